"""Maps of patches: layer by head, layer by position, or head by position, both directions side by side.

One scale for both directions, around 0: what helps the task on one side, what hurts on the other. Layer 0 is the top
row. Cells without a patch stay empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from workbench.errors import RequestError
from workbench.figures.scales import Scale, round_ticks
from workbench.figures.studies import need
from workbench.figures.text import interval, number, probability, readable, safe, signed, with_caption
from workbench.figures.theme import Palette, colour_bar, palette, template

_ROW_PIXELS = 14
# Rows of a map of heads by position: those with the strongest patches.
MOST_ROWS = 24
_TITLES = {"denoising": "<b>Restored</b>: clean into corrupt", "noising": "<b>Broken</b>: corrupt into clean"}
_MOVED = {
    "denoising": "restored by clean values in the corrupt run",
    "noising": "broken by corrupt ones in the clean run",
}
_HOVER = "<b>%{customdata[0]}</b>  %{customdata[1]}<br>95 % interval %{customdata[2]}<br>q %{customdata[3]}"
_HOVER += " · n %{customdata[4]}<extra></extra>"
MLP = "MLP"


@dataclass(frozen=True)
class _Axes:
    """What stands on the rows and columns: keys of the table's rows, and their labels."""

    row: list[Any]
    column: list[Any]
    row_labels: list[str]
    column_labels: list[str]
    row_title: str
    column_title: str


def has_map(effects: pd.DataFrame) -> bool:
    """Whether the table has two axes to draw a map on."""
    layers = effects["layer"].notna().any() and effects["node"].nunique() > 1
    keyed = "key" in effects and effects["key"].notna().any()
    return bool(layers and not keyed and (effects["head"].notna().any() or effects["position"].notna().any()))


def patch_maps(
    effects: pd.DataFrame,
    about: Mapping[str, Any],
    *,
    tokens: pd.DataFrame | None = None,
    dark: bool = False,
) -> go.Figure:
    """Effects of one site (or of paths to one receiver), a map a direction.

    `effects` is the table of `workbench.circuits.Effects` with its places; `about` says task, metric, n and the means
    of both runs; `tokens` labels positions (position, token, role) where all prompts have one shape.
    """
    need(effects, ["direction", "node", "layer", "head", "position", "effect", "recovery"])
    if not has_map(effects):
        raise RequestError("These patches have one axis only; draw them as points, or patch by head or by position.")
    rows = _cells(effects)
    measure = "recovery" if rows["recovery"].notna().any() else "effect"
    axes = _axes(rows, measure, tokens)
    directions = list(dict.fromkeys(rows["direction"]))
    scale = centred(rows[measure].to_numpy(float), palette(dark))
    figure = make_subplots(
        rows=1, cols=len(directions), shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=[_TITLES[str(direction)] for direction in directions],
    )  # fmt: skip
    for column, direction in enumerate(directions, start=1):
        _add(figure, rows[rows["direction"] == direction], measure, axes, palette(dark), scale, column)
    _lay_out(figure, axes, scale, measure, len(directions), dark)
    return with_caption(figure, _caption(rows, about, measure, axes))


def centred(values: NDArray[np.float64], colours: Palette) -> Scale:
    """A scale around 0 that reaches to the largest value of either sign."""
    finite = np.abs(values[np.isfinite(values)])
    reach = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    ticks = round_ticks(-reach, reach)
    return Scale(-reach, reach, colours.diverging, tuple(ticks), tuple(signed(tick) for tick in ticks))


def measured(about: Mapping[str, Any]) -> str:
    """What was measured, on what, how often; for the end of a caption."""
    name = readable(about.get("metric", "metric"))
    gap = f", clean {number(about['clean'])}, corrupt {number(about['corrupt'])}" if "clean" in about else ""
    return f"{about.get('task', 'The task')}, {name}{gap}, mean over n = {about.get('n', '?')} pairs."


def _cells(effects: pd.DataFrame) -> pd.DataFrame:
    """Rows with text keys: which head (an MLP has a column of its own), which position."""
    heads = [
        (MLP if str(node).endswith(".mlp") else "") if pd.isna(head) else str(int(head))
        for node, head in zip(effects["node"], effects["head"], strict=True)
    ]
    positions = ["" if pd.isna(place) else str(place) for place in effects["position"]]
    return effects.assign(at_head=heads, at_position=positions)


def _axes(rows: pd.DataFrame, measure: str, tokens: pd.DataFrame | None) -> _Axes:
    with_heads, with_positions = (rows["at_head"] != "").any(), (rows["at_position"] != "").any()
    layers = list(range(int(rows["layer"].min()), int(rows["layer"].max()) + 1))
    kv = rows["node"].str.contains("KV").any()
    if with_positions:
        places = _in_order(list(rows["at_position"].unique()))
        labels = [_position(place, tokens) for place in places]
        by_role = not all(place.isdecimal() for place in places)
        title = "role" if by_role else "token of the first pair" if tokens is not None else "position"
        if not with_heads:
            return _Axes(layers, places, [str(layer) for layer in layers], labels, "layer", title)
        names = strongest(rows, measure)
        return _Axes(names, places, names, labels, "", title)
    heads = _in_order(list(rows["at_head"].unique()))
    title = "key/value head" if kv else "head"
    return _Axes(layers, heads, [str(layer) for layer in layers], heads, "layer", title)


def strongest(rows: pd.DataFrame, measure: str, most: int = MOST_ROWS) -> list[str]:
    """Nodes with the largest values of either sign anywhere, in the order of the model."""
    best = rows.assign(size=rows[measure].abs()).groupby("node")["size"].max().nlargest(most).index
    order = rows.drop_duplicates("node").set_index("node").loc[list(best), ["layer", "head"]]
    return [str(name) for name in order.sort_values(["layer", "head"], na_position="last").index]


