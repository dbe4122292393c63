"""Exact scores of edges: the change of the metric when one edge alone is cut, one run an edge and prompt.

The truth that attribution methods approximate ("EActP" of MIB), and what path patching measures with everything
between sender and receiver frozen. Edges into one reader run together, from its layer on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from workbench.circuits.forks import Ablation
from workbench.circuits.graph import Scores
from workbench.circuits.recorded import Metric
from workbench.circuits.trials import Progress, Trials
from workbench.tasks.pairs import Edge, PairTask
from workbench.tracing import Model

# Masks that are handed over at a time.
_MASKS = 256


def exact_edges(
    model: Model,
    task: PairTask,
    *,
    metric: str | Metric | None = None,
    ablation: Ablation | str = "patching",
    edges: Sequence[Edge] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Scores of all edges, or of those named: the clean metric less that with the edge cut, so positive helps.

    For small models, or few edges: the number of runs is edges times prompts.
    """
    began = time.perf_counter()
    trials = Trials(model, task, metric=metric, ablation=ablation)
    graph = trials.graph
    asked = graph.exists if edges is None else np.zeros_like(graph.exists)
    for edge in edges or ():
        asked[graph.place(edge)] = True
    found = np.full((len(task), *graph.exists.shape), np.nan, np.float32)
    # Column by column, so that edges into one reader follow on each other.
    readers, writers = np.nonzero(asked.T)
    for first in range(0, len(writers), _MASKS):
        one, two = writers[first : first + _MASKS], readers[first : first + _MASKS]
        masks = np.repeat(graph.exists[None], len(one), axis=0)
        masks[np.arange(len(one)), one, two] = False
        found[:, one, two] = trials.clean[:, None] - trials.values(masks).T
        if progress is not None:
            progress(first + len(one), len(writers))
    return Scores(
        graph, "exact", task.name, trials.metric, len(task), seed,
        edges=found.astype(np.float64).mean(0), per_prompt=found, ablation=trials.ablation,
        clean=trials.clean, corrupt=trials.baseline, seconds=time.perf_counter() - began,
        work={"forwards": trials.forwards, "backwards": 0, "exact": len(writers) * len(task)},
    )  # fmt: skip
