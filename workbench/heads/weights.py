"""Circuits of heads read off the weights: W_Q, W_K, W_V, W_O, embedding and unembedding, without any prompt.

All matrices act on row vectors and have the norms folded in (`workbench.models.projections`). With grouped queries a
query head h has the W_K and W_V of its key/value head, h // group.

Rotary models have no one QK matrix: a query meets a key d tokens back through ``W_Q R_d W_K^T``. R_d is taken from
the cosines and sines that the model itself computes, for a grid of distances; scores say what they average over it.
Models without rotation have the identity alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import ModelRefused, RequestError
from workbench.heads.detector import Array, Detector, Kind, Part, Progress
from workbench.heads.settings import Settings
from workbench.models import Attachment, Head, Spec
from workbench.models.projections import EndWeights, LayerWeights, end_weights, layer_weights
from workbench.tasks import Task
from workbench.tracing import Model

OFFSETS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The folded weights of a model, layer by layer and made when asked for.

    `offsets` are the distances (tokens) between query and key at which QK circuits are taken, `rotations` R_d of each
    layer; a model without rotation has the one offset 0. `draws` and `seed` are for scores with random matrices as
    null.
    """

    attachment: Attachment
    offsets: tuple[int, ...]
    rotations: tuple[Float[Tensor, "offset head_dim head_dim"], ...]
    draws: int = 99
    seed: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def spec(self) -> Spec:
        return self.attachment.spec

    @property
    def device(self) -> torch.device:
        return self._ends.embedding.device

    @property
    def embedding(self) -> Float[Tensor, "token d_model"]:
        """W_E, unscaled and without positions."""
        return self._ends.embedding

    @property
    def unembedding(self) -> Float[Tensor, "d_model token"]:
        """W_U with the final norm folded in."""
        return self._ends.unembedding

    @cached_property
    def _ends(self) -> EndWeights:
        return end_weights(self.spec.architecture, self.attachment.hf_model, self.dtype)

    @cached_property
    def copying_gram(self) -> Float[Tensor, "d_model d_model"]:
        """W_U W_E: with it the eigenvalues of vocabulary-sized circuits come from matrices of a head's width."""
        return self.unembedding @ self.embedding

    @cached_property
    def embedding_gram(self) -> Float[Tensor, "d_model d_model"]:
        """W_E^T W_E."""
        return self.embedding.T @ self.embedding

    @cached_property
    def ignored(self) -> tuple[str, ...]:
        """What the matrices leave out (biases, token-dependent lengths), once each."""
        found = [name for layer in range(self.spec.n_layers) for name in self.layer(layer).ignored]
        return tuple(dict.fromkeys([*found, *self._ends.ignored]))

    def layer(self, layer: int) -> LayerWeights:
        """Folded weights of a layer, per key/value head where they are shared."""
        if not 0 <= layer < self.spec.n_layers:
            raise RequestError(f"Layer {layer} does not exist: layers run from 0 to {self.spec.n_layers - 1}.")
        found = layer_weights(
            self.spec.architecture, self.attachment.layers[layer], self.spec.layers[layer], self.dtype
        )
        query, key, value, output = (part.to(self.device) for part in found[:4])
        return LayerWeights(query, key, value, output, found.ignored)

    def queries(self, layer: int) -> LayerWeights:
        """The same per query head: W_K and W_V repeated for the heads that share them."""
        found, group = self.layer(layer), self.spec.layers[layer].group
        return found._replace(
            key=found.key.repeat_interleave(group, dim=0), value=found.value.repeat_interleave(group, dim=0)
        )

    def ov(self, head: Head) -> Float[Tensor, "d_model d_model"]:
        """W_V W_O of a query head."""
        self.spec.check(head)
        found = self.queries(head.layer)
        return found.value[head.head] @ found.output[head.head]

    def qk(self, head: Head, offset: int = 0) -> Float[Tensor, "d_model d_model"]:
        """W_Q R_d W_K^T of a query head: `x_query @ qk @ x_key` is the logit before its scale and norms."""
        self.spec.check(head)
        found = self.queries(head.layer)
        query = found.query[head.head]
        if offset and self.spec.rotary:
            query = query @ self.rotations[head.layer][self._place(offset)]
        return query @ found.key[head.head].T

    def _place(self, offset: int) -> int:
        if offset not in self.offsets:
            raise RequestError(
                f"offset={offset}: rotations were taken at {', '.join(map(str, self.offsets))}; "
                "read the weights with the offsets you need."
            )
        return self.offsets.index(offset)

    def padded(self, values: Sequence[Tensor]) -> Array:
        """One `[..., head]` tensor a layer as `[..., layer, head]`, NaN where a layer has fewer heads than others."""
        most = max(layer.heads for layer in self.spec.layers)
        rows = [torch.nn.functional.pad(v.double().cpu(), (0, most - v.shape[-1]), value=torch.nan) for v in values]
        found: Array = torch.stack(rows, dim=-2).numpy()
        return found


