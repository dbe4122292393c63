"""What a report says of runs about circuits: patches, scores of nodes and edges, circuits and how good they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from workbench.figures import (
    circuit_graph,
    contribution_bars,
    faithfulness_curve,
    has_map,
    patch_maps,
    point_chart,
    roc_curve,
    score_map,
)
from workbench.figures.patching import measured
from workbench.figures.text import interval, number, probability, readable, signed
from workbench.reports.circuit_sentences import WHOLE, known_circuit
from workbench.reports.circuit_summary import places
from workbench.reports.source import RunLike, frame

SHOWN = 20
POINTS = 12
EXAMPLES = 3
Plan = tuple[str, str, Callable[[bool], Any]]
_WORDS = {"denoising": "Restored", "noising": "Broken"}


@dataclass(frozen=True)
class Cells:
    """A table as texts: heads of its columns, and rows; the first column names."""

    title: str
    intro: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class CircuitsView:
    """A run about circuits as texts; `figures` are ids in their order, `sections` the page's anchors."""

    title: str
    intro: str
    figures: tuple[str, ...]
    tables: tuple[Cells, ...]
    examples: Cells | None
    notes: tuple[str, ...]
    sections: tuple[tuple[str, str], ...]


def circuits_view(run: RunLike) -> CircuitsView | None:
    """The circuits of a run; None where it is about something else."""
    about = run.manifest.get("circuits")
    if not about:
        return None
    examples = _examples(run)
    sections = [("circuits", "Circuit"), *([("pairs", "Prompts")] if examples else [])]
    what = str(about.get("what", ""))
    return CircuitsView(
        title=_TITLES.get(what, "Circuits"),
        intro=_intro(about),
        figures=tuple(name for _, name, _ in circuit_charts(run)),
        tables=tuple(_tables(run)),
        examples=examples,
        notes=tuple(_notes(run, about)),
        sections=tuple(sections),
    )


_TITLES = {
    "patch": "What patches do",
    "attribute": "Scores of nodes and edges",
    "discover": "What was found",
    "evaluate": "How good the circuit is",
}


def circuit_charts(run: RunLike) -> Iterator[Plan]:
    """(part, figure id, how to draw it) for all that the run's tables allow."""
    about = run.manifest.get("circuits")
    if not about:
        return
    effects = frame(run, "effects")
    if effects is not None:
        yield from _patch_charts(effects, about, frame(run, "positions"))
    nodes, edges = frame(run, "node_scores"), frame(run, "edge_scores")
    curve, roc = frame(run, "faithfulness"), frame(run, "roc")
    if curve is not None:
        yield "faithfulness", "faithfulness", partial(_faithfulness, curve, about, frame(run, "random_circuits"))
    if nodes is not None and nodes["node"].nunique() > 1:
        yield "scores", "node-map", partial(_nodes, nodes, about, "score of the node")
    elif edges is not None:
        yield "scores", "node-map", partial(_nodes, outgoing(edges), about, "sum of the outgoing edges' scores")
    circuit = frame(run, "circuit_edges")
    if circuit is not None:
        edges = circuit
    if edges is not None:
        yield "graph", "circuit-graph", partial(_graph, edges, about, _group(run))
    contributions = frame(run, "contributions")
    if contributions is not None:
        yield "contributions", "contributions", partial(_bars, contributions, about)
    if roc is not None:
        yield "roc", "roc", partial(_roc, roc, about)


def outgoing(edges: pd.DataFrame) -> pd.DataFrame:
    """Each node's score as the sum over its outgoing edges."""
    return edges.groupby("source", sort=False)["score"].sum().rename_axis("node").reset_index()


def _patch_charts(effects: pd.DataFrame, about: Mapping[str, Any], tokens: pd.DataFrame | None) -> Iterator[Plan]:
    by = "receiver" if "receiver" in effects else "site"
    for index, (_, rows) in enumerate(effects.groupby(by, sort=False)):
        if has_map(rows):
            yield "patches", f"patch-map-{index}", partial(_map, rows, about, tokens)
        # Positions of a residual stream are told by the map; heads have intervals worth seeing.
        if not has_map(rows) or rows["head"].notna().any():
            yield "patches", f"patch-points-{index}", partial(_points, rows, about)


def _map(rows: pd.DataFrame, about: Mapping[str, Any], tokens: pd.DataFrame | None, dark: bool) -> Any:
    return patch_maps(rows, about, tokens=tokens, dark=dark)


def _points(rows: pd.DataFrame, about: Mapping[str, Any], dark: bool) -> Any:
    measure = "recovery" if rows["recovery"].notna().any() else "effect"
    chosen = strongest_places(rows, measure, POINTS)
    if measure == "effect":
        chosen = chosen.assign(low=chosen["effect_low"], high=chosen["effect_high"])
    chosen = chosen.assign(
        caption=f"The {chosen['place'].nunique()} strongest of {places(rows).nunique()} places. {measured(about)}",
        patched=chosen["direction"].map({"denoising": "clean into corrupt", "noising": "corrupt into clean"}),
    )
    title = "Share of the gap" if measure == "recovery" else "Change of the metric"
    return point_chart(chosen, value=measure, label="place", group="patched", title=title, dark=dark)


