"""Attention knockout: keys are taken from heads before the softmax, which shares their part among the others.

What a score of minus infinity does (Geva et al. 2023, arXiv 2304.14767), unlike zeroing an entry of the pattern, which
lowers the row's sum. The knocked-out run is recomputed from the first knocked-out layer on, in all later ones with
the queries, keys and values that it has by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from workbench.circuits.blocks import Blocks
from workbench.circuits.effects import Direction, Effects
from workbench.circuits.patching import Options, Progress, patch_changes
from workbench.circuits.recorded import Group, Metric, Recorded, Source, Values
from workbench.circuits.spots import Change, Spot
from workbench.errors import RequestError
from workbench.models import Head
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site


def attention_edges(
    heads: Iterable[Head | str] | Iterable[int], destination: int | str, sources: Iterable[int | str]
) -> Change:
    """Edges from each source to a destination (positions or roles), of heads, or of all heads of layers (numbers)."""
    spots: list[Spot] = []
    keys = list(sources)
    for one in heads:
        if isinstance(one, int):
            layer, head = one, None
        else:
            layer, head = Head.parse(one) if isinstance(one, str) else one
        spots += [Spot(layer, "mask", head, destination, key) for key in keys]
    if not spots:
        raise RequestError("No edge to knock out; name at least one head (or layer) and one source.")
    return tuple(spots)


def knock_out(
    model: Model,
    task: PairTask,
    edges: Sequence[Change],
    *,
    labels: Sequence[str] = (),
    direction: Direction | Literal["both"] = "noising",
    metric: str | Metric | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Effects:
    """The metric with each set of edges knocked out: of the clean prompts ("noising"), or of the corrupt ones.

    The effect on clean prompts is positive where the edges help; recovery is its share of the gap to the corrupt run.
    """
    for change in edges:
        for spot in change:
            if spot.site != "mask":
                raise RequestError(f"{spot.site} of {spot.node} is no attention edge; make them by attention_edges.")
    return patch_changes(
        model, task, edges, labels=labels, direction=direction, metric=metric, source=_Nothing(), options=options,
        progress=progress,
    )  # fmt: skip


class _Nothing(Source):
    """Knockouts put nothing in place."""

    def values(self, group: Group, blocks: Blocks, base: Recorded, other: Recorded) -> Values:
        return _Unchanged(len(base.batch))


class _Unchanged(Values):
    def __init__(self, prompts: int) -> None:
        self.same_before: Tensor = torch.zeros(prompts, dtype=torch.long)

    def at(self, change: int, site: Site, layer: int) -> Tensor:
        raise LookupError(f"A knockout puts nothing in place of {site} of layer {layer}.")
