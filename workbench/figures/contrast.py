"""Domain contrast: one point a head, its statistic on one kind of text against the other.

Heads on the diagonal behave alike on both; heads far from it switch with the domain (active on one, dormant
on the other). The farthest are labelled and carry their intervals.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.errors import RequestError
from workbench.figures.text import interval, number, safe, with_caption
from workbench.figures.theme import palette, template

# centre and half size
Box = tuple[float, float, float, float]


def domain_scatter(
    contrast: pd.DataFrame,
    domains: tuple[str, str] = ("prose", "code"),
    *,
    statistic: str = "first-token mass",
    labelled: int = 6,
    dark: bool = False,
) -> go.Figure:
    """`domains[0]` across, `domains[1]` up; the `labelled` heads farthest from the diagonal are named."""
    wide = _wide(contrast, domains)
    far = wide.sort_values("gap", key=np.abs, ascending=False).head(labelled)
    rest = wide.drop(far.index)
    colours = palette(dark)
    figure = go.Figure(layout={"template": template(dark)})
    reach = [0.0, float(max(wide["x"].max(), wide["y"].max())) * 1.06]
    figure.add_trace(
        go.Scatter(
            x=reach,
            y=reach,
            mode="lines",
            line={"color": colours.control, "width": 1, "dash": "dot"},
            hoverinfo="skip",
            name="equal",
            showlegend=False,
        )
    )
    figure.add_trace(_points(rest, domains, "other heads", colours.control))
    figure.add_trace(_points(far, domains, "farthest from the diagonal", colours.effect, reach[1]))
    figure.update_layout(
        height=440,
        margin={"l": 60, "r": 16, "t": 34, "b": 52},
        xaxis={
            "title": {"text": f"{safe(statistic)} on {safe(domains[0])}"},
            "range": reach,
            "fixedrange": True,
        },
        yaxis={
            "title": {"text": f"{safe(statistic)} on {safe(domains[1])}"},
            "range": reach,
            "fixedrange": True,
        },
    )
    counts = sorted({int(n) for n in contrast["n"].dropna()}) if "n" in contrast else []
    sizes = f" over {counts[0]} prompts of each kind" if len(counts) == 1 else ""
    return with_caption(
        figure,
        f"Mean {statistic} of every head on {domains[0]} (across) and on {domains[1]} (up){sizes}; bars are "
        f"95 % intervals of the {len(far)} heads farthest from the diagonal.",
    )


def _wide(contrast: pd.DataFrame, domains: tuple[str, str]) -> pd.DataFrame:
    sides = []
    for letter, domain in zip("xy", domains, strict=True):
        part = contrast[contrast["domain"] == domain].set_index(["layer", "head"])
        if part.empty:
            present = ", ".join(sorted(map(str, contrast["domain"].unique())))
            raise RequestError(f"No rows of domain {domain!r}; the table has {present or 'none'}.")
        columns = {"value": letter, "low": f"{letter}_low", "high": f"{letter}_high"}
        sides.append(part[list(columns)].rename(columns=columns))
    wide = sides[0].join(sides[1], how="inner").reset_index()
    wide["gap"] = wide["y"] - wide["x"]
    wide["name"] = [f"L{layer}H{head}" for layer, head in zip(wide["layer"], wide["head"], strict=True)]
    return wide


def _points(
    rows: pd.DataFrame, domains: tuple[str, str], name: str, colour: str, reach: float | None = None
) -> go.Scatter:
    marked = reach is not None
    hover = [
        [row["name"]]
        + [f"{number(row[s], 3)} ({interval(row[f'{s}_low'], row[f'{s}_high'], 3) or 'no interval'})" for s in "xy"]
        for row in rows.to_dict("records")
    ]
    bars: dict[str, Any] = {}
    if reach is not None:
        texts, sides = _sides(rows, reach)
        bars = {f"error_{s}": _bars(rows, s, colour) for s in "xy"}
        bars |= {"text": texts, "textposition": sides, "textfont": {"size": 11}}
    return go.Scatter(
        x=rows["x"].to_numpy(),
        y=rows["y"].to_numpy(),
        mode="markers+text" if marked else "markers",
        marker={"size": 8 if marked else 6, "color": colour, "opacity": 1 if marked else 0.55},
        customdata=hover,
        hovertemplate=(
            f"<b>%{{customdata[0]}}</b><br>{safe(domains[0])} %{{customdata[1]}}"
            f"<br>{safe(domains[1])} %{{customdata[2]}}<extra></extra>"
        ),
        name=name,
        **bars,
    )


def _bars(rows: pd.DataFrame, side: str, colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": (rows[f"{side}_high"] - rows[side]).to_numpy(),
        "arrayminus": (rows[side] - rows[f"{side}_low"]).to_numpy(),
        "color": colour,
        "thickness": 1,
        "width": 0,
    }


def _sides(rows: pd.DataFrame, reach: float) -> tuple[list[str], list[str]]:
    """Texts and places of the labels: away from the diagonal where there is room, else on another side.

    A label that would lie on another one everywhere is left out; the hover still names its head.
    """
    taken = [(x / reach, y / reach, 0.01, 0.01) for x, y in zip(rows["x"], rows["y"], strict=True)]
    texts, sides = [], []
    for row in rows.to_dict("records"):
        order = sorted(_PLACES, key=lambda side: _PLACES[side][0] * np.sign(row["gap"]))
        found = None
        for side in order:
            across, up = _PLACES[side]
            box = (row["x"] / reach + 0.055 * across, row["y"] / reach + 0.035 * up, 0.045, 0.018)
            if not any(_overlap(box, other) for other in taken):
                found = side
                taken.append(box)
                break
        texts.append(row["name"] if found else "")
        sides.append(found or "top center")
    return texts, sides


# label places as (across, up), in widths and heights of a label
_PLACES = {
    "top left": (-1, 1),
    "middle left": (-1.15, 0),
    "bottom left": (-1, -1),
    "top center": (0, 1.2),
    "bottom center": (0, -1.2),
    "top right": (1, 1),
    "middle right": (1.15, 0),
    "bottom right": (1, -1),
}


def _overlap(one: Box, other: Box) -> bool:
    return abs(one[0] - other[0]) < one[2] + other[2] and abs(one[1] - other[1]) < one[3] + other[3]
