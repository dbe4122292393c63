"""How good a circuit is: faithfulness over its size beside random circuits, and recovery of a known circuit.

Sizes are on a logarithmic axis: circuits that matter hold a few hundredths of all edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures.patching import measured
from workbench.figures.studies import need
from workbench.figures.text import interval, number, safe, with_caption
from workbench.figures.theme import palette, template

_HEIGHT = 380
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star")


def faithfulness_curve(
    curve: pd.DataFrame,
    about: Mapping[str, Any],
    *,
    random: pd.DataFrame | None = None,
    dark: bool = False,
) -> go.Figure:
    """Faithfulness over the share of edges kept, a line a method with its interval; 1 is the whole model, 0 none of it.

    `curve` has method, fraction, value, low and high; `random` has fraction, low, high (and value): random circuits of
    equal size, drawn as a band.
    """
    need(curve, ["method", "fraction", "value", "low", "high"])
    colours, curve = palette(dark), _named(curve)
    figure = go.Figure(layout={"template": template(dark)})
    if random is not None and len(random):
        # Circuits of one share have random ones of their own; the band holds all of them.
        band = random.groupby("fraction", as_index=False).agg(low=("low", "min"), high=("high", "max"))
        _add_band(figure, band.dropna(), colours.control)
    for index, (method, part) in enumerate(curve.groupby("method", sort=False)):
        _add_line(figure, str(method), part.sort_values("fraction"), colours.series[index % len(colours.series)], index)
    for level in (0.0, 1.0):
        figure.add_hline(y=level, line={"color": colours.control, "width": 1}, layer="below")
    shares = curve.loc[curve["fraction"] > 0, "fraction"]
    ticks = [
        tick for tick in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if tick >= shares.min() * 0.99
    ]
    figure.update_layout(
        height=_HEIGHT,
        margin={"l": 60, "r": 20, "t": 56, "b": 52},
        xaxis={
            "type": "log", "title": {"text": "share of the edges kept"}, "tickvals": ticks, "fixedrange": True,
            "ticktext": [f"{100 * tick:g} %" for tick in ticks],
        },
        yaxis={"title": {"text": "faithfulness"}, "fixedrange": True, "zeroline": False},
        showlegend=True,
    )  # fmt: skip
    n = int(random["n"].max()) if random is not None and "n" in random and len(random) else None
    beside = f" Grey: {n} random circuits of equal size (their full range)." if n else ""
    if random is not None and len(random) and n is None:
        beside = " Grey: random circuits of equal size."
    ablated = about.get("ablation") or "the corrupt run"
    return with_caption(
        figure,
        "Faithfulness (metric of the circuit less that of the corrupt run, over the gap between the runs) with "
        f"everything outside the circuit replaced: {ablated}. Bars are 95 % bootstrap intervals over prompts.{beside} "
        f"{measured(about)}",
    )  # fmt: skip


_RANKINGS = {"absolute": "by size", "signed": "by sign", "given": "as found"}


def _named(curve: pd.DataFrame) -> pd.DataFrame:
    """One name a line: the method, and how its edges were ranked where that differs."""
    if "ranking" not in curve or curve["ranking"].nunique() < 2:
        return curve
    ways = [_RANKINGS.get(str(one), str(one)) for one in curve["ranking"]]
    return curve.assign(method=[f"{name}, {way}" for name, way in zip(curve["method"], ways, strict=True)])


def roc_curve(points: pd.DataFrame, about: Mapping[str, Any], *, dark: bool = False) -> go.Figure:
    """True against false positive rate of the known circuit's parts, a line a method; `auc` where the table has it."""
    need(points, ["method", "fpr", "tpr"])
    colours = palette(dark)
    figure = go.Figure(layout={"template": template(dark)})
    figure.add_trace(
        go.Scatter(
            x=[0, 1], y=[0, 1], mode="lines", line={"color": colours.control, "width": 1, "dash": "dot"},
            hoverinfo="skip", name="chance",
        )
    )  # fmt: skip
    if "of" in points and points["of"].nunique() > 1:
        points = points.assign(
            method=[f"{name}, {of}" for name, of in zip(points["method"], points["of"], strict=True)]
        )
    for index, (method, part) in enumerate(points.groupby("method", sort=False)):
        ordered = part.sort_values(["fpr", "tpr"])
        area = f" (area {number(float(part['auc'].iloc[0]), places=2)})" if "auc" in part else ""
        figure.add_trace(
            go.Scatter(
                x=ordered["fpr"], y=ordered["tpr"], mode="lines", name=safe(f"{method}{area}"),
                line={"color": colours.series[index % len(colours.series)], "width": 2, "shape": "hv"},
                hovertemplate="false positives %{x:.3f}, true %{y:.3f}",
            )
        )  # fmt: skip
    figure.update_layout(
        height=_HEIGHT,
        margin={"l": 60, "r": 20, "t": 56, "b": 52},
        xaxis={"title": {"text": "false positive rate"}, "range": [-0.02, 1.02], "fixedrange": True},
        yaxis={"title": {"text": "true positive rate"}, "range": [-0.02, 1.04], "fixedrange": True},
        showlegend=True,
    )
    known = about.get("known_circuit") or {}
    paper = f" of {known['paper']}" if isinstance(known, Mapping) and known.get("paper") else ""
    of = " and ".join(dict.fromkeys(map(str, points["of"]))) if "of" in points else "parts"
    return with_caption(
        figure, f"How the ranking of {of} by score finds those of the known circuit{paper}. {measured(about)}"
    )


