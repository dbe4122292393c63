"""Ablation chart: the effect of ablating a detector's top heads against draws of matched random heads.

One row an ablation, one panel a metric (units differ). Grey points are the single draws, the grey bar their
full range; the diamond is the effect of the named heads with its bootstrap interval, filled where the
effect is shown and hollow where it is not, e.g. inside the control range.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from workbench.errors import RequestError
from workbench.figures.controls import KEYS, counted_sets, few_sets, whence, with_controls
from workbench.figures.text import BY_HAND, form, interval, probability, readable, safe, signed, with_caption
from workbench.figures.theme import Palette, palette, template
from workbench.figures.verdict import verdict

_ROW_PIXELS = 46
_HEAD_PIXELS = 74


def ablation_chart(
    verification: pd.DataFrame,
    draws: pd.DataFrame | None = None,
    *,
    metric: str | None = None,
    labels: dict[str, str] | None = None,
    dark: bool = False,
) -> go.Figure:
    """Effects of the `verification` table, the points of `verification_draws` behind them where given.

    `metric` keeps one metric; `labels` gives detectors their titles.
    """
    rows = with_controls(verification if metric is None else verification[verification["metric"] == metric], draws)
    if rows.empty:
        raise RequestError(f"No ablation of metric {metric or 'any'} in the table; run `workbench verify`.")
    metrics = list(dict.fromkeys(rows["metric"]))
    sizes = [int((rows["metric"] == name).sum()) for name in metrics]
    height = _ROW_PIXELS * sum(sizes) + _HEAD_PIXELS * len(metrics) + 30
    figure = make_subplots(
        rows=len(metrics),
        cols=1,
        row_heights=sizes,
        vertical_spacing=_HEAD_PIXELS / height if len(metrics) > 1 else 0.1,
    )
    colours = palette(dark)
    for index, name in enumerate(metrics):
        part = rows[rows["metric"] == name].reset_index(drop=True)
        _panel(figure, part, draws, index + 1, colours, labels or {}, _whose(rows))
    figure.update_layout(
        template=template(dark),
        height=height,
        margin={"l": 150, "r": 120, "t": 44, "b": 52},
        legend={"y": 1, "yref": "container", "yanchor": "top", "traceorder": "normal"},
    )
    return with_caption(figure, _caption(rows))


def _panel(
    figure: go.Figure,
    rows: pd.DataFrame,
    draws: pd.DataFrame | None,
    panel: int,
    colours: Palette,
    labels: dict[str, str],
    whose: str,
) -> None:
    place = {"row": panel, "col": 1}
    # the first row of the table at the top
    heights = np.arange(len(rows))[::-1]
    points = _draws_of(rows, draws, heights)
    first = panel == 1
    figure.add_trace(_range(rows, heights, colours, first), **place)
    if points is not None:
        figure.add_trace(_draws(points, colours, first), **place)
    judged = [verdict(row).kind == "shown" for row in rows.to_dict("records")]
    for shown in (True, False):
        chosen = rows[[flag is shown for flag in judged]]
        figure.add_trace(_effects(chosen, heights[chosen.index], shown, colours, first, whose), **place)
    names = [
        f"<b>{safe(name)}</b><br><span style='font-size:11px'>{safe(size)}</span>"
        for name, size in (_set(row, labels) for row in rows.to_dict("records"))
    ]
    axis = {"tickvals": heights, "ticktext": names, "range": [-0.6, len(rows) - 0.4], "fixedrange": True}
    figure.update_yaxes(axis | {"showgrid": False, "tickfont": {"size": 12, "color": colours.ink}}, **place)
    figure.update_xaxes(title={"text": _axis_title(rows.iloc[0])}, fixedrange=True, **place)
    figure.add_vline(x=0, line={"color": colours.control, "width": 1}, layer="below", **place)
    for height, row in zip(heights, rows.to_dict("records"), strict=True):
        figure.add_annotation(
            x=1.0,
            xref="paper",
            xanchor="left",
            xshift=10,
            y=height,
            yref=f"y{panel if panel > 1 else ''}",
            text=f"p {probability(row.get('p'))}<br>q {probability(row.get('q'))}",
            showarrow=False,
            align="left",
            font={"size": 11, "color": colours.muted},
        )


def _set(row: dict[str, Any], labels: dict[str, str]) -> tuple[str, str]:
    """What to call the ablated heads, and how many there are of them."""
    k, detector = int(row["k"]), str(row["detector"])
    if detector == BY_HAND:
        return "Chosen by hand", f"{k} {'head' if k == 1 else 'heads'}, {form(row)}"
    return labels.get(detector, detector), f"top {k}, {form(row)}"


def _whose(rows: pd.DataFrame) -> str:
    by_hand = rows["detector"] == BY_HAND
    return "heads chosen by hand" if by_hand.all() else "ablated heads" if by_hand.any() else "detector's heads"


def _axis_title(row: pd.Series) -> str:
    unit = f" ({safe(row['unit'])})" if row.get("unit") else ""
    arrow = "← worse" if row.get("better") == "higher" else "worse →"
    text = f"change in {safe(readable(row['metric']))}{unit}"
    return f"{arrow}   {text}" if arrow.startswith("←") else f"{text}   {arrow}"


def _draws_of(rows: pd.DataFrame, draws: pd.DataFrame | None, heights: NDArray[np.int64]) -> pd.DataFrame | None:
    if draws is None:
        return None
    places = rows[KEYS].assign(height=heights)
    joined = draws.merge(places, on=KEYS, how="inner")
    # a fixed sequence spreads the points over the row: the same picture for the same table
    spread = (np.arange(len(joined)) * 0.618034) % 1 - 0.5
    return joined.assign(height=joined["height"] + 0.42 * spread)


def _draws(points: pd.DataFrame, colours: Palette, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=points["effect"].to_numpy(),
        y=points["height"].to_numpy(),
        mode="markers",
        marker={"size": 5, "color": colours.control, "opacity": 0.75},
        customdata=[[safe(heads), signed(e, 3)] for heads, e in zip(points["heads"], points["effect"], strict=True)],
        hovertemplate="matched random heads<br>%{customdata[0]}<br>effect %{customdata[1]}<extra></extra>",
        name="one random draw",
        legendgroup="draws",
        showlegend=legend,
    )


def _range(rows: pd.DataFrame, heights: NDArray[np.int64], colours: Palette, legend: bool) -> go.Scatter:
    xs: list[float | None] = []
    ys: list[float | None] = []
    for row, height in zip(rows.to_dict("records"), heights, strict=True):
        xs += [row["control_low"], row["control_high"], None]
        ys += [height, height, None]
    return go.Scatter(
        x=xs,
        y=ys,
        mode="lines",
        line={"color": colours.control, "width": 16},
        opacity=0.28,
        hoverinfo="skip",
        name="range of random draws",
        legendgroup="range",
        showlegend=legend,
    )


def _effects(
    rows: pd.DataFrame, heights: NDArray[np.int64], shown: bool, colours: Palette, legend: bool, whose: str
) -> go.Scatter:
    hover = [
        [safe(r["heads"]), signed(r["effect"], 3, _beside(r)), interval(r["low"], r["high"], 3), verdict(r).label]
        for r in rows.to_dict("records")
    ]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": (rows["high"] - rows["effect"]).to_numpy(),
        "arrayminus": (rows["effect"] - rows["low"]).to_numpy(),
        "color": colours.effect,
        "thickness": 1.6,
        "width": 5,
    }
    return go.Scatter(
        x=rows["effect"].to_numpy() if len(rows) else [None],
        y=heights if len(rows) else [None],
        mode="markers",
        marker={
            "symbol": "diamond" if shown else "diamond-open",
            "size": 11,
            "color": colours.effect,
            "line": {"width": 2, "color": colours.effect},
        },
        error_x=bars,
        customdata=hover,
        hovertemplate=(
            "<b>%{customdata[0]}</b><br>effect %{customdata[1]} (95 % %{customdata[2]})"
            "<br>%{customdata[3]}<extra></extra>"
        ),
        name=f"{whose}, effect {'shown' if shown else 'not shown'}",
        legendgroup=f"effect {shown}",
        showlegend=legend,
    )


def _caption(rows: pd.DataFrame) -> str:
    sizes = sorted({int(n) for n in rows["n"].dropna()}) if "n" in rows else []
    over = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}" if sizes else "the"
    heads = {"detector's heads": "a detector's top heads"}.get(_whose(rows), f"the {_whose(rows)}")
    return (
        f"Change of each task metric when {heads} are ablated, mean over {over} prompts with "
        f"a 95 % bootstrap interval, beside {_sets(rows)} of as many random heads{whence(rows.to_dict('records'))}. A "
        "filled diamond is an effect outside the range of at least ten different sets with q below 0.05; a hollow one "
        "is not."
    )


def _sets(rows: pd.DataFrame) -> str:
    """How many control sets an ablation had; the different ones where these are fewer than the draws."""
    drawn = sorted({int(n) for n in rows["draws"].dropna()}) if "draws" in rows else []
    found = rows["different_draws"].dropna() if "different_draws" in rows else pd.Series(dtype=float)
    if any(map(few_sets, rows.to_dict("records"))) or (drawn and (found < drawn[0]).any()):
        least, most = int(found.min()), int(found.max())
        return counted_sets(least) if least == most else f"{least} to {most} different sets"
    return f"{drawn[0]} draws" if len(drawn) == 1 else "draws"


def _beside(row: dict[str, Any]) -> tuple[float, ...]:
    return tuple(float(row[name]) for name in ("baseline", "ablated") if name in row)
