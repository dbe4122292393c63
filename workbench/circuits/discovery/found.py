"""What discovery returns: scores on the graph, and the circuit where a method chooses one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from workbench.circuits.circuit import Circuit
from workbench.circuits.graph import Graph, Scores
from workbench.tasks.pairs import PairTask

# (done, of) in steps, edges or layers, whatever the method counts.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Found(Scores):
    """Scores of a discovery method, and what it found on its way.

    `circuit`
        the chosen one, where the method chooses; None for methods that only rank.
    `circuits`
        setting (a threshold) -> its circuit, for methods that sweep.
    `log`
        decisions or the course of training, one row each.
    `tensors`
        what else was learned or measured, by name (constants, gates, baselines).
    """

    circuit: Circuit | None = None
    circuits: Mapping[float, Circuit] = field(default_factory=dict)
    log: pd.DataFrame = field(default_factory=pd.DataFrame)
    tensors: Mapping[str, np.ndarray[Any, np.dtype[Any]]] = field(default_factory=dict)


def course(rows: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """The course of training as a table."""
    return pd.DataFrame(list(rows))


def chosen(graph: Graph, kept: np.ndarray[Any, np.dtype[np.bool_]], method: str, task: PairTask) -> Circuit:
    """A circuit as a method leaves it: nodes that nothing reaches, or that reach nothing, are still in it."""
    return Circuit(graph, kept & graph.exists, name=f"{method}, {task.name}", method=method)
