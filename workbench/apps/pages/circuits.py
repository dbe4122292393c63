"""Circuits: patches by site, position and head, scores of nodes and edges as a graph, faithfulness."""

from __future__ import annotations

from html import unescape
from typing import Any

import dash_cytoscape as cyto
import dash_mantine_components as dmc
import pandas as pd
from dash import ALL, Dash, Input, Output, State, ctx, dcc, html, no_update

from workbench.apps.address import Query, link, read_number, read_query, to_query
from workbench.apps.context import Context, Page
from workbench.apps.parts import data_grid, facts, figure_panel
from workbench.apps.shell import refusal
from workbench.figures import palette
from workbench.figures.text import number, readable
from workbench.reports.circuits import circuit_charts, circuits_view

MOST_EDGES = 400
_FIRST_EDGES = 40
_PROMPTS = (
    {"field": "prompt", "headerName": "Pair", "width": 80},
    {"field": "direction", "headerName": "Direction", "width": 130},
    {"field": "clean", "headerName": "Clean run", "width": 120},
    {"field": "corrupt", "headerName": "Corrupt run", "width": 120},
    {"field": "value", "headerName": "Patched", "width": 120},
    {"field": "effect", "headerName": "Effect (positive helps)", "width": 180},
)


def _runs(context: Context) -> list[str]:
    table = context.library.table()
    names = [str(name) for name in table.loc[table["status"] == "complete", "name"]]
    return [name for name in names if context.library.run(name).manifest.get("circuits")]


def _subject(context: Context, query: Query) -> list[str]:
    return [query["run"]] if query.get("run") else _runs(context)[:1]


def _layout(context: Context, query: Query) -> Any:
    runs = _runs(context)
    if not runs:
        return refusal("No run here is about circuits.", "workbench circuits patch smollm2-135m --task ioi --site z")
    name = query.get("run", "") or runs[0]
    run = context.library.run(name)
    view = circuits_view(run)
    if view is None:
        return refusal(f"The run {name} ({run.kind}) is not about circuits; choose one of {', '.join(runs[:5])}.")
    bar = dmc.Group(
        [
            dmc.Title("Circuits", order=2),
            dmc.Select(id="circuits-run", data=runs, value=name, size="xs", w=280, searchable=True, allowDeselect=False,
                       **{"aria-label": "Run"}),
        ],
        mb="sm",
    )  # fmt: skip
    figures = [
        html.Div(figure_panel({"circuit": key}, draw(query.dark), title=f"{view.title}, {key}"), className="block")
        for _, key, draw in circuit_charts(run)
        if key != "circuit-graph"
    ]
    graph = _graph(context, name, query)
    chosen = _chooser(context, name, query.get("cell", ""))
    clicked = html.Div(id="circuits-cell", className="block", children=_cell(context, name, query.get("cell", "")))
    notes = [html.P(note, className="caption") for note in view.notes]
    return html.Div(
        [bar, html.P(view.intro), _facts(run.manifest["circuits"]), *graph, *figures, chosen, clicked, *notes]
    )


def _facts(about: dict[str, Any]) -> Any:
    names = ("task", "metric", "n", "method", "ablation", "clean", "corrupt", "right")
    shown = [
        (
            readable(name).capitalize(),
            number(about[name], 3) if isinstance(about[name], float) else str(about[name])[:200],
        )
        for name in names
        if about.get(name) is not None
    ]
    return html.Div(facts(shown), className="panel block")


def _cells(context: Context, name: str) -> list[str]:
    """Every patch of a run as cells of maps are called: `L5H1`, `L5.resid_pre at END`."""
    if not context.library.run(name).has_table("prompt_effects"):
        return []
    table = context.library.frame(name, "prompt_effects")[["node", "position"]].drop_duplicates()
    return [
        str(node) if pd.isna(position) or str(position) in ("nan", "None", "") else f"{node} at {position}"
        for node, position in zip(table["node"], table["position"], strict=True)
    ]


def _chooser(context: Context, name: str, cell: str) -> Any:
    """The cells of the maps by name, for those who do not point."""
    cells = _cells(context, name)
    choice = dmc.Select(
        id="circuits-choose", data=cells, value=cell if cell in cells else None, searchable=True, clearable=False,
        size="xs", w=280, limit=200, label="Cell of a map (type a part of its name, arrows and Enter)",
        placeholder="such as " + cells[0] if cells else "",
    )  # fmt: skip
    # Where there is nothing to choose it stays, unseen: callbacks name it.
    return html.Div(choice, className="block", hidden=not cells)


