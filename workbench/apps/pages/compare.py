"""Two runs side by side: the same heads as differences with intervals, or heads of two models paired by profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import dash_mantine_components as dmc
import numpy as np
import pandas as pd
from dash import Dash, Input, Output, State, html, no_update

from workbench.apps.address import Query, read_choice, read_number, to_query
from workbench.apps.aligned import aligned
from workbench.apps.context import Context, Page
from workbench.apps.parts import data_grid, figure_panel
from workbench.apps.shell import refusal
from workbench.errors import WorkbenchError
from workbench.figures import difference_map, metric_scatter, palette, told_apart
from workbench.figures.text import interval, number, probability
from workbench.models import Head
from workbench.reports.catalogue import Catalogue, catalogue
from workbench.runs import Run, compare_runs
from workbench.runs.compare import ablated, removed_heads, same_shape

_COLUMNS = (
    {"field": "name", "headerName": "Head", "width": 100},
    {"field": "value_a", "headerName": "A", "width": 100},
    {"field": "interval_a", "headerName": "95 % interval of A", "width": 150},
    {"field": "value_b", "headerName": "B", "width": 100},
    {"field": "interval_b", "headerName": "95 % interval of B", "width": 150},
    {"field": "difference", "headerName": "B less A", "width": 110},
    {"field": "bounds", "headerName": "95 % interval of the difference", "width": 220},
    {"field": "q", "headerName": "q", "width": 100},
)
_WAYS = {"index": "Same heads", "profile": "Aligned heads"}
_WINDOWS = {"0.1": "0.1 of the depth", "0.2": "0.2 of the depth", "0.4": "0.4 of the depth", "1": "the whole depth"}


@dataclass(frozen=True)
class _Asked:
    """What the address asks for, as far as these two runs can answer it."""

    a: str
    b: str
    first: Run
    second: Run
    by: str
    window: float
    only_told: bool


def _comparable(context: Context) -> list[str]:
    """Complete runs with head scores, or statistics of a trace; the newest first."""
    table = context.library.table()
    names = [str(name) for name in table.loc[table["status"] == "complete", "name"]]
    runs = ((name, context.library.run(name)) for name in names)
    return [name for name, run in runs if run.has_table("head_scores") or run.has_table("statistic_means")]


def _sides(context: Context, runs: list[str], query: Query) -> list[str]:
    """The runs that the address names; else the two newest that fit each other, the older one first."""
    a, b = query.get("a", ""), query.get("b", "")
    if a and b:
        return [a, b]
    given = a or b
    pairs = ((given, other) for other in runs if other != given) if given else combinations(runs, 2)
    for newer, older in pairs:
        if _fit(context, newer, older):
            break
    else:
        # The page then says why these two cannot be compared, and offers the others.
        newer, older = (given, next(name for name in runs if name != given)) if given else runs[:2]
    return [newer, older] if a else [older, newer]


def _fit(context: Context, a: str, b: str) -> bool:
    """Whether two runs are of a kind and have a score in common, or heads that can be aligned."""
    runs = [context.library.run(name) for name in (a, b)]
    scored = [run.has_table("head_scores") for run in runs]
    if scored[0] != scored[1]:
        return False
    if not same_shape(*runs):
        return scored[0]
    table, column = ("head_scores", "detector") if scored[0] else ("statistic_means", "statistic")
    first, second = (set(context.library.frame(name, table)[column]) for name in (a, b))
    return bool(first & second)


def _subject(context: Context, query: Query) -> list[str]:
    runs = _comparable(context)
    return _sides(context, runs, query) if len(runs) > 1 else []


def _layout(context: Context, query: Query) -> Any:
    runs = _comparable(context)
    if len(runs) < 2:
        advice = "workbench heads MODEL --out runs/another"
        return refusal("Two runs with head scores, or two traces, are needed to compare.", advice)
    a, b = _sides(context, runs, query)
    first, second = context.library.run(a), context.library.run(b)
    # Heads of two shapes can only be aligned.
    by = read_choice(query, "by", *((_WAYS, "index") if same_shape(first, second) else (("profile",), "profile")))
    told = read_choice(query, "told", ("0", "1"), "0") == "1"
    asked = _Asked(a, b, first, second, by, read_number(query, "window", 0.01, 1, 0.2), told)
    try:
        found, names = _found(context, asked)
    except WorkbenchError as error:
        # The choices stay, so that another run can be taken.
        return html.Div([_controls(runs, asked, [], "", {}), refusal(str(error))])
    known = catalogue(first)
    titles = {name: known.get(name).title for name in names}
    leading = [info.name for info in known.leading() if info.name in names]
    detector = read_choice(query, "detector", names, (leading or names)[0])
    head = _controls(runs, asked, names, detector, titles)
    if by == "profile":
        return html.Div([head, *aligned(context, a, b, found, detector, query.dark)])
    rows = found[found["detector"] == detector]
    same = found.attrs.get("same_prompts") is True or set(rows["method"]) == {"paired"}
    notes = [html.Li(note) for note in [*found.attrs.get("notes", []), *_repair(asked, rows, same)]]
    return html.Div(
        [
            head,
            html.Ul(notes, className="caption", id="compare-notes") if notes else None,
            *_figures(asked, rows, titles[detector], known, query.dark),
            _table(rows, asked.only_told),
        ]
    )


def _found(context: Context, asked: _Asked) -> tuple[Any, list[str]]:
    """The comparison, kept while the runs do not change, and the detectors that it has."""
    if asked.by == "profile":
        from workbench.runs.alignment import align_runs

        made = context.library.computed(
            asked.a, ("aligned", asked.b, asked.second.id, asked.window),
            lambda: align_runs(asked.first, asked.second, window=asked.window),
        )  # fmt: skip
        return made, list(made.detectors)
    found = context.library.computed(
        asked.a, ("compared", asked.b, asked.second.id), lambda: compare_runs(asked.first, asked.second)
    )
    known = found.loc[found["difference"].notna(), "detector"]
    names = [str(name) for name in dict.fromkeys(known)]
    order = {info.name: at for at, info in enumerate(catalogue(asked.first))}
    return found, sorted(names or [str(found["detector"].iloc[0])], key=lambda name: order.get(name, len(order)))


def _controls(runs: list[str], asked: _Asked, names: Sequence[str], detector: str, titles: dict[str, str]) -> Any:
    """Which runs, by what, and how; all of them always there, as a change of one is read with the others."""
    selects = [
        html.Span(
            dmc.Select(id=f"compare-{key}", data=runs, value=value, label=text, size="xs", w=220, searchable=True,
                       allowDeselect=False),
            title=f"Identifier: {run.id}",
        )
        for key, value, text, run in (("a", asked.a, "A", asked.first), ("b", asked.b, "B", asked.second))
    ]  # fmt: skip
    shape = same_shape(asked.first, asked.second)
    aligning = asked.by == "profile"
    window = f"{asked.window:g}"
    windows = _WINDOWS if window in _WINDOWS else {**_WINDOWS, window: f"{window} of the depth"}
    selects += [
        dmc.Select(id="compare-detector", data=[{"value": one, "label": titles[one]} for one in names],
                   value=detector or None, label="Detector", size="xs", w=240, searchable=True, allowDeselect=False),
        dmc.Select(id="compare-by", data=[{"value": one, "label": text} for one, text in _WAYS.items()],
                   value=asked.by, label="Heads matched", size="xs", w=140, allowDeselect=False, disabled=not shape),
        dmc.Select(id="compare-window", data=[{"value": one, "label": text} for one, text in windows.items()],
                   value=window, label="Pairs within", size="xs", w=160, allowDeselect=False,
                   style={} if aligning else {"display": "none"}),
        dmc.Switch(id="compare-told", label="Only told from zero", checked=asked.only_told, size="sm", mt=26,
                   style={"display": "none"} if aligning else {}),
    ]  # fmt: skip
    return html.Div([dmc.Title("Compare", order=2), dmc.Group(selects, my="sm", align="flex-start")])


def _repair(asked: _Asked, rows: pd.DataFrame, same_prompts: bool) -> list[str]:
    """Where one run does without heads: what the layers before and behind them show.

    On other prompts heads differ for that alone, those that nothing removed can change as well.
    """
    removed = [Head.parse(name) for name in removed_heads(asked.first, asked.second)]
    if not removed or ablated(asked.first) == ablated(asked.second):
        return []
    first = min(head.layer for head in removed)
    stays = ~rows.apply(lambda row: (row["layer"], row["head"]) in set(removed), axis=1).astype(bool)
    before, behind = rows[rows["layer"] <= first], rows[(rows["layer"] > first) & stays]
    largest = before["difference"].abs().max()
    told = [f"Up to layer {first} nothing can answer: the largest difference there is {number(largest, 3)}."]
    if not same_prompts:
        judged = f"{int(told_apart(before).sum())} of {len(before)} heads are told from zero"
        source = f"what differs there comes from other prompts ({judged}; the largest difference is "
        told = [f"Up to layer {first} nothing can answer: {source}{number(largest, 3)}), and may so behind it."]
    if len(behind):
        judged = f"{int(told_apart(behind).sum())} of {len(behind)} heads are told from zero"
        judged = "the largest difference" if behind["q"].isna().all() else f"{judged}; the largest difference"
        told.append(f"Behind it {judged} is {number(behind['difference'].abs().max(), 3)}.")
    return [" ".join(told)]


def _figures(asked: _Asked, rows: pd.DataFrame, title: str, known: Catalogue, dark: bool) -> list[Any]:
    unit = known.get(str(rows["detector"].iloc[0])).unit
    removed = removed_heads(asked.first, asked.second)
    difference = difference_map(rows, title, unit=unit, only_told=asked.only_told, removed=removed, dark=dark)
    wide = rows[["layer", "head", "value_a", "value_b"]].reset_index(drop=True)
    told = rows.loc[told_apart(rows), ["layer", "head"]]
    chosen = [f"L{layer}H{head}" for layer, head in told.itertuples(index=False)]
    both = metric_scatter(
        wide, "value_a", "value_b", titles={"value_a": "A", "value_b": "B"}, selected=chosen if asked.only_told else (),
        dark=dark,
    )  # fmt: skip
    low, high = (float(wide[["value_a", "value_b"]].agg(how).agg(how)) for how in ("min", "max"))
    line = {"width": 1, "dash": "dot", "color": palette(dark).muted}
    both.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=line)
    return [
        html.Div(
            [
                figure_panel("compare-map", difference, title=f"{title}, B less A"),
                figure_panel("compare-scatter", both, title=f"{title}, A against B"),
            ],
            className="pair block",
        )
    ]


def _table(rows: pd.DataFrame, only_told: bool) -> Any:
    rows = rows[told_apart(rows)] if only_told else rows
    order = rows["difference"].abs().sort_values(ascending=False, kind="stable").index
    records = [
        {
            "name": f"L{row['layer']}H{row['head']}",
            **{key: _rounded(row[key]) for key in ("value_a", "value_b", "difference")},
            "interval_a": interval(row["low_a"], row["high_a"], 3),
            "interval_b": interval(row["low_b"], row["high_b"], 3),
            "bounds": interval(row["low"], row["high"], 3),
            "q": probability(row["q"]),
        }
        for row in rows.loc[order].to_dict("records")
    ]
    words = (
        "Largest differences first. q is the false-discovery rate over this detector's heads: below 0.05, a difference "
        "is told from zero. "
        "Intervals are each head's own, so that one may leave out zero where q does not tell. "
        "How differences were judged is said at the top."
    )
    return html.Section([data_grid("compare-table", records, _COLUMNS, height=420), html.P(words, className="caption")])


def _rounded(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 4)


def _register(app: Dash, context: Context) -> None:
    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("compare-a", "value"),
        Input("compare-b", "value"),
        Input("compare-detector", "value"),
        Input("compare-by", "value"),
        Input("compare-window", "value"),
        Input("compare-told", "checked"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def change(
        a: str | None, b: str | None, detector: str | None, by: str | None, window: str | None, told: bool | None,
        now: str | None,
    ) -> Any:  # fmt: skip
        # What is usual is left out, so that addresses stay short.
        fields = {"a": a, "b": b, "detector": detector, "by": by if by != "index" else None,
                  "window": window if window != "0.2" else None, "told": "1" if told else None}  # fmt: skip
        query = to_query(fields)
        return no_update if not a or not b or query == now else query


PAGE = Page("/compare", "Compare", "Two runs, head by head", _layout, _register, _subject)
