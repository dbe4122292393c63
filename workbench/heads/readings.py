"""What a head's OV and QK circuits say in tokens: strongest directions, and what chosen tokens are turned into.

OV: ``W_E W_V W_O W_U``, token read in, logit written out. QK: ``W_E W_Q W_K^T W_E^T``, query token in, key token out,
without rotation: the position-free part, which a rotary model applies as it is to no distance but 0. With grouped
queries a query head has the W_K and W_V of its key/value head. Norms are folded in; biases, and the division by a
length that depends on the token, are left out, so that orders of tokens count and sizes do not. The embedding is the
raw one also in later layers, where heads read what earlier layers wrote: what stands here is what the weights do with
bare tokens (Elhage et al. 2021; Millidge and Black 2022 for the directions).

Null: Gaussian matrices in place of W_V and W_O (W_Q and W_K), as the detectors on weights have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.inference import Better, drawn_p
from workbench.heads.spectra import effective_rank, eigen_score, random_scores, singular_directions
from workbench.heads.weights import HeadWeights
from workbench.models import Head

MOST_TOKENS = 8
CIRCUITS = ("ov", "qk")
_DRAWS_AT_ONCE = 16


class CircuitDirections(NamedTuple):
    """The strongest directions of a circuit: share of its power, and the tokens at either end of either side.

    `reads` and `writes` are `[direction, sign, token]`, sign 0 for the positive end, 1 for the negative one: where a
    residual has the tokens of one sign, the circuit gives those of the same sign. For QK, queries and keys.
    """

    share: Float[Tensor, " direction"]
    reads: Int[Tensor, "direction sign token"]
    writes: Int[Tensor, "direction sign token"]


def circuit_directions(
    weights: HeadWeights, layer: int, circuit: str, *, directions: int = 3, tokens: int = 6
) -> list[CircuitDirections]:
    """Of every query head of a layer."""
    if circuit not in CIRCUITS:
        raise RequestError(f"circuit={circuit!r}: choose from {', '.join(CIRCUITS)}.")
    head_dim, vocabulary = weights.spec.layers[layer].head_dim, weights.spec.vocab_size
    if not 1 <= directions <= head_dim or not 1 <= tokens <= vocabulary:
        raise RequestError(
            f"directions={directions}, tokens={tokens}: there are up to {head_dim} directions and {vocabulary} tokens."
        )
    first, second = _factors(weights, layer, circuit)
    left, singular, right = singular_directions(first, second)
    share = singular.square() / singular.square().sum(-1, keepdim=True).clamp(min=torch.finfo(singular.dtype).tiny)
    heads = len(share)
    reads = weights.embedding @ left[:, :, :directions].transpose(0, 1).flatten(1)
    rows = right[:, :directions].flatten(0, 1)
    writes = rows @ weights.unembedding if circuit == "ov" else rows @ weights.embedding.T
    ends = [_ends(side, tokens).reshape(heads, directions, 2, tokens).cpu() for side in (reads.T, writes)]
    return [CircuitDirections(one, *(side[at] for side in ends)) for at, one in enumerate(share[:, :directions].cpu())]


def _factors(weights: HeadWeights, layer: int, circuit: str) -> tuple[Tensor, Tensor]:
    """The circuit as reader `[head, d_model, k]` times writer `[head, k, d_model]`."""
    found = weights.queries(layer)
    return (found.value, found.output) if circuit == "ov" else (found.query, found.key.transpose(1, 2))


def _ends(rows: Float[Tensor, "row vocabulary"], count: int) -> Int[Tensor, "row sign token"]:
    return torch.stack([rows.topk(count, largest=largest).indices for largest in (True, False)], dim=1)


def summary(weights: HeadWeights, head: Head) -> list[dict[str, Any]]:
    """Scores of the two circuits with their nulls: value, the range of 95 % of the draws, p.

    Both signs of an eigenvalue score count; of ranks, low ones do.
    """
    layer = weights.spec.check(head).layer
    rows: list[dict[str, Any]] = []
    for circuit in CIRCUITS:
        gram = weights.copying_gram if circuit == "ov" else weights.embedding_gram
        first, second = (part[head.head] for part in _factors(weights, layer, circuit))
        about: dict[str, tuple[Tensor, Tensor, Better]] = {
            "eigenvalues": (
                eigen_score(torch.linalg.eigvals(second @ gram @ first)),
                random_scores(weights, layer, partial(_random_eigenvalues, gram)),
                "either",
            ),
            "rank": (
                effective_rank(_singular(first, second)),
                random_scores(weights, layer, lambda a, b: effective_rank(_singular(a, _t(b)))),
                "lower",
            ),
        }
        for name, (value, drawn, better) in about.items():
            null = np.asarray(drawn.double().cpu().numpy())
            low, high = np.percentile(null, [2.5, 97.5])
            p = drawn_p(np.array([float(value)]), null[:, None], better)[0]
            rows.append({
                "circuit": circuit, "measure": name, "value": float(value), "null_low": float(low),
                "null_high": float(high), "p": float(p),
            })  # fmt: skip
    return rows


def _random_eigenvalues(gram: Tensor, reader: Tensor, writer: Tensor) -> Tensor:
    return eigen_score(torch.linalg.eigvals(_t(writer) @ gram @ reader))


def _t(matrices: Tensor) -> Tensor:
    return matrices.transpose(-2, -1)


def _singular(first: Tensor, second: Tensor) -> Tensor:
    return singular_directions(first, second)[1]


class TokenReading(NamedTuple):
    """What a circuit makes of one token: the tokens raised and lowered most, with their distance from the mean over the
    vocabulary in standard deviations; the token's own place (1: raised most) and the share of random matrices that
    place it at least as high."""

    raised: Int[Tensor, " token"]
    lowered: Int[Tensor, " token"]
    raised_by: Float[Tensor, " token"]
    lowered_by: Float[Tensor, " token"]
    own_place: int
    own_p: float


def token_readings(
    weights: HeadWeights, head: Head, circuit: str, ids: Sequence[int], *, tokens: int = 8
) -> list[TokenReading]:
    """OV: which tokens' logits a head raises where it reads each of `ids`; QK: which key tokens each looks for."""
    if circuit not in CIRCUITS:
        raise RequestError(f"circuit={circuit!r}: choose from {', '.join(CIRCUITS)}.")
    if not 1 <= len(ids) <= MOST_TOKENS:
        raise RequestError(f"{len(ids)} tokens: choose 1 to {MOST_TOKENS}.")
    wrong = [one for one in ids if not 0 <= one < weights.spec.vocab_size]
    if wrong:
        raise RequestError(f"Token id {wrong[0]} is outside the vocabulary of {weights.spec.vocab_size}.")
    layer = weights.spec.check(head).layer
    first, second = (part[head.head] for part in _factors(weights, layer, circuit))
    out = weights.unembedding if circuit == "ov" else weights.embedding.T
    read = weights.embedding[list(ids)]
    logits = _standard(read @ first @ second @ out)
    place = _places(logits, ids)
    drawn = random_scores(weights, layer, lambda a, b: _drawn_places(read, a, b, out, ids))
    p = (1 + (drawn <= place).sum(0)) / (1 + len(drawn))
    high, low = (logits.topk(tokens, largest=largest) for largest in (True, False))
    return [
        TokenReading(
            high.indices[at].cpu(), low.indices[at].cpu(), high.values[at].cpu(), low.values[at].cpu(), int(place[at]),
            float(p[at]),
        )
        for at in range(len(ids))
    ]  # fmt: skip


def _standard(logits: Float[Tensor, "row vocabulary"]) -> Float[Tensor, "row vocabulary"]:
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / centred.std(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)


def _places(logits: Float[Tensor, "row vocabulary"], ids: Sequence[int]) -> Int[Tensor, " row"]:
    """1 for the token whose logit is the highest of all."""
    own = logits.gather(1, torch.as_tensor(list(ids), device=logits.device)[:, None])
    return 1 + (logits > own).sum(-1)


def _drawn_places(read: Tensor, readers: Tensor, writers: Tensor, out: Tensor, ids: Sequence[int]) -> Tensor:
    """`[draw, row]` places under random factors, few draws at a time: vocabularies are long."""
    places = []
    for at in range(0, len(readers), _DRAWS_AT_ONCE):
        a, b = readers[at : at + _DRAWS_AT_ONCE], writers[at : at + _DRAWS_AT_ONCE]
        written = read @ a @ b.transpose(1, 2)
        logits = written.flatten(0, 1) @ out
        places.append(_places(logits, list(ids) * len(a)).reshape(len(a), len(ids)))
    return torch.cat(places)