def contribution_bars(
    parts: pd.DataFrame, about: Mapping[str, Any], *, most: int = 24, dark: bool = False
) -> go.Figure:
    """Direct logit attribution: what each part writes towards the answer, the largest of either sign.

    `parts` has node, value, and low and high where they are known.
    """
    need(parts, ["node", "value"])
    order = parts["value"].abs().sort_values(ascending=False, kind="stable").index[:most]
    rows = parts.loc[order].sort_values("value", ascending=True)
    colours = palette(dark)
    bars = None
    if {"low", "high"} <= set(rows.columns) and rows["low"].notna().any():
        bars = {
            "type": "data", "symmetric": False, "array": (rows["high"] - rows["value"]).to_numpy(float),
            "arrayminus": (rows["value"] - rows["low"]).to_numpy(float), "color": colours.ink, "thickness": 1.2,
            "width": 3,
        }  # fmt: skip
    told = [interval(row.get("low"), row.get("high"), 3) or "not known" for row in rows.to_dict("records")]
    figure = go.Figure(layout={"template": template(dark)})
    figure.add_trace(
        go.Bar(
            x=rows["value"].to_numpy(float), y=[safe(node) for node in rows["node"]], orientation="h", error_x=bars,
            marker={"color": np.where(rows["value"] > 0, colours.diverging[-2], colours.diverging[1]).tolist()},
            customdata=told, name="contributions",
            hovertemplate="<b>%{y}</b>  %{x:.3f}<br>95 % interval %{customdata}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_vline(x=0, line={"color": colours.control, "width": 1})
    figure.update_layout(
        height=17 * len(rows) + 80,
        margin={"l": 80, "r": 20, "t": 12, "b": 52},
        xaxis={"title": {"text": "direct contribution to the metric"}, "fixedrange": True},
        yaxis={"fixedrange": True, "showgrid": False, "dtick": 1},
        showlegend=False,
    )
    left = f" The {len(rows)} largest of {len(parts)}." if len(parts) > len(rows) else ""
    return with_caption(
        figure,
        "What each part writes straight to the logits, answer less foil, in the clean run, through the final norm's "
        f"own scale; nothing is patched.{left} {measured(about)}",
    )


def _add_band(figure: go.Figure, rows: pd.DataFrame, colour: str) -> None:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "legendgroup": "random"}
    figure.add_trace(go.Scatter(x=rows["fraction"], y=rows["low"], showlegend=False, **edge))
    figure.add_trace(
        go.Scatter(
            x=rows["fraction"], y=rows["high"], fill="tonexty", fillcolor=f"rgba({red},{green},{blue},0.28)",
            name="random circuits", **edge,
        )
    )  # fmt: skip


def _add_line(figure: go.Figure, method: str, rows: pd.DataFrame, colour: str, index: int) -> None:
    above = np.nan_to_num((rows["high"] - rows["value"]).to_numpy(float))
    below = np.nan_to_num((rows["value"] - rows["low"]).to_numpy(float))
    told = [interval(row["low"], row["high"], 3) or "not known" for row in rows.to_dict("records")]
    figure.add_trace(
        go.Scatter(
            x=rows["fraction"], y=rows["value"], mode="lines+markers", name=safe(method), customdata=told,
            line={"color": colour, "width": 2},
            marker={"size": 7, "symbol": _SYMBOLS[index % len(_SYMBOLS)]},
            error_y={
                "type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": colour,
                "thickness": 1.2, "width": 3,
            },
            hovertemplate="%{x:.3%} of the edges: %{y:.3f} (95 % %{customdata})",
        )
    )  # fmt: skip
