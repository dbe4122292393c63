"""Data for the page's scripts: JSON that cannot end its own element, and figures in both modes at once.

Every text of it loses the controls that reorder a page on its way in; no script has to think of them.

A figure is drawn twice, light and dark; only the values that differ are kept for the dark mode (a handful of
colours), so that switching the mode needs no second copy of the data.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly
from markupsafe import Markup

from workbench.figures import caption_of
from workbench.figures.text import in_order

_DANGEROUS = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def embed(data: object) -> Markup:
    """JSON for a `<script type="application/json">` element: no character of it can close or open a tag."""
    text = json.dumps(_plain_data(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, escape in _DANGEROUS.items():
        text = text.replace(character, escape)
    return Markup(text)


def size_of(data: object) -> int:
    """How many bytes the data takes in the file."""
    return len(embed(data).encode())


def figure_pair(draw: Callable[[bool], Any]) -> dict[str, Any]:
    """`draw(dark)` in both modes: the light figure, what differs in the dark one, height and caption."""
    light, dark = draw(False), draw(True)
    shapes = [_plain(figure) for figure in (light, dark)]
    return {
        "figure": shapes[0],
        "dark": list(_differences(shapes[0], shapes[1], [])),
        "height": int(light.layout.height or 400),
        "caption": caption_of(light),
    }


def _plain(figure: Any) -> dict[str, Any]:
    shape: dict[str, Any] = json.loads(figure.to_json())
    # the page holds the two templates once
    shape["layout"].pop("template", None)
    shape["layout"].pop("meta", None)
    return shape


def _differences(light: Any, dark: Any, path: list[str | int]) -> list[list[Any]]:
    """`[path, value in the dark mode]` for each leaf that differs."""
    if isinstance(light, dict) and isinstance(dark, dict) and light.keys() == dark.keys():
        return [d for key in light for d in _differences(light[key], dark[key], [*path, key])]
    if isinstance(light, list) and isinstance(dark, list) and len(light) == len(dark):
        return [d for i in range(len(light)) for d in _differences(light[i], dark[i], [*path, i])]
    return [] if light == dark else [[path, dark]]


def _plain_data(data: Any) -> Any:
    """NaN and infinities as null, which JSON lacks; texts with nothing in them that reorders a page."""
    if isinstance(data, str):
        return in_order(data)
    if isinstance(data, dict):
        return {in_order(str(key)): _plain_data(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain_data(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def plotly_bundle() -> str:
    """The plotly.js that comes with the plotly package, about 4.8 MB."""
    return (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def packed(text: str) -> str:
    """The text gzipped and in base64; browsers unpack it with `DecompressionStream`."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
