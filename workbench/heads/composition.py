"""Composition of heads: how much of what one head reads lies where an earlier one writes, from weights alone.

For an earlier head with OV circuit A and a later one with B, ``|A B| / (|A| |B|)`` (Frobenius), where B is the later
head's QK for Q-composition, QK^T for K-composition and OV for V-composition: Elhage et al. 2021; the same form as
TransformerLens'. By chance it is 1/sqrt(d_model): for A turned by a random rotation of the residual stream the mean of
its square is 1/d_model exactly, whatever A and B are. That is subtracted.

``|A B|^2 = <A^T A, B B^T>``, so each head is summed up once, in a d_model x d_model matrix, and a pair costs one inner
product: no product of the pair is formed. Rotary QK circuits enter by the mean of B B^T over the offsets.

`trace_products` has the same shape for the trace of ``W_E W_QK W_OV^T W_E^T``: whether a later head's query for a token
meets the keys where an earlier head wrote that token (the QK trace of Olsson et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Array
from workbench.heads.weights import HeadWeights

Composed = Literal["q", "k", "v"]
# Summaries of earlier heads that are held at once; one layer's are, however large.
BLOCK_BYTES = 1 << 28
# Random rotations for the null, and how many of the heads each is tried on.
ROTATIONS, SAMPLED = 4, 12

Summaries = Callable[[int], Float[Tensor, "head d_model d_model"]]


def written(weights: HeadWeights, layer: int) -> Float[Tensor, "head d_model d_model"]:
    """A^T A of each head's OV circuit A: where, and how strongly, it writes."""
    found = weights.queries(layer)
    return found.output.transpose(1, 2) @ (found.value.transpose(1, 2) @ found.value) @ found.output


def read(weights: HeadWeights, layer: int, composed: Composed) -> Float[Tensor, "head d_model d_model"]:
    """B B^T of each head's circuit B: where it reads, by the side asked for."""
    reader, inner = _reader(weights, layer, composed)
    return reader @ inner @ reader.transpose(1, 2)


def _reader(weights: HeadWeights, layer: int, composed: Composed) -> tuple[Tensor, Tensor]:
    """C `[head, d_model, head_dim]` and M `[head, head_dim, head_dim]` with B B^T = C M C^T."""
    if composed not in get_args(Composed):
        raise RequestError(f"composed={composed!r}: choose from {', '.join(get_args(Composed))}.")
    found, turn = weights.queries(layer), weights.rotations[layer][:, None]
    if composed == "v":
        return found.value, found.output @ found.output.transpose(1, 2)
    if composed == "q":
        keys = found.key.transpose(1, 2) @ found.key
        return found.query, (turn @ keys @ turn.transpose(2, 3)).mean(0)
    queries = found.query.transpose(1, 2) @ found.query
    return found.key, (turn.transpose(2, 3) @ queries @ turn).mean(0)


def _size(weights: HeadWeights, layer: int, composed: Composed | None) -> Float[Tensor, " head"]:
    """Squared Frobenius norm of a head's circuit: what it reads with on a side, or (None) what it writes with."""
    reader, inner = _reader(weights, layer, composed or "v")
    return ((reader.transpose(1, 2) @ reader) * inner).sum((1, 2))


