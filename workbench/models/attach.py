"""Attaching to a running Hugging Face model: every attention call passes through one observer.

Nothing of the model is rewritten and nothing process-wide is patched. Under one key we register an attention
function with transformers' public `AttentionInterface` and a mask function with `AttentionMaskInterface`; an
`Attachment` selects that key on one model object and restores the previous choice when it is detached or
dropped. The mask function hands on the two-dimensional padding mask, as the flash one does, so no array of
size N x N is ever built. Without an observer the function is plain attention in O(N) memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.errors import ModelRefused, RequestError
from workbench.kernels import (
    AttentionStatistics,
    Geometry,
    StatisticsRequest,
    attention_output,
    attention_pattern,
    attention_statistics,
)
from workbench.models.adapters import Host
from workbench.models.architectures import LayerModules, describe, locate
from workbench.models.spec import Spec

KEY = "attention_workbench"
# Arguments that transformers passes on to attention functions and that change nothing in what they compute.
_NEUTRAL = frozenset(
    """
    cache_position deterministic layer_idx logits_to_keep num_items_in_batch output_attentions
    output_hidden_states output_router_logits past_key_values position_embeddings position_ids return_dict
    use_cache
    """.split()
)


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention was called with; k and v un-repeated, q and k after rotation and norms.

    `key_start` and `key_end` bound the real tokens of each prompt on the key axis; None without padding.
    """

    layer: int
    q: Float[Tensor, "batch head query dim"]
    k: Float[Tensor, "batch kv_head key dim"]
    v: Float[Tensor, "batch kv_head key dim"]
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    key_start: Int[Tensor, " batch"] | None = None
    key_end: Int[Tensor, " batch"] | None = None

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "key_start": self.key_start,
            "key_end": self.key_end,
        }

    @property
    def geometry(self) -> Geometry:
        queries, keys = self.q.shape[2], self.k.shape[2]
        return Geometry(len(self.q), queries, keys, True, self.window, self.key_start, self.key_end)

    def output(self) -> Float[Tensor, "batch head query dim"]:
        """z: what the model itself would compute."""
        return attention_output(self.q, self.k, self.v, **self._options)

    def statistics(self, request: StatisticsRequest, **options: Any) -> AttentionStatistics:
        """Statistics of this call; options as in `attention_statistics`."""
        return attention_statistics(self.q, self.k, self.v, request, **self._options, **options)

    def pattern(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "batch head query key"]:
        """The explicit attention pattern, O(N^2) memory; float64 makes it the oracle."""
        options = {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks, "dtype": dtype}
        return attention_pattern(self.q, self.k, self.geometry, **options)[0]  # type: ignore[arg-type]

    def last_query(self) -> AttentionCall:
        """The same call for its last row alone: what a decoding step would have seen."""
        return self.last_queries(1)

    def last_queries(self, rows: int) -> AttentionCall:
        """The same call for its last rows alone: what so many decoding steps would have seen."""
        return replace(self, q=self.q[:, :, -rows:])


Observer = Callable[[AttentionCall], Tensor]
# Attention module -> the attachment that watches it (weakly, so that dropping it detaches) and its layer.
_WATCHED: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Attachment], int]] = weakref.WeakKeyDictionary()


