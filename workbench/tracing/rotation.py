"""Queries before rotation: what a head asks for, whatever the position that it asks at.

In rotary models the q that enters the softmax is R_p q, with a rotation R_p for each position p, so that a mean over
positions has to be taken of q itself. Attention modules are handed the angles of R_p; a hook notes them, and the
model's own rotation, with the sign of the sine turned, undoes itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import ModelRefused
from workbench.models import Attachment, AttentionCall, Batch, Head

if TYPE_CHECKING:
    from workbench.tracing.model import Model

# Relative error up to which a rotation counts as undone.
TOLERANCE = 1e-3


class Rotation:
    """Rotates queries as a layer's positions ask, and back; does nothing where positions do not rotate."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def noting(self, layers: Iterable[int]) -> Iterator[None]:
        """Note the angles that these layers are handed, in each forward pass from here on."""
        chosen = sorted(set(layers)) if self.attachment.spec.rotary else []
        hooks = [
            self.attachment.layers[layer].attention.register_forward_pre_hook(self._note(layer), with_kwargs=True)
            for layer in chosen
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._angles.clear()

    def _note(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            angles = kwargs.get("position_embeddings")
            if angles is None or not hasattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb"):
                raise ModelRefused(
                    f"{self.attachment.spec.architecture}: {type(module).__name__} of layer {layer} is not handed its "
                    "rotation, so that no mean query can be put in its place; use how='uniform' instead."
                )
            self._angles[layer] = (angles[0], angles[1])

        return hook

    def forth(self, layer: int, q: Float[Tensor, "batch head query dim"]) -> Float[Tensor, "batch head query dim"]:
        """q as it enters the softmax."""
        return q if layer not in self._angles else self._turned(layer, q, 1)

    def back(self, layer: int, q: Float[Tensor, "batch head query dim"]) -> Float[Tensor, "batch head query dim"]:
        """q before rotation; `ModelRefused` where the model's rotation does not undo itself."""
        if layer not in self._angles:
            return q
        cos, sin = self._angles[layer]
        # Scaled rotations (YaRN) lengthen q by the root of this.
        length = float((cos.double().square() + sin.double().square()).mean())
        plain = self._turned(layer, q, -1) / length
        error = float((self._turned(layer, plain, 1) - q).abs().max())
        if error > TOLERANCE * float(q.abs().max()):
            raise ModelRefused(
                f"{self.attachment.spec.architecture}: the rotation of layer {layer} is not undone by turning it back "
                f"(error {error:.1e}), so that no mean query can be taken; use how='uniform' instead."
            )
        return plain

    def _turned(self, layer: int, q: Tensor, sign: int) -> Tensor:
        cos, sin = self._angles[layer]
        module = sys.modules[type(self.attachment.layers[layer].attention).__module__]
        turned: Tensor = module.apply_rotary_pos_emb(q, q, cos.to(q), sign * sin.to(q))[0]
        return turned


@torch.no_grad()
def mean_queries(model: Model, reference: Batch, heads: Iterable[Head]) -> dict[Head, Float[Tensor, " dim"]]:
    """The mean over real tokens of each head's query, before rotation."""
    chosen = list(heads)
    layers = sorted({head.layer for head in chosen})
    attachment, rotation = model.attachment, Rotation(model.attachment)
    sums: dict[int, Tensor] = {}
    real: Tensor

    def observer(call: AttentionCall) -> Tensor:
        if call.layer in layers:
            q = rotation.back(call.layer, call.q.float())
            total = (q * real[:, None, :, None]).double().sum((0, 2)).cpu()
            sums[call.layer] = sums.get(call.layer, torch.zeros_like(total)) + total
        return call.output()

    with attachment.observe(observer), rotation.noting(layers):
        for _, piece in model.pieces(reference):
            piece = piece.to(model.device)
            real = piece.mask
            options = {"attention_mask": piece.mask.long(), "position_ids": piece.positions} if piece.padded else {}
            attachment.hf_model(piece.ids, use_cache=False, logits_to_keep=1, **options)
    count = int(reference.mask.sum())
    return {head: (sums[head.layer][head.head] / count).float() for head in chosen}


def one_head(call: AttentionCall, head: int, q: Float[Tensor, "batch query dim"]) -> Float[Tensor, "batch query dim"]:
    """z of one head of a call whose query is another."""
    kv_head = head // (call.q.shape[1] // call.k.shape[1])
    return replace(
        call,
        q=q[:, None].to(call.q),
        k=call.k[:, kv_head : kv_head + 1],
        v=call.v[:, kv_head : kv_head + 1],
        sinks=None if call.sinks is None else call.sinks[head : head + 1],
    ).output()[:, 0]
