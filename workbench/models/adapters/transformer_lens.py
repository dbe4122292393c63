"""A `TransformerBridge` of TransformerLens, attached to.

A bridge puts components of its own in the place of a Hugging Face model's submodules, in the same tree, and computes
attention itself, pattern by pattern (N x N). For as long as we are attached, its attention components run the native
attention module that they wrap, between their own `hook_in` and `hook_out`, so that attention is ours: any length, all
statistics, all edits. On detach they get their own computation back. Nothing of TransformerLens is patched: the
changes are to instances, and undone.

The native module keeps the bridge's projections, so hooks of the user on q, k, v and z, on norms, MLPs and the
residual stream fire, and their edits count, in every trace. Hooks on what the native module does not have (scores,
patterns, rotated q and k, split inputs) would be silent; a run with such a hook in place is refused by its name.

Weights that TransformerLens has processed (compatibility mode: folded norms, centred weights) are refused: they are
another set of weights than those of the model, and results would carry the wrong name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import MissingExtra, ModelRefused, RequestError
from workbench.models.adapters.host import Adapter, Host, plain

_OWN = "transformer_lens.model_bridge"
_INSTALL = "pip install 'attention-workbench[transformer-lens]'"


def bridge_around(hf_model: nn.Module, tokenizer: Any | None) -> Any:
    """A bridge over a loaded Hugging Face model, native weights; the model's own modules become part of it."""
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
        from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config
    except ImportError as error:
        raise MissingExtra(f"TransformerLens is not installed; install it by {_INSTALL}.") from error
    model: Any = hf_model
    architecture = type(hf_model).__name__
    if not model.config.architectures:
        # What the bridge's adapters are chosen by; a model made in memory does not say it.
        model.config.architectures = [architecture]
    try:
        architecture = determine_architecture_from_hf_config(model.config)
        bridge = build_bridge_from_module(
            hf_model,
            architecture,
            hf_config=model.config,
            tokenizer=tokenizer,
            model_name=str(getattr(model.config, "name_or_path", "") or "model"),
        )
    except (ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise ModelRefused(
            f"TransformerLens makes no bridge over a {architecture} ({error}); load the model without "
            "through='transformer-lens'."
        ) from error
    bridge.eval()
    return bridge


class BridgeHost(Host):
    """The model inside a `TransformerBridge`."""

    name: Adapter = "transformer-lens"

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge
        try:
            model = bridge.original_model
        except AttributeError as error:
            raise ModelRefused(
                f"A {type(bridge).__name__} runs its model elsewhere ({error}); attach to a bridge that holds one."
            ) from error
        if not hasattr(model, "set_attn_implementation"):
            raise ModelRefused(
                f"The bridge runs a {type(model).__name__}, which is no Hugging Face model; attach to a bridge made by "
                "boot_transformers()."
            )
        super().__init__(model)
        _refuse_processed(bridge)

    def native(self, attention: nn.Module) -> nn.Module:
        found: nn.Module = plain(attention)
        return found

    def install(self) -> Callable[[], None]:
        stack = ExitStack()
        try:
            for attention in self._attentions():
                _run_native(attention, stack)
        except BaseException:
            stack.close()
            raise
        return stack.pop_all().close

    def check(self) -> None:
        """Refuse hooks that would stay silent."""
        silent = [name for name, hook in self._silent() if hook.has_hooks(dir="both")]
        if silent:
            raise RequestError(
                f"The bridge has a hook on {silent[0]}, which does not fire while attention is streamed; remove it "
                "(bridge.reset_hooks()), or read and edit that place by trace(sites=..., edits=...)."
            )
        flags = ("use_attn_result", "use_split_qkv_input", "use_attn_in")
        on = [flag for flag in flags if getattr(self.bridge.cfg, flag, False)]
        if on:
            raise RequestError(f"The bridge's {on[0]} has no effect while attention is streamed; turn it off.")

    @property
    def tokenizer(self) -> Any | None:
        return getattr(self.bridge, "tokenizer", None)

    @property
    def interferes(self) -> bool:
        handles = [one for hook in self.bridge.hook_dict.values() for one in (*hook.fwd_hooks, *hook.bwd_hooks)]
        # Some bridges pass values on by permanent hooks of their own.
        return any(not str(getattr(one.user_hook, "__module__", "")).startswith(_OWN) for one in handles)

    def own_logits(self, ids: Tensor) -> Float[Tensor, "prompt token vocab"]:
        found: Tensor = self.bridge(ids, return_type="logits")
        return found

    def own_patterns(self, ids: Tensor) -> list[Float[Tensor, "prompt head query key"]]:
        found: dict[str, Tensor] = {}

        def keep(pattern: Tensor, hook: Any) -> None:
            found[hook.name] = pattern.detach()

        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(len(self._attentions()))]
        hooks: list[tuple[str, Any]] = [(name, keep) for name in names]
        self.bridge.run_with_hooks(ids, return_type=None, fwd_hooks=hooks)
        return [found[name] for name in names] if len(found) == len(names) else []

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        # Tied ones once, under their first name.
        seen: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in _native_parameters(self.hf_model, ""):
            seen.setdefault(id(parameter), (name, parameter))
        return list(seen.values())

    def _attentions(self) -> list[Any]:
        """The bridge's attention components, layer by layer."""
        return [block.attn for block in self.bridge.blocks if hasattr(block, "attn")]

    def _silent(self) -> Iterator[tuple[str, Any]]:
        """Hook points of attention components that the native modules never reach."""
        from transformer_lens.hook_points import HookPoint

        for attention in self._attentions():
            reached = {id(attention.hook_in), id(attention.hook_out)}
            reached |= {id(module) for module in plain(attention).modules()}
            yield from (
                (str(module.name), module)
                for module in attention.modules()
                if isinstance(module, HookPoint) and id(module) not in reached
            )