class Attachment:
    """One model under observation: its spec, its modules, and whoever watches its attention at the moment."""

    def __init__(self, hf_model: nn.Module | Host) -> None:
        self.host = hf_model if isinstance(hf_model, Host) else Host(hf_model)
        self.hf_model = cast(Any, self.host.running)
        self.spec: Spec = describe(self.hf_model)
        self._observer: Observer | None = None
        previous = self.hf_model.config._attn_implementation
        if previous == KEY:
            raise RequestError(
                "This model, or one that shares its configuration object, is attached already; use that "
                "attachment, detach() it first, or give this model a configuration of its own."
            )
        _register()
        take_back = self.host.install()
        self._restore = weakref.finalize(self, _restore, self.hf_model, previous, take_back)
        # At the end of the process there is nothing left to restore it for.
        self._restore.atexit = False
        self.layers: tuple[LayerModules, ...] = tuple(
            replace(layer, attention=self.host.native(layer.attention)) for layer in locate(self.hf_model)
        )
        self.hf_model.set_attn_implementation(KEY)
        if self.hf_model.config._attn_implementation != KEY:
            self._restore()
            raise ModelRefused(
                f"{self.spec.architecture}: {type(self.host.hf_model).__name__} does not take its attention from "
                "transformers' AttentionInterface, so its attention cannot be watched."
            )
        for layer in self.layers:
            _WATCHED[layer.attention] = (weakref.ref(self), layer.index)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, next(self.hf_model.parameters()).device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.layers[0].projection.weight.dtype)

    def detach(self) -> None:
        """Give the model its own attention implementation back; doing so twice is harmless."""
        self._restore()

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Pass every attention call to `observer`; what it returns is the z that the model goes on with."""
        if not self._restore.alive:
            raise RequestError("The model is detached; load it again to trace it.")
        if self._observer is not None:
            raise RequestError("The model is being traced already; finish that trace first.")
        self.host.check()
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def answer(self, call: AttentionCall) -> Tensor:
        """z for one attention call: the observer's, or plain attention."""
        return call.output() if self._observer is None else self._observer(call)


def _restore(hf_model: Any, implementation: str, take_back: Callable[[], None]) -> None:
    hf_model.set_attn_implementation(implementation)
    take_back()


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(KEY, _attention)
    AttentionMaskInterface.register(KEY, _padding_mask)


def _padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    **ignored: Any,
) -> Tensor | None:
    """The mask of real tokens `[batch, key]`, or None where all are real; causality and windows need no array."""
    if int(q_offset) + q_length != int(kv_offset) + kv_length:
        raise RequestError(
            f"A cache of fixed size gives {kv_length} keys to {int(q_offset) + q_length} tokens; use the default "
            "cache, which grows."
        )
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].bool()
    return None if bool(mask.all()) else mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: `[B, H, Q, D]` in, `[B, Q, H, D]` out."""
    attachment, layer = _watcher(module)
    unknown = [
        name for name, value in more.items() if name not in _NEUTRAL and value is not None and value is not False
    ]
    if unknown:
        raise ModelRefused(f"Layer {layer} passes {unknown[0]!r} to its attention, which we do not reproduce.")
    if dropout:
        raise RequestError("Attention dropout is on; call model.eval() before tracing.")
    if is_causal is False:
        raise ModelRefused(f"Layer {layer} attends without causality, which we do not reproduce.")
    start, end = _bounds(attention_mask, key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = AttentionCall(layer, query, key, value, scale, sliding_window, softcap, s_aux, start, end)
    return attachment.answer(call).transpose(1, 2).contiguous(), None


def _watcher(module: nn.Module) -> tuple[Attachment, int]:
    reference, layer = _WATCHED.get(module, (None, -1))
    attachment = None if reference is None else reference()
    if attachment is None:
        raise RequestError(
            f"A {type(module).__name__} runs under {KEY!r} without an attachment (a copy of an attached "
            "model, or one that shares its configuration?); call set_attn_implementation('sdpa') on it first."
        )
    return attachment, layer


def _bounds(mask: Tensor | None, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """First real key and one past the last, per prompt."""
    if mask is None:
        return None, None
    if mask.ndim != 2 or mask.shape[1] != keys:
        raise RequestError(f"An attention mask of shape {tuple(mask.shape)} for {keys} keys; pass [prompt, key].")
    count = mask.sum(-1)
    start = mask.to(torch.uint8).argmax(-1)
    end = keys - mask.flip(-1).to(torch.uint8).argmax(-1)
    if not bool(((end - start == count) | (count == 0)).all()):
        raise RequestError("Padding stands between real tokens; put it before or after them.")
    return torch.where(count == 0, 0, start), torch.where(count == 0, 0, end)