def _faithfulness(curve: pd.DataFrame, about: Mapping[str, Any], random: pd.DataFrame | None, dark: bool) -> Any:
    return faithfulness_curve(curve, about, random=random, dark=dark)


def _nodes(nodes: pd.DataFrame, about: Mapping[str, Any], of: str, dark: bool) -> Any:
    return score_map(nodes, about, of=of, dark=dark)


def _graph(edges: pd.DataFrame, about: Mapping[str, Any], group: int, dark: bool) -> Any:
    return circuit_graph(edges, about, group=group, dark=dark)


def _bars(parts: pd.DataFrame, about: Mapping[str, Any], dark: bool) -> Any:
    return contribution_bars(parts, about, dark=dark)


def _roc(points: pd.DataFrame, about: Mapping[str, Any], dark: bool) -> Any:
    return roc_curve(points, about, dark=dark)


def _group(run: RunLike) -> int:
    model = run.manifest.get("model", {})
    heads, kv_heads = model.get("heads"), model.get("kv_heads")
    return int(heads) // int(kv_heads) if heads and kv_heads else 1


def strongest_places(rows: pd.DataFrame, measure: str, most: int) -> pd.DataFrame:
    """Rows of the places with the largest value in any direction, the largest first."""
    named = rows.assign(place=places(rows), size=rows[measure].abs())
    order = named.groupby("place")["size"].max().nlargest(most).index
    rank = {place: at for at, place in enumerate(order)}
    chosen = named[named["place"].isin(rank)]
    return chosen.assign(at=chosen["place"].map(rank)).sort_values(["at", "direction"]).drop(columns=["at", "size"])


def _intro(about: Mapping[str, Any]) -> str:
    what = about.get("what")
    if what == "patch":
        told = (
            "An activation of one prompt of a pair is put into the run of the other, one place at a time, and "
            "everything after it is computed anew. Restored: a clean activation in the corrupt run (denoising; what is "
            "sufficient). Broken: a corrupt one in the clean run (noising; what is necessary). Shares are ratios of "
            "means and are not clipped: a part that works against the task is below 0."
        )
        if about.get("receivers"):
            form = {
                "wang": "other heads stay as they are and MLPs on the way are computed anew",
                "strict": "everything on the way stays as it is",
            }[str(about.get("form", "wang"))]
            told += f" Only the path from each part to {', '.join(about['receivers'])} is patched: {form}."
        return told
    if what == "evaluate":
        return (
            "The model runs on the edges of a circuit alone; what enters everywhere else is replaced by "
            f"{about.get('ablation') or 'that of the corrupt prompt'}. Circuits of all sizes are made from the scores, "
            "by their size and by their sign, and stand beside random ones with as many edges between the same layers."
        )
    return (
        "Scores are positive where a part helps the task, whatever the method. An edge is what one part writes, as "
        "read by one input of another; query heads and key/value heads are separate nodes."
    )


def _tables(run: RunLike) -> Iterator[Cells]:
    effects = frame(run, "effects")
    if effects is not None:
        by = "receiver" if "receiver" in effects else "site"
        for name, rows in effects.groupby(by, sort=False):
            yield _effects_table(str(name), rows)
    for name, key in (("edge_scores", "edges"), ("node_scores", "nodes")):
        scores = frame(run, name)
        if scores is not None:
            yield _scores_table(key, scores)
    curve = frame(run, "faithfulness")
    if curve is not None:
        yield _curve_table(curve, frame(run, "random_circuits"))
    measures = frame(run, "measures")
    if measures is not None:
        yield _measures_table(measures)


def _effects_table(name: str, rows: pd.DataFrame) -> Cells:
    directions = list(dict.fromkeys(rows["direction"]))
    measure = "recovery" if rows["recovery"].notna().any() else "effect"
    chosen = strongest_places(rows, measure, SHOWN)
    lines = []
    for place, own in chosen.groupby("place", sort=False):
        cells = [str(place)]
        for direction in directions:
            found = own[own["direction"] == direction].to_dict("records")
            if not found:
                cells += ["–", "–", "–"]
                continue
            row = found[0]
            bounds = interval(row["low"], row["high"])
            cells += [
                signed(row["effect"]),
                f"{signed(row['recovery'])}" + (f" [{bounds}]" if bounds else ""),
                probability(row["q"]),
            ]
        lines.append(tuple(cells))
    columns = ["Place"]
    for direction in directions:
        columns += [f"{_WORDS[str(direction)]}, change of the metric", "Share of the gap [95 %]", "q"]
    return Cells(
        f"Strongest places: {name}",
        f"The {len(lines)} of {places(rows).nunique()} with the largest effect in either direction; q is over all "
        "places of a direction (Benjamini-Hochberg on sign-flip permutation tests over prompts).",
        tuple(columns),
        tuple(lines),
    )


