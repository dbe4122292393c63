"""Dose curve: the effect of ablating a detector's first k heads, over k, with the range of as many random heads.

One panel a detector and metric. The line is the effect of the nested sets with its bootstrap interval, the band the
full range of the matched random draws at the same k. Markers are filled where the effect is shown.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import RequestError
from workbench.figures.controls import with_controls
from workbench.figures.text import BY_HAND, interval, readable, safe, signed, with_caption
from workbench.figures.theme import Palette, palette, template
from workbench.figures.verdict import verdict

_PANEL_PIXELS = 250


def has_doses(verification: pd.DataFrame) -> bool:
    """Whether some detector's heads were ablated in sets of several sizes."""
    return bool(len(verification)) and bool((verification.groupby(["detector", "metric"])["k"].nunique() > 1).any())


def dose_curve(
    verification: pd.DataFrame,
    draws: pd.DataFrame | None = None,
    *,
    labels: dict[str, str] | None = None,
    dark: bool = False,
) -> go.Figure:
    """Effects over k from the `verification` table; only detectors with several sizes are drawn."""
    if not has_doses(verification):
        raise RequestError("No set of heads was ablated in several sizes; run `workbench verify` with --dose 1,2,4,8.")
    rows = with_controls(verification, draws)
    panels = [
        (str(detector), str(metric), part.sort_values("k"))
        for (detector, metric), part in rows.groupby(["detector", "metric"], sort=False)
        if part["k"].nunique() > 1
    ]
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        subplot_titles=[_title(detector, metric, labels or {}) for detector, metric, _ in panels],
        vertical_spacing=0.32 / max(1, len(panels)) if len(panels) > 1 else 0.1,
    )
    colours = palette(dark)
    for index, (_, _, part) in enumerate(panels, start=1):
        _panel(figure, part, index, colours)
    figure.update_layout(
        template=template(dark),
        height=_PANEL_PIXELS * len(panels) + 60,
        margin={"l": 80, "r": 24, "t": 64, "b": 52},
        legend={"y": 1, "yref": "container", "yanchor": "top", "traceorder": "normal"},
    )
    return with_caption(figure, _caption(rows))


def _title(detector: str, metric: str, labels: dict[str, str]) -> str:
    name = "Chosen by hand" if detector == BY_HAND else labels.get(detector, detector)
    return f"{safe(name)}: {safe(readable(metric))}"


def _panel(figure: go.Figure, part: pd.DataFrame, panel: int, colours: Palette) -> None:
    place = {"row": panel, "col": 1}
    sizes, first = part["k"].to_numpy(), panel == 1
    for trace in _band(part, colours, first):
        figure.add_trace(trace, **place)
    records = part.to_dict("records")
    shown = [verdict(row).kind == "shown" for row in records]
    figure.add_trace(
        go.Scatter(
            x=sizes,
            y=part["effect"].to_numpy(),
            mode="lines+markers",
            line={"color": colours.effect, "width": 2},
            marker={
                "symbol": ["diamond" if one else "diamond-open" for one in shown],
                "size": 11,
                "color": colours.effect,
                "line": {"width": 2, "color": colours.effect},
            },
            error_y={
                "type": "data",
                "symmetric": False,
                "array": (part["high"] - part["effect"]).to_numpy(),
                "arrayminus": (part["effect"] - part["low"]).to_numpy(),
                "color": colours.effect,
                "thickness": 1.6,
                "width": 5,
            },
            customdata=[_hover(row) for row in records],
            hovertemplate="<b>%{customdata[0]}</b><br>effect %{customdata[1]} (95 % %{customdata[2]})"
            "<br>%{customdata[3]}<extra></extra>",
            name="named heads, filled where the effect is shown",
            legendgroup="effect",
            showlegend=first,
        ),
        **place,
    )
    unit = f" ({safe(str(part['unit'].iloc[0]))})" if part["unit"].iloc[0] else ""
    worse = "worse ↑" if part["better"].iloc[0] == "lower" else "worse ↓"
    figure.update_yaxes(title={"text": f"effect{unit}, {worse}"}, fixedrange=True, **place)
    figure.update_xaxes(title={"text": "heads ablated (k)"}, type="log", tickvals=sizes, ticktext=[*map(str, sizes)],
                        fixedrange=True, **place)  # fmt: skip
    figure.add_hline(y=0, line={"color": colours.control, "width": 1}, layer="below", **place)


def _hover(row: dict[str, Any]) -> list[str]:
    return [
        safe(row["heads"]),
        signed(row["effect"], 3),
        interval(row["low"], row["high"], 3),
        verdict(row).label,
    ]


def _band(part: pd.DataFrame, colours: Palette, legend: bool) -> list[go.Scatter]:
    """The range of the draws, between two lines, and their mean."""
    edge: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "legendgroup": "range"}
    mean = {"color": colours.control, "width": 1.5, "dash": "dot"}
    sizes = part["k"].to_numpy()
    return [
        go.Scatter(x=sizes, y=part["control_low"].to_numpy(), showlegend=False, **edge),
        go.Scatter(
            x=sizes,
            y=part["control_high"].to_numpy(),
            fill="tonexty",
            fillcolor=_faint(colours.control),
            name="range of random draws",
            showlegend=legend,
            **edge,
        ),
        go.Scatter(
            x=sizes, y=part["control_effect"].to_numpy(), mode="lines", line=mean, hoverinfo="skip",
            name="mean of random draws", legendgroup="mean", showlegend=legend,
        ),
    ]  # fmt: skip


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.22)"


def _caption(rows: pd.DataFrame) -> str:
    sizes = sorted({int(n) for n in rows["n"].dropna()})
    over = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return (
        f"Change of a task metric when the first k heads are ablated together, mean over {over} prompts with a 95 % "
        "bootstrap interval; each set holds the smaller ones. The band is the full range of as many random heads, "
        "drawn anew for each k. A filled marker is an effect outside it with q below 0.05; a hollow one is not."
    )
