"""All heads of a model by all detectors: maps, a scatter of any metrics, a table; brushing joins the three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dash_mantine_components as dmc
import pandas as pd
from dash import Dash, Input, Output, State, ctx, html, no_update

from workbench.apps.address import Query, link, read_choice, read_heads, read_list, read_number, read_query, to_query
from workbench.apps.context import Context, Page
from workbench.apps.heads import Scores, scored_run, scored_runs, scores_of
from workbench.apps.library import counted
from workbench.apps.parts import data_grid, figure_panel
from workbench.apps.shell import refusal
from workbench.figures import head_maps, metric_scatter

MOST_MAPS = 12
_AXES = {"x": "Across", "y": "Up", "colour": "Colour", "size": "Size"}


def _layout(context: Context, query: Query) -> Any:
    runs = scored_runs(context)
    if not runs:
        return refusal("No run here has head scores.", "workbench atlas smollm2-135m")
    name = query.get("run", "") or runs[0]
    scores = scores_of(context, name)
    view = _View(scores, query)
    bar = dmc.Group(
        [
            dmc.Title("Atlas", order=2),
            dmc.Select(id="atlas-run", data=runs, value=name, size="xs", w=240, allowDeselect=False, searchable=True,
                       **{"aria-label": "Run"}),
            dmc.Text(_said(context, name, scores), size="sm", c="dimmed"),
        ],
        mb="sm",
    )  # fmt: skip
    return html.Div([bar, _maps(view), _scatter(view), _table(view)], id="atlas")


class _View:
    """What the address asks for, with what is there in place of what is not."""

    def __init__(self, scores: Scores, query: Query) -> None:
        names = scores.names
        leading = [info.name for info in scores.known.leading()]
        self.scores, self.dark = scores, query.dark
        self.maps = (read_list(query, "maps", names) or leading)[:MOST_MAPS]
        self.axes = {
            "x": read_choice(query, "x", names, leading[0] if leading else ""),
            "y": read_choice(query, "y", names, leading[1] if len(leading) > 1 else (leading[0] if leading else "")),
            "colour": read_choice(query, "colour", names),
            "size": read_choice(query, "size", names),
        }
        self.most_q = read_number(query, "q", 0, 1, 1)
        self.by = read_choice(query, "by", names, self.axes["y"])
        pairs = zip(scores.wide["layer"], scores.wide["head"], strict=True)
        self.heads = read_heads(query, known={f"L{layer}H{head}" for layer, head in pairs})

    @property
    def asks(self) -> tuple[Any, ...]:
        """What maps, scatter and filter follow from; the chosen heads stand beside it."""
        return self.maps, self.axes, self.most_q, self.by

    @property
    def rows(self) -> pd.DataFrame:
        """Heads that the filter keeps: those whose q by the filtering detector is small enough."""
        wide = self.scores.wide
        if self.most_q >= 1 or self.by not in self.scores.q:
            return wide
        kept: pd.DataFrame = wide[self.scores.q[self.by].to_numpy() <= self.most_q]
        return kept


def _said(context: Context, name: str, scores: Scores) -> str:
    model = context.library.run(name).manifest.get("model") or {}
    size = f"{counted(len(scores.wide), 'head')}, {counted(len(scores.names), 'detector')}"
    return f"{str(model.get('name', ''))[:80]}: {size}"


def _choices(view: _View) -> list[dict[str, str]]:
    return [{"value": name, "label": view.scores.titles.get(name, name)} for name in view.scores.names]


def _maps(view: _View) -> Any:
    choose = dmc.MultiSelect(
        id="atlas-maps", data=_choices(view), value=view.maps, searchable=True, clearable=False, maxValues=MOST_MAPS,
        size="xs", label=f"Maps (up to {MOST_MAPS})", hidePickedOptions=True,
    )  # fmt: skip
    return html.Section([choose, html.Div(id="atlas-maps-figure", children=_maps_figure(view))], className="block")


def _maps_figure(view: _View) -> Any:
    table = pd.DataFrame([view.scores.info(name) | {"detector": name} for name in view.maps])
    figure = head_maps(view.scores.long, table, columns=4, dark=view.dark, narrow=True)
    return figure_panel("atlas-map-graph", figure, title="Layer x head maps")


def _scatter(view: _View) -> Any:
    selects = [
        dmc.Select(
            id=f"atlas-{axis}", data=_choices(view), value=view.axes[axis] or None, label=label, size="xs", w=210,
            searchable=True, clearable=axis in ("colour", "size"), allowDeselect=False,
        )
        for axis, label in _AXES.items()
    ]  # fmt: skip
    selects.append(
        dmc.NumberInput(id="atlas-q", value=view.most_q, min=0, max=1, step=0.01, label="q at most", size="xs", w=100)
    )
    by = dmc.Select(
        id="atlas-by", data=_choices(view), value=view.by or None, label="q of", size="xs", w=210, searchable=True,
        allowDeselect=False,
    )  # fmt: skip
    figure = html.Div(id="atlas-scatter-figure", children=_scatter_figure(view))
    return html.Section([dmc.Group([*selects, by], gap="xs"), figure], className="block")


def _scatter_figure(view: _View) -> Any:
    axes = view.axes
    figure = metric_scatter(
        view.rows, axes["x"], axes["y"], colour=axes["colour"], size=axes["size"], titles=view.scores.titles,
        selected=view.heads, dark=view.dark,
    )  # fmt: skip
    return figure_panel("atlas-scatter", figure, title="Heads by two metrics")


def _shown_columns(view: _View) -> list[str]:
    return list(dict.fromkeys([*view.maps, *(name for name in view.axes.values() if name)]))


def _grid_rows(view: _View) -> list[dict[str, Any]]:
    names = _shown_columns(view)
    rows = view.rows[["layer", "head", *names]].round(4)
    rows.insert(0, "name", [f"L{layer}H{head}" for layer, head in zip(rows["layer"], rows["head"], strict=True)])
    return [
        {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}
        for row in rows.to_dict("records")
    ]


def _grid_columns(view: _View) -> list[dict[str, Any]]:
    first = [
        {"field": "name", "headerName": "Head", "pinned": "left", "width": 130, "cellRenderer": "HeadLink"},
        {"field": "layer", "headerName": "Layer", "width": 90, "filter": "agNumberColumnFilter"},
    ]
    rest = [
        {
            "field": name,
            "headerName": view.scores.titles.get(name, name),
            "headerTooltip": view.scores.known.get(name).measures,
            "filter": "agNumberColumnFilter",
            "width": 150,
        }
        for name in _shown_columns(view)
    ]
    return [*first, *rest]


def _table(view: _View) -> Any:
    names = [str(name) for name in view.heads]
    buttons = dmc.Group(
        [
            dmc.Button("Keep as my set", id="atlas-keep", size="compact-sm"),
            dmc.Button("Clear", id="atlas-clear", size="compact-sm", variant="default"),
            dmc.Text(_selected_text(names), id="atlas-selected", size="sm"),
        ],
        my="xs",
    )
    grid = data_grid(
        "atlas-table", _grid_rows(view), _grid_columns(view), height=420, select="multiRow",
    )  # fmt: skip
    grid.getRowId = "params.data.name"
    grid.selectedRows = {"ids": names}
    return html.Section([buttons, grid], className="block")


def _selected_text(names: Sequence[str]) -> str:
    if not names:
        return "Drag over points, click cells or tick rows to choose heads."
    return f"{len(names)} chosen: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}"


def _register(app: Dash, context: Context) -> None:
    controls = [State("atlas-run", "value"), State("atlas-maps", "value")]
    controls += [State(f"atlas-{name}", "value") for name in (*_AXES, "q", "by")]

    def view_of(values: Sequence[Any], heads: Sequence[str], scheme: str | None) -> tuple[_View, str]:
        run, maps, x, y, colour, size, most_q, by = values
        fields = {
            "run": run, "maps": ",".join(maps or []), "x": x, "y": y, "colour": colour, "size": size,
            "q": None if most_q in (None, "", 1) else most_q, "by": by, "heads": ",".join(heads),
        }  # fmt: skip
        query = {key: str(value) for key, value in fields.items() if value not in (None, "")}
        return _View(scores_of(context, str(run)), Query(query, scheme == "dark")), to_query(query)

    def asked(search: str | None) -> _View:
        query = Query(read_query(search))
        return _View(scores_of(context, scored_run(context, query)[0]), query)

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Output("shown-query", "data", allow_duplicate=True),
        Output("atlas-maps-figure", "children"),
        Output("atlas-scatter-figure", "children"),
        Output("atlas-table", "rowData"),
        Output("atlas-table", "columnDefs"),
        Input("atlas-maps", "value"),
        *[Input(f"atlas-{name}", "value") for name in (*_AXES, "q", "by")],
        State("atlas-table", "selectedRows"),
        State("scheme", "data"),
        State("url", "search"),
        *controls,
        prevent_initial_call=True,
    )
    def change(*given: Any) -> Any:
        rows, scheme, search, *values = given[7:]
        seen = asked(search)
        view, query = view_of(values, _chosen_names(rows, seen), scheme)
        # A page that was just built says what its address says: nobody changed anything.
        if view.asks == seen.asks:
            return (no_update,) * 6
        maps = _maps_figure(view) if ctx.triggered_id == "atlas-maps" else no_update
        table = ctx.triggered_id in ("atlas-maps", "atlas-q", "atlas-by", *(f"atlas-{axis}" for axis in _AXES))
        rows, columns = (_grid_rows(view), _grid_columns(view)) if table else (no_update, no_update)
        return query, "/atlas" + query, maps, _scatter_figure(view), rows, columns

    @app.callback(
        Output("url", "href", allow_duplicate=True), Input("atlas-run", "value"), State("url", "search"),
        prevent_initial_call=True,
    )  # fmt: skip
    def other_run(run: str | None, search: str | None) -> Any:
        shown = next(iter(scored_run(context, Query(read_query(search)))), None)
        return link("/atlas", run=run) if run and run != shown else no_update

    _register_choice(app, view_of, asked, controls)


def _names(rows: Any) -> list[str]:
    """Names of chosen rows of the table, whichever way they were chosen."""
    found = rows.get("ids", []) if isinstance(rows, dict) else [row.get("name") for row in rows or []]
    return [str(name) for name in found]


def _chosen_names(rows: Any, seen: _View) -> list[str]:
    """Chosen heads: those that the table says, and those of the address that its filter hides from the table."""
    names = _names(rows)
    if isinstance(rows, dict):
        return names
    listed = {f"L{layer}H{head}" for layer, head in zip(seen.rows["layer"], seen.rows["head"], strict=True)}
    return list(dict.fromkeys([*names, *(head for head in seen.heads if head not in listed)]))


def _register_choice(app: Dash, view_of: Any, asked: Any, controls: list[State]) -> None:
    """Choosing heads: in the table, in the scatter, in a map. The table's selection is the one that counts."""

    @app.callback(
        Output("atlas-table", "selectedRows"),
        Input("atlas-scatter", "selectedData"),
        Input("atlas-map-graph", "clickData"),
        Input("atlas-clear", "n_clicks"),
        State("atlas-table", "selectedRows"),
        prevent_initial_call=True,
    )
    def choose(brushed: Any, clicked: Any, cleared: int | None, rows: Any) -> Any:
        if ctx.triggered_id == "atlas-clear" and cleared:
            return {"ids": []}
        if ctx.triggered_id == "atlas-scatter" and brushed:
            return {"ids": [str(point["customdata"][0]) for point in brushed["points"]]}
        if ctx.triggered_id == "atlas-map-graph" and clicked:
            # Maps have a layer a row and a head a column.
            point = clicked["points"][0]
            name = f"L{int(point['y'])}H{int(point['x'])}"
            names = _names(rows)
            return {"ids": [one for one in names if one != name] if name in names else [*names, name]}
        return no_update

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Output("shown-query", "data", allow_duplicate=True),
        Output("atlas-selected", "children"),
        Output("atlas-scatter", "figure"),
        Input("atlas-table", "selectedRows"),
        State("scheme", "data"),
        State("atlas-scatter", "figure"),
        State("url", "search"),
        *controls,
        prevent_initial_call=True,
    )
    def chosen(rows: Any, scheme: str | None, figure: Any, search: str | None, *values: Any) -> Any:
        seen = asked(search)
        names = _chosen_names(rows, seen)
        # The table of a page that was just built says what its address says.
        if set(names) == set(seen.heads):
            return (no_update,) * 4
        _, query = view_of(values, names, scheme)
        points = figure["data"][0]["text"]
        picked = [at for at, name in enumerate(points) if name in set(names)]
        figure["data"][0]["selectedpoints"] = picked or None
        return query, "/atlas" + query, _selected_text(names), figure

    @app.callback(
        Output("head-set", "data", allow_duplicate=True),
        Input("atlas-keep", "n_clicks"),
        State("atlas-table", "selectedRows"),
        prevent_initial_call=True,
    )
    def keep(wanted: int | None, rows: Any) -> Any:
        return _names(rows) if wanted else no_update


PAGE = Page("/atlas", "Atlas", "All heads by all detectors", _layout, _register, scored_run)
