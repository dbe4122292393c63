"""Losses of the tokens of one prompt, from the intact and the ablated model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.figures.text import safe, visible, with_caption
from workbench.figures.theme import palette, template

# Above so many, single points only hide the line.
_MOST_POINTS = 400


def loss_lines(tokens: Sequence[str], losses: Mapping[str, Sequence[float | None]], *, dark: bool = False) -> go.Figure:
    """One line a name of `losses` (two at most), over positions 1 on; entry t is of the token after token t."""
    colours = palette(dark)
    figure = go.Figure(layout={"template": template(dark)})
    texts = [safe(visible(token)[:40]) for token in tokens[1:]]
    means = {}
    for (name, given), colour in zip(losses.items(), (colours.control, colours.effect), strict=False):
        values = np.array([np.nan if one is None else one for one in given], dtype=float)
        means[name] = float(np.nanmean(values)) if np.isfinite(values).any() else np.nan
        mode = "lines+markers" if len(values) <= _MOST_POINTS else "lines"
        figure.add_scatter(
            x=list(range(1, len(values) + 1)), y=values, mode=mode, name=name,
            text=texts, marker={"size": 4}, line={"color": colour, "width": 1.5},
            hovertemplate="%{text} at %{x}: %{y:.3f} nats<extra>" + safe(name) + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        height=280, xaxis={"title": {"text": "position"}}, yaxis={"title": {"text": "loss (nats)"}}, hovermode="x"
    )
    told = ", ".join(f"{safe(name)} {value:.3f}" for name, value in means.items())
    return with_caption(figure, f"Loss of each token of the prompt, given those before it. Means: {told} nats.")
