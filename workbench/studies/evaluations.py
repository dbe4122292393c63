"""Evaluation of circuits as a run: how faithful they are by size, beside random ones, stable, and like a known one.

1. `baseline`: the pairs, which by default are others than those that the circuits were found on.
2. `evaluate:<name>`: tables `faithfulness` (one row a circuit), `random_circuits`, `prompt_faithfulness`, `roc` (where
   a circuit of this task is known in this very model) and `measures` (CPR, CMD, areas under ROC, stability). Of the
   first method, `circuit_edges` are those of the smallest circuit that is faithful enough.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.circuits import Graph, Scores
from workbench.circuits.circuit import Circuit
from workbench.circuits.discovery import Found
from workbench.circuits.evaluation import Evaluation, evaluate
from workbench.circuits.exchange import read_mib
from workbench.circuits.faithfulness import FRACTIONS
from workbench.circuits.overlap import stability
from workbench.errors import RequestError
from workbench.runs import Run, RunWriter
from workbench.studies.circuit_scores import circuit_table, read_scores
from workbench.studies.pairs import baseline, describe
from workbench.studies.survey import Reporter, Silent, model_facts
from workbench.tasks.known_circuits import KNOWN_CIRCUITS
from workbench.tasks.pairs import Edge, KnownCircuit, PairTask
from workbench.tracing import Model

KIND = "evaluate"
# A circuit that holds this much of the gap is called faithful; the smallest such one is kept edge by edge.
FAITHFUL = 0.8
# The share of edges whose circuit is resampled for its stability.
STABILITY_AT = 0.05
# Of fewer pairs an interval is no more than the pairs themselves.
FEWEST = 3
Loaded = Mapping[str, Scores | Circuit]


@dataclass(frozen=True)
class EvaluationSettings:
    """Shares of edges, what stands in for the rest, random circuits a circuit, resamples for stability."""

    fractions: tuple[float, ...] = FRACTIONS
    how: str = "top"
    metric: str | None = None
    ablation: str = "patching"
    random: int = 5
    draw: str = "matched"
    resamples: int = 50
    seed: int = 0

    def check(self) -> None:
        """Refuse what no model can be asked."""
        if self.random < 0 or self.resamples < 0:
            raise RequestError(f"random={self.random}, resamples={self.resamples}: give 0 or more.")
        if list(self.fractions) != sorted(set(self.fractions)) or any(not 0 < one <= 1 for one in self.fractions):
            raise RequestError(f"fractions {list(self.fractions)} must rise, from above 0 to at most 1.")

    def stated(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in plain.items() if value is not None}


def load_found(model: Model, sources: Sequence[str | Path]) -> dict[str, Scores | Circuit]:
    """Scores of runs, their circuits where they chose one, and circuits of MIB's JSON files, by method or file name."""
    graph = Graph.of(model)
    found: dict[str, Scores | Circuit] = {}

    def keep(name: str, one: Scores | Circuit) -> None:
        number = sum(other.split(" #")[0] == name for other in found)
        found[f"{name} #{number + 1}" if number else name] = one

    for source in sources:
        if str(source).endswith(".json"):
            keep(Path(source).stem, _from_file(graph, source))
            continue
        scores = read_scores(Run.open(source), graph)
        if scores.edges is not None or scores.nodes is not None:
            keep(scores.method, scores)
        if isinstance(scores, Found) and scores.circuit is not None:
            keep(f"{scores.method}, its circuit", scores.circuit)
    if not found:
        raise RequestError("There is nothing to evaluate; give runs of attribute or discover, or JSON files of MIB.")
    return found


def _from_file(graph: Graph, source: str | Path) -> Scores | Circuit:
    """A circuit; or scores, where a file marks no edge, or all of them."""
    circuit = read_mib(graph, source)
    if circuit.scores is None or np.isnan(circuit.scores[graph.exists]).any() or 0 < circuit.size < graph.count:
        return circuit
    return Scores(graph, Path(source).stem, "", "", 0, 0, edges=circuit.scores)


