"""Scores, or a series of circuits, against a known circuit: true and false positive rates, and the area under them.

Between points nothing is assumed: the area is that of the staircase that steps up only where a point was reached
(pessimistic and monotone, as in ACDC, Conmy et al. 2023, arXiv 2304.14997). Scores that tie come in together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.circuits.circuit import Circuit
from workbench.circuits.graph import Graph, Scores
from workbench.errors import RequestError

Of = Literal["edges", "nodes"]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Roc:
    """Points from (0, 0) to (1, 1), both rates rising, and the area under their staircase."""

    of: str
    fpr: Float[np.ndarray, " point"]
    tpr: Float[np.ndarray, " point"]

    @property
    def auc(self) -> float:
        return float((np.diff(self.fpr) * self.tpr[:-1]).sum())

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"of": self.of, "fpr": self.fpr, "tpr": self.tpr, "auc": self.auc})


def roc(found: Scores | Iterable[Circuit], truth: Circuit, of: Of | str = "edges") -> Roc:
    """Edges, or nodes (heads and MLPs), of a known circuit by score, the largest size first, or by circuits.

    A node's score is the method's own, or where it has none the largest of the edges that leave it. Refuses a truth
    that holds everything or nothing.
    """
    if of not in ("edges", "nodes"):
        raise RequestError(f"of={of!r} is unknown; choose 'edges' or 'nodes'.")
    graph = truth.graph
    right = _parts(truth, of)
    if not comparable(truth, of):
        raise RequestError(f"The known circuit {truth.name} has {'all' if right.all() else 'none'} of the {of}.")
    if isinstance(found, Scores):
        return _pareto(of, *_by_threshold(_sizes(found, graph, of), right))
    kept = np.stack([_parts(one, of) for one in found])
    return _pareto(of, kept[:, ~right].mean(1), kept[:, right].mean(1))


def comparable(truth: Circuit, of: Of | str) -> bool:
    """Whether some of the edges (nodes) are in the known circuit, and some are not."""
    right = _parts(truth, of)
    return bool(right.any() and not right.all())


def _pareto(of: str, fpr: Float[np.ndarray, " point"], tpr: Float[np.ndarray, " point"]) -> Roc:
    """Points that no other one beats, with both ends."""
    fpr, tpr = np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], tpr, [1.0]])
    order = np.lexsort((tpr, fpr))
    fpr, tpr = fpr[order], np.maximum.accumulate(tpr[order])
    last = np.append(np.diff(fpr) > 0, True)
    return Roc(of, np.concatenate([[0.0], fpr[last]]), np.concatenate([[0.0], tpr[last]]))


def _parts(circuit: Circuit, of: str) -> Bool[np.ndarray, " part"]:
    if of == "edges":
        return np.asarray(circuit.kept[circuit.graph.exists])
    # The embedding is part of every circuit.
    return circuit.writers[1:]


def _sizes(scores: Scores, graph: Graph, of: str) -> Float[np.ndarray, " part"]:
    if of == "edges":
        if scores.edges is None:
            raise RequestError(f"{scores.method} has no scores of edges; compare its nodes.")
        return np.asarray(np.nan_to_num(np.abs(scores.edges[graph.exists])))
    if scores.nodes is not None:
        return np.asarray(np.nan_to_num(np.abs(scores.nodes[1:])))
    if scores.edges is None:
        raise RequestError(f"{scores.method} has scores of neither edges nor nodes.")
    return np.asarray(np.nan_to_num(np.abs(scores.edges[1:])).max(1))


def _by_threshold(sizes: Float[np.ndarray, " part"], right: Bool[np.ndarray, " part"]) -> tuple[Array, Array]:
    """False and true positive rates of what is kept at every threshold that makes a difference."""
    order = np.argsort(-sizes, kind="stable")
    ends = np.append(np.diff(sizes[order]) != 0, True)
    true = np.cumsum(right[order])[ends] / right.sum()
    false = np.cumsum(~right[order])[ends] / (~right).sum()
    return false, true
