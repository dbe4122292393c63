"""One forward pass with everything that gradients are taken of, and the gradients.

The network is differentiated once with respect to what nodes put out. What a single reader of the stream sends back
through its own fork, before the norm in front of it, then needs no further pass of the model: from an MLP it is what
the gradient gained between the MLP's output and its input, and from q, k and v of each head it takes a short way
within the layer (`readers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.circuits.attribution.rules import Attend
from workbench.models import AttentionCall
from workbench.models.architectures import rewritten
from workbench.models.projections import PROJECTIONS, Projections
from workbench.tracing import Model

# `embed` and `final` are the stream before and after all layers, `mlp_in` the stream that an MLP reads.
Part = Literal["embed", "z", "mlp_out", "q", "k", "v", "mlp_in", "final"]
WRITES: tuple[Part, ...] = ("embed", "z", "mlp_out")
READS: tuple[Part, ...] = ("q", "k", "v", "mlp_in", "final")
Key = tuple[Part, int]
# Activations or gradients, [prompt, token, (head,) dim]; `embed` and `final` under layer 0.
Parts = dict[Key, Tensor]


@dataclass(eq=False)
class Pass:
    """A run's tensors where they stand in the graph of gradients: streams `[row, token, d_model]`, attention calls, z
    `[row, head, token, dim]`, and what attention and MLPs put out, in the modules' own shapes.

    `normed` and `projected` are what the norm in front of attention and the modules that make q, k and v put out.
    `streams` enter the layers and leave the last one; `dropped` is the layer that a backward pass leaves out.
    """

    streams: list[Tensor] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    normed: list[Tensor] = field(default_factory=list)
    projected: list[list[Tensor]] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    dropped: int | None = None

    def mlp_in(self, layer: int, parallel: bool) -> Tensor:
        """The stream that an MLP reads."""
        stream = self.streams[layer]
        return stream if parallel else stream + self.attention[layer].reshape(stream.shape)

    def parts(self, parallel: bool) -> Parts:
        """All activations, cut from the graph."""
        found: Parts = {("embed", 0): self.streams[0], ("final", 0): self.streams[-1]}
        for layer, (call, z) in enumerate(zip(self.calls, self.z, strict=True)):
            heads: Mapping[Part, Tensor] = {"z": z, "q": call.q, "k": call.k, "v": call.v}
            found |= {(part, layer): value.transpose(1, 2) for part, value in heads.items()}
            if layer in self.mlp:
                found["mlp_out", layer] = self.mlp[layer].reshape(self.streams[0].shape)
                found["mlp_in", layer] = self.mlp_in(layer, parallel)
        return {key: value.detach() for key, value in found.items()}

    def cut(self) -> Pass:
        """Attention calls alone, cut from the graph."""
        calls = [replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach()) for call in self.calls]
        return Pass(calls=calls)


@contextmanager
def constant_weights(model: Model) -> Iterator[None]:
    """No gradients of weights, and nothing kept for them."""
    module = cast(nn.Module, model.attachment.hf_model)
    moved = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in moved:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moved:
            parameter.requires_grad_(True)


def run(
    model: Model,
    ids: Int[Tensor, "row token"],
    attend: Attend,
    *,
    put: Mapping[Key, Tensor] | None = None,
    gradients: bool = True,
) -> Pass:
    """A pass of prompts of one length up to the token that is read; `put` replaces `embed`, `z` or `mlp_out`.

    Gradients pass what is put in place of z or an MLP's output, as if a constant had been added to it.
    """
    attachment, found = model.attachment, Pass()
    placed = {key: value.detach() for key, value in (put or {}).items()}

    def entering(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = "hidden_states" in kwargs
            hidden: Tensor = kwargs["hidden_states"] if named else args[0]
            if layer == 0:
                hidden = placed.get(("embed", 0), hidden).detach().requires_grad_(gradients)
            found.streams.append(hidden)
            return (args, kwargs | {"hidden_states": hidden}) if named else ((hidden, *args[1:]), kwargs)

        return hook

    def observe(call: AttentionCall) -> Tensor:
        value = placed.get(("z", call.layer))
        z = attend(call)
        if value is not None:
            z = z + (value.transpose(1, 2) - z.detach())
        found.calls.append(call)
        found.z.append(z)
        return z

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        # The tensor itself: a view of it would stand beside the way to the logits.
        found.streams.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradients))
        if gradients:
            _watch_projections(model, found, stack)
        for layer, modules in enumerate(attachment.layers):
            stack.callback(modules.block.register_forward_pre_hook(entering(layer), with_kwargs=True).remove)
            stack.callback(modules.attention_write.register_forward_hook(_note(found, layer, None, False)).remove)
            if modules.mlp_write is not None:
                value = placed.get(("mlp_out", layer))
                stack.callback(modules.mlp_write.register_forward_hook(_note(found, layer, value, True)).remove)
        stack.callback(attachment.layers[-1].block.register_forward_hook(leaving).remove)
        stack.enter_context(attachment.observe(observe))
        logits: Tensor = attachment.hf_model(ids.to(attachment.device), use_cache=False, logits_to_keep=1).logits
    found.logits = logits[:, -1]
    return found


def projection_paths(row: Projections) -> tuple[str, ...]:
    """The modules, within attention, that make q, k and v."""
    return (row.query, row.key, row.value) if row.packing == "apart" else (row.query,)


def _watch_projections(model: Model, found: Pass, stack: ExitStack) -> None:
    row = PROJECTIONS[model.spec.architecture]
    for modules in model.attachment.layers:
        outputs: list[Tensor] = []
        found.projected.append(outputs)
        if row.norm is not None:
            norm = modules.block.get_submodule(row.norm)
            stack.callback(norm.register_forward_hook(lambda _, args, output: found.normed.append(output)).remove)
        for path in projection_paths(row):
            module = modules.attention.get_submodule(path)
            stack.callback(module.register_forward_hook(_keeping(outputs)).remove)


def _keeping(outputs: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(output)

    return hook


def _note(found: Pass, layer: int, value: Tensor | None, mlp: bool) -> Any:
    """Keeps what a module adds to the stream, and lets a backward pass leave it out."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        if value is not None:
            tensor = tensor + (value.reshape(tensor.shape) - tensor.detach())
            output = rewritten(output, tensor)
            tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(lambda back: torch.zeros_like(back) if found.dropped == layer else back)  # type: ignore[no-untyped-call]
        if mlp:
            found.mlp[layer] = tensor
        else:
            found.attention.append(tensor)
        return output

    return hook


