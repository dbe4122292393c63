"""Eigenvalues and singular values of OV and QK circuits, never made at the size of the vocabulary.

``W_E W_V W_O W_U`` (token in, logit out) has the eigenvalues of the head-sized ``W_O (W_U W_E) W_V``; so does
``W_E W_Q R_d W_K^T W_E^T`` with ``R_d W_K^T (W_E^T W_E) W_Q``, for each distance d between query and key (rotary
models have no single QK circuit). The sum of the eigenvalues over the sum of their sizes says whether a head raises
what it reads (+1), lowers it (-1) or does neither: Elhage et al. 2021, A mathematical framework for transformer
circuits. One d_model x vocabulary product a model, and head_dim x head_dim eigenvalues a head (and distance).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.weights import HeadWeights
from workbench.models import Head


def eigen_score(eigenvalues: Complex[Tensor, "*head value"]) -> Float[Tensor, "*head"]:
    """Re(sum) / sum of sizes, in [-1, 1]; 0 where all eigenvalues are 0."""
    size = eigenvalues.abs().sum(-1)
    score: Tensor = torch.where(size > 0, eigenvalues.real.sum(-1) / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
    return score


def ov_eigenvalues(weights: HeadWeights, layer: int) -> Complex[Tensor, "head head_dim"]:
    """The non-zero eigenvalues of W_E W_V W_O W_U, up to the width of the head."""
    found = weights.queries(layer)
    values: Tensor = torch.linalg.eigvals(found.output @ weights.copying_gram @ found.value)
    return values


def qk_eigenvalues(weights: HeadWeights, layer: int) -> Complex[Tensor, "offset head head_dim"]:
    """The non-zero eigenvalues of W_E W_Q R_d W_K^T W_E^T at each of the offsets."""
    found = weights.queries(layer)
    product = found.key.transpose(1, 2) @ weights.embedding_gram @ found.query
    values: Tensor = torch.linalg.eigvals(weights.rotations[layer][:, None] @ product)
    return values


def ov_singular_values(weights: HeadWeights, layer: int) -> Float[Tensor, "head head_dim"]:
    """Singular values of W_V W_O, largest first."""
    found = weights.queries(layer)
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(found.value).R @ found.output)
    return values


def qk_singular_values(weights: HeadWeights, layer: int) -> Float[Tensor, "offset head head_dim"]:
    """Singular values of W_Q R_d W_K^T at each of the offsets, largest first."""
    found = weights.queries(layer)
    left, right = torch.linalg.qr(found.query).R, torch.linalg.qr(found.key).R
    values: Tensor = torch.linalg.svdvals(left @ weights.rotations[layer][:, None] @ right.transpose(1, 2))
    return values


def effective_rank(singular: Float[Tensor, "*head value"]) -> Float[Tensor, "*head"]:
    """exp of the entropy of the squared singular values' shares: of how many directions the matrix consists."""
    power = singular.square()
    share = power / power.sum(-1, keepdim=True).clamp(min=torch.finfo(power.dtype).tiny)
    rank: Tensor = torch.special.entr(share).sum(-1).exp()
    return rank


def participation_ratio(singular: Float[Tensor, "*head value"]) -> Float[Tensor, "*head"]:
    """(sum)^2 / sum of squares of the singular values."""
    total = singular.sum(-1).square()
    return total / singular.square().sum(-1).clamp(min=torch.finfo(singular.dtype).tiny)


def qk_symmetry(weights: HeadWeights, layer: int) -> Float[Tensor, "offset head"]:
    """tr(M M) / tr(M M^T) of M = W_Q R_d W_K^T: 1 for a symmetric circuit, -1 for an antisymmetric one."""
    found, turn = weights.queries(layer), weights.rotations[layer][:, None]
    inner = turn @ (found.key.transpose(1, 2) @ found.query)
    squared = (inner @ inner).diagonal(dim1=-2, dim2=-1).sum(-1)
    size = qk_singular_values(weights, layer).square().sum(-1)
    return squared / size.clamp(min=torch.finfo(size.dtype).tiny)


def singular_directions(
    reader: Float[Tensor, "*head d_model width"], writer: Float[Tensor, "*head width d_model"]
) -> tuple[Float[Tensor, "*head d_model width"], Float[Tensor, "*head width"], Float[Tensor, "*head width d_model"]]:
    """The singular value decomposition of reader @ writer, which itself is never made."""
    basis, triangle = torch.linalg.qr(reader)
    left, singular, right = torch.linalg.svd(triangle @ writer, full_matrices=False)
    return basis @ left, singular, right


class Directions(NamedTuple):
    """The strongest directions of an OV circuit: their strength and the tokens read and written most, either sign."""

    singular: Float[Tensor, " direction"]
    reads: Int[Tensor, "direction token"]
    writes: Int[Tensor, "direction token"]


def ov_directions(weights: HeadWeights, head: Head, directions: int = 5, tokens: int = 10) -> Directions:
    """W_V W_O as a sum of read-and-write directions, named by tokens (Millidge and Black 2022).

    Signs are those of the singular vectors, which come in pairs: read and written tokens belong together.
    """
    layer = weights.spec.layers[weights.spec.check(head).layer]
    if not 1 <= directions <= layer.head_dim or not 1 <= tokens <= weights.spec.vocab_size:
        raise RequestError(
            f"directions={directions}, tokens={tokens}: {head} has up to {layer.head_dim} directions and the "
            f"vocabulary {weights.spec.vocab_size} tokens."
        )
    found = weights.queries(head.layer)
    left, singular, right = singular_directions(found.value[head.head], found.output[head.head])
    reads = weights.embedding @ left[:, :directions]
    writes = right[:directions] @ weights.unembedding
    return Directions(
        singular[:directions].cpu(), reads.T.topk(tokens).indices.cpu(), writes.topk(tokens).indices.cpu()
    )


def random_scores(weights: HeadWeights, layer: int, make: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`make(reader, writer)` of Gaussian factors `[draw, d_model, head_dim]` in place of two of a layer's matrices.

    Scores of eigenvalues and ranks do not depend on the factors' norms, so drawn ones need none.
    """
    generator = torch.Generator().manual_seed(weights.seed)
    shape = (weights.draws, weights.spec.d_model, weights.spec.layers[layer].head_dim)
    first, second = (torch.randn(shape, generator=generator, dtype=weights.dtype) for _ in range(2))
    return make(first.to(weights.device), second.to(weights.device))
