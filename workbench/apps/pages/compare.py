"""Two runs side by side: the same heads by the same detectors, as differences with their intervals."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
import pandas as pd
from dash import Dash, Input, Output, State, html, no_update

from workbench.apps.address import Query, read_choice, to_query
from workbench.apps.context import Context, Page
from workbench.apps.heads import scored_runs, scores_of
from workbench.apps.parts import data_grid, figure_panel
from workbench.apps.shell import refusal
from workbench.figures import head_map, metric_scatter
from workbench.runs import compare_runs

_COLUMNS = (
    {"field": "name", "headerName": "Head", "width": 110},
    {"field": "value_a", "headerName": "A", "width": 110},
    {"field": "interval_a", "headerName": "95 % interval of A", "width": 160},
    {"field": "value_b", "headerName": "B", "width": 110},
    {"field": "interval_b", "headerName": "95 % interval of B", "width": 160},
    {"field": "difference", "headerName": "B less A", "width": 120},
    {"field": "apart", "headerName": "Intervals", "width": 120},
)


def _sides(runs: list[str], query: Query) -> list[str]:
    return [query.get("a", "") or runs[1], query.get("b", "") or runs[0]]


def _subject(context: Context, query: Query) -> list[str]:
    runs = scored_runs(context)
    return _sides(runs, query) if len(runs) > 1 else []


def _layout(context: Context, query: Query) -> Any:
    runs = scored_runs(context)
    if len(runs) < 2:
        return refusal("Two runs with head scores are needed to compare.", "workbench heads MODEL --out runs/another")
    a, b = _sides(runs, query)
    found = context.library.computed(
        a, ("compared", b, context.library.run(b).id),
        lambda: compare_runs(context.library.run(a), context.library.run(b)),
    )  # fmt: skip
    names = [name for name in scores_of(context, a).names if name in set(found["detector"])]
    leading = [info.name for info in scores_of(context, a).known.leading() if info.name in names]
    detector = read_choice(query, "detector", names, (leading or names)[0])
    titles = scores_of(context, a).titles
    rows = found[found["detector"] == detector]
    selects = [
        dmc.Select(id=f"compare-{key}", data=runs, value=value, label=text, size="xs", w=240, searchable=True,
                   allowDeselect=False)
        for key, value, text in (("a", a, "A"), ("b", b, "B"))
    ]  # fmt: skip
    selects.append(
        dmc.Select(id="compare-detector", data=[{"value": one, "label": titles.get(one, one)} for one in names],
                   value=detector, label="Detector", size="xs", w=260, searchable=True, allowDeselect=False)
    )  # fmt: skip
    notes = [html.Li(note) for note in found.attrs.get("notes", [])]
    return html.Div(
        [
            dmc.Title("Compare", order=2),
            dmc.Group(selects, my="sm"),
            html.Ul(notes, className="caption") if notes else None,
            *_figures(rows, titles.get(detector, detector), query.dark),
            _table(rows),
        ]
    )


def _figures(rows: pd.DataFrame, title: str, dark: bool) -> list[Any]:
    told = rows.assign(value=rows["difference"])[["detector", "layer", "head", "value"]]
    info = {
        "title": f"{title}, B less A",
        "caption": f"Difference of the scores of {len(rows)} heads that both runs have: B less A.",
        "better": "either",
    }
    difference = head_map(told, str(rows["detector"].iloc[0]), info=info, dark=dark)
    wide = rows[["layer", "head", "value_a", "value_b"]].reset_index(drop=True)
    both = metric_scatter(wide, "value_a", "value_b", titles={"value_a": "A", "value_b": "B"}, dark=dark)
    low, high = (float(wide[["value_a", "value_b"]].agg(how).agg(how)) for how in ("min", "max"))
    both.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line={"width": 1, "dash": "dot", "color": "#87919b"})
    return [
        html.Div(
            [
                figure_panel("compare-map", difference, title=f"{title}, B less A"),
                figure_panel("compare-scatter", both, title=f"{title}, A against B"),
            ],
            className="pair block",
        )
    ]


def _table(rows: pd.DataFrame) -> Any:
    order = rows["difference"].abs().sort_values(ascending=False, kind="stable").index
    records = []
    for row in rows.loc[order].to_dict("records"):
        overlap = row["overlap"]
        records.append(
            {
                "name": f"L{row['layer']}H{row['head']}",
                **{key: round(float(row[key]), 4) for key in ("value_a", "value_b", "difference")},
                "interval_a": _bounds(row, "a"),
                "interval_b": _bounds(row, "b"),
                "apart": "" if pd.isna(overlap) else "overlap" if overlap else "apart",
            }
        )
    words = "Largest differences first. Intervals that lie apart differ beyond the prompts that were drawn."
    return html.Section([data_grid("compare-table", records, _COLUMNS, height=420), html.P(words, className="caption")])


def _bounds(row: dict[str, Any], side: str) -> str:
    low, high = row[f"low_{side}"], row[f"high_{side}"]
    return "" if pd.isna(low) or pd.isna(high) else f"{low:.3f} to {high:.3f}"


def _register(app: Dash, context: Context) -> None:
    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("compare-a", "value"),
        Input("compare-b", "value"),
        Input("compare-detector", "value"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def change(a: str | None, b: str | None, detector: str | None, now: str | None) -> Any:
        query = to_query({"a": a, "b": b, "detector": detector})
        return no_update if not a or not b or query == now else query


PAGE = Page("/compare", "Compare", "Two runs, head by head", _layout, _register, _subject)