def _scores_table(key: str, scores: pd.DataFrame) -> Cells:
    best = scores.loc[scores["score"].abs().sort_values(ascending=False, kind="stable").index[:SHOWN]]
    lines = []
    for row in best.to_dict("records"):
        through = f".{row['through']}" if row.get("through") else ""
        name = f"{row['source']} → {row['target']}{through}" if key == "edges" else str(row["node"])
        lines.append((name, signed(row["score"], 3), interval(row.get("low"), row.get("high"), 3) or "–"))
    return Cells(
        f"Strongest {key}", f"The {len(lines)} of {len(scores):,} with the largest score of either sign.",
        (key[:-1].capitalize(), "Score", "95 % interval"), tuple(lines),
    )  # fmt: skip


_MEASURES = {
    "cpr": "CPR",
    "cmd": "CMD",
    "auc_edges": "area under ROC, edges",
    "auc_nodes": "area under ROC, nodes",
    "stability_jaccard": "stability (Jaccard of edges)",
}
_RANKED = {"absolute": "by size", "signed": "by sign", "given": "as found"}


def _curve_table(curve: pd.DataFrame, random: pd.DataFrame | None) -> Cells:
    keys = ["method", "ranking", "fraction"]
    beside = {}
    if random is not None and set(keys) <= set(random.columns):
        beside = {tuple(row[key] for key in keys): row for row in random.to_dict("records")}
    lines = []
    for row in curve.to_dict("records"):
        drawn = beside.get(tuple(row.get(key) for key in keys))
        bounds = interval(row["low"], row["high"])
        lines.append(
            (
                f"{row['method']}, {_RANKED.get(str(row.get('ranking')), 'all')}",
                f"{100 * row['fraction']:.3g} %",
                number(row.get("edges"), places=0),
                number(row["value"], beside=WHOLE) + (f" [{bounds}]" if bounds else ""),
                "–"
                if drawn is None
                else f"{number(drawn['value'], beside=WHOLE)} [{interval(drawn['low'], drawn['high'])}]",
            )
        )
    return Cells(
        "Faithfulness by size",
        "Edges that are left after those that lead nowhere are dropped; of random circuits mean and full range.",
        ("Circuit", "Share of edges", "Edges left", "Faithfulness [95 %]", "Random circuits [range]"),
        tuple(lines),
    )


def _measures_table(measures: pd.DataFrame) -> Cells:
    lines = [
        (
            str(row["method"]), _MEASURES.get(str(row["measure"]), readable(row["measure"])), number(row["value"], 3),
            interval(row.get("low"), row.get("high"), 3) or "–", str(row.get("note") or ""),
        )
        for row in measures.to_dict("records")
    ]  # fmt: skip
    return Cells(
        "Measures", "CPR: area under faithfulness over the share of edges, higher is better; CMD: area of its distance "
        "to 1, lower is better.", ("Method", "Measure", "Value", "95 % interval", "Note"), tuple(lines),
    )  # fmt: skip


def _examples(run: RunLike) -> Cells | None:
    pairs = frame(run, "pairs")
    if pairs is None:
        return None
    lines = [
        (
            str(row["clean_text"]), str(row["corrupt_text"]), str(row["answer"]).strip(), str(row["foil"]).strip(),
            signed(row["clean"]), signed(row["corrupt"]),
        )
        for row in pairs.head(EXAMPLES).to_dict("records")
    ]  # fmt: skip
    return Cells(
        "Prompts", f"The first {len(lines)} of {len(pairs)} pairs; the run holds all of them.",
        ("Clean", "Corrupt", "Answer", "Foil", "Metric, clean", "Metric, corrupt"), tuple(lines),
    )  # fmt: skip


def _notes(run: RunLike, about: Mapping[str, Any]) -> Iterator[str]:
    work = about.get("work") or {}
    if work.get("rows") and work.get("naive_rows"):
        yield (
            f"{work['runs']:,} patched runs"
            + (f", {work['unchanged']:,} of which cannot change anything; " if work.get("unchanged") else "; ")
            + f"{number(work['naive_rows'] / work['rows'], 1)} times fewer tokens went through layers than one whole "
            "pass a patch takes, with equal results."
        )
    if about.get("dropped"):
        listed = ", ".join(f"{count} {what}" for what, count in about["dropped"].items())
        yield f"Left out, as this tokenizer cannot take them: {listed}."
    known = known_circuit(about, "roc" in run.tables)
    if known:
        yield known
    yield from map(str, about.get("notes") or ())