def _cell(context: Context, name: str, cell: str) -> Any:
    """What was patched in one cell of a map, pair by pair."""
    if not context.library.run(name).has_table("prompt_effects"):
        return None
    if not cell:
        return html.P(
            "Click a cell of a map, or choose one by its name, to see what was patched there, pair by pair.",
            className="caption",
        )
    node, _, position = cell.partition(" at ")
    table = context.library.frame(name, "prompt_effects")
    rows = table[table["node"] == node]
    if position:
        rows = rows[rows["position"].astype(str) == position]
    if rows.empty:
        return html.P(f"The run has no patch of {cell[:80]}.", className="caption")
    site = ", ".join(dict.fromkeys(map(str, rows["site"])))
    means = "; ".join(f"{direction} {part['effect'].mean():+.3f}" for direction, part in rows.groupby("direction"))
    head = [dcc.Link("head card", href=link("/head", head=node))] if "H" in node else []
    words = f"{site} of {node}{f' at {position}' if position else ''}: mean effect {means}. "
    kept = rows[[str(column["field"]) for column in _PROMPTS]].round(4).to_dict("records")
    return html.Section(
        [html.H3(f"Patch of {cell}"), html.P([words, *head]), data_grid("circuits-prompts", kept, _PROMPTS, height=320)]
    )


def _edges(context: Context, name: str) -> pd.DataFrame | None:
    run = context.library.run(name)
    for table in ("circuit_edges", "edge_scores"):
        if run.has_table(table):
            edges = context.library.frame(name, table)
            kept: pd.DataFrame = edges[edges["score"].notna()]
            return kept.iloc[kept["score"].abs().argsort()[::-1]]
    return None


def _graph(context: Context, name: str, query: Query) -> list[Any]:
    edges = _edges(context, name)
    if edges is None or edges.empty:
        return []
    most = min(MOST_EDGES, len(edges))
    count = int(read_number(query, "edges", 1, most, min(_FIRST_EDGES, most)))
    slider = dmc.Slider(id="circuits-edges", min=1, max=most, value=count, updatemode="mouseup", w=360,
                        **{"aria-label": "Edges shown"})  # fmt: skip
    drawing = cyto.Cytoscape(
        id="circuits-graph",
        elements=_elements(edges.head(count)),
        layout={"name": "preset", "fit": True, "padding": 20},
        stylesheet=_style(query.dark),
        style={"height": 520, "width": "100%"},
        minZoom=0.2,
        maxZoom=4,
        boxSelectionEnabled=False,
    )
    words = (
        "Nodes by layer, from the embedding below to the logits above; width is the size of the score, colour its sign."
    )
    said = dmc.Text(_shown(edges, count), id="circuits-shown", size="sm", c="dimmed")
    row = dmc.Group([dmc.Text("Strongest edges", size="sm"), slider, said], mb="xs")
    told = html.P([words, " ", html.Span(id="circuits-node")], className="caption")
    return [html.Section([row, drawing, told], className="panel block")]


def _shown(edges: pd.DataFrame, count: int) -> str:
    least = float(edges["score"].abs().iloc[count - 1])
    return f"{count} of {len(edges)} edges, scores of {least:.3g} or more"


def _elements(edges: pd.DataFrame) -> list[dict[str, Any]]:
    nodes = dict.fromkeys([*map(str, edges["source"]), *map(str, edges["target"])])
    most = float(edges["score"].abs().max()) or 1.0
    layers = [_layer(node) for node in nodes]
    top = max([layer for layer in layers if layer < 10_000], default=0) + 1
    across: dict[float, int] = {}
    placed = []
    for node, layer in zip(nodes, layers, strict=True):
        at = min(layer, top)
        seat = across[at] = across.get(at, -1) + 1
        side = (seat + 1) // 2 * (1 if seat % 2 else -1)
        x, y = 90 * side + 20 * (int(at) % 2), -46 * at
        placed.append({"data": {"id": node, "label": node}, "position": {"x": x, "y": y}, "classes": _kind(node)})
    lines = [
        {
            "data": {
                "id": f"{row.source}>{row.target}.{row.through}", "source": row.source, "target": row.target,
                "label": str(row.through), "width": 0.6 + 5 * abs(row.score) / most, "score": float(row.score),
            },
            "classes": "helps" if row.score > 0 else "hurts",
        }
        for row in edges.itertuples()
    ]  # fmt: skip
    return [*placed, *lines]


def _layer(node: str) -> float:
    if node == "embed":
        return -1
    if node == "logits":
        return 10_000
    digits = node[1:].partition("H")[0].partition("K")[0].partition(".")[0]
    return int(digits) + (0.5 if node.endswith(".mlp") else 0.0) if digits.isdigit() else 0