@dataclass(eq=False)
class Gradients:
    """Of a metric, with respect to what nodes put out and read (`parts`), and to the stream where parts add to it."""

    parts: Parts
    attention: list[Tensor]


def differentiate(one: Pass, metric: Float[Tensor, " row"], parallel: bool, drop: int | None = None) -> Gradients:
    """One backward pass of all rows; with `drop`, nothing goes back through what that layer adds."""
    layers = range(len(one.calls))
    wanted: dict[Key, Tensor] = {("embed", 0): one.streams[0], ("final", 0): one.streams[-1]}
    for layer in layers:
        call = one.calls[layer]
        wanted |= {("z", layer): one.z[layer], ("q", layer): call.q, ("k", layer): call.k, ("v", layer): call.v}
        if layer in one.mlp:
            wanted["mlp_out", layer] = one.mlp[layer]
    one.dropped = drop
    try:
        flat = _gradients(metric.sum(), [*wanted.values(), *one.attention])
    finally:
        one.dropped = None
    own = dict(zip(wanted, flat, strict=False))
    shape = one.streams[0].shape
    attention = [gradient.reshape(shape) for gradient in flat[len(wanted) :]]
    parts: Parts = {}
    for key, gradient in own.items():
        gone = drop is not None and key[1] == drop and key[0] not in ("embed", "final")
        value = torch.zeros_like(gradient) if gone else gradient
        parts[key] = value.transpose(1, 2) if key[0] in ("z", "q", "k", "v") else value.reshape(shape)
    for layer in one.mlp:
        after = parts["mlp_out", layer]
        # The first is exact in the stream's own precision; half precision would leave little of the difference.
        if layer == drop:
            parts["mlp_in", layer] = torch.zeros_like(after)
        elif not parallel and after.dtype in (torch.float32, torch.float64):
            parts["mlp_in", layer] = attention[layer] - after
        else:
            source = one.streams[layer] if parallel else one.attention[layer]
            inner = one.mlp[layer]
            parts["mlp_in", layer] = _pulled(inner, source, after.reshape(inner.shape)).reshape(shape)
    return Gradients(parts, attention)


def _gradients(total: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    there = [tensor.requires_grad for tensor in inputs]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True, materialize_grads=True))
    return [next(found) if here else torch.zeros_like(tensor) for here, tensor in zip(there, inputs, strict=True)]


def _pulled(output: Tensor, source: Tensor, cotangent: Tensor) -> Tensor:
    """A cotangent brought back from output to source."""
    (found,) = torch.autograd.grad(
        output, source, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return found