def known_for(model: Model, task: PairTask) -> KnownCircuit | None:
    """The circuit that was published for this task and this very model."""
    name = model.source.name.rsplit("/", 1)[-1]
    listed = [*KNOWN_CIRCUITS.get(task.name, ()), *([task.circuit] if task.circuit is not None else [])]
    return next((one for one in listed if one.model == name), None)


def count_steps(found: Loaded) -> int:
    """Steps that a run will tell its reporter of."""
    return 1 + len(found)


def evaluation_run(
    model: Model,
    task: PairTask,
    found: Loaded,
    path: str | Path,
    *,
    settings: EvaluationSettings | None = None,
    sources: Sequence[str] = (),
    known: KnownCircuit | Circuit | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    command: str | None = None,
) -> Run:
    """Evaluate scores and circuits on a task into a run of kind `evaluate`; continues one that was interrupted.

    `known` is the circuit to draw ROC curves against (by default the published one of this model, where there is one);
    `sources` say where `found` comes from.
    """
    settings, told = settings or EvaluationSettings(), reporter or Silent()
    settings.check()
    known = known_for(model, task) if known is None else known
    stated = settings.stated() | {"task": task.name, "pairs": len(task), "found": list(found), "sources": list(sources)}
    with RunWriter.open(
        path, kind=KIND, title=f"Circuits of {task.name} in {model.source.name}", overwrite=overwrite, command=command,
        fingerprint={
            "model": model_facts(model), "settings": stated, "pairs": task.hash, "kind": KIND,
            "found": [_digest(one) for one in found.values()],
        },
    ) as writer:  # fmt: skip
        describe(writer, model, task, stated)
        about: dict[str, Any] = writer.manifest["circuits"]
        about |= {
            "what": KIND,
            "method": ", ".join(found),
            "ablation": _WORDS.get(settings.ablation, settings.ablation),
        }
        about |= {"compared": known is not None}
        if isinstance(known, KnownCircuit):
            about["known_circuit"] = {"model": known.model, "paper": known.paper}
        baseline(model, task, writer, told, settings.metric)
        for number, (name, one) in enumerate(found.items()):
            step = f"evaluate:{name}"
            kept = writer.has(step)
            told.step(step, "circuits of all sizes, and random ones", kept)
            if kept:
                continue
            began = time.monotonic()
            made = evaluate(
                model, task, {name: one}, fractions=settings.fractions, how=settings.how, metric=settings.metric,
                ablation=settings.ablation, random=settings.random, draw=settings.draw, known=known, seed=settings.seed,
                progress=told.advance,
            )  # fmt: skip
            _write(writer, number, made, measures(made, one, settings))
            if number == 0:
                _keep_circuit(writer, made, one)
            writer.done(step, seconds=time.monotonic() - began)
        return writer.finish()


_WORDS = {
    "patching": "activations of the corrupt prompt",
    "mean": "means over the reference prompts",
    "zero": "zero",
}


def _digest(one: Scores | Circuit) -> float:
    """Tells other scores from these, should a run go on with other files of the same names."""
    if isinstance(one, Circuit):
        return float(np.flatnonzero(one.kept).sum())
    values = one.edges if one.edges is not None else one.nodes
    return 0.0 if values is None else float(np.nansum(np.abs(values)))


def _write(writer: RunWriter, number: int, made: Evaluation, told: pd.DataFrame) -> None:
    part = str(number)
    curve = made.curve()
    if made.n < FEWEST:
        curve = curve.assign(low=np.nan, high=np.nan)
    writer.table(f"faithfulness/{part}", curve)
    writer.table(f"prompt_faithfulness/{part}", made.per_prompt())
    writer.table(f"measures/{part}", told)
    random, roc = made.random(), made.roc()
    if len(random):
        writer.table(f"random_circuits/{part}", random)
    if len(roc):
        writer.table(f"roc/{part}", roc)
    about = writer.manifest["circuits"]
    about["forwards"] = about.get("forwards", 0) + made.forwards
    about["notes"] = list(dict.fromkeys([*about.get("notes", ()), *made.notes]))
    if made.refusal:
        about["refusal"] = made.refusal


