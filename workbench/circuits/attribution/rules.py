"""What the backward pass goes by: true gradients, norms whose scale is taken as given, or relevance (RelP).

A norm at the end of a trained model hides effects from gradients: the stream there is dominated by the answer, and
along it the norm gives nothing (the final norm saturates like a softmax does). With its scale taken as given it is a
linear map.

RelP (Rezaei Jafari et al. 2025, arXiv 2508.21258) takes the rules of layer-wise relevance propagation in place of the
gradient: scales of norms and attention patterns as given, an activation function as its output over its input, and
half of the gradient for each factor of a gated MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.circuits.attribution.settings import Freeze
from workbench.errors import ModelRefused
from workbench.models import AttentionCall
from workbench.models.architectures import ends
from workbench.models.projections import norm_gain
from workbench.tracing import Model

Attend = Callable[[AttentionCall], Tensor]
# How far a norm may be from what we take it to be, relative to its largest output.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
COARSE = 3e-2


@dataclass(frozen=True)
class MLPRules:
    """Modules of a block: the activation function, the other factor, or one projection that makes both (gate first).

    ReLU needs none: its output over its input is its derivative.
    """

    activation: str | None = None
    factor: str | None = None
    both: str | None = None


_GATED = MLPRules("mlp.act_fn", "mlp.up_proj")
MLP_RULES: dict[str, MLPRules] = {
    "gpt2": MLPRules("mlp.act"),
    "gpt_neox": MLPRules("mlp.act"),
    "opt": MLPRules("activation_fn"),
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "phi3": MLPRules("mlp.activation_fn", both="mlp.gate_up_proj"),
    "workbench_toy": MLPRules(),
}


@contextmanager
def backward_rules(model: Model, freeze: Freeze, relevance: bool = False) -> Iterator[Attend]:
    """Runs inside differentiate as asked for; values are those of the model. Gives what answers attention calls."""
    with ExitStack() as stack:
        for norm in _norms(model, "all" if relevance else freeze):
            stack.callback(norm.register_forward_hook(_given_scale(model.spec.architecture)).remove)
        if relevance:
            for module, hook in _relevance_hooks(model):
                stack.callback(module.register_forward_hook(hook).remove)
        yield _given_pattern if relevance else AttentionCall.output


def _norms(model: Model, freeze: Freeze) -> list[nn.Module]:
    hf_model = cast(nn.Module, model.attachment.hf_model)
    if freeze == "none":
        return []
    if freeze == "final":
        final = ends(hf_model).final_norm
        return [] if final is None else [final]
    return [module for module in hf_model.modules() if type(module).__name__.endswith("Norm")]


def _same_value(value: Tensor, linear: Tensor) -> Tensor:
    """The value, with the gradient of something else."""
    return value.detach() + (linear - linear.detach())


class NormParts(NamedTuple):
    """A norm at work: `gain * scale * centred` (and a bias); `centres` where it takes the mean away."""

    gain: Float[Tensor, " d_model"] | None
    centres: bool
    centred: Float[Tensor, "*place d_model"]
    scale: Float[Tensor, "*place one"]


def norm_parts(architecture: str, norm: nn.Module, hidden: Tensor, output: Tensor) -> NormParts:
    """What a norm did to `hidden`, read off its output; refuses a module that is no such norm."""
    gain = norm_gain(architecture, norm, hidden.dtype)
    centred = hidden - hidden.mean(-1, keepdim=True) if gain.centres else hidden
    with torch.no_grad():
        unscaled = centred if gain.gain is None else centred * gain.gain
        bias = getattr(norm, "bias", None)
        rest = output if bias is None else output - bias
        # The scale that the module used, whatever its epsilon.
        scale = (rest * unscaled).sum(-1, keepdim=True) / (unscaled**2).sum(-1, keepdim=True).clamp(min=1e-30)
        error = (unscaled * scale - rest).abs().max()
        if error > TOLERANCE.get(output.dtype, COARSE) * rest.abs().max().clamp(min=1e-6):
            raise ModelRefused(
                f"{architecture}: a {type(norm).__name__} is not the norm that we take it to be (off by "
                f"{float(error):.3g}), so that gradients cannot be told apart behind it; patch activations instead."
            )
    return NormParts(gain.gain, gain.centres, centred, scale)


def _given_scale(architecture: str) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        parts = norm_parts(architecture, module, args[0], output)
        unscaled = parts.centred if parts.gain is None else parts.centred * parts.gain
        return _same_value(output, unscaled * parts.scale)

    return hook


def _given_pattern(call: AttentionCall) -> Tensor:
    with torch.no_grad():
        pattern = call.pattern(torch.promote_types(call.q.dtype, torch.float32)).to(call.q.dtype)
    return pattern @ call.v.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)


def _relevance_hooks(model: Model) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    rules = MLP_RULES.get(model.spec.architecture)
    if rules is None:
        raise ModelRefused(
            f"Rules of relevance are known for {', '.join(MLP_RULES)}, not for the MLPs of {model.spec.architecture}; "
            "use 'atp' or 'eap' with freeze_ln_scale=True."
        )
    share = 1.0 if rules.factor is None and rules.both is None else 0.5
    for modules in model.attachment.layers:
        if rules.activation is not None:
            yield modules.block.get_submodule(rules.activation), _given_ratio(share)
        if rules.factor is not None:
            yield modules.block.get_submodule(rules.factor), _given_share(whole=True)
        if rules.both is not None:
            yield modules.block.get_submodule(rules.both), _given_share(whole=False)


def _given_ratio(share: float) -> Callable[..., Tensor]:
    """An activation function as multiplication by what it multiplied by."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        (hidden,) = args
        with torch.no_grad():
            ratio = torch.where(hidden == 0, 0.0, output / torch.where(hidden == 0, 1.0, hidden))
        return _same_value(output, hidden * ratio * share)

    return hook


def _given_share(*, whole: bool) -> Callable[..., Tensor]:
    """Half of the gradient: of all columns, or (where a projection makes both factors) of the second half."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if whole:
            return _same_value(output, output / 2)
        gate, factor = output.chunk(2, dim=-1)
        return torch.cat([gate, _same_value(factor, factor / 2)], -1)

    return hook
