"""Two models whose heads are paired by profiles: the pairs, scores by relative depth, and each one's leading heads."""

from __future__ import annotations

from typing import Any

import pandas as pd
from dash import html

from workbench.apps.context import Context
from workbench.apps.heads import Scores, scores_of
from workbench.apps.parts import data_grid, figure_panel
from workbench.figures import depth_scatter, pair_scatter
from workbench.figures.text import number, probability
from workbench.figures.verdict import SIGNIFICANT
from workbench.runs.alignment import Alignment

_LEADING = 4
_PAIRS = (
    {"field": "a", "headerName": "Head of A", "width": 110},
    {"field": "value_a", "headerName": "Score in A", "width": 110},
    {"field": "depth_a", "headerName": "Depth in A", "width": 110},
    {"field": "b", "headerName": "Head of B", "width": 110},
    {"field": "value_b", "headerName": "Score in B", "width": 110},
    {"field": "depth_b", "headerName": "Depth in B", "width": 110},
    {"field": "distance", "headerName": "Distance", "width": 110},
    {"field": "q", "headerName": "q", "width": 90},
)
_TOPS = (
    {"field": "title", "headerName": "Detector", "flex": 1, "minWidth": 180},
    {"field": "a", "headerName": "Leading heads of A (relative depth)", "flex": 2, "minWidth": 220},
    {"field": "b", "headerName": "Leading heads of B (relative depth)", "flex": 2, "minWidth": 220},
    {"field": "rho", "headerName": "Held-out correlation", "width": 160},
    {"field": "chance", "headerName": "Random pairs", "width": 150},
)
_MEANING = (
    "A pair says: of all heads at that depth, these two stand in the most similar places by these detectors. It does "
    "not say that they compute the same. The held-out correlation asks whether pairs made without a detector agree on "
    "it: only above that of random pairs does alignment mean something for it. Detectors that measure nearly the same "
    "help each other."
)


def aligned(context: Context, a: str, b: str, found: Alignment, detector: str, dark: bool) -> list[Any]:
    """The parts of the page below its choices."""
    first, second = scores_of(context, a), scores_of(context, b)
    title = first.known.get(detector).title
    values = [_values(scores, detector) for scores in (first, second)]
    pairs = found.pairs
    near = int((pairs["q"] < SIGNIFICANT).sum())
    distances = f"Mean distance of pairs {number(found.distance, 3)}, with shuffled profiles {number(found.null, 3)}"
    alone = f"{found.alone[0]} heads of A and {found.alone[1]} of B stay alone"
    notes = [
        f"{len(pairs)} pairs by {len(found.detectors)} detectors; {alone}.",
        f"{distances}; {near} pairs are nearer than shuffled ones (q below {SIGNIFICANT:g}).",
        _MEANING,
    ]
    depth = depth_scatter(values[0], values[1], title, dark=dark)
    figures = [
        figure_panel("aligned-pairs", pair_scatter(pairs, dark=dark), title="Paired heads by relative depth"),
        figure_panel("aligned-depth", depth, title=f"{title} by relative depth"),
    ]
    return [
        html.Ul([html.Li(note) for note in notes], className="caption", id="compare-notes"),
        html.Div(figures, className="pair block"),
        html.Section([html.H3(f"Pairs, with their {title}"), _pairs(pairs, values)], className="block"),
        html.Section([html.H3("Leading heads of each detector"), _tops(found, first, second)], className="block"),
    ]


def _values(scores: Scores, detector: str) -> pd.DataFrame:
    table = scores.wide[["layer", "head", detector]]
    return table.rename(columns={detector: "value"})


def _pairs(pairs: pd.DataFrame, values: list[pd.DataFrame]) -> Any:
    known = [table.set_index(["layer", "head"])["value"] for table in values]
    rows = [
        {
            **{side: f"L{row[f'layer_{side}']}H{row[f'head_{side}']}" for side in "ab"},
            **{
                f"value_{side}": number(table.get((row[f"layer_{side}"], row[f"head_{side}"])), 3)
                for side, table in zip("ab", known, strict=True)
            },
            **{f"depth_{side}": f"{row[f'depth_{side}']:.2f}" for side in "ab"},
            "distance": f"{row['distance']:.3f}",
            "q": probability(row["q"]),
        }
        for row in pairs.to_dict("records")
    ]
    return data_grid("aligned-table", rows, _PAIRS, height=360)


def _tops(found: Alignment, first: Scores, second: Scores) -> Any:
    held = found.held_out.set_index("detector")
    rows = []
    for name in found.detectors:
        row = {"title": first.known.get(name).title, "a": _leading(first, name), "b": _leading(second, name)}
        if name in held.index:
            own = held.loc[name]
            bounds = f"{number(own['chance'], 2)} ({number(own['low'], 2)} to {number(own['high'], 2)})"
            row |= {"rho": number(own["rho"], 2), "chance": bounds}
        rows.append(row)
    return data_grid("aligned-tops", rows, _TOPS, height=360)


def _leading(scores: Scores, detector: str) -> str:
    rows = scores.long[scores.long["detector"] == detector].sort_values("rank").head(_LEADING)
    last = max(int(scores.long["layer"].max()), 1)
    return ", ".join(f"L{row['layer']}H{row['head']} ({row['layer'] / last:.2f})" for row in rows.to_dict("records"))
