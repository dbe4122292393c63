"""Detectors on weights alone: copying, matching, rank and composition of a head's circuits. No prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from workbench.heads.composition import Composed, chance, chance_pool, composition_scores
from workbench.heads.detector import Array, Detector, Part, PromptScores
from workbench.heads.spectra import (
    effective_rank,
    eigen_score,
    ov_eigenvalues,
    ov_singular_values,
    qk_eigenvalues,
    random_scores,
)
from workbench.heads.weights import HeadWeights, weights_of

_PAPER = "Elhage et al. 2021, A mathematical framework for transformer circuits"
_URL = "https://transformer-circuits.pub/2021/framework/index.html"


def _exact(
    weights: HeadWeights, of_layer: Callable[[int], Tensor], drawn: Callable[[int], Tensor] | None
) -> PromptScores:
    """One value a head, and the same of random matrices of its shape, `[draw]`, shared by a layer's heads."""
    layers = range(weights.spec.n_layers)
    values = weights.padded([of_layer(layer) for layer in layers])[None]
    null = np.empty((0, *values.shape[1:]))
    if drawn is not None:
        same: dict[tuple[int, bytes], Array] = {}
        columns = []
        for layer in layers:
            shape = (weights.spec.layers[layer].head_dim, weights.rotations[layer].cpu().numpy().tobytes())
            if shape not in same:
                same[shape] = np.asarray(drawn(layer).double().cpu().numpy())
            columns.append(same[shape])
        null = np.repeat(np.stack(columns, axis=1)[:, :, None], values.shape[2], axis=2)
    return PromptScores(values, null, exact=True)


def _copying(parts: Sequence[Part]) -> PromptScores:
    weights = weights_of(parts)

    def random(reader: Tensor, writer: Tensor) -> Tensor:
        return eigen_score(torch.linalg.eigvals(writer.transpose(1, 2) @ weights.copying_gram @ reader))

    return _exact(
        weights,
        lambda layer: eigen_score(ov_eigenvalues(weights, layer)),
        lambda layer: random_scores(weights, layer, random),
    )


def _matching(parts: Sequence[Part]) -> PromptScores:
    weights = weights_of(parts)

    def drawn(layer: int) -> Tensor:
        def random(query: Tensor, key: Tensor) -> Tensor:
            product = key.transpose(1, 2) @ weights.embedding_gram @ query
            return eigen_score(torch.linalg.eigvals(weights.rotations[layer][:, None] @ product)).mean(0)

        return random_scores(weights, layer, random)

    return _exact(weights, lambda layer: eigen_score(qk_eigenvalues(weights, layer)).mean(0), drawn)


def _rank(parts: Sequence[Part]) -> PromptScores:
    weights = weights_of(parts)

    def random(reader: Tensor, writer: Tensor) -> Tensor:
        return effective_rank(torch.linalg.svdvals(torch.linalg.qr(reader).R @ writer.transpose(1, 2)))

    return _exact(
        weights,
        lambda layer: effective_rank(ov_singular_values(weights, layer)),
        lambda layer: random_scores(weights, layer, random),
    )


def _composition(composed: Composed) -> Callable[[Sequence[Part]], PromptScores]:
    def score(parts: Sequence[Part]) -> PromptScores:
        """Per reader the largest score over earlier heads; the null takes as many scores at chance."""
        weights = weights_of(parts)
        spec, expected = weights.spec, chance(weights)
        values = composition_scores(weights, composed).max(axis=(2, 3))[None] - expected
        pool, rng = chance_pool(weights, composed), np.random.default_rng(weights.seed)
        null = np.full((weights.draws, *values.shape[1:]), -expected)
        earlier = 0
        for layer in spec.layers:
            if earlier:
                drawn = rng.choice(pool, (weights.draws, layer.heads, earlier))
                null[:, layer.index, : layer.heads] = drawn.max(axis=2) - expected
            earlier += layer.heads
        return PromptScores(values, null, exact=True)

    return score


_FOLDED = (
    "Norms are folded in; biases, and divisions by a length that depends on the token, are left out, as in the paper."
)

OV_COPYING = Detector(
    name="ov_copying",
    title="OV copying",
    kind="weights",
    measures="sum of the eigenvalues of W_E W_OV W_U over the sum of their sizes (1: raises each token it reads, "
    "-1: lowers it)",
    null="random matrices in place of W_V and W_O",
    unit="share of eigenvalues",
    positions="none: weights alone",
    threshold=None,
    paper=_PAPER,
    url=_URL,
    score=_copying,
    probe="induction",
    note=_FOLDED + " The embedding is the raw one also in later layers. With tied embeddings the score is raised by "
    "directions that all tokens share.",
)
QK_MATCHING = Detector(
    name="qk_matching",
    title="QK same-token matching",
    kind="weights",
    measures="sum of the eigenvalues of W_E W_QK W_E^T over the sum of their sizes, mean over distances of 1 to 64 "
    "tokens (1: a query prefers keys of its own token)",
    null="random matrices in place of W_Q and W_K",
    unit="share of eigenvalues",
    positions="none: weights alone",
    threshold=None,
    paper=_PAPER,
    url=_URL,
    score=_matching,
    note=_FOLDED + " Rotary models have one QK circuit a distance; the paper's model has one. Embeddings alone are "
    "matched, so heads that compare what earlier layers wrote do not show.",
)
OV_RANK = Detector(
    name="ov_rank",
    title="OV effective rank",
    kind="weights",
    measures="exp of the entropy of the squared singular values of W_V W_O: of how many directions it consists",
    null="random matrices in place of W_V and W_O",
    unit="directions",
    positions="none: weights alone",
    threshold=None,
    paper="Millidge and Black 2022, The singular value decompositions of transformer weight matrices",
    url="https://www.lesswrong.com/posts/mkbGjzxD8d8XqKHzA",
    score=_rank,
    better="lower",
    note=_FOLDED + " Descriptive: trained circuits have fewer directions than random ones.",
)


def _composing(composed: Composed, title: str, side: str, circuit: str) -> Detector:
    return Detector(
        name=f"{composed}_composition",
        title=title,
        kind="weights",
        measures=f"largest |W_OV {circuit}| / (|W_OV| |{circuit}|) over all earlier heads, less 1/sqrt(d_model): how "
        f"strongly its {side} read what one of them writes",
        null="as many pairs of heads with the earlier one's output turned at random",
        unit="share of the Frobenius norm",
        positions="none: weights alone",
        threshold=None,
        paper=_PAPER,
        url=_URL,
        score=_composition(composed),
        note=_FOLDED + " Rotary QK circuits enter by their root mean square over distances of 1 to 64 tokens. Heads of "
        "the first layer have nothing before them and score 0 before chance is subtracted. The paper draws random "
        "matrices for the baseline, of which 1/sqrt(d_model) is the exact root mean square.",
    )


Q_COMPOSITION = _composing("q", "Q-composition", "queries", "W_QK")
K_COMPOSITION = _composing("k", "K-composition", "keys", "W_QK^T")
V_COMPOSITION = _composing("v", "V-composition", "values", "W_OV")

CIRCUITS = (OV_COPYING, QK_MATCHING, OV_RANK, Q_COMPOSITION, K_COMPOSITION, V_COMPOSITION)