def _in_order(names: Sequence[str]) -> list[str]:
    """Numbers by size, then words as they come."""
    numbers = sorted((name for name in names if name.isdecimal()), key=int)
    return [*numbers, *(name for name in names if name and not name.isdecimal())]


def _position(place: str, tokens: pd.DataFrame | None) -> str:
    """A token under its number, and its role where it has one."""
    if tokens is None or not place.isdecimal():
        return safe(place)
    found = tokens[tokens["position"] == int(place)]
    if found.empty:
        return place
    row = found.iloc[0]
    role = f" <b>{safe(row['role'])}</b>" if row["role"] else ""
    return f"{safe(row['token'])}{role}"


def _add(
    figure: go.Figure, rows: pd.DataFrame, measure: str, axes: _Axes, colours: Palette, scale: Scale, column: int
) -> None:
    """The cells of one direction, and a ring at the strongest."""
    values = np.full((len(axes.row), len(axes.column)), np.nan)
    hover = np.full((*values.shape, 5), "", dtype=object)
    down = {key: at for at, key in enumerate(axes.row)}
    across = {key: at for at, key in enumerate(axes.column)}
    low, high = ("low", "high") if measure == "recovery" else ("effect_low", "effect_high")
    by_position, by_node = axes.column_title not in ("head", "key/value head"), axes.row_title == ""
    for row in rows.to_dict("records"):
        y = down.get(row["node"] if by_node else int(row["layer"]))
        x = across.get(row["at_position"] if by_position else row["at_head"])
        if y is None or x is None:
            continue
        values[y, x] = row[measure]
        where = f" at {row['at_position']}" if row["at_position"] else ""
        told = (signed(row[measure], 3), interval(row.get(low), row.get(high), 3) or "–", probability(row.get("q")))
        hover[y, x] = [safe(f"{row['node']}{where}"), *told, number(row.get("n"), places=0)]
    gap = 1 if max(values.shape) <= 48 else 0
    figure.add_trace(
        go.Heatmap(
            z=values, customdata=hover, hovertemplate=_HOVER, coloraxis="coloraxis", xgap=gap, ygap=gap, name="patches"
        ),
        row=1, col=column,
    )  # fmt: skip
    if not np.isfinite(values).any():
        return
    top, left = map(int, np.unravel_index(int(np.nanargmax(np.abs(values))), values.shape))
    ring = scale.mark(float(values[top, left]), colours)
    marker = {"symbol": "circle-open", "size": 10, "color": ring, "line": {"width": 1.8, "color": ring}}
    figure.add_trace(
        go.Scatter(x=[left], y=[top], mode="markers", marker=marker, hoverinfo="skip", name="strongest"),
        row=1, col=column,
    )  # fmt: skip


def _lay_out(figure: go.Figure, axes: _Axes, scale: Scale, measure: str, columns: int, dark: bool) -> None:
    def axis(title: str, labels: list[str], most: int) -> dict[str, Any]:
        plain = all(label.isdecimal() for label in labels)
        step = next((s for s in (1, 2, 4, 5, 10, 20, 50) if len(labels) <= s * most), len(labels)) if plain else 1
        shown = range(0, len(labels), step)
        return {
            "title": {"text": title}, "tickvals": list(shown), "ticktext": [labels[at] for at in shown],
            "showgrid": False, "zeroline": False, "fixedrange": True,
        }  # fmt: skip

    long = max(map(len, axes.column_labels), default=0) > 2 and len(axes.column) > 6
    figure.update_xaxes(axis(axes.column_title, axes.column_labels, 12) | ({"tickangle": -60} if long else {}))
    figure.update_xaxes(range=[-0.5, len(axes.column) - 0.5])
    figure.update_yaxes(axis("", axes.row_labels, 16 if axes.row_title else len(axes.row)))
    figure.update_yaxes(range=[len(axes.row) - 0.5, -0.5])
    figure.update_yaxes(title={"text": axes.row_title}, row=1, col=1)
    unit = "share of the gap" if measure == "recovery" else "change of the metric"
    figure.update_annotations(font={"size": 13}, yshift=4)
    figure.update_layout(
        template=template(dark),
        coloraxis=scale.axis(colour_bar(x=1.0) | {"title": {"text": unit, "side": "right", "font": {"size": 11}}}),
        height=int(np.clip(len(axes.row) * _ROW_PIXELS, 110, 900)) + 100 + (60 if long else 0),
        margin={"l": 56 if axes.row_title else 70, "r": 84, "t": 40, "b": 44},
        showlegend=False,
        title={"text": ""},
    )


def _caption(rows: pd.DataFrame, about: Mapping[str, Any], measure: str, axes: _Axes) -> str:
    sites = ", ".join(dict.fromkeys(map(str, rows["site"]))) if "site" in rows else "activation"
    what = "Share of the gap between the clean and the corrupt run" if measure == "recovery" else "Change of the metric"
    receivers = list(dict.fromkeys(rows["receiver"])) if "receiver" in rows else []
    moved = f"paths to {', '.join(map(str, receivers))} are patched" if receivers else f"{sites} is patched"
    if axes.row_title == "" and rows["node"].nunique() > len(axes.row):
        moved += f" (the {len(axes.row)} of {rows['node'].nunique()} nodes with the strongest patches)"
    directions = [_MOVED[str(direction)] for direction in dict.fromkeys(rows["direction"])]
    return f"{what}, where {moved}: {', '.join(directions)}. Blue helps the task, orange hurts it. {measured(about)}"
