"""Edge attribution patching, and its gradients taken at several points.

The score of an edge is what its writer's change does to first order through the reader's own fork of the stream,
before the norm in front of it: the change times the gradient there, summed over tokens and dimensions (Syed, Rager and
Conmy 2023, arXiv 2310.10348). Integrated gradients (Hanna, Pezzelle and Belinkov 2024, arXiv 2403.17806) take the mean
of gradients on the way from one run to the other. All readers of a layer are contracted with all writers before them
at once, so that gradients of forks never exist for more than one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.attribution.baselines import writes
from workbench.circuits.attribution.passes import Gradients, Key, Pass
from workbench.circuits.attribution.readers import head_forks
from workbench.circuits.attribution.work import Chunk

EdgeScores = Float[Tensor, "prompt writer reader"]


def edge_patching(chunk: Chunk, points: int) -> EdgeScores:
    """EAP: gradients where the run begins."""
    scores = _Scores(chunk)
    one, back = chunk.at_base()
    scores.add(one, back(None), 1.0)
    return scores.total


def integrated_inputs(chunk: Chunk, points: int) -> EdgeScores:
    """EAP-IG: gradients on the way of the embeddings from the corrupt to the clean prompt.

    What leaves `embed` adds up to the difference of the two runs, but for the error of the sum.
    """
    shares = chunk.job.settings.shares
    scores = _Scores(chunk)
    for one, gradients in chunk.between(("embed", 0), shares, points):
        scores.add(one, gradients, 1 / len(shares))
    return scores.total


def both_ends(chunk: Chunk, points: int) -> EdgeScores:
    """clean-corrupted: the mean of the gradients at both runs."""
    scores = _Scores(chunk)
    for one, gradients in chunk.between(("embed", 0), (0.0, 1.0), points):
        scores.add(one, gradients, 0.5)
    return scores.total


def integrated_activations(chunk: Chunk, points: int) -> EdgeScores:
    """EAP-IG (activations): the embeddings, each layer's heads and each MLP go their own way, the rest follows.

    All edges take the mean over all these runs, as published.
    """
    shares, keys = chunk.job.settings.shares, _components(chunk)
    scores = _Scores(chunk)
    for key in keys:
        for one, gradients in chunk.between(key, shares, points):
            scores.add(one, gradients, 1 / (len(shares) * len(keys)))
    return scores.total


def integrated_own(chunk: Chunk, points: int) -> EdgeScores:
    """The same, where an edge counts only runs in which its own writer's layer of heads, or MLP, is on its way.

    Then what leaves a layer's heads (or an MLP) adds up to the effect of patching them.
    """
    shares = chunk.job.settings.shares
    scores = _Scores(chunk)
    for key in _components(chunk):
        for one, gradients in chunk.between(key, shares, points):
            scores.add(one, gradients, 1 / len(shares), _writers(chunk, key))
    return scores.total


def _components(chunk: Chunk) -> list[Key]:
    found: list[Key] = [("embed", 0)]
    for layer, places in enumerate(chunk.job.graph.layers):
        found.append(("z", layer))
        if places.mlp.stop > places.mlp.start:
            found.append(("mlp_out", layer))
    return found


def _writers(chunk: Chunk, key: Key) -> slice:
    part, layer = key
    if part == "embed":
        return slice(0, 1)
    places = chunk.job.graph.layers[layer]
    return places.heads if part == "z" else places.mlp_out


class _Scores:
    """Sums over points of changes times gradients at forks."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk, self.graph = chunk, chunk.job.graph
        changes = writes(chunk.job.model, self.graph, chunk.change)
        self.prompts = len(changes)
        self.changes = changes.flatten(2)
        self.total = changes.new_zeros(self.prompts, len(self.graph.writers), len(self.graph.readers))
        self.before: Sequence[int] = self.graph.exists.sum(0).tolist()

    def add(self, one: Pass, gradients: Gradients, weight: float, writers: slice | None = None) -> None:
        for readers, forks in self._forks(one, gradients):
            first = 0 if writers is None else writers.start
            end = self.before[readers.start] if writers is None else min(writers.stop, self.before[readers.start])
            if end <= first:
                continue
            # Points of one prompt add up before the contraction.
            summed = forks.reshape(len(forks), -1, self.prompts, self.changes.shape[-1]).sum(1)
            found = torch.bmm(self.changes[:, first:end], summed.permute(1, 2, 0))
            self.total[:, first:end, readers] += weight * found

    def _forks(self, one: Pass, gradients: Gradients) -> Iterator[tuple[slice, Tensor]]:
        """Readers that read the same writers, and `[reader, row, token, d_model]`."""
        job, last = self.chunk.job, len(self.graph.readers) - 1
        yield slice(last, last + 1), gradients.parts["final", 0][None]
        for layer, places in enumerate(self.graph.layers):
            yield slice(places.q.start, places.v.stop), head_forks(job.model, one, gradients, layer, job.frozen)
            if places.mlp.stop > places.mlp.start:
                yield places.mlp, gradients.parts["mlp_in", layer][None]
