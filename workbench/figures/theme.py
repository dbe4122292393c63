"""One look for all figures: two palettes (light, dark) and the plotly template made from each.

Nothing is registered with plotly and no default is changed: `template(dark)` builds a new object that a
figure carries in `layout.template`. The reports take their style sheet's colours from the same palettes.

The sequential scale was interpolated in OKLCH so that lightness runs in one direction from end to end: it
stays ordered in every kind of colour blindness and in print. Series colours are Okabe and Ito's (2008),
some of them darkened or lightened until they reach a contrast of 3:1 on the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import plotly.graph_objects as go

SANS = '"Segoe UI", Inter, Roboto, "Helvetica Neue", Arial, sans-serif'


@dataclass(frozen=True)
class Palette:
    """The colours of one mode, as hexadecimal strings."""

    name: str
    page: str
    surface: str
    sunken: str
    ink: str
    muted: str
    line: str
    accent: str
    effect: str
    control: str
    good: str
    bad: str
    series: tuple[str, ...]
    sequential: tuple[str, ...]
    diverging: tuple[str, ...]

    def scale(self) -> list[list[float | str]]:
        """The sequential scale as plotly wants it: `[[0.0, "#..."], ..., [1.0, "#..."]]`."""
        return _stops(self.sequential)


LIGHT = Palette(
    name="light",
    page="#fbfbf9",
    surface="#ffffff",
    sunken="#f3f3ef",
    ink="#1a2027",
    muted="#5a6570",
    line="#e1e2dd",
    accent="#0b6a7d",
    effect="#c24a00",
    control="#7d8791",
    good="#0b7a53",
    bad="#b3261e",
    series=("#0072b2", "#c24a00", "#00795b", "#a34e83", "#8a6d00", "#3b82b5", "#5a6570"),
    sequential=(
        "#f1f1ed",
        "#dde9d8",
        "#bcdec8",
        "#92d1b9",
        "#66bdae",
        "#3fa4a2",
        "#108a9a",
        "#006d92",
        "#104f84",
        "#203270",
        "#1d1b4e",
    ),
    diverging=("#8a3b00", "#c8783a", "#e9bd94", "#f4f2ee", "#9cc7d3", "#3f8fab", "#0b4f6c"),
)

DARK = Palette(
    name="dark",
    page="#12161b",
    surface="#1a1f26",
    sunken="#161a20",
    ink="#e8eaec",
    muted="#9aa5b0",
    line="#2d343d",
    accent="#5cc4d6",
    effect="#ff9a57",
    control="#87919b",
    good="#5fd0a5",
    bad="#ff8a80",
    series=("#56b4e9", "#ff9a57", "#3fcf9f", "#e39ac6", "#e3c044", "#8fc7ef", "#9aa5b0"),
    sequential=(
        "#1f2329",
        "#253147",
        "#294065",
        "#24527f",
        "#106a92",
        "#00849a",
        "#209fa1",
        "#48bba5",
        "#84d3a1",
        "#cce79e",
        "#f8f5bf",
    ),
    diverging=("#ffc392", "#d98a4b", "#7d5130", "#22272e", "#2b5f73", "#4fa3bd", "#a8e4f2"),
)


def palette(dark: bool = False) -> Palette:
    """The colours of the light or the dark mode."""
    return DARK if dark else LIGHT


def template(dark: bool = False) -> go.layout.Template:
    """A new plotly template in the light or the dark mode; changes no global state."""
    colours = palette(dark)
    axis = {
        "gridcolor": colours.line,
        "linecolor": colours.line,
        "zeroline": False,
        "ticks": "",
        "automargin": True,
        "title": {"font": {"size": 12, "color": colours.muted}, "standoff": 8},
        "tickfont": {"size": 11, "color": colours.muted},
    }
    return go.layout.Template(
        layout={
            "font": {"family": SANS, "size": 12, "color": colours.ink},
            "title": {
                "font": {"size": 14, "color": colours.ink},
                "x": 0,
                "xref": "container",
                "xanchor": "left",
                "pad": {"l": 4},
            },
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(colours.series),
            "colorscale": {"sequential": colours.scale(), "diverging": _stops(colours.diverging)},
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": _hover_label(colours),
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.0,
                "yanchor": "bottom",
                "font": {"size": 11, "color": colours.muted},
            },
            "margin": {"l": 48, "r": 12, "t": 40, "b": 40},
            "dragmode": False,
        }
    )


def colour_bar(**extra: object) -> dict[str, object]:
    """A slim colour bar without a frame; `extra` is merged in."""
    bar: dict[str, object] = {
        "thickness": 9,
        "len": 1.0,
        "outlinewidth": 0,
        "ticks": "",
        "xpad": 8,
        "ypad": 0,
    }
    return bar | {"tickfont": {"size": 10}} | extra


def _stops(colours: tuple[str, ...]) -> list[list[float | str]]:
    last = len(colours) - 1
    return [[i / last, colour] for i, colour in enumerate(colours)]


def _hover_label(colours: Palette) -> Mapping[str, object]:
    return {
        "bgcolor": colours.surface,
        "bordercolor": colours.line,
        "font": {"family": SANS, "size": 12, "color": colours.ink},
        "align": "left",
    }
