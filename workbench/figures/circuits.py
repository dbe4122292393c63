"""A circuit as a picture: its strongest edges between nodes laid out by layer, and maps of scores of nodes and edges.

Query heads are circles, key/value heads squares, MLPs diamonds; a key/value head is tied to the query heads that read
it by a thin dotted line, which is architecture and no edge. Edges are coloured by sign, and as wide as their score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.figures.patching import MLP, centred, measured
from workbench.figures.studies import need
from workbench.figures.text import interval, safe, signed, with_caption
from workbench.figures.theme import Palette, palette, template

MOST_EDGES = 40
_NODE = re.compile(r"L(\d+)(?:H(\d+)|KV(\d+)|(\.mlp))")
_WIDTHS = (1.0, 2.0, 3.4, 5.0)
_DASHES = {"q": "solid", "k": "dash", "v": "dot", "": "solid"}
_SYMBOLS = {"head": "circle", "kv": "square", "mlp": "diamond", "end": "circle"}
_LIFT = {"kv": -0.3, "head": 0.0, "mlp": 0.32, "end": 0.0}
_ROW_PIXELS = 54


@dataclass(frozen=True)
class _Node:
    name: str
    kind: str
    layer: int
    index: int


def score_map(
    nodes: pd.DataFrame, about: Mapping[str, Any], *, of: str = "score of the node", dark: bool = False
) -> go.Figure:
    """Scores of nodes by layer and head, MLPs in the last column; `nodes` has node and score, and intervals."""
    need(nodes, ["node", "score"])
    cells: dict[tuple[int, str], Mapping[str, Any]] = {}
    for row in nodes.to_dict("records"):
        found = _NODE.fullmatch(str(row["node"]))
        if found is not None and found[3] is None:
            cells[int(found[1]), MLP if found[4] else found[2]] = row
    layers = 1 + max((layer for layer, _ in cells), default=0)
    heads = sorted({head for _, head in cells if head != MLP}, key=int)
    columns = [*heads, *([MLP] if any(head == MLP for _, head in cells) else [])]
    values = np.full((layers, len(columns)), np.nan)
    hover = np.full((layers, len(columns), 3), "", dtype=object)
    for (layer, head), row in cells.items():
        at = layer, columns.index(head)
        values[at] = row["score"]
        hover[at] = [
            str(row["node"]), signed(row["score"], 3), interval(row.get("low"), row.get("high"), 3) or "not known",
        ]  # fmt: skip
    colours = palette(dark)
    scale = centred(values.ravel(), colours)
    figure = go.Figure(layout={"template": template(dark)})
    figure.add_trace(
        go.Heatmap(
            z=values, customdata=hover, coloraxis="coloraxis", xgap=1, ygap=1, name="scores",
            hovertemplate="<b>%{customdata[0]}</b>  %{customdata[1]}<br>95 % interval %{customdata[2]}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(
        coloraxis=scale.axis({"thickness": 9, "outlinewidth": 0, "x": 1.0}),
        height=int(np.clip(layers * 14, 110, 900)) + 90,
        margin={"l": 48, "r": 70, "t": 16, "b": 44},
        xaxis=_ticks("head", columns, 16),
        yaxis=_ticks("layer", [str(layer) for layer in range(layers)], 16) | {"range": [layers - 0.5, -0.5]},
    )
    missing = [str(row["node"]) for row in nodes.to_dict("records") if not _NODE.fullmatch(str(row["node"]))]
    ends = f" Without a cell: {', '.join(missing)}." if missing else ""
    return with_caption(
        figure, f"{_capital(of)} by {_method(about)}; blue helps the task, orange hurts it.{ends} {measured(about)}"
    )


def circuit_graph(
    edges: pd.DataFrame,
    about: Mapping[str, Any],
    *,
    most: int = MOST_EDGES,
    group: int = 1,
    dark: bool = False,
) -> go.Figure:
    """The `most` strongest edges as curves between nodes, layers from below to above.

    `edges` has source, target, through and score (positive helps); `group` is how many query heads share a key/value
    head, whose ties are drawn where both ends are shown.
    """
    need(edges, ["source", "target", "through", "score"])
    shown = edges.loc[edges["score"].abs().sort_values(ascending=False, kind="stable").index[:most]]
    shown = shown[shown["score"].abs() > 0]
    names = dict.fromkeys([*shown["source"], *shown["target"]])
    nodes = [_node(str(name)) for name in names]
    places, rows = _placed(nodes)
    colours = palette(dark)
    figure = go.Figure(layout={"template": template(dark)})
    _add_ties(figure, nodes, places, group, colours)
    _add_edges(figure, shown, places, colours)
    _add_nodes(figure, nodes, places, colours)
    figure.update_layout(
        height=max(260, _ROW_PIXELS * len(rows) + 90),
        margin={"l": 56, "r": 16, "t": 44, "b": 16},
        xaxis={"visible": False, "range": [-0.04, 1.04], "fixedrange": True},
        yaxis={
            "tickvals": list(range(len(rows))), "ticktext": rows, "showgrid": True, "zeroline": False,
            "fixedrange": True, "range": [-0.6, len(rows) - 0.4], "title": {"text": "layer"},
        },
        hovermode="closest",
        showlegend=True,
    )  # fmt: skip
    left = len(edges) - len(shown)
    more = f" {left:,} weaker ones of {len(edges):,} are not drawn." if left else ""
    return with_caption(
        figure,
        f"The {len(shown)} strongest edges by {_method(about)}: width by size, blue helps the task, orange hurts it; "
        f"solid into queries (and MLPs, logits), dashed into keys, dotted into values. Circles are query heads, "
        f"squares key/value heads, tied to their query heads, diamonds MLPs.{more} {measured(about)}",
    )  # fmt: skip


def _method(about: Mapping[str, Any]) -> str:
    method = str(about.get("method") or about.get("what") or "score")
    kinds = [str(about[name]) for name in ("direction", "ablation") if about.get(name)]
    return f"{method} ({', '.join(kinds)})" if kinds else method


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _ticks(title: str, labels: list[str], most: int) -> dict[str, Any]:
    step = next((s for s in (1, 2, 4, 5, 10, 20, 50) if len(labels) <= s * most), len(labels))
    shown = list(range(0, len(labels), step))
    if labels and labels[-1] == MLP and shown[-1] != len(labels) - 1:
        shown.append(len(labels) - 1)
    return {
        "title": {"text": title}, "tickvals": shown, "ticktext": [labels[at] for at in shown], "showgrid": False,
        "zeroline": False, "fixedrange": True,
    }  # fmt: skip


def _node(name: str) -> _Node:
    found = _NODE.fullmatch(name)
    if found is None:
        return _Node(name, "end", -1 if name == "embed" else 10**6, 0)
    layer = int(found[1])
    if found[4]:
        return _Node(name, "mlp", layer, 10**6)
    return _Node(name, "head", layer, int(found[2])) if found[3] is None else _Node(name, "kv", layer, int(found[3]))


def _placed(nodes: list[_Node]) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Where each node stands: a row a layer that has any, spread out and shifted row by row, so that edges part."""
    layers = sorted({node.layer for node in nodes})
    places: dict[str, tuple[float, float]] = {}
    for row, layer in enumerate(layers):
        for kind in ("head", "kv", "mlp", "end"):
            own = sorted((node for node in nodes if node.layer == layer and node.kind == kind), key=lambda n: n.index)
            for at, node in enumerate(own):
                x = (at + 1) / (len(own) + 1) if kind in ("head", "end") else (at + 0.5) / (len(own) + 0.5)
                shift = 0.05 * (row % 3 - 1) if kind != "end" else 0.0
                places[node.name] = (0.94 if kind == "mlp" else 0.86 * x + shift, row + _LIFT[kind])
    return places, ["" if (abs(layer) == 1 and layer < 0) or layer == 10**6 else str(layer) for layer in layers]


