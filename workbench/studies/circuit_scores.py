"""Scores of circuits in runs: tables to read and arrays to go on with.

Tables `edge_scores`, `node_scores` and `input_scores` (one row a part, with intervals), and the array `scores`: edges
`[writer, reader]`, nodes, inputs, and those of every prompt. A circuit that a method chose is the table
`circuit_edges` and `kept` in the array; circuits of a sweep are `kept_sweep`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from workbench.circuits import Scores
from workbench.circuits.circuit import Circuit
from workbench.circuits.discovery import Found
from workbench.circuits.graph import Graph
from workbench.errors import RunError
from workbench.runs import Run, RunWriter

_PLAIN = ("method", "task", "metric", "n", "seed", "notes", "seconds", "direction", "ablation")
_ARRAYS: Mapping[str, tuple[str, ...]] = {
    "edges": ("writer", "reader"),
    "nodes": ("writer",),
    "inputs": ("reader",),
    "per_prompt": ("prompt", "writer", "reader"),
    "node_per_prompt": ("prompt", "writer"),
    "input_per_prompt": ("prompt", "reader"),
    "clean": ("prompt",),
    "corrupt": ("prompt",),
}
_KINDS = {"edges": "edge_scores", "nodes": "node_scores", "inputs": "input_scores"}


def write_scores(writer: RunWriter, scores: Scores) -> None:
    """Everything of the scores, and what a search found on its way."""
    for kind, name in _KINDS.items():
        if getattr(scores, kind) is not None:
            writer.table(name, scores.table(kind))  # type: ignore[arg-type]
    held = {name: getattr(scores, name) for name in _ARRAYS}
    variables: dict[str, Any] = {name: (_ARRAYS[name], value) for name, value in held.items() if value is not None}
    about: dict[str, Any] = writer.manifest["circuits"]
    about["scores"] = {name: getattr(scores, name) for name in _PLAIN} | {"work": dict(scores.work)}
    about |= {"method": scores.method, "direction": scores.direction, "ablation": scores.ablation}
    about["notes"] = [*about.get("notes", ()), *scores.notes]
    if isinstance(scores, Found):
        variables |= _found(writer, scores)
    coordinates = {"writer": list(scores.graph.writers), "reader": reader_names(scores.graph)}
    writer.array("scores", xr.Dataset(variables, coords=coordinates))


def _found(writer: RunWriter, found: Found) -> dict[str, Any]:
    """What a search chose: its circuit, those of its sweep, its course."""
    variables: dict[str, Any] = {}
    about: dict[str, Any] = writer.manifest["circuits"]
    if found.circuit is not None:
        writer.table("circuit_edges", circuit_table(found.circuit, found.edges))
        variables["kept"] = (("writer", "reader"), found.circuit.kept)
        about["circuit"] = {"edges": found.circuit.size, "of": found.graph.count, "notes": list(found.circuit.notes)}
    if found.circuits:
        settings = sorted(found.circuits)
        variables["kept_sweep"] = (
            ("setting", "writer", "reader"), np.stack([found.circuits[one].kept for one in settings]),
        )  # fmt: skip
        sweep = [{"setting": one, "edges": found.circuits[one].size, "of": found.graph.count} for one in settings]
        writer.table("sweep", pd.DataFrame(sweep))
    if len(found.log):
        writer.table("course", found.log.reset_index(drop=True))
    for name, values in found.tensors.items():
        label = name.replace(" ", "_")
        variables[f"learned_{label}"] = (tuple(f"{label}_{axis}" for axis in range(values.ndim)), values)
    return variables


def circuit_table(circuit: Circuit, scores: Float[np.ndarray, "writer reader"] | None = None) -> pd.DataFrame:
    """One row an edge that is kept; without scores each counts 1."""
    graph = circuit.graph
    values = circuit.scores if scores is None else scores
    rows = []
    for edge in circuit.edges:
        score = np.nan if values is None else float(values[graph.place(edge)])
        rows.append((edge.source, edge.target, edge.through, 1.0 if np.isnan(score) else score))
    return pd.DataFrame(rows, columns=["source", "target", "through", "score"])


def reader_names(graph: Graph) -> list[str]:
    """`L0H0.q`, `L0.mlp`, `logits`."""
    return [f"{node}.{through}" if through else node for node, through in graph.readers]


def read_scores(run: Run, graph: Graph) -> Scores:
    """The scores of a run, for the model whose graph is given."""
    about = run.manifest.get("circuits", {}).get("scores")
    if about is None or not run.has_array("scores"):
        raise RunError(f"{run.path} is of kind {run.kind} and has no scores; give a run of attribute or discover.")
    data = run.array("scores")
    ours = (list(graph.writers), reader_names(graph))
    if tuple(list(map(str, data[axis].values)) for axis in ("writer", "reader")) != ours:
        raise RunError(f"The scores of {run.path} are of another model's graph; name the model that they were made on.")
    held = {name: np.asarray(data[name].values) for name in _ARRAYS if name in data}
    plain = {name: about[name] for name in _PLAIN if name in about}
    plain["notes"] = tuple(plain.get("notes", ()))
    scores = {"work": about.get("work", {}), **plain, **held}
    if "kept" not in data and "kept_sweep" not in data:
        return Scores(graph, **scores)
    method = str(plain["method"])
    circuit = None
    if "kept" in data:
        circuit = Circuit(graph, _kept(data["kept"]), f"{method}, {plain['task']}", method, scores=held.get("edges"))
    circuits: dict[float, Circuit] = {}
    if "kept_sweep" in data:
        settings = run.table("sweep")["setting"].tolist()
        for setting, kept in zip(settings, _kept(data["kept_sweep"]), strict=True):
            circuits[float(setting)] = Circuit(graph, kept, f"{method} {setting:g}", method)
    return Found(graph, **scores, circuit=circuit, circuits=circuits)


def _kept(values: xr.DataArray) -> Bool[np.ndarray, "*place"]:
    found: np.ndarray[Any, np.dtype[np.bool_]] = np.asarray(values.values, dtype=bool)
    return found
