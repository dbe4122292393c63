"""Position curves: a statistic of a head over the query position, the evidence behind a score.

Statistics that are fractions (all values in 0..1) share a panel; every other statistic has its own, since
nats and norms do not fit one axis. The position axis is logarithmic for long prompts whose positions span a
decade, counted from 1 there so that the first query stays on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from workbench.errors import RequestError
from workbench.figures.text import readable, safe, with_caption
from workbench.figures.theme import palette, template
from workbench.figures.ticks import position_ticks

Array = NDArray[np.float64]
_LONG = 200
_PANEL_PIXELS = 180
_KEYS = ["detector", "layer", "head", "statistic"]
# statistics in nats, positions or norms, which may stay below 1 as well
_NO_SHARES = ("entropy", "lse", "distance", "norm")
# a curve of fewer points has them marked
_FEW = 24
_MOST_NAMED = 8


def position_curves(
    curves: pd.DataFrame,
    heads: Sequence[tuple[int, int]] | None = None,
    *,
    log: bool | None = None,
    labels: dict[str, str] | None = None,
    caption: str = "",
    dark: bool = False,
) -> go.Figure:
    """Lines of `value` over `position`, one for each head, detector and statistic of the table.

    `heads` keeps only those (layer, head); `log=None` takes the logarithmic axis where the longest curve
    passes 200 positions and the curves span a decade of them; `labels` gives detectors their titles.
    """
    rows = _chosen(curves, heads)
    panels, fractions = _panels(rows)
    first, last = float(rows["position"].min()), float(rows["position"].max())
    logarithmic = last >= max(_LONG, 10 * (first + 1) - 1) if log is None else log
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.09)
    colours = palette(dark).series
    for line, (key, curve) in enumerate(rows.groupby(_KEYS, sort=False)):
        panel = next(i for i, names in enumerate(panels) if key[-1] in names)
        figure.add_trace(
            _line(curve, _name(rows, key, labels or {}), colours[line % len(colours)], line, logarithmic),
            row=panel + 1,
            col=1,
        )
    for index, names in enumerate(panels):
        stem = names[0].partition(", ")[0]
        text = "share of attention" if index == 0 and fractions else safe(readable(stem))
        figure.update_yaxes(title={"text": text}, rangemode="tozero", nticks=5, row=index + 1, col=1)
    # two names a line in a narrow place
    legend = 12 + 20 * math.ceil(len(figure.data) / 2)
    word = "query position (counted from 1)" if logarithmic else "query position"
    figure.update_xaxes(title={"text": word}, row=len(panels), col=1)
    figure.update_xaxes(_positions(first, last, logarithmic))
    # the zero of one axis stands clear of the first number of the other
    figure.update_yaxes(ticklabelstandoff=5)
    figure.update_layout(
        template=template(dark),
        height=_PANEL_PIXELS * len(panels) + 52 + legend,
        margin={"l": 52, "r": 12, "t": legend, "b": 44},
        hovermode="x unified",
        showlegend=True,
    )
    return with_caption(figure, caption or _caption(rows))


def _positions(first: float, last: float, logarithmic: bool) -> dict[str, Any]:
    """The position axis: numbers written out, and some room before the first of them."""
    shift = 1 if logarithmic else 0
    ends = (first + shift, last + shift)
    ticks = position_ticks(*ends, logarithmic)
    low, high = np.log10(ends) if logarithmic else ends
    room = 0.03 * (high - low) or 0.5
    return {
        "type": "log" if logarithmic else "linear",
        "tickvals": ticks,
        "ticktext": [f"{tick:,}" for tick in ticks],
        "range": [float(low - room), float(high + room)],
        "ticklabelstandoff": 5,
    }


def _chosen(curves: pd.DataFrame, heads: Sequence[tuple[int, int]] | None) -> pd.DataFrame:
    rows = curves
    if heads is not None:
        wanted = {(int(layer), int(head)) for layer, head in heads}
        pairs = zip(curves["layer"], curves["head"], strict=True)
        rows = curves[[(int(layer), int(head)) in wanted for layer, head in pairs]]
    if rows.empty:
        named = ", ".join(f"L{layer}H{head}" for layer, head in heads or [])
        raise RequestError(f"No position curve of {named or 'any head'} in the table; run `workbench heads`.")
    return rows


def _panels(rows: pd.DataFrame) -> tuple[list[list[str]], bool]:
    """Statistics, panel by panel: all fractions first, then each other one alone; are there fractions?"""
    shares: list[str] = []
    alone: dict[str, list[str]] = {}
    for name, part in rows.groupby("statistic", sort=False):
        named_otherwise = any(word in str(name) for word in _NO_SHARES)
        if not named_otherwise and part["value"].min() >= -1e-6 and part["value"].max() <= 1 + 1e-3:
            shares.append(str(name))
        else:
            # `entropy, prose` and `entropy, code` belong together
            alone.setdefault(str(name).partition(", ")[0], []).append(str(name))
    return ([shares] if shares else []) + list(alone.values()), bool(shares)


def _name(rows: pd.DataFrame, key: tuple[Any, ...], labels: dict[str, str]) -> str:
    """The shortest name that tells this line from the others."""
    detector, layer, head, statistic = key
    parts = [f"L{layer}H{head}"] if len(rows.groupby(["layer", "head"])) > 1 else []
    several = rows.groupby("statistic")["detector"].nunique().max() > 1
    parts += [labels.get(str(detector), str(detector))] if several else []
    return safe(" · ".join([*parts, readable(statistic)]))


def _line(curve: pd.DataFrame, name: str, colour: str, index: int, logarithmic: bool) -> go.Scatter:
    ordered = curve.sort_values("position")
    positions, values = _broken(ordered["position"].to_numpy(float), ordered["value"].to_numpy(float))
    dashes = ("solid", "dash", "dot", "dashdot")
    return go.Scatter(
        x=positions + (1 if logarithmic else 0),
        y=values,
        mode="lines+markers" if len(ordered) < _FEW else "lines",
        marker={"size": 4},
        name=name,
        line={"width": 1.8, "color": colour, "dash": dashes[index % len(dashes)]},
        hovertemplate="%{y:.3f}",
    )


def _broken(positions: Array, values: Array) -> tuple[Array, Array]:
    """The curve with a gap where it skips positions, as the rows of a needle's answer do at each length."""
    steps = np.diff(positions)
    if len(steps) < 3:
        return positions, values
    before, after = np.r_[steps[1], steps[:-1]], np.r_[steps[1:], steps[-2]]
    breaks = np.flatnonzero(steps > 4 * np.maximum(before, after)) + 1
    return np.insert(positions, breaks, np.nan), np.insert(values, breaks, np.nan)


def _caption(rows: pd.DataFrame) -> str:
    heads = [f"L{layer}H{head}" for layer, head in rows[["layer", "head"]].drop_duplicates().values]
    named = ", ".join(heads) if len(heads) <= _MOST_NAMED else f"{len(heads)} heads"
    # names have commas of their own: `first token, prose`
    names = "; ".join(readable(name) for name in dict.fromkeys(rows["statistic"]))
    return f"{named} over the query position: {names}. Mean over the detector's prompts."
