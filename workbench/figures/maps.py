"""Layer x head maps: one cell a head, coloured by a detector's score.

Layer 0 is the top row, so that a map reads downwards as the model computes. The scale starts at 0 and ends
at the largest score; scores of both signs get a diverging scale around 0. The threshold, where
there is one, is a tick of the colour bar, and a ring marks the strongest head. Works for any number of
layers and heads, also where layers have different numbers of heads (cells that do not exist stay empty).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from workbench.errors import RequestError
from workbench.figures.scales import Scale, scale_for, strength
from workbench.figures.text import interval, number, probability, safe, with_caption
from workbench.figures.theme import Palette, colour_bar, palette, template

_HOVER = (
    "<b>%{customdata[0]}</b>  %{customdata[1]}<br>95 % interval %{customdata[2]}"
    "<br>null %{customdata[3]} · q %{customdata[4]} · n %{customdata[5]}<extra></extra>"
)
# of values that nothing was tested about, such as means over one text
_BARE_HOVER = "<b>%{customdata[0]}</b>  %{customdata[1]}<extra></extra>"
_ROW_PIXELS = 13
_MOST_LABELS = 12
# Characters of a title's line beside others of four columns in 600 pixels, and pixels that two more lines take.
_NARROW, _MORE_TITLE = 16, 34


def head_map(
    scores: pd.DataFrame, detector: str, *, info: Mapping[str, Any] | None = None, dark: bool = False
) -> go.Figure:
    """The map of one detector.

    `scores` is a head-score table (of several detectors or only this one); `info` is the detector's row of
    the detector table: title, unit, threshold and caption.
    """
    known = dict(info or {})
    rows = _rows_of(scores, detector)
    figure = go.Figure(layout={"template": template(dark)})
    scale = _add_map(figure, rows, known, palette(dark), "coloraxis", None)
    axes = _axes(rows)
    figure.update_layout(
        coloraxis=scale.axis(colour_bar(x=1.0)),
        title={
            "text": _title(detector, known),
            "y": 1.0,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 6},
        },
        height=_height(rows),
        margin={"l": 40, "r": 64, "t": 36, "b": 40},
        xaxis=axes["x"],
        yaxis=axes["y"],
        showlegend=False,
    )
    return with_caption(figure, map_caption(rows, detector, known))


def head_maps(
    scores: pd.DataFrame,
    detectors: pd.DataFrame | Sequence[str] | None = None,
    *,
    columns: int = 3,
    dark: bool = False,
    narrow: bool = False,
) -> go.Figure:
    """Maps of several detectors as small multiples, each with a scale of its own.

    `detectors` is the detector table or a list of names; without it, all detectors in the order of the
    scores. `narrow` breaks titles into lines, for figures that may be drawn in a small window.
    """
    known = _catalogue(scores, detectors)
    if not known:
        raise RequestError("No detector to draw: the score table is empty. Run `workbench heads` first.")
    columns = min(columns, len(known))
    lines = math.ceil(len(known) / columns)
    more = _MORE_TITLE if narrow else 0
    gap_x, height = 0.11, _height(scores) + more
    gap_y = min((84 + more) / (height * lines), 1 / max(lines - 1, 1))
    figure = make_subplots(
        rows=lines,
        cols=columns,
        subplot_titles=[_title(name, row, narrow) for name, row in known.items()],
        horizontal_spacing=gap_x,
        vertical_spacing=gap_y,
    )
    for index, (name, row) in enumerate(known.items()):
        rows = _rows_of(scores, name)
        cell = (index // columns + 1, index % columns + 1)
        axis = f"coloraxis{index + 1 if index else ''}"
        scale = _add_map(figure, rows, row, palette(dark), axis, cell)
        axes = _axes(rows)
        figure.update_xaxes(axes["x"], row=cell[0], col=cell[1])
        # The first of a line names the axis of all; between maps there is the colour bar.
        figure.update_yaxes(axes["y"] | ({"title": None} if cell[1] > 1 else {}), row=cell[0], col=cell[1])
        figure.update_layout({axis: scale.axis(colour_bar(**_bar_place(figure, index)))})
    figure.update_annotations(font={"size": 13}, yshift=4)
    figure.update_layout(
        template=template(dark), height=height * lines, margin={"l": 44, "r": 70, "t": 44 + more}, showlegend=False
    )
    captions = [map_caption(_rows_of(scores, name), name, row) for name, row in known.items()]
    return with_caption(figure, " ".join(captions))


def map_caption(rows: pd.DataFrame, detector: str, info: Mapping[str, Any]) -> str:
    """What a map shows: the detector's own caption, else its name, and the number of prompts."""
    said = str(info.get("caption") or f"Score of the detector {detector!r} for each head.")
    sizes = sorted({int(n) for n in rows["n"].dropna()}) if "n" in rows else []
    counted = f" n = {sizes[0]} prompts." if len(sizes) == 1 else ""
    return f"{said.rstrip()}{counted}"


def _rows_of(scores: pd.DataFrame, detector: str) -> pd.DataFrame:
    rows = scores[scores["detector"] == detector] if "detector" in scores else scores
    if rows.empty:
        present = sorted(map(str, scores["detector"].unique())) if "detector" in scores else []
        raise RequestError(f"No scores of detector {detector!r}; the table has {', '.join(present) or 'none'}.")
    return rows