def pair_products(weights: HeadWeights, writes: Summaries, reads: Summaries) -> Float[np.ndarray, "l h l h"]:
    """Inner products `[reader layer, head, writer layer, head]` of heads' summaries; 0 unless the writer is earlier."""
    spec = weights.spec
    most = max(layer.heads for layer in spec.layers)
    found = np.zeros((spec.n_layers, most, spec.n_layers, most))
    bytes_a_layer = most * spec.d_model**2 * torch.finfo(weights.dtype).bits // 8
    block = max(1, BLOCK_BYTES // bytes_a_layer)
    for first in range(0, spec.n_layers - 1, block):
        earlier = range(first, min(first + block, spec.n_layers - 1))
        rows = {layer: writes(layer).flatten(1) for layer in earlier}
        for reader in range(first + 1, spec.n_layers):
            columns = reads(reader).flatten(1)
            for writer in earlier:
                if writer < reader:
                    product = (columns @ rows[writer].T).double().cpu().numpy()
                    found[reader, : len(columns), writer, : len(rows[writer])] = product
    return found


def composition_scores(weights: HeadWeights, composed: Composed) -> Float[np.ndarray, "l h l h"]:
    """Scores in [0, 1], `[reader layer, head, writer layer, head]`, chance not yet subtracted; 0 unless earlier."""
    layers = range(weights.spec.n_layers)
    writes = weights.padded([_size(weights, layer, None) for layer in layers])
    reads = weights.padded([_size(weights, layer, composed) for layer in layers])
    squared = pair_products(
        weights, lambda layer: written(weights, layer), lambda layer: read(weights, layer, composed)
    )
    scale = np.nan_to_num(reads[:, :, None, None] * writes)
    shares = np.divide(squared.clip(min=0), scale, out=np.zeros_like(squared), where=scale > 0)
    return np.asarray(np.sqrt(shares))


def chance(weights: HeadWeights) -> float:
    """The composition score of unrelated heads: 1 / sqrt(d_model)."""
    return float(weights.spec.d_model**-0.5)


def composition_table(weights: HeadWeights, composed: Composed) -> pd.DataFrame:
    """Every pair: reader and writer (layer, head), score, and what it has above chance; the strongest first."""
    scores, heads = composition_scores(weights, composed), weights.spec.heads()
    rows = [
        (*reader, *writer, scores[*reader, *writer])
        for reader in heads
        for writer in heads
        if writer.layer < reader.layer
    ]
    table = pd.DataFrame(rows, columns=["layer", "head", "writer_layer", "writer_head", "score"])
    table["above_chance"] = table["score"] - chance(weights)
    return table.sort_values("score", ascending=False, ignore_index=True)


def chance_pool(weights: HeadWeights, composed: Composed) -> Array:
    """Scores of random pairs of the model's own heads with the writer turned at random."""
    generator = torch.Generator().manual_seed(weights.seed)
    heads = weights.spec.heads()

    def some(summary: Callable[[int], Tensor]) -> Tensor:
        chosen = [heads[int(at)] for at in torch.randperm(len(heads), generator=generator)[:SAMPLED]]
        return torch.stack([summary(head.layer)[head.head] for head in chosen])

    pool = []
    for _ in range(ROTATIONS):
        writers, readers = (
            some(lambda layer: written(weights, layer)),
            some(lambda layer: read(weights, layer, composed)),
        )
        gaussian = torch.randn(weights.spec.d_model, weights.spec.d_model, generator=generator, dtype=weights.dtype)
        turn = torch.linalg.qr(gaussian).Q.to(weights.device)
        products = readers.flatten(1) @ (turn.T @ writers @ turn).flatten(1).T
        scale = _traces(readers)[:, None] * _traces(writers)
        pool.append(torch.where(scale > 0, products.clamp(min=0) / scale, 0.0).sqrt().flatten())
    return np.asarray(torch.cat(pool).double().cpu().numpy())


def trace_products(weights: HeadWeights) -> Float[np.ndarray, "l h l h"]:
    """tr(W_E W_Q R W_K^T (W_V W_O)^T W_E^T), `[reader layer, head, writer layer, head]`; R is the offsets' mean."""

    def writes(layer: int) -> Tensor:
        found = weights.queries(layer)
        return found.value @ found.output

    def reads(layer: int) -> Tensor:
        found, turn = weights.queries(layer), weights.rotations[layer].mean(0)
        return weights.embedding_gram @ found.query @ turn @ found.key.transpose(1, 2)

    return pair_products(weights, writes, reads)


def _traces(matrices: Float[Tensor, "head d_model d_model"]) -> Float[Tensor, " head"]:
    return matrices.diagonal(dim1=1, dim2=2).sum(-1)
