"""Discrete codes of head outputs, and which of them belong to one class of prompts: bare arrays, no model.

After O'Neill and Bui 2024 (arXiv 2405.12522) and their code. One sparse autoencoder is trained on the outputs of all
heads for a handful of prompts; the number of the strongest feature is a head's code on a prompt. Heads that have many
codes on positive prompts only, and pairs of heads that have many pairs of codes on them only, are the circuit.

Where text and code differ, the code is followed: the penalty is on the sum of a row's features (not their mean), the
encoder has a bias of its own beside the tied one, and a decoder row (one coordinate of the output over all features),
not a feature's direction, has unit norm. A row without an active feature has the code -1 here (feature 0 there).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.errors import RequestError

SILENT = -1
Array = np.ndarray[Any, np.dtype[np.float64]]
# Rows that are encoded at once.
_ROWS = 1 << 16


@dataclass(frozen=True)
class AutoencoderSettings:
    """The published ones; `penalty` was .02 for indirect objects and greater-than, .05 for docstrings.

    `examples`: prompts that the autoencoder is trained on, half of them positive. More were worse: codes are then
    used again across classes.
    """

    features: int = 200
    penalty: float = 0.02
    epochs: int = 500
    rate: float = 1e-3
    examples: int = 10

    def __post_init__(self) -> None:
        if self.features < 2 or self.epochs < 1 or self.rate <= 0 or self.penalty < 0 or self.examples < 2:
            raise RequestError(
                f"{self}: needs at least two features, one epoch, two examples, a positive rate, no negative penalty."
            )


class Autoencoder(nn.Module):
    """`f = ReLU(E (x - b) + e)`, `x' = D f + b`; rows of E and D have unit norm."""

    def __init__(self, width: int, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.tied = nn.Parameter(torch.zeros(width))
        self.encoder = nn.Parameter(_unit(torch.randn(features, width, generator=generator)))
        self.decoder = nn.Parameter(_unit(torch.randn(width, features, generator=generator)))
        bound = 1 / math.sqrt(width)
        self.bias = nn.Parameter((2 * torch.rand(features, generator=generator) - 1) * bound)

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row feature"]:
        """Features of rows."""
        return torch.relu((x - self.tied) @ self.encoder.T + self.bias)

    def forward(self, x: Float[Tensor, "*row width"]) -> tuple[Tensor, Tensor]:
        """Features and reconstruction."""
        features = self.encode(x)
        return features, features @ self.decoder.T + self.tied

    @torch.no_grad()
    def renormalise(self) -> None:
        """Put rows back to unit norm."""
        for weight in (self.encoder, self.decoder):
            weight.copy_(_unit(weight))

    @torch.no_grad()
    def drop_lengthening(self) -> None:
        """Take the part along its row out of each gradient: rows turn, they do not grow."""
        for weight in (self.encoder, self.decoder):
            if weight.grad is not None:
                row = _unit(weight)
                weight.grad -= (weight.grad * row).sum(-1, keepdim=True) * row


def _unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=-1)


@torch.enable_grad()
def train_autoencoder(
    rows: Float[Tensor, "row width"], settings: AutoencoderSettings, generator: torch.Generator
) -> Autoencoder:
    """Full-batch Adam on the mean squared error and the penalty on features."""
    model = Autoencoder(rows.shape[1], settings.features, generator).to(rows.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.rate)
    for _ in range(settings.epochs):
        optimiser.zero_grad()
        features, rebuilt = model(rows)
        loss = (rebuilt - rows).square().mean() + settings.penalty * features.sum(-1).mean()
        loss.backward()
        model.drop_lengthening()
        optimiser.step()
        model.renormalise()
    return model


@torch.no_grad()
def codes_of(model: Autoencoder, outputs: Float[Tensor, "prompt head width"]) -> Int[np.ndarray, "prompt head"]:
    """The strongest feature of every head on every prompt; -1 where none is active."""
    found = []
    for part in torch.split(outputs.flatten(0, 1), _ROWS):
        strongest = model.encode(part.to(model.tied)).max(-1)
        found.append(torch.where(strongest.values > 0, strongest.indices, SILENT).cpu())
    return torch.cat(found).reshape(outputs.shape[:2]).numpy()


def unique_to_positive(
    codes: Int[np.ndarray, "prompt column"], positive: Bool[np.ndarray, " prompt"]
) -> tuple[Int[np.ndarray, " column"], Int[np.ndarray, " column"]]:
    """In each column, how many values only positive prompts have, and how many values there are at all."""
    marked = np.sort(codes.astype(np.int64) * 2 + positive[:, None], axis=0)
    # Of equal values, those of negative prompts come first: a run that begins with a positive one has no negative.
    begins = np.ones(marked.shape, dtype=bool)
    begins[1:] = marked[1:] // 2 != marked[:-1] // 2
    return (begins & (marked % 2 == 1)).sum(0), begins.sum(0)


def node_scores(
    codes: Int[np.ndarray, "prompt head"], positive: Bool[np.ndarray, " prompt"], normalise: bool = False
) -> Float[np.ndarray, " head"]:
    """How many codes a head has on positive prompts only; `normalise` divides by how many it has."""
    own, total = unique_to_positive(codes, positive)
    return own / total if normalise else own.astype(np.float64)


def edge_scores(
    codes: Int[np.ndarray, "prompt head"],
    positive: Bool[np.ndarray, " prompt"],
    layers: Int[np.ndarray, " head"],
    normalise: bool = False,
) -> Float[np.ndarray, "head head"]:
    """How many pairs of codes two heads have together on positive prompts only; rows are heads of lower layers.

    NaN where the second head is not in a later layer. A pair counts the codes of both: a circuit's head next to one
    that merely has many codes may score above two of the circuit's.
    """
    heads = codes.shape[1]
    found = np.full((heads, heads), np.nan)
    shifted = codes.astype(np.int64) + 1
    many = int(shifted.max()) + 1
    for head in range(heads):
        later = np.flatnonzero(layers > layers[head])
        if len(later):
            own, total = unique_to_positive(shifted[:, [head]] * many + shifted[:, later], positive)
            found[head, later] = own / total if normalise else own
    return found


def heads_in_pairs(edges: Float[np.ndarray, "head head"], share: float = 0.25) -> Float[np.ndarray, " head"]:
    """How often each head is in the best pairs: what the paper's "edge" curves are of.

    Its code lists all ordered pairs of heads, N^2, and counts the first N^2 / 2 heads in that list: a quarter of the
    pairs. Pairs that tie at the end of the list count in part, so that their order does not matter.
    """
    if not 0 < share <= 1:
        raise RequestError(f"share={share}: take a share of the pairs above 0 and up to 1.")
    first, second = np.nonzero(~np.isnan(edges))
    values = edges[first, second]
    if not len(values):
        return np.zeros(len(edges))
    wanted = max(1.0, share * len(values))
    last = np.sort(values)[::-1][math.ceil(wanted) - 1]
    above, tied = values > last, values == last
    weight = above + tied * (wanted - above.sum()) / tied.sum()
    return np.bincount(first, weight, len(edges)) + np.bincount(second, weight, len(edges))


@dataclass(frozen=True, eq=False)
class Curve:
    """Hits against false alarms as the threshold falls. `best` is what the paper calls F1.

    That is the harmonic mean of the shares of true and of false parts that are told apart rightly, 2 t n / (t + n)
    with n = 1 - false alarms, at its best threshold: neither precision nor F1 is in it.
    """

    false_alarms: Array
    hits: Array
    thresholds: Array
    area: float
    best: float
    best_threshold: float


def curve(scores: Float[np.ndarray, " part"], true: Bool[np.ndarray, " part"]) -> Curve:
    """The ROC curve of scores; parts with equal scores are taken together. Refused where one class is empty."""
    known = ~np.isnan(scores)
    scores, true = scores[known], true[known]
    if true.all() or not true.any():
        raise RequestError(f"{int(true.sum())} of {len(true)} parts are true; a curve needs both kinds.")
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.append(0, np.cumsum(true[order])[ends]) / true.sum()
    alarms = np.append(0, np.cumsum(~true[order])[ends]) / (~true).sum()
    thresholds = np.append(np.inf, scores[order][ends])
    both = hits + 1 - alarms
    harmonic = np.divide(2 * hits * (1 - alarms), both, out=np.zeros_like(both), where=both > 0)
    best = int(harmonic.argmax())
    area = float(np.trapezoid(hits, alarms))
    return Curve(alarms, hits, thresholds, area, float(harmonic[best]), float(thresholds[best]))