def _catalogue(scores: pd.DataFrame, detectors: pd.DataFrame | Sequence[str] | None) -> dict[str, dict[str, Any]]:
    present = list(dict.fromkeys(scores["detector"]))
    if isinstance(detectors, pd.DataFrame):
        rows = {str(row["detector"]): dict(row) for row in detectors.to_dict("records")}
        return {name: rows[name] for name in rows if name in present}
    return {str(name): {} for name in (present if detectors is None else detectors)}


def _title(detector: str, info: Mapping[str, Any], narrow: bool = False) -> str:
    """The detector's name and unit; broken into lines, at most three, where a map may be narrow."""
    title, unit = str(info.get("title") or detector), str(info.get("unit") or "")
    lines = textwrap.wrap(title, _NARROW, max_lines=2, placeholder=" …") if narrow else [title]
    tail = f"<span style='font-size:11px'>({safe(unit)})</span>" if unit else ""
    joint = "<br>" if narrow else " "
    return f"<b>{'<br>'.join(map(safe, lines))}</b>{joint if tail else ''}{tail}"


def _height(rows: pd.DataFrame) -> int:
    layers = int(rows["layer"].max()) + 1
    return int(np.clip(layers * _ROW_PIXELS, 96, 900)) + 84


def _grid(rows: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.object_]]:
    """Values `[layer, head]` and hover texts `[layer, head, 6]`, two of them where the rows have only values."""
    shape = (int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1)
    values = np.full(shape, np.nan)
    told = 6 if _judged(rows) else 2
    hover = np.full((*shape, told), "", dtype=object)
    for row in rows.to_dict("records"):
        at = (int(row["layer"]), int(row["head"]))
        values[at] = row["value"]
        hover[at] = [
            f"L{at[0]}H{at[1]}",
            number(row["value"], 3),
            interval(row.get("low"), row.get("high"), 3) or "–",
            number(row.get("null"), 3),
            probability(row.get("q")),
            number(row.get("n"), places=0),
        ][:told]
    return values, hover


def _judged(rows: pd.DataFrame) -> bool:
    """Whether the rows have an interval, a null or a q beside their values."""
    return not {"low", "null", "q"}.isdisjoint(rows.columns)


def _strongest(rows: pd.DataFrame, values: NDArray[np.float64], info: Mapping[str, Any]) -> tuple[int, int]:
    """The head to ring: the first by rank, where the table ranks equal scores."""
    if "rank" in rows and rows["rank"].notna().any():
        best = rows.loc[rows["rank"].idxmin()]
        return int(best["layer"]), int(best["head"])
    layer, head = np.unravel_index(int(np.nanargmax(strength(values, info.get("better")))), values.shape)
    return int(layer), int(head)


def _add_map(
    figure: go.Figure,
    rows: pd.DataFrame,
    info: Mapping[str, Any],
    colours: Palette,
    axis: str,
    cell: tuple[int, int] | None,
) -> Scale:
    """Adds the cells and the ring of the strongest head; returns the scale of the cells."""
    values, hover = _grid(rows)
    scale = scale_for(values, info, colours)
    place = {} if cell is None else {"row": cell[0], "col": cell[1]}
    gap = 1 if max(values.shape) <= 48 else 0
    hovered = _HOVER if _judged(rows) else _BARE_HOVER
    figure.add_trace(
        go.Heatmap(z=values, customdata=hover, hovertemplate=hovered, coloraxis=axis, xgap=gap, ygap=gap, name="heads"),
        **place,
    )
    if np.isfinite(values).any():
        layer, head = _strongest(rows, values, info)
        ring = scale.mark(float(values[layer, head]), colours)
        figure.add_trace(
            go.Scatter(
                x=[int(head)],
                y=[int(layer)],
                mode="markers",
                marker={
                    "symbol": "circle-open",
                    "size": 10,
                    "color": ring,
                    "line": {"width": 1.8, "color": ring},
                },
                hoverinfo="skip",
                name="strongest",
            ),
            **place,
        )
    return scale


def _axes(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    layers, heads = int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1

    def axis(name: str, count: int) -> dict[str, Any]:
        step = next((s for s in (1, 2, 4, 5, 10, 20, 50) if count <= s * _MOST_LABELS), count)
        return {
            "title": {"text": name},
            "tickvals": list(range(0, count, step)),
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        }

    return {
        "x": axis("head", heads) | {"range": [-0.5, heads - 0.5]},
        "y": axis("layer", layers) | {"range": [layers - 0.5, -0.5]},
    }


def _bar_place(figure: go.Figure, index: int) -> dict[str, Any]:
    """Puts a subplot's colour bar at its right edge, with its height."""
    suffix = str(index + 1) if index else ""
    x, y = figure.layout[f"xaxis{suffix}"].domain, figure.layout[f"yaxis{suffix}"].domain
    return {"x": x[1], "y": (y[0] + y[1]) / 2, "len": y[1] - y[0], "yanchor": "middle", "xpad": 3}
