"""Figures of studies: values with intervals side by side, and values over a dose with the range of random controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.errors import RequestError
from workbench.figures.text import interval, number, safe, with_caption
from workbench.figures.theme import Palette, palette, template

_ROW_PIXELS = 17
_HOVER = "<b>%{customdata[0]}</b><br>%{customdata[1]} (95 % %{customdata[2]})<extra></extra>"
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star")


def point_chart(
    rows: pd.DataFrame,
    *,
    value: str,
    label: str,
    group: str | list[str] | None = None,
    title: str = "",
    control: bool = False,
    dark: bool = False,
) -> go.Figure:
    """A point with its interval (`low`, `high`) for each row: one line a `label`, coloured by `group`.

    A group of several columns is named by all of them.
    With `control`, the range of random draws (`control_low`, `control_high`) stands behind it as a bar.
    """
    if isinstance(group, list):
        need(rows, group)
        rows = rows.assign(**{" ": rows[group].astype(str).agg(" ".join, axis=1)})
        group = " "
    need(rows, [value, label, "low", "high", *([group] if group else []), *(_CONTROL if control else [])])
    colours, labels = palette(dark), list(dict.fromkeys(map(str, rows[label])))
    groups = list(dict.fromkeys(map(str, rows[group]))) if group else [""]
    figure = go.Figure(layout={"template": template(dark)})
    # The first label and group stand at the top.
    place = {name: float(at) for at, name in enumerate(reversed(labels))}
    for index, name in enumerate(groups):
        part = rows if group is None else rows[rows[group].astype(str) == name]
        y = part[label].astype(str).map(place) + 0.7 * ((len(groups) - 1) / 2 - index) / max(len(groups), 1)
        if control:
            figure.add_trace(_ranges(part, y, colours, index == 0))
        figure.add_trace(
            _points(part, y, value, label, safe(f"{group} {name}".strip() if group else title), index, colours)
        )
    figure.add_vline(x=0, line={"color": colours.control, "width": 1}, layer="below")
    figure.update_layout(
        height=max(190, _ROW_PIXELS * len(labels) * max(len(groups), 2) + 110),
        margin={"l": 110, "r": 20, "t": 40, "b": 56},
        showlegend=bool(group) or control,
        xaxis={"title": {"text": safe(title or value)}, "fixedrange": True},
        yaxis={
            "tickvals": list(place.values()), "ticktext": [safe(name) for name in place], "showgrid": False,
            "range": [-0.6, len(labels) - 0.4], "fixedrange": True,
        },
    )  # fmt: skip
    return with_caption(figure, f"{title or value}, with 95 % bootstrap intervals. {_captions(rows)}".strip())


_CONTROL = ("control_low", "control_high")


def dose_lines(
    rows: pd.DataFrame,
    *,
    x: str,
    value: str,
    group: str,
    x_title: str = "",
    y_title: str = "",
    band: str = "range of random draws",
    log_x: bool = False,
    dark: bool = False,
) -> go.Figure:
    """Lines of `value` over `x`, one a `group` with its intervals; the controls' range as a band of the same colour.

    Where all groups have the same controls there is one band, in grey. `band` says what it is. `log_x` is for doses
    that grow by factors.
    """
    need(rows, [x, value, group, "low", "high", *_CONTROL])
    shared = not rows[[x, *_CONTROL]].drop_duplicates().duplicated(x).any() and rows[group].nunique() > 1
    colours = palette(dark)
    figure = go.Figure(layout={"template": template(dark)})
    for index, (name, part) in enumerate(rows.groupby(group, sort=False)):
        colour, ordered = colours.series[index % len(colours.series)], part.sort_values(x)
        across = ordered[x].to_numpy()
        filled = colours.control if shared else colour
        red, green, blue = (int(filled[at : at + 2], 16) for at in (1, 3, 5))
        edge = {
            "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "legendgroup": "band" if shared else str(name),
        }  # fmt: skip
        if not (shared and index):
            figure.add_trace(go.Scatter(x=across, y=ordered["control_low"].to_numpy(), showlegend=False, **edge))
            figure.add_trace(
                go.Scatter(
                    x=across, y=ordered["control_high"].to_numpy(), fill="tonexty", **edge,
                    fillcolor=f"rgba({red},{green},{blue},0.16)", name=safe(band if shared else f"{name}, {band}"),
                )
            )  # fmt: skip
        line = _points(ordered, pd.Series(ordered[value].to_numpy()), x, group, safe(str(name)), index, colours)
        line.update(
            x=across, mode="lines+markers", line={"color": colour, "width": 2}, error_x=None,
            error_y=_bars(ordered, value, colour), customdata=_told(ordered, value, group),
        )  # fmt: skip
        figure.add_trace(line)
    figure.add_hline(y=0, line={"color": colours.control, "width": 1}, layer="below")
    figure.update_layout(
        height=400,
        margin={"l": 70, "r": 20, "t": 70, "b": 56},
        xaxis={
            "title": {"text": safe(x_title or x)}, "fixedrange": True,
            **({"type": "log", "tickvals": sorted(set(rows[x]))} if log_x else {}),
        },
        yaxis={"title": {"text": safe(y_title or value)}, "fixedrange": True},
    )  # fmt: skip
    bands = f"{'the band is the' if shared else 'bands are the'} {band}"
    return with_caption(
        figure,
        f"{y_title or value} over {x_title or x}, with 95 % bootstrap intervals; {bands}. {_captions(rows)}".strip(),
    )


def need(rows: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuse an empty table, and one without the columns that are drawn."""
    if rows.empty:
        raise RequestError("There are no rows to draw; run the study first, or choose other rows (where).")
    missing = [name for name in columns if name not in rows]
    if missing:
        raise RequestError(f"The table has no column {missing[0]!r} to draw; it has {', '.join(rows.columns)}.")


