"""Pattern map: the full attention pattern of one head on a short prompt, query x key.

Position 0 is left out of the colour range: it is where unused attention goes, often nine tenths of it, and
would wash out the rest. Its column is drawn on the same scale (saturated where it exceeds it) and the hover
has the value. Keys after the query are masked in a causal model, so cells above the diagonal stay empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from workbench.errors import RequestError
from workbench.figures.text import safe, with_caption
from workbench.figures.theme import colour_bar, palette, template

_MOST_PIXELS = 640
_MOST_TICKS = 72


def pattern_map(
    pattern: Any, tokens: Sequence[str], *, head: tuple[int, int] | None = None, dark: bool = False
) -> go.Figure:
    """`pattern` is `[query, key]`, a labelled array or what converts to one; `tokens` are their texts."""
    values = np.asarray(pattern, dtype=np.float32)
    count = len(tokens)
    if values.ndim != 2 or values.shape[0] < count or values.shape[1] < count:
        raise RequestError(f"The pattern has shape {values.shape}, too small for {count} tokens.")
    values = values[:count, :count].copy()
    values[np.triu_indices(count, k=1)] = np.nan
    top = colour_range(values)
    names = [f"{i} {safe(token)}" for i, token in enumerate(tokens)]
    side = int(np.clip(count * 11 + 120, 300, _MOST_PIXELS))
    title = f"L{head[0]}H{head[1]}" if head is not None else ""
    figure = go.Figure(
        go.Heatmap(
            z=values,
            coloraxis="coloraxis",
            xgap=1 if count <= 40 else 0,
            ygap=1 if count <= 40 else 0,
            hovertemplate="query <b>%{y}</b><br>key <b>%{x}</b><br>attention %{z:.3f}<extra></extra>",
            x=names,
            y=names,
            hoverongaps=False,
            name=title,
        )
    )
    axis = {
        "showgrid": False,
        "type": "category",
        "fixedrange": True,
        "showticklabels": count <= _MOST_TICKS,
        "tickfont": {"size": 9},
        "tickmode": "linear",
    }
    figure.update_layout(
        template=template(dark),
        title={"text": title},
        coloraxis={"cmin": 0.0, "cmax": top, "colorscale": palette(dark).scale(), "colorbar": colour_bar()},
        xaxis=axis | {"title": {"text": "key"}, "tickangle": -90},
        yaxis=axis | {"title": {"text": "query"}, "autorange": "reversed"},
        height=side,
        margin={"l": 90, "r": 60, "t": 16 if not title else 40, "b": 90},
    )
    return with_caption(
        figure,
        f"Attention of {title or 'one head'} on a prompt of {count} tokens: each row is a query token, each "
        "column a key token. Position 0 is left out of the colour range.",
    )


def colour_range(pattern: Any) -> float:
    """The top of the colour scale: the largest attention to any key but position 0 (1 for a lone token)."""
    values = np.asarray(pattern, dtype=np.float32)[:, 1:]
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0
