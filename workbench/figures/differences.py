"""Two models or runs beside each other: maps of differences, scores by relative depth, heads that were paired."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.errors import RequestError
from workbench.figures.maps import head_map
from workbench.figures.scales import scale_for
from workbench.figures.text import number, safe, with_caption
from workbench.figures.theme import colour_bar, palette, template
from workbench.figures.verdict import SIGNIFICANT

_SIDES = (("a", "A", "circle"), ("b", "B", "diamond"))
_MARK = 5


def told_apart(rows: pd.DataFrame) -> pd.Series:
    """Which rows of `workbench.runs.compare_runs` have a difference that is told from zero."""
    found: pd.Series = rows["q"] < SIGNIFICANT
    return found


def difference_map(
    rows: pd.DataFrame,
    title: str,
    *,
    unit: str = "",
    sides: tuple[str, str] = ("A", "B"),
    only_told: bool = False,
    removed: Collection[str] = (),
    dark: bool = False,
) -> go.Figure:
    """Differences of one detector's scores, the second side less the first; those told from zero have a dot.

    `rows` are one detector's of `workbench.runs.compare_runs`. `only_told` leaves the other cells empty. `removed` are
    heads that only one of the two was measured without; they get a cross.
    """
    if rows.empty:
        raise RequestError("No differences to draw: the runs have no head in common by this detector.")
    first, second = sides
    told = told_apart(rows)
    shown = rows["difference"].where(told) if only_told else rows["difference"]
    cells = rows.assign(value=shown)[["detector", "layer", "head", "value", "low", "high", "q"]]
    judged = f"{int(told.sum())} are told from zero (q below {SIGNIFICANT:g}, dots)"
    judged = "none could be judged" if rows["q"].isna().all() else judged
    info: Mapping[str, Any] = {
        "title": f"{title}, {second} less {first}",
        "unit": unit,
        "caption": f"{title}: {second} less {first}, {len(rows)} heads that both have; {judged}."
        + (" Only those are shown." if only_told else "")
        + (" Crosses: heads that one of the two does without." if removed else ""),
        "better": "either",
    }
    figure = head_map(cells, str(rows["detector"].iloc[0]), info=info, dark=dark)
    ink = palette(dark).ink
    _mark(figure, rows[told], "told from zero", {"symbol": "circle", "size": _MARK, "color": ink})
    names = "L" + rows["layer"].astype(str) + "H" + rows["head"].astype(str)
    cross = {"symbol": "x-thin", "size": 9, "color": ink, "line": {"width": 2, "color": ink}}
    _mark(figure, rows[names.isin(set(removed))], "removed", cross)
    return figure


def _mark(figure: go.Figure, rows: pd.DataFrame, name: str, marker: Mapping[str, Any]) -> None:
    if len(rows):
        figure.add_trace(
            go.Scatter(
                x=rows["head"].to_numpy(), y=rows["layer"].to_numpy(), mode="markers", marker=dict(marker), name=name,
                hoverinfo="skip",
            )
        )  # fmt: skip


def depth_scatter(
    a: pd.DataFrame, b: pd.DataFrame, title: str, *, names: tuple[str, str] = ("A", "B"), dark: bool = False
) -> go.Figure:
    """Every head's score by relative depth (layer over the last layer), and the mean of each layer, of two models.

    `a` and `b` have `layer`, `head` and `value`.
    """
    colours = palette(dark)
    figure = go.Figure(layout={"template": template(dark)})
    counts = []
    for rows, name, (side, _, symbol), colour in zip(
        (a, b), names, _SIDES, (colours.control, colours.effect), strict=True
    ):
        known = rows[rows["value"].notna()]
        depth = known["layer"].to_numpy(float) / max(float(rows["layer"].max()), 1.0)
        hover = [f"L{layer}H{head}" for layer, head in zip(known["layer"], known["head"], strict=True)]
        figure.add_trace(
            go.Scatter(
                x=depth, y=known["value"].to_numpy(float), mode="markers", name=safe(name), text=hover,
                legendgroup=side, marker={"size": 5, "color": colour, "symbol": symbol, "opacity": 0.55},
                hovertemplate="<b>%{text}</b> %{y:.4g} at depth %{x:.2f}<extra>" + safe(name) + "</extra>",
            )
        )  # fmt: skip
        means = known.assign(depth=depth).groupby("depth")["value"].mean()
        figure.add_trace(
            go.Scatter(
                x=means.index.to_numpy(float), y=means.to_numpy(float), mode="lines", showlegend=False,
                name=f"{safe(name)}, mean of a layer", legendgroup=side, line={"color": colour, "width": 2},
                hoverinfo="skip",
            )
        )  # fmt: skip
        counts.append(f"{len(known)} of {safe(name)}")
    figure.update_layout(
        height=360, xaxis={"title": {"text": "relative depth (layer over the last layer)"}},
        yaxis={"title": {"text": safe(title)}}, legend={"orientation": "h", "y": 1.08},
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
    )  # fmt: skip
    return with_caption(
        figure, f"{title} of each head by relative depth: {' and '.join(counts)} heads. Lines are means of a layer."
    )


def pair_scatter(pairs: pd.DataFrame, *, sides: tuple[str, str] = ("A", "B"), dark: bool = False) -> go.Figure:
    """Paired heads of two models by relative depth in either; the colour is the distance of their profiles."""
    if pairs.empty:
        raise RequestError("No pairs of heads to draw.")
    colours = palette(dark)
    values = pairs["distance"].to_numpy(float)
    scale = scale_for(values, {}, colours)
    hover = [
        f"L{row['layer_a']}H{row['head_a']} and L{row['layer_b']}H{row['head_b']}<br>distance "
        f"{number(row['distance'], 3)}"
        for row in pairs.to_dict("records")
    ]
    # Heads of one layer share a depth: spread within the layer, so that none hides another.
    spread = [_spread(pairs, side) for side in "ab"]
    figure = go.Figure(
        go.Scatter(
            x=spread[0], y=spread[1], mode="markers", text=hover, hovertemplate="%{text}<extra></extra>",
            marker={"color": values, "coloraxis": "coloraxis", "size": 8,
                    "line": {"width": 0.6, "color": colours.page}},
            name="pairs",
        )
    )  # fmt: skip
    figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line={"width": 1, "dash": "dot", "color": colours.muted})
    figure.update_layout(
        template=template(dark), height=420, showlegend=False,
        xaxis={"title": {"text": f"relative depth in {safe(sides[0])}"}},
        yaxis={"title": {"text": f"relative depth in {safe(sides[1])}"}},
        coloraxis=scale.axis(colour_bar(title={"text": "distance", "side": "right", "font": {"size": 11}})),
        margin={"l": 60, "r": 80, "t": 16, "b": 50},
    )  # fmt: skip
    return with_caption(
        figure,
        f"{len(pairs)} pairs of heads by relative depth; heads of a layer are spread a little. Colour is the distance "
        "of their profiles: 0 for the same places by all detectors, about 0.41 for unrelated ones.",
    )


def _spread(pairs: pd.DataFrame, side: str) -> Any:
    depth, head = pairs[f"depth_{side}"].to_numpy(float), pairs[f"head_{side}"].to_numpy(float)
    layers = np.unique(depth)
    step = float(np.diff(layers).min()) if len(layers) > 1 else 1.0
    return depth + step * 0.7 * (head / max(head.max(), 1.0) - 0.5)