def measures(made: Evaluation, one: Scores | Circuit, settings: EvaluationSettings) -> pd.DataFrame:
    """One row a measure of a method: value, interval (of 3 pairs or more), and what random circuits have."""
    rows: list[dict[str, Any]] = []
    for row in made.summary().to_dict("records"):
        for name in ("cpr", "cmd"):
            if not np.isnan(row[name]):
                beside = f"random circuits {row[f'{name}_random']:.3f}" if settings.random else ""
                low, high = (row[f"{name}_low"], row[f"{name}_high"]) if made.n >= FEWEST else (np.nan, np.nan)
                rows.append(_measure(row["method"], name, row[name], low, high, beside))
        areas = [f"auc_{of}" for of in ("edges", "nodes") if not np.isnan(row.get(f"auc_{of}", np.nan))]
        rows += [_measure(row["method"], area, row[area], np.nan, np.nan, "0.5 by chance") for area in areas]
    if isinstance(one, Scores) and one.per_prompt is not None and len(one.per_prompt) > 1 and settings.resamples > 1:
        n = max(1, int(STABILITY_AT * one.graph.count))
        found = stability(one, n, settings.how, resamples=settings.resamples, seed=settings.seed).table().iloc[0]
        empty = "no edge is left of it; " if not found["edges"] else ""
        note = (
            f"{empty}{n} edges, {settings.resamples} resamples of the {one.n} prompts they were scored on; by chance "
            f"{found['by_chance']:.3f}; {'stable' if found['stable'] else 'not stable'} (pairs {found['pairwise']:.2f})"
        )
        method = next(point.method for point in made.points)
        low, high = (found["low"], found["high"]) if one.n >= FEWEST else (np.nan, np.nan)
        rows.append(_measure(method, "stability_jaccard", found["jaccard"], low, high, note))
    if not rows:
        rows.append(_measure(made.points[0].method, "edges", made.points[0].circuit.size, np.nan, np.nan, ""))
    return pd.DataFrame(rows)


def _measure(method: str, name: str, value: float, low: float, high: float, note: str) -> dict[str, Any]:
    return {
        "method": method, "measure": name, "value": float(value), "low": float(low), "high": float(high), "note": note,
    }  # fmt: skip


def chosen_point(curve: pd.DataFrame) -> pd.Series[Any]:
    """The smallest circuit by size (or given) that is faithful enough, else the most faithful below the whole."""
    rows = curve[curve["ranking"].isin(["absolute", "given"])].sort_values("fraction")
    # The whole model is no finding.
    below = rows[rows["fraction"] < 1] if (rows["fraction"] < 1).any() else rows
    enough = below[below["value"] >= FAITHFUL]
    if len(enough):
        return enough.iloc[0]
    return below.loc[below["value"].idxmax()] if below["value"].notna().any() else below.iloc[-1]


def _keep_circuit(writer: RunWriter, made: Evaluation, one: Scores | Circuit) -> None:
    """The edges of the circuit to show and to export."""
    point = chosen_point(made.curve())
    circuit = made.circuit(str(point["method"]), float(point["fraction"]), str(point["ranking"]))
    if circuit.size:
        writer.table("circuit_edges", circuit_table(circuit, one.edges if isinstance(one, Scores) else None))
    writer.manifest["circuits"]["circuit"] = {
        "method": str(point["method"]), "edges": circuit.size, "of": circuit.graph.count,
        "fraction": float(point["fraction"]), "ranking": str(point["ranking"]), "faithfulness": float(point["value"]),
    }  # fmt: skip


def kept_circuit(run: Run, graph: Graph) -> Circuit:
    """The circuit of a run's table `circuit_edges`, with its scores."""
    if not run.has_table("circuit_edges"):
        raise RequestError(f"{run.path} keeps no circuit: not one edge was left of it.")
    kept, scores = np.zeros_like(graph.exists), np.full(graph.exists.shape, np.nan)
    for row in run.table("circuit_edges").to_dict("records"):
        where = graph.place(Edge(row["source"], row["target"], row["through"]))
        kept[where], scores[where] = True, row["score"]
    about = run.manifest["circuits"]
    return Circuit(graph, kept, str(about["task"]), str(about.get("circuit", {}).get("method", "")), scores=scores)
