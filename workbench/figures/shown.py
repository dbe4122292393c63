"""`workbench.show`: the figure of a result, drawn in notebooks by plotly itself, without a server."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from workbench.circuits.effects import Effects
from workbench.circuits.graph import Scores
from workbench.errors import RequestError
from workbench.figures.circuits import circuit_graph, score_map
from workbench.figures.maps import head_map, head_maps
from workbench.figures.patching import patch_maps
from workbench.heads.detection import HeadScores
from workbench.runs import Run
from workbench.tracing import Trace

MOST_MAPS = 12


@singledispatch
def show(result: object, what: str = "", *, dark: bool = False) -> go.Figure:
    """The figure of head scores, a trace, effects of patches, scores of a circuit, or a run.

    `what` narrows it: a detector, the statistic of a trace (its mean over prompts and positions; the first by default),
    "nodes" or "edges" of a circuit's scores. Evaluate it last in a cell; `workbench.figures.caption_of` has its words.
    Jupyter draws it with plotly's own files, offline; programs that only read its HTML would fetch plotly.js.
    """
    del what, dark
    raise RequestError(
        f"There is no figure of {type(result).__name__}; show takes HeadScores, a Trace, Effects, Scores or a Run."
    )


@show.register
def _(result: HeadScores, what: str = "", *, dark: bool = False) -> go.Figure:
    return _maps(result.table, result.detectors, what, dark)


@show.register
def _(result: Trace, what: str = "", *, dark: bool = False) -> go.Figure:
    means = result.means()
    name = what or next(iter(means), "")
    if name not in means:
        known = ", ".join(means) or "none; trace with statistics=[...]"
        raise RequestError(f"This trace has no mean of {name!r} by head; it has {known}.")
    table = means[name].assign(detector=name)
    caption = f"{name}: mean over {len(result.batch)} prompts and all their positions."
    return head_map(table, name, info={"title": name, "caption": caption}, dark=dark)


@show.register
def _(result: Effects, what: str = "", *, dark: bool = False) -> go.Figure:
    del what
    about: dict[str, Any] = {"task": result.task, "metric": result.metric, "n": len(result.clean)}
    about |= {"clean": float(result.clean.mean()), "corrupt": float(result.corrupt.mean())}
    return patch_maps(result.table(), about, dark=dark)


@show.register
def _(result: Scores, what: str = "", *, dark: bool = False) -> go.Figure:
    about = {"task": result.task, "metric": result.metric, "n": result.n, "method": result.method}
    kind = what or ("nodes" if result.nodes is not None else "edges")
    if kind == "nodes":
        return score_map(result.table("nodes"), about, dark=dark)
    if kind == "edges":
        return circuit_graph(result.means("edges"), about, dark=dark)
    raise RequestError(f"No figure of {kind!r}; choose 'nodes' or 'edges'.")


@show.register
def _(result: Run, what: str = "", *, dark: bool = False) -> go.Figure:
    if result.has_table("head_scores"):
        detectors = result.table("detectors") if result.has_table("detectors") else None
        return _maps(result.table("head_scores"), detectors, what, dark)
    about = result.manifest.get("circuits") or {}
    if result.has_table("effects"):
        return patch_maps(result.table("effects"), about, dark=dark)
    if result.has_table("node_scores") and what != "edges":
        return score_map(result.table("node_scores"), about, dark=dark)
    if result.has_table("edge_scores"):
        return circuit_graph(result.table("edge_scores"), about, dark=dark)
    raise RequestError(
        f"The run {result.id} ({result.kind}) has no table that one figure shows (it has {', '.join(result.tables)}); "
        "write its report with workbench.write_report."
    )


def _maps(table: pd.DataFrame, detectors: pd.DataFrame | None, what: str, dark: bool) -> go.Figure:
    scored = [str(name) for name in table.loc[table["value"].notna(), "detector"].unique()]
    if what and what not in scored:
        raise RequestError(f"No scores of {what!r}; there are {', '.join(scored) or 'none'}.")
    names = [what] if what else scored[:MOST_MAPS]
    if detectors is None:
        return head_maps(table, names, dark=dark)
    return head_maps(table, detectors[detectors["detector"].isin(names)], dark=dark)
