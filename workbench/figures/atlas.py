"""The three pictures of an atlas: how far detectors agree, which kinds of heads there are, and all maps at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from workbench.errors import RequestError
from workbench.figures.text import interval, number, safe, signed, with_caption
from workbench.figures.theme import colour_bar, palette, template

Array = NDArray[np.float64]
# With the seven colours of a palette, shapes keep more clusters than that apart, and all of them in print.
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "triangle-down", "star", "hexagon", "bowtie")
_CELL = 15
_MOST_COLUMN_NAMES = 30
_NAMED_SCORES = 4
_HOVER = "<b>%{customdata[0]}</b>  %{customdata[1]}<br>%{customdata[2]}<extra></extra>"


def agreement_matrix(
    correlations: pd.DataFrame, titles: Mapping[str, str] | None = None, *, dark: bool = False
) -> go.Figure:
    """Rank correlation of every pair of detectors; detectors that agree stand beside each other.

    `correlations` is the table of `workbench.heads.agreement`. Pairs without a correlation stay empty.
    """
    if correlations.empty:
        raise RequestError("No pair of detectors to draw: agreement takes at least two.")
    known = correlations[correlations["rho"].notna()]
    names = list(dict.fromkeys([*known["detector_a"], *known["detector_b"]]))
    if not names:
        raise RequestError("No pair of detectors to draw: no two of them tell heads apart.")
    rho, hover = _square(correlations, names, titles or {})
    order = _beside(rho)
    shown = [_short(safe((titles or {}).get(names[i], names[i])), 36) for i in order]
    grid = np.ix_(order, order)
    colours = palette(dark)
    last = len(colours.diverging) - 1
    figure = go.Figure(layout={"template": template(dark)})
    figure.add_trace(
        go.Heatmap(
            z=rho[grid], customdata=hover[grid], hovertemplate="%{customdata}<extra></extra>", zmin=-1, zmax=1,
            colorscale=[[i / last, colour] for i, colour in enumerate(colours.diverging)],
            colorbar=colour_bar(tickvals=[-1, -0.5, 0, 0.5, 1], ticktext=["−1", "−0.5", "0", "0.5", "1"]),
            xgap=1, ygap=1, name="agreement",
        )
    )  # fmt: skip
    places = list(range(len(names)))
    ticks = {"tickvals": places, "ticktext": shown, "showgrid": False, "fixedrange": True}
    figure.update_layout(
        height=max(260, _CELL * len(names) + (170 if len(names) <= _MOST_COLUMN_NAMES else 60)),
        margin={"l": 40, "r": 64, "t": 16, "b": 40},
        # Many names would run into each other; rows have them all, in the same order.
        xaxis=ticks
        | {"tickangle": -60, "range": [-0.5, len(names) - 0.5], "showticklabels": len(names) <= _MOST_COLUMN_NAMES},
        yaxis=ticks | {"range": [len(names) - 0.5, -0.5]},
    )
    heads = sorted({int(n) for n in correlations["heads"]})
    counted = f"{heads[0]}" if len(heads) == 1 else f"{heads[0]} to {heads[-1]}"
    return with_caption(
        figure,
        f"Spearman's rank correlation of the scores of {counted} heads for each pair of {len(names)} detectors, each "
        "turned so that a high score says most; columns stand in the order of the rows. Detectors that rank heads "
        "alike stand together. Point at a cell for its interval (bootstrap over heads).",
    )


def _square(
    correlations: pd.DataFrame, names: Sequence[str], titles: Mapping[str, str]
) -> tuple[Array, NDArray[np.object_]]:
    place = {name: index for index, name in enumerate(names)}
    rho = np.full((len(names), len(names)), np.nan)
    hover = np.full(rho.shape, "", dtype=object)
    both = correlations["detector_a"].isin(names) & correlations["detector_b"].isin(names)
    for row in correlations[both].to_dict("records"):
        a, b = place[row["detector_a"]], place[row["detector_b"]]
        bounds = interval(row["low"], row["high"])
        told = f"{signed(row['rho'])} ({bounds})" if bounds else signed(row["rho"])
        for one, other in ((a, b), (b, a)):
            rho[one, other] = row["rho"]
            pair = " and ".join(safe(titles.get(names[i], names[i])) for i in (one, other))
            hover[one, other] = f"<b>{pair}</b><br>{told}, {int(row['heads'])} heads"
    for i, name in enumerate(names):
        hover[i, i] = f"<b>{safe(titles.get(name, name))}</b>"
    known = np.isfinite(rho).any(axis=1)
    rho[known, known] = 1.0
    return rho, hover


def _beside(rho: Array) -> list[int]:
    """An order in which detectors of high correlation are neighbours (average linkage of 1 - rho)."""
    if len(rho) < 3:
        return list(range(len(rho)))
    distance = np.clip(1 - np.nan_to_num(rho), 0, 2)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return [int(i) for i in leaves_list(tree)]


def head_scatter(
    heads: pd.DataFrame,
    clusters: pd.DataFrame,
    *,
    axes: Sequence[str] = ("", ""),
    scores: pd.DataFrame | None = None,
    titles: Mapping[str, str] | None = None,
    dark: bool = False,
) -> go.Figure:
    """The map of heads: a point a head, coloured and shaped by its cluster.

    `heads` and `clusters` are the tables of `workbench.heads.clusters`. With the head-score table, hovering tells where
    a head ranks highest.
    """
    best = _best_ranks(scores, titles or {}) if scores is not None else {}
    colours = palette(dark)
    figure = go.Figure(layout={"template": template(dark)})
    for row in clusters.sort_values("cluster").to_dict("records"):
        points = heads[heads["cluster"] == row["cluster"]]
        name = f"{row['name']} ({row['size']})"
        hover = [
            [f"L{layer}H{head}", safe(row["name"]), best.get((layer, head), "")]
            for layer, head in zip(points["layer"], points["head"], strict=True)
        ]
        at = int(row["cluster"])
        figure.add_trace(
            go.Scatter(
                x=points["x"].to_numpy(), y=points["y"].to_numpy(), mode="markers", name=safe(name), customdata=hover,
                hovertemplate=_HOVER,
                marker={
                    "size": 8, "color": colours.series[at % len(colours.series)], "opacity": 0.85,
                    "symbol": SYMBOLS[at % len(SYMBOLS)], "line": {"width": 0.6, "color": colours.page},
                },
            )
        )  # fmt: skip
    labels = [_broken(safe(text)) for text in axes]
    figure.update_layout(
        height=520 + 20 * math.ceil(len(clusters) / 2),
        margin={"l": 60, "r": 16, "t": 30 + 20 * math.ceil(len(clusters) / 2), "b": 70},
        xaxis={"title": {"text": labels[0]}, "showticklabels": False, "fixedrange": True},
        yaxis={"title": {"text": labels[1]}, "showticklabels": False, "fixedrange": True},
    )
    return with_caption(
        figure,
        f"{len(heads)} heads by all their scores, each detector's ranks made normal; near heads have like scores. "
        "Colours and shapes are Ward's clusters, named by the detectors that score them highest.",
    )


def _broken(text: str) -> str:
    """An axis title over two lines where it has a colon."""
    return text.replace(": ", ":<br>", 1)


def _best_ranks(scores: pd.DataFrame, titles: Mapping[str, str]) -> dict[tuple[int, int], str]:
    """For each head the detectors where it ranks highest, with value and place."""
    known = scores[scores["value"].notna()]
    found: dict[tuple[int, int], str] = {}
    for (layer, head), rows in known.sort_values("rank", kind="stable").groupby(["layer", "head"], sort=False):
        told = [
            f"{safe(titles.get(row['detector'], row['detector']))} {number(row['value'])} (rank {int(row['rank'])})"
            for row in rows.head(_NAMED_SCORES).to_dict("records")
        ]
        found[int(layer), int(head)] = "<br>".join(told)
    return found


def rank_maps(
    scores: pd.DataFrame, titles: Mapping[str, str] | None = None, *, columns: int = 6, dark: bool = False
) -> go.Figure:
    """Layer x head maps of all detectors as small multiples on one scale: the share of heads that a head outranks.

    Ranks make detectors of any unit comparable at a glance; values are in the hover, and in the large maps.
    """
    names = [name for name, rows in scores.groupby("detector", sort=False) if rows["value"].notna().any()]
    if not names:
        raise RequestError("No detector to draw: the score table is empty. Run `workbench atlas` first.")
    columns = min(columns, len(names))
    lines = math.ceil(len(names) / columns)
    layers, heads = int(scores["layer"].max()) + 1, int(scores["head"].max()) + 1
    panel = int(np.clip(4 * layers, 70, 260))
    height = (panel + 34) * lines + 70
    colours = palette(dark)
    figure = make_subplots(
        rows=lines, cols=columns, horizontal_spacing=0.018, vertical_spacing=min(34 / height, 1 / max(lines - 1, 1)),
        subplot_titles=[_short(safe((titles or {}).get(str(name), str(name)))) for name in names],
    )  # fmt: skip
    for index, name in enumerate(names):
        share, hover = _shares(scores[scores["detector"] == name], layers, heads)
        figure.add_trace(
            go.Heatmap(z=share, customdata=hover, hovertemplate=_HOVER, coloraxis="coloraxis", name=safe(name)),
            row=index // columns + 1,
            col=index % columns + 1,
        )
    hidden = {"showticklabels": False, "showgrid": False, "zeroline": False, "fixedrange": True}
    figure.update_xaxes(hidden | {"range": [-0.5, heads - 0.5]})
    figure.update_yaxes(hidden | {"range": [layers - 0.5, -0.5]})
    figure.update_annotations(font={"size": 10, "color": colours.muted})
    bar = colour_bar(
        orientation="h", y=0, yanchor="top", ypad=14, len=0.4, tickvals=[0, 0.5, 1],
        ticktext=["outranks none", "half", "all heads"],
    )  # fmt: skip
    figure.update_layout(
        template=template(dark), height=height, margin={"l": 12, "r": 12, "t": 28, "b": 56}, showlegend=False,
        coloraxis={"cmin": 0, "cmax": 1, "colorscale": colours.scale(), "colorbar": bar},
    )  # fmt: skip
    return with_caption(
        figure,
        f"{len(names)} detectors, one map each: rows are layers (layer 0 on top), columns heads. Colours are shares of "
        "heads that a head outranks, equal scores in the middle, so that one scale serves all.",
    )


def _shares(rows: pd.DataFrame, layers: int, heads: int) -> tuple[Array, NDArray[np.object_]]:
    """Shares of the other heads outranked `[layer, head]`, and hover texts."""
    known = rows[rows["value"].notna()]
    # Ranks stand in the table in the order that the detector means; heads of one value share theirs.
    middle = known.groupby("value")["rank"].transform("mean")
    outranked = (len(known) - middle) / max(len(known) - 1, 1)
    share = np.full((layers, heads), np.nan)
    hover = np.full((layers, heads, 3), "", dtype=object)
    for row, part in zip(known.to_dict("records"), outranked, strict=True):
        at = int(row["layer"]), int(row["head"])
        share[at] = round(float(part), 3)
        hover[at] = [f"L{at[0]}H{at[1]}", number(row["value"], 3), f"rank {int(row['rank'])} of {len(known)}"]
    return share, hover


def _short(text: str, most: int = 26) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