def _refuse_processed(bridge: Any) -> None:
    """Folded norms and centred weights are no longer the model's own."""
    marks = ("layer_norm_folding",)
    processed = [mark for mark in marks if getattr(bridge.cfg, mark, False)]
    processed += [
        f"processed weights in {name}"
        for name, module in bridge.named_modules()
        if vars(module).get("_use_processed_weights", False) or vars(module).get("_processed_W_Q") is not None
    ]
    if not processed:
        processed = [f"split q, k, v of {where}" for where in _split_apart(bridge)]
    if processed:
        raise ModelRefused(
            f"The bridge's weights were processed ({processed[0]}), so they are not the model's own; boot it again and "
            "leave out enable_compatibility_mode() and process_weights()."
        )


def _split_apart(bridge: Any) -> Iterator[str]:
    """Attention components whose own copies of q, k and v differ from the joint projection that they came from."""
    for block in bridge.blocks:
        attention: Any = getattr(block, "attn", None)
        joint = None if attention is None else _joint(attention)
        if joint is not None:
            made = torch.cat([part.weight for part in joint.parts])
            if made.shape != joint.weight.T.shape or not torch.equal(made, joint.weight.T):
                yield str(attention.name)


def _run_native(attention: Any, stack: ExitStack) -> None:
    """Let a component run the attention module that it wraps."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    native, own = plain(attention), vars(attention).get("forward")
    joint = _joint(attention)
    if joint is not None:
        _replace(native, "c_attn", joint, stack)
    for name, child in list(native._modules.items()):
        # Some components keep the bridge of their output projection to themselves.
        outer = attention._modules.get("o")
        if child is not None and outer is not None and outer is not child and plain(outer) is child:
            _replace(native, name, outer, stack)
    vars(attention)["forward"] = partial(GeneralizedComponent.forward, attention)
    stack.callback(_give_back, attention, own)


def _give_back(attention: Any, own: Any) -> None:
    vars(attention).pop("forward", None)
    if own is not None:
        vars(attention)["forward"] = own


def _replace(parent: nn.Module, name: str, module: nn.Module, stack: ExitStack) -> None:
    stack.callback(parent._modules.__setitem__, name, parent._modules[name])
    parent._modules[name] = module


class _JointProjection(nn.Module):
    """GPT-2's joint projection as the bridge splits it: q, k and v by their own linear maps, with their hooks.

    The joint weights stay where they are read.
    """

    def __init__(self, whole: nn.Module, parts: tuple[Any, ...]) -> None:
        super().__init__()
        self.whole = whole
        for part in zip("qkv", parts, strict=True):
            self.add_module(*part)

    @property
    def parts(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v

    @property
    def weight(self) -> Tensor:
        found: Tensor = plain(self.whole).weight
        return found

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = plain(self.whole).bias
        return found

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([part(hidden) for part in self.parts], dim=-1)


def _joint(attention: Any) -> _JointProjection | None:
    """The joint projection of a component that splits it into three equal blocks, as GPT-2's is."""
    native, children = plain(attention), attention._modules
    if type(native).__name__ != "GPT2Attention" or not {"q", "k", "v", "qkv"} <= set(children):
        return None
    whole = native._modules["c_attn"]
    if isinstance(whole, _JointProjection):
        return whole
    return _JointProjection(whole, tuple(children[name] for name in "qkv"))


def _native_parameters(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the path that they have without the bridge's components."""
    module = plain(module)
    if isinstance(module, _JointProjection):
        module = plain(module.whole)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{prefix}{name}", parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from _native_parameters(child, f"{prefix}{name}.")
