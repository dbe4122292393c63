"""Patching one edited forward pass at a time: the definition, the oracle of tests, and the way that always works."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.recorded import Metric
from workbench.circuits.spots import Change, Spot
from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.pairs import PairTask
from workbench.tracing import Edit, Model, Trace, patch


def naive_values(
    model: Model, task: PairTask, changes: Sequence[Change], receiving: Batch, source: Batch, metric: Metric
) -> Float[np.ndarray, "change prompt"]:
    """The metric of each change in a whole pass of its own; NaN where a position does not exist.

    A pattern entry is put into the row of the receiving run, so that several spots with entries must not follow on
    each other through layers.
    """
    sites = sorted({spot.place for change in changes for spot in change})
    found = model.trace(source, sites=sites)
    kept = model.trace(receiving, sites=[name for name in sites if name == "pattern"])
    every = torch.arange(len(task))
    values = np.full((len(changes), len(task)), np.nan)
    for number, change in enumerate(changes):
        edits, there = list[Edit](), torch.ones(len(task), dtype=torch.bool)
        for spot in change:
            if spot.site == "mask":
                raise RequestError("Attention knockout has no naive form here; this model's blocks do not run on rows.")
            edit, exists = _edit(spot, task, found, kept)
            edits.append(edit)
            there &= exists
        logits = model.trace(receiving, edits=edits, logits=task.position[:, None].cpu()).logits
        assert logits is not None
        scores = metric(logits[:, 0], every).double().cpu().numpy()
        values[number] = np.where(there.numpy(), scores, np.nan)
    return values


def _edit(spot: Spot, task: PairTask, found: Trace, kept: Trace) -> tuple[Edit, Tensor]:
    """The edit of a spot, and in which prompts its place exists."""
    value = found.site(spot.place, spot.layer)
    heads = None if spot.head is None else [spot.head]
    there = torch.ones(len(task), dtype=torch.bool)
    if spot.position is None:
        return patch(spot.place, value, layer=spot.layer, heads=heads), there
    columns = _columns(task, spot.position)
    there &= columns < (task.clean.starts + task.clean.lengths).cpu()
    chosen = torch.zeros(task.clean.ids.shape, dtype=torch.bool)
    chosen[torch.arange(len(task))[there], columns[there]] = True
    if spot.key is not None:
        own = kept.site("pattern", spot.layer).clone()
        rows = torch.arange(len(task))[there]
        keys = _columns(task, spot.key)[there]
        own[rows, :, columns[there], keys] = value[rows, :, columns[there], keys]
        value = own
    return patch(spot.place, value, layer=spot.layer, heads=heads, positions=chosen), there


def _columns(task: PairTask, position: int | str) -> Tensor:
    return task.roles[position].cpu() if isinstance(position, str) else task.clean.starts.cpu() + position