def _kind(node: str) -> str:
    return "mlp" if node.endswith(".mlp") else "head" if "H" in node or "KV" in node else "end"


def _style(dark: bool) -> list[dict[str, Any]]:
    colours = palette(dark)
    node = {
        "label": "data(label)", "font-size": 11, "color": colours.ink, "background-color": colours.surface,
        "border-color": colours.muted, "border-width": 1, "text-valign": "center", "shape": "round-rectangle",
        "width": 62, "height": 22,
    }  # fmt: skip
    edge = {"width": "data(width)", "curve-style": "bezier", "target-arrow-shape": "triangle", "arrow-scale": 0.7,
            "opacity": 0.75}  # fmt: skip
    return [
        {"selector": "node", "style": node},
        {"selector": ".mlp", "style": {"background-color": colours.sunken, "shape": "rectangle"}},
        {"selector": ".end", "style": {"shape": "ellipse", "width": 70}},
        {"selector": "edge", "style": edge},
        {"selector": ".helps", "style": {"line-color": colours.accent, "target-arrow-color": colours.accent}},
        {"selector": ".hurts", "style": {"line-color": colours.effect, "target-arrow-color": colours.effect}},
        {"selector": ":selected", "style": {"border-width": 3, "border-color": colours.accent}},
    ]


def _register(app: Dash, context: Context) -> None:
    @app.callback(
        Output("url", "search", allow_duplicate=True), Input("circuits-run", "value"), State("url", "search"),
        prevent_initial_call=True,
    )  # fmt: skip
    def other(run: str | None, now: str | None) -> Any:
        return no_update if not run or f"run={run}" in (now or "") else to_query({"run": run})

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Output("shown-query", "data", allow_duplicate=True),
        Output("circuits-graph", "elements"),
        Output("circuits-shown", "children"),
        Input("circuits-edges", "value"),
        State("circuits-run", "value"),
        prevent_initial_call=True,
    )
    def fewer(count: int | None, run: str | None) -> Any:
        edges = None if not run else _edges(context, run)
        if edges is None or not count:
            return (no_update,) * 4
        count = max(1, min(int(count), MOST_EDGES, len(edges)))
        query = to_query({"run": run, "edges": count})
        return query, "/circuits" + query, _elements(edges.head(count)), _shown(edges, count)

    _register_cells(app, context)

    @app.callback(
        Output("circuits-node", "children"), Input("circuits-graph", "tapNodeData"), prevent_initial_call=True
    )
    def node(data: dict[str, Any] | None) -> Any:
        name = str((data or {}).get("id", ""))
        return [dcc.Link(f"Head card of {name}", href=link("/head", head=name))] if "H" in name else name


def _register_cells(app: Dash, context: Context) -> None:
    """A cell of a map is chosen by a click or by its name."""

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Output("shown-query", "data", allow_duplicate=True),
        Output("circuits-cell", "children"),
        Output("circuits-choose", "value"),
        Input({"circuit": ALL}, "clickData"),
        State({"circuit": ALL}, "figure"),
        State("circuits-run", "value"),
        prevent_initial_call=True,
    )
    def look(clicks: list[Any], figures: list[Any], run: str | None) -> Any:
        cells = [
            _clicked(figure, click["points"][0])
            for click, figure, one in zip(clicks, figures, ctx.inputs_list[0], strict=True)
            if click and ctx.triggered_id == one["id"]
        ]
        if not run or not any(cells):
            return (no_update,) * 4
        cell = next(one for one in cells if one)
        query = to_query({"run": run, "cell": cell})
        return query, "/circuits" + query, _cell(context, run, cell), cell

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Output("shown-query", "data", allow_duplicate=True),
        Output("circuits-cell", "children", allow_duplicate=True),
        Input("circuits-choose", "value"),
        State("circuits-run", "value"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def choose(cell: str | None, run: str | None, now: str | None) -> Any:
        # A click on a map writes its cell here as well, and has done the rest.
        if not run or not cell or cell == read_query(now).get("cell"):
            return (no_update,) * 3
        query = to_query({"run": run, "cell": cell})
        return query, "/circuits" + query, _cell(context, run, cell)


def _clicked(figure: dict[str, Any], point: dict[str, Any]) -> str | None:
    """What a cell of a map is called; events of maps do not carry it."""
    trace = figure["data"][int(point.get("curveNumber", 0))]
    if trace.get("type") != "heatmap" or "customdata" not in trace:
        return None
    row, column = (int(point[axis]) for axis in "yx")
    name: str = unescape(trace["customdata"][row][column][0])
    return name


PAGE = Page("/circuits", "Circuits", "Patches, scores and graphs of circuits", _layout, _register, _subject)
