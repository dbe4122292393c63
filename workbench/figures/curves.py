"""Position curves: a statistic of a head over the query position, the evidence behind a score.

Statistics that are fractions (all values in 0..1) share a panel; every other statistic has its own, since nats and
norms do not fit one axis. The position axis is logarithmic for long prompts, counted from 1 there so that the
first query stays on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import RequestError
from workbench.figures.text import safe, statistic_label, with_caption
from workbench.figures.theme import palette, template

_LONG = 200
_PANEL_PIXELS = 180


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

    `heads` keeps only those (layer, head); `log=None` takes the logarithmic axis where the longest curve passes
    200 positions; `labels` gives detectors their titles.
    """
    rows = _chosen(curves, heads)
    panels, fractions = _panels(rows)
    logarithmic = bool(rows["position"].max() >= _LONG) if log is None else log
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
        text = "share of attention" if index == 0 and fractions else safe(statistic_label(names[0]))
        figure.update_yaxes(title={"text": text}, rangemode="tozero", nticks=5, row=index + 1, col=1)
    word = "query position (counted from 1)" if logarithmic else "query position"
    figure.update_xaxes(title={"text": word}, row=len(panels), col=1)
    if logarithmic:
        figure.update_xaxes(type="log", dtick=1, minor={"showgrid": False})
    figure.update_layout(
        template=template(dark),
        height=_PANEL_PIXELS * len(panels) + 70,
        margin={"l": 52, "r": 12, "t": 34, "b": 44},
        hovermode="x unified",
    )
    return with_caption(figure, caption or _caption(rows))


_KEYS = ["detector", "layer", "head", "statistic"]


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
    """Statistic names, panel by panel: all fractions first, then each other one alone; are there fractions?"""
    shares: list[str] = []
    alone: list[list[str]] = []
    for name, part in rows.groupby("statistic", sort=False):
        if part["value"].min() >= -1e-6 and part["value"].max() <= 1 + 1e-3:
            shares.append(str(name))
        else:
            alone.append([str(name)])
    return ([shares] if shares else []) + alone, bool(shares)


def _name(rows: pd.DataFrame, key: tuple[Any, ...], labels: dict[str, str]) -> str:
    """The shortest name that tells this line from the others."""
    detector, layer, head, statistic = key
    parts = [f"L{layer}H{head}"] if len(rows.groupby(["layer", "head"])) > 1 else []
    several = rows.groupby("statistic")["detector"].nunique().max() > 1
    parts += [labels.get(str(detector), str(detector))] if several else []
    return safe(" · ".join([*parts, statistic_label(str(statistic))]))


def _line(curve: pd.DataFrame, name: str, colour: str, index: int, logarithmic: bool) -> go.Scatter:
    ordered = curve.sort_values("position")
    dashes = ("solid", "dash", "dot", "dashdot")
    return go.Scatter(
        x=ordered["position"].to_numpy() + (1 if logarithmic else 0),
        y=ordered["value"].to_numpy(),
        mode="lines",
        name=name,
        line={"width": 1.8, "color": colour, "dash": dashes[index % len(dashes)]},
        hovertemplate="%{y:.3f}",
    )


def _caption(rows: pd.DataFrame) -> str:
    heads = ", ".join(f"L{layer}H{head}" for layer, head in rows[["layer", "head"]].drop_duplicates().values)
    names = ", ".join(statistic_label(str(name)) for name in dict.fromkeys(rows["statistic"]))
    return f"{heads} over the query position: {names}; mean over the detector's prompts."