def read_weights(
    model: Model,
    offsets: Sequence[int] = OFFSETS,
    *,
    draws: int = 99,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> HeadWeights:
    """The weights of a model's heads.

    Args:
        offsets: distances between query and key for rotary QK circuits; those beyond the model's positions are
            left out.
        draws, seed: random matrices for nulls.
    """
    if draws < 1 or not offsets or min(offsets) < 0:
        raise RequestError(f"offsets={tuple(offsets)}, draws={draws}: give distances of 0 or more and at least 1 draw.")
    if not model.spec.rotary:
        identities = tuple(torch.eye(layer.head_dim, dtype=dtype)[None] for layer in model.spec.layers)
        return HeadWeights(model.attachment, (0,), _on(identities, model), draws, seed, dtype)
    most = model.spec.max_positions
    kept = tuple(sorted({offset for offset in offsets if most is None or offset < most}))
    if not kept:
        raise RequestError(f"offsets={tuple(offsets)}: the model has {most} positions; give smaller distances.")
    waves = _waves(model, max(kept) + 1)
    chosen = torch.tensor(kept)
    found = tuple(
        _rotation(cos[chosen], sin[chosen], layer.head_dim)
        for (cos, sin), layer in zip(waves, model.spec.layers, strict=True)
    )
    return HeadWeights(model.attachment, kept, _on(tuple(one.to(dtype) for one in found), model), draws, seed, dtype)


def _on(tensors: tuple[Tensor, ...], model: Model) -> tuple[Tensor, ...]:
    device = model.attachment.hf_model.get_input_embeddings().weight.device
    return tuple(tensor.to(device) for tensor in tensors)


@torch.no_grad()
def _waves(model: Model, positions: int) -> list[tuple[Tensor, Tensor]]:
    """Cosines and sines that each layer's attention is given, `[position, width]`."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def listen(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            waves = kwargs.get("position_embeddings")
            if waves is not None:
                seen[layer] = (waves[0][0].double().cpu(), waves[1][0].double().cpu())

        return hook

    handles = [
        layer.attention.register_forward_pre_hook(listen(layer.index), with_kwargs=True)
        for layer in model.attachment.layers
    ]
    try:
        ids = torch.zeros(1, positions, dtype=torch.long, device=model.device)
        model.attachment.hf_model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != model.spec.n_layers:
        raise ModelRefused(
            f"{model.spec.architecture}: the attention of layer {min(set(range(model.spec.n_layers)) - set(seen))} is "
            "not given its rotation as 'position_embeddings', so its QK circuit cannot be rebuilt."
        )
    return [seen[layer] for layer in range(model.spec.n_layers)]


def _rotation(
    cos: Float[Tensor, "offset width"], sin: Float[Tensor, "offset width"], head_dim: int
) -> Float[Tensor, "offset head_dim head_dim"]:
    """R_d as matrices on row vectors; dimensions beyond the rotated ones pass through.

    Pairs are half a width apart. Most models give each angle twice, once for either half; gpt-oss gives it once.
    """
    half = cos.shape[1] // 2
    if cos.shape[1] % 2 or not torch.equal(cos[:, :half], cos[:, half:]):
        cos, sin, half = cos.repeat(1, 2), sin.repeat(1, 2), cos.shape[1]
    turn = torch.zeros(2 * half, 2 * half, dtype=cos.dtype)
    place = torch.arange(half)
    turn[place + half, place], turn[place, place + half] = -1.0, 1.0
    rotation = torch.eye(head_dim, dtype=cos.dtype).repeat(len(cos), 1, 1)
    rotation[:, : 2 * half, : 2 * half] = torch.diag_embed(cos) + turn * sin[:, None, :]
    return rotation


def weights_of(parts: Sequence[Part]) -> HeadWeights:
    """What the kind `weights` found."""
    (part,) = parts
    assert isinstance(part.found, HeadWeights)
    return part.found


def weights_for(model: Model, settings: Settings) -> HeadWeights:
    """The weights with the settings of a run of detectors."""
    return read_weights(model, settings.weight_offsets, draws=settings.weight_draws, seed=settings.seed)


def _none(model: Model, settings: Settings) -> list[Task]:
    return []


def _run(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> HeadWeights:
    return weights_for(model, settings)


WEIGHTS = Kind("weights", "no prompts: the weights themselves", _none, _run)
