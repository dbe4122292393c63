"""Evaluating what methods found: faithfulness over size beside random circuits, MIB's areas, recovery of a known one.

Scores make circuits of MIB's shares of edges, ranked by size (for CMD) and with their sign (for CPR); circuits are
taken as they are. All run together on the task, everything outside of them replaced, and each is compared with random
circuits of its size. What goes further is beside this: `completeness`, `minimality`, `hypotheses`, `overlap`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.circuits.circuit import Circuit, Draw, How, ranking, top
from workbench.circuits.faithfulness import FRACTIONS, AreaIntervals, area_intervals, faithfulness
from workbench.circuits.forks import Ablation
from workbench.circuits.graph import Graph, Scores
from workbench.circuits.inference import gap_refusal
from workbench.circuits.recorded import Metric
from workbench.circuits.roc import Of, Roc, comparable, roc
from workbench.circuits.trials import Progress, Trials
from workbench.errors import RequestError
from workbench.tasks.pairs import KnownCircuit, PairTask
from workbench.tracing import Model

Array = np.ndarray[Any, np.dtype[np.float64]]
Ranking = Literal["absolute", "signed", "given"]
Found = Scores | Circuit


@dataclass(frozen=True, eq=False)
class Point:
    """A circuit of a method: the share of edges that was asked for, and how its edges were ranked."""

    method: str
    ranking: Ranking
    fraction: float
    circuit: Circuit


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metric of every circuit, and of the random ones of its size, on every prompt.

    `clean` is the metric with everything kept, `baseline` with nothing; `random_values` is `[point, draw, prompt]`.
    `rocs` holds (method, curve) where a known circuit was compared with.
    """

    task: str
    metric: str
    ablation: str
    seed: int
    points: tuple[Point, ...]
    values: Float[np.ndarray, "point prompt"]
    random_values: Float[np.ndarray, "point draw prompt"]
    clean: Float[np.ndarray, " prompt"]
    baseline: Float[np.ndarray, " prompt"]
    rocs: tuple[tuple[str, Roc], ...] = ()
    forwards: int = 0
    notes: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.clean)

    @property
    def refusal(self) -> str:
        """Why faithfulness is NaN throughout; empty where it is not."""
        return gap_refusal(self.clean, self.baseline)

    def curve(self) -> pd.DataFrame:
        """One row a circuit: share of edges asked for, edges and heads kept, faithfulness (`value`) with its interval,
        the metric itself, and `random_as_good`: the share of random circuits that are as near to 1."""
        found = faithfulness(self.values, self.clean, self.baseline, self.seed)
        frame = self._places().assign(value=found.value + 0.0, low=found.low, high=found.high)
        frame["measured"] = self.values.mean(1)
        if self.random_values.shape[1]:
            drawn = self._random_faithfulness()
            # As near up to rounding.
            off = np.abs(1 - drawn) <= np.abs(1 - found.value)[:, None] + 1e-6
            frame["random_as_good"] = np.where(np.isnan(drawn).all(1), np.nan, off.mean(1))
        return self._about(frame).assign(reason=self.refusal)

    def random(self) -> pd.DataFrame:
        """One row a circuit: mean faithfulness of the random ones of its size (`value`) and their full range."""
        if not self.random_values.shape[1]:
            return pd.DataFrame()
        drawn = self._random_faithfulness()
        frame = self._places().assign(value=drawn.mean(1), low=drawn.min(1), high=drawn.max(1), n=drawn.shape[1])
        return frame.assign(task=self.task, metric=self.metric, ablation=self.ablation, seed=self.seed)

    def summary(self) -> pd.DataFrame:
        """One row a method: CPR (edges ranked with their sign) and CMD (by size) with intervals, the random circuits'
        own, and areas under ROC curves. NaN for circuits that are no curve."""
        rows = []
        for method in dict.fromkeys(point.method for point in self.points):
            row: dict[str, Any] = {"method": method}
            for name, order in (("cpr", "signed"), ("cmd", "absolute")):
                own = self._rows(method, order)
                found = self.areas(method, order) if len(own) > 1 else None
                for side in ("value", "low", "high"):
                    known = np.nan if found is None else float(getattr(getattr(found, side), name))
                    row[name if side == "value" else f"{name}_{side}"] = known
                row[f"{name}_random"] = self._random_area(own, name) if len(own) > 1 else np.nan
            for label, curve in self.rocs:
                if label == method:
                    row[f"auc_{curve.of}"] = curve.auc
            rows.append(row)
        return self._about(pd.DataFrame(rows)).assign(reason=self.refusal)

    def areas(self, method: str, order: Ranking | str) -> AreaIntervals:
        """CPR and CMD of one curve, whichever its ranking; MIB reports CPR of signed and CMD of absolute ones."""
        own = self._rows(method, order)
        if len(own) < 2:
            raise RequestError(f"{method}, {order}, is no curve: it has {len(own)} circuits. Evaluate scores.")
        return area_intervals(self._fractions(own), self.values[own], self.clean, self.baseline, self.seed)

    def roc(self) -> pd.DataFrame:
        """Points of all ROC curves: method, of ("edges" or "nodes"), fpr, tpr, auc."""
        parts = [curve.table().assign(method=method) for method, curve in self.rocs]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def per_prompt(self) -> pd.DataFrame:
        """One row a circuit and prompt: the metric, and that of the model and of nothing."""
        places = self._places()
        long = places.loc[places.index.repeat(self.n)].reset_index(drop=True)
        ends = {"clean": np.tile(self.clean, len(places)), "baseline": np.tile(self.baseline, len(places))}
        return long.assign(prompt=np.tile(np.arange(self.n), len(places)), measured=self.values.reshape(-1), **ends)

    def circuit(self, method: str, fraction: float, order: Ranking | str = "absolute") -> Circuit:
        """The circuit of a point."""
        for place in self._rows(method, order):
            if np.isclose(self.points[place].fraction, fraction):
                return self.points[place].circuit
        raise RequestError(f"{method}, {order}, has no circuit of a share of {fraction:g} of the edges.")

    def _rows(self, method: str, order: str) -> list[int]:
        return [place for place, one in enumerate(self.points) if one.method == method and one.ranking == order]

    def _fractions(self, rows: Sequence[int]) -> Array:
        return np.array([self.points[row].fraction for row in rows])

    def _random_faithfulness(self) -> Float[np.ndarray, "point draw"]:
        if self.refusal:
            return np.full(self.random_values.shape[:2], np.nan)
        gained = (self.random_values - self.baseline).mean(2)
        found: Array = gained / (self.clean - self.baseline).mean()
        return found

    def _random_area(self, rows: Sequence[int], name: str) -> float:
        if not self.random_values.shape[1]:
            return float("nan")
        mean = self.random_values[list(rows)].mean(1)
        value = area_intervals(self._fractions(rows), mean, self.clean, self.baseline, self.seed).value
        return float(getattr(value, name))

    def _places(self) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "method": [point.method for point in self.points],
                "ranking": [point.ranking for point in self.points],
                "fraction": [point.fraction for point in self.points],
                "edges": [point.circuit.size for point in self.points],
                "nodes": [len(point.circuit.nodes) for point in self.points],
            }
        )

    def _about(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(task=self.task, metric=self.metric, ablation=self.ablation, n=self.n, seed=self.seed)


def evaluate(
    model: Model,
    task: PairTask,
    found: Found | Sequence[Found] | Mapping[str, Found],
    *,
    fractions: Sequence[float] = FRACTIONS,
    how: How | str = "top",
    metric: str | Metric | None = None,
    ablation: Ablation | str = "patching",
    random: int = 5,
    draw: Draw | str = "matched",
    known: KnownCircuit | Circuit | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Run what methods found on a task (best on other prompts than those that it was found on).

    Args:
        found: scores of edges or nodes, or circuits; several as a sequence or by name.
        fractions: shares of edges of the circuits made of scores; MIB's by default.
        how: "top" or "greedy" selection; both are pruned afterwards.
        ablation: what stands in for everything outside: "patching" (the corrupt prompt's), "mean" or "zero".
        random: random circuits for each circuit, drawn as `Circuit.random_like` says.
        known: a known circuit of this very model to draw ROC curves against.
    """
    if random < 0:
        raise RequestError(f"random={random} circuits; give 0 or more.")
    if list(fractions) != sorted(set(fractions)) or any(not 0 < one <= 1 for one in fractions):
        raise RequestError(f"fractions={list(fractions)} must rise from above 0 to at most 1.")
    trials = Trials(model, task, metric=metric, ablation=ablation)
    named = _named(found)
    points = tuple(point for name, one in named.items() for point in _points(name, one, trials.graph, fractions, how))
    truth = Circuit.from_known(trials.graph, known) if isinstance(known, KnownCircuit) else known
    rocs = tuple(_rocs(named, truth)) if truth is not None else ()
    drawn = [point.circuit.random_like(seed + number, draw) for point in points for number in range(random)]
    masks: list[Bool[np.ndarray, "writer reader"]] = [point.circuit.kept for point in points]
    values = trials.values(np.stack([*masks, *(one.kept for one in drawn)]), progress)
    return Evaluation(
        task.name, trials.metric, trials.ablation, seed, points, values[: len(points)],
        values[len(points) :].reshape(len(points), random, len(task)), trials.clean, trials.baseline, rocs,
        trials.forwards, (f"random circuits: {draw}", f"selection: {how}"),
    )  # fmt: skip


def _named(found: Found | Sequence[Found] | Mapping[str, Found]) -> dict[str, Found]:
    """By name; equal names are numbered."""
    if isinstance(found, Scores | Circuit):
        found = [found]
    if isinstance(found, Mapping):
        return dict(found)
    named: dict[str, Found] = {}
    for one in found:
        name = one.method if isinstance(one, Scores) else one.name
        number = sum(other.split(" #")[0] == name for other in named)
        named[f"{name} #{number + 1}" if number else name] = one
    if not named:
        raise RequestError("There is nothing to evaluate; give scores or circuits.")
    return named


def _points(name: str, found: Found, graph: Graph, fractions: Sequence[float], how: How | str) -> Iterator[Point]:
    if found.graph.writers != graph.writers or found.graph.readers != graph.readers:
        raise RequestError(f"{name} is of a model of another shape.")
    if isinstance(found, Circuit):
        yield Point(name, "given", found.size / graph.count, found)
        return
    if how == "threshold":
        raise RequestError("how='threshold' gives no circuits of given sizes; choose 'top' or 'greedy'.")
    for order in ("absolute", "signed"):
        for fraction in fractions:
            if found.edges is not None:
                chosen = Circuit.from_scores(found, int(fraction * graph.count), how, signed=order == "signed")
            else:
                chosen = _of_nodes(found, fraction, order == "signed")
            yield Point(name, "signed" if order == "signed" else "absolute", fraction, chosen)


def _of_nodes(scores: Scores, fraction: float, signed: bool) -> Circuit:
    """A share of the scored nodes, and all edges among them, as MIB makes circuits of node scores."""
    if scores.nodes is None:
        raise RequestError(f"{scores.method} has scores of neither edges nor nodes.")
    values = ranking(scores.nodes[None], signed)
    kept = top(values, int(fraction * int((~np.isnan(scores.nodes)).sum())))[0]
    names = [node for node, there in zip(scores.graph.writers, kept, strict=True) if there]
    unscored = [node for node, score in zip(scores.graph.writers, scores.nodes, strict=True) if np.isnan(score)]
    return Circuit.from_nodes(scores.graph, [*names, *unscored], scores.method, scores.method).pruned()


def _rocs(named: Mapping[str, Found], truth: Circuit) -> Iterator[tuple[str, Roc]]:
    kinds: tuple[Of, ...] = ("edges", "nodes")
    for name, found in named.items():
        for of in kinds:
            if not comparable(truth, of):
                continue
            if isinstance(found, Circuit):
                yield name, roc([found], truth, of)
            elif found.edges is not None or (of == "nodes" and found.nodes is not None):
                yield name, roc(found, truth, of)