def _curve(a: tuple[float, float], b: tuple[float, float]) -> tuple[list[float | None], list[float | None]]:
    """From one place to another, bent a little to the side the farther they are apart."""
    t = np.linspace(0, 1, 13)
    bend = 0.05 + 0.03 * abs(b[1] - a[1])
    middle = ((a[0] + b[0]) / 2 + (bend if a[0] <= 0.5 else -bend), (a[1] + b[1]) / 2)
    xs, ys = ((1 - t) ** 2 * a[i] + 2 * t * (1 - t) * middle[i] + t**2 * b[i] for i in (0, 1))
    return [*map(float, xs), None], [*map(float, ys), None]


def _add_edges(
    figure: go.Figure, edges: pd.DataFrame, places: Mapping[str, tuple[float, float]], colours: Palette
) -> None:
    """Curves, those of one sign, width and input in one trace; their middles answer to the pointer."""
    if edges.empty:
        return
    largest = float(edges["score"].abs().max())
    bins = np.clip((edges["score"].abs() / largest * len(_WIDTHS)).astype(int), 0, len(_WIDTHS) - 1)
    signs = (("hurts", colours.diverging[1]), ("helps", colours.diverging[-2]))
    named = set[str]()
    for (positive, through, size), part in edges.groupby([edges["score"] > 0, edges["through"], bins]):
        xs, ys = list[float | None](), list[float | None]()
        for row in part.to_dict("records"):
            x, y = _curve(places[row["source"]], places[row["target"]])
            xs, ys = xs + x, ys + y
        label, colour = signs[int(bool(positive))]
        line = {"color": colour, "width": _WIDTHS[int(size)], "dash": _DASHES.get(str(through), "solid")}
        figure.add_trace(
            go.Scatter(
                x=xs, y=ys, mode="lines", line=line, opacity=0.8, hoverinfo="skip", name=f"{label} the task",
                legendgroup=label, showlegend=label not in named,
            )
        )  # fmt: skip
        named.add(label)
    middles = [_curve(places[row["source"]], places[row["target"]]) for row in edges.to_dict("records")]
    told = [
        [
            safe(f"{row['source']} -> {row['target']}" + (f".{row['through']}" if row["through"] else "")),
            signed(row["score"], 3), interval(row.get("low"), row.get("high"), 3) or "not known",
        ]
        for row in edges.to_dict("records")
    ]  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=[x[6] for x, _ in middles], y=[y[6] for _, y in middles], mode="markers", customdata=told,
            marker={"size": 9, "color": colours.ink, "opacity": 0}, showlegend=False, name="edges",
            hovertemplate="<b>%{customdata[0]}</b>  %{customdata[1]}<br>95 % interval %{customdata[2]}<extra></extra>",
        )
    )  # fmt: skip