def _points(
    rows: pd.DataFrame, y: pd.Series, value: str, label: str, name: str, index: int, colours: Palette
) -> go.Scatter:
    colour = colours.series[index % len(colours.series)]
    return go.Scatter(
        x=rows[value].to_numpy(),
        y=y.to_numpy(),
        mode="markers",
        marker={"size": 9, "color": colour, "symbol": _SYMBOLS[index % len(_SYMBOLS)]},
        error_x=_bars(rows, value, colour) if {"low", "high"} <= set(rows.columns) else None,
        customdata=_told(rows, value, label),
        hovertemplate=_HOVER,
        name=name,
        legendgroup=name,
    )


def _told(rows: pd.DataFrame, value: str, label: str) -> list[list[str]]:
    return [[safe(row[label]), number(row[value], 3), interval(row["low"], row["high"], 3)] for row in _records(rows)]


def _bars(rows: pd.DataFrame, value: str, colour: str) -> dict[str, object]:
    above = (rows["high"] - rows[value]).to_numpy(dtype=float)
    below = (rows[value] - rows["low"]).to_numpy(dtype=float)
    return {
        "type": "data", "symmetric": False, "array": np.nan_to_num(above), "arrayminus": np.nan_to_num(below),
        "color": colour, "thickness": 1.5, "width": 4,
    }  # fmt: skip


def _ranges(rows: pd.DataFrame, y: pd.Series, colours: Palette, legend: bool) -> go.Scatter:
    xs: list[float | None] = []
    ys: list[float | None] = []
    for row, height in zip(_records(rows), y, strict=True):
        xs += [row["control_low"], row["control_high"], None]
        ys += [height, height, None]
    return go.Scatter(
        x=xs, y=ys, mode="lines", line={"color": colours.control, "width": 14}, opacity=0.3, hoverinfo="skip",
        name="range of random draws", legendgroup="range", showlegend=legend,
    )  # fmt: skip


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = rows.to_dict("records")
    return records


def _captions(rows: pd.DataFrame) -> str:
    return " ".join(dict.fromkeys(map(str, rows["caption"]))) if "caption" in rows else ""
