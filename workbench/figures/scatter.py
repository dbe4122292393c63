"""Heads by any metrics: a point a head, with metrics on both axes, in the colour and in the size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from workbench.errors import RequestError
from workbench.figures.scales import scale_for
from workbench.figures.text import number, safe, with_caption
from workbench.figures.theme import colour_bar, palette, template

Array = NDArray[np.float64]
_SMALL, _LARGE, _PLAIN = 4.0, 18.0, 8.0


def metric_scatter(
    heads: pd.DataFrame,
    x: str,
    y: str,
    *,
    colour: str = "",
    size: str = "",
    titles: Mapping[str, str] | None = None,
    selected: Collection[str] = (),
    dark: bool = False,
) -> go.Figure:
    """`heads` has a row a head: `layer`, `head` and a column a metric; heads without x or y are left out.

    `selected` heads are drawn full, the others pale, where any are selected.
    """
    for name in (x, y, *filter(None, (colour, size))):
        if name not in heads:
            raise RequestError(f"There is no metric {name[:60]!r} here; there are {', '.join(heads.columns[2:])}.")
    known = heads[heads[x].notna() & heads[y].notna()]
    names = [f"L{layer}H{head}" for layer, head in zip(known["layer"], known["head"], strict=True)]
    called = {name: safe((titles or {}).get(name, name)) for name in (x, y, colour, size) if name}
    colours = palette(dark)
    shades = known[colour or "layer"].to_numpy(float)
    scale = scale_for(shades, {}, colours)
    shown = dict.fromkeys([x, y, *filter(None, (colour, size))])
    hover = [
        [name, "<br>".join(f"{called[one]} {number(row[one], 3)}" for one in shown)]
        for name, row in zip(names, known.to_dict("records"), strict=True)
    ]
    chosen = [at for at, name in enumerate(names) if name in set(selected)]
    marker: dict[str, Any] = {
        "color": shades, "coloraxis": "coloraxis", "size": _sizes(known[size].to_numpy(float)) if size else _PLAIN,
        "line": {"width": 0.6, "color": colours.page}, "opacity": 0.9,
    }  # fmt: skip
    figure = go.Figure(
        go.Scatter(
            x=known[x].to_numpy(float), y=known[y].to_numpy(float), mode="markers", marker=marker, customdata=hover,
            text=names, hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}<extra></extra>", name="heads",
            selectedpoints=chosen or None, unselected={"marker": {"opacity": 0.18}},
        )
    )  # fmt: skip
    title = called[colour] if colour else "layer"
    figure.update_layout(
        template=template(dark), height=460, dragmode="select", showlegend=False,
        xaxis={"title": {"text": called[x]}}, yaxis={"title": {"text": called[y]}},
        coloraxis=scale.axis(colour_bar(title={"text": title, "side": "right", "font": {"size": 11}})),
        margin={"l": 60, "r": 80, "t": 16, "b": 50},
    )  # fmt: skip
    dropped = (
        f" {len(heads) - len(known)} heads without one of the two are left out." if len(known) < len(heads) else ""
    )
    sized = f", size is {called[size]}" if size else ""
    return with_caption(
        figure, f"{len(known)} heads: {called[x]} against {called[y]}; colour is {title}{sized}.{dropped}"
    )


def _sizes(values: Array) -> Array:
    """Areas in proportion, from the smallest to the largest value; unknown ones are small."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    share = np.clip((np.nan_to_num(values, nan=low) - low) / ((high - low) or 1.0), 0, 1)
    sizes: Array = _SMALL + (_LARGE - _SMALL) * np.sqrt(share)
    return sizes