def _add_ties(
    figure: go.Figure, nodes: list[_Node], places: Mapping[str, tuple[float, float]], group: int, colours: Palette
) -> None:
    xs, ys = list[float | None](), list[float | None]()
    for kv in (node for node in nodes if node.kind == "kv"):
        for head in (node for node in nodes if node.kind == "head" and node.layer == kv.layer):
            if head.index // group == kv.index:
                for a, b in pairwise((places[kv.name], places[head.name])):
                    xs += [a[0], b[0], None]
                    ys += [a[1], b[1], None]
    if xs:
        line = {"color": colours.muted, "width": 1, "dash": "dot"}
        figure.add_trace(
            go.Scatter(x=xs, y=ys, mode="lines", line=line, hoverinfo="skip", name="key/value heads of query heads")
        )


def _add_nodes(
    figure: go.Figure, nodes: list[_Node], places: Mapping[str, tuple[float, float]], colours: Palette
) -> None:
    figure.add_trace(
        go.Scatter(
            x=[places[node.name][0] for node in nodes],
            y=[places[node.name][1] for node in nodes],
            mode="markers+text",
            text=[safe(_short(node)) for node in nodes],
            textposition="middle right",
            textfont={"size": 10, "color": colours.ink},
            marker={
                "size": 9, "symbol": [_SYMBOLS[node.kind] for node in nodes], "color": colours.surface,
                "line": {"width": 1.6, "color": colours.ink},
            },
            hovertext=[safe(node.name) for node in nodes], hoverinfo="text", showlegend=False, name="nodes",
        )
    )  # fmt: skip


def _short(node: _Node) -> str:
    """The layer is at the side already."""
    return {"end": node.name, "mlp": MLP, "head": f"H{node.index}", "kv": f"KV{node.index}"}[node.kind]
