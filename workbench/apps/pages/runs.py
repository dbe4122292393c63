"""The runs in the folder: search, provenance, compare two, delete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, ctx, dcc, html, no_update

from workbench.apps.address import Query, link, read_query, to_query
from workbench.apps.context import Context, Page
from workbench.apps.parts import certificate_badge, data_grid, facts
from workbench.apps.shell import refusal
from workbench.errors import WorkbenchError
from workbench.runs import Run
from workbench.runs.patterns import stored_patterns

_COLUMNS = (
    {"field": "name", "headerName": "Run", "flex": 2, "minWidth": 180, "cellRenderer": "RunLink"},
    {"field": "kind", "headerName": "Kind", "width": 100},
    {"field": "title", "headerName": "Title", "flex": 3, "minWidth": 200},
    {"field": "model", "headerName": "Model", "width": 150},
    {"field": "created", "headerName": "Created (UTC)", "width": 165},
    {"field": "status", "headerName": "Status", "width": 100},
    {"field": "certificate", "headerName": "Certificate", "width": 110},
)


def _layout(context: Context, query: Query) -> Any:
    found = context.library.table()
    rows = found.assign(certificate=found["certificate"].map({True: "passed", False: "–"}))
    kept = ["name", "kind", "title", "model", "created", "status", "certificate"]
    shown = rows[kept].assign(title=rows["title"].str.slice(0, 200))
    records = [{**row, "to": _leads_to(context, row)} for row in shown.to_dict("records")]
    search = query.get("search", "")
    return html.Div(
        [
            dmc.Group(
                [
                    dmc.Title("Runs", order=2),
                    dmc.Text(f"{len(found)} in {context.library.folder}", size="sm", c="dimmed"),
                    dmc.TextInput(
                        id="runs-search", value=search, placeholder="Search", size="xs", w=240, ml="auto", debounce=200,
                        **{"aria-label": "Search runs"},
                    ),
                ],
                mb="sm",
            ),
            data_grid(
                "runs-table", records, _COLUMNS, height=440, select="multiRow", quickFilterText=search, pagination=True,
                paginationPageSize=50, paginationPageSizeSelector=False,
            ),
            html.Div(id="runs-chosen", children=_chosen(context, [query["run"]] if "run" in query else [])),
            dmc.Modal(
                id="runs-delete",
                title="Delete this run for good?",
                children=[
                    dmc.Text(id="runs-delete-name", className="token"),
                    dmc.Text("Its folder and everything in it are removed. This cannot be undone.", size="sm", my="sm"),
                    dmc.Group([
                        dmc.Button("Delete", id="runs-delete-yes", color="red", size="xs"),
                        dmc.Button("Keep", id="runs-delete-no", variant="default", size="xs"),
                    ]),
                ],
            ),
        ]
    )  # fmt: skip


def _leads_to(context: Context, row: Mapping[str, Any]) -> str | None:
    """The address of the first page that can show a run; None where none can."""
    if row["status"] != "complete":
        return None
    name = str(row["name"])
    try:
        run = context.library.run(name)
        return context.library.computed(name, ("pages",), lambda: next((to for _, to in _pages_of(name, run)), None))
    except WorkbenchError:
        return None


def _chosen(context: Context, names: list[str]) -> Any:
    """What is known about the chosen runs, and what can be done with them."""
    if not names:
        return dmc.Text(
            "Choose a run to see where it comes from; choose two to compare them.", size="sm", c="dimmed", mt="sm"
        )
    parts = [_actions(names)]
    for name in names[:2]:
        try:
            parts.append(_provenance(name, context.library.run(name)))
        except WorkbenchError as error:
            parts.append(refusal(str(error)))
    return html.Div(parts)


def _actions(names: list[str]) -> Any:
    buttons = []
    if len(names) == 1:
        buttons.append(dmc.Button("Delete ...", id="runs-delete-open", size="compact-sm", color="red", variant="light"))
    if len(names) == 2:
        href = link("/compare", a=names[0], b=names[1])
        buttons.append(dcc.Link(dmc.Button("Compare the two", size="compact-sm"), href=href))
    return dmc.Group(buttons, my="sm")


def _provenance(name: str, run: Run) -> Any:
    manifest = run.manifest
    model, machine = manifest.get("model") or {}, manifest.get("environment") or {}
    certificate = (manifest.get("certificate") or {}).get("passed")
    pages = [dcc.Link(text, href=href) for text, href in _pages_of(name, run)]
    rows = [
        ("Shown on", html.Span([part for one in pages for part in (one, " ")]) if pages else None),
        ("Identifier", run.id),
        ("Command", html.Code(str(manifest.get("command", "")))),
        ("Model", f"{model.get('name', '–')}, {model.get('dtype', '–')} on {model.get('device', '–')}"),
        ("Weights, SHA-256", html.Code(str(model.get("weights_sha256", "–")))),
        ("Special tokens", str(model.get("special_tokens", "–"))),
        ("Created, finished", f"{manifest.get('created')}, {manifest.get('finished')}"),
        ("Versions", ", ".join(f"{key} {machine.get(key)}" for key in ("workbench", "torch", "transformers"))),
        ("Machine", f"{machine.get('cpu', '–')}, {machine.get('threads', '–')} threads"),
        ("Tables", ", ".join(f"{key} ({one['rows']})" for key, one in manifest["tables"].items())),
        ("Arrays", ", ".join((*run.arrays, *run.tensor_files))),
        ("Settings", html.Code(json.dumps(manifest.get("settings", {}))[:2000])),
    ]
    heading = dmc.Group([dmc.Title(run.title[:200], order=4), certificate_badge(certificate)])
    return html.Section([heading, facts(rows)], className="panel")


def _pages_of(name: str, run: Run) -> list[tuple[str, str]]:
    found = [("Atlas", link("/atlas", run=name))] if run.has_table("head_scores") else []
    found += [("Circuits", link("/circuits", run=name))] if run.manifest.get("circuits") else []
    found += [(f"Pattern {one}", link("/pattern", run=name, pattern=one)) for one in stored_patterns(run)]
    return found


def _register(app: Dash, context: Context) -> None:
    app.clientside_callback(
        "function(text, now) { return {...now, quickFilterText: text || ''}; }",
        Output("runs-table", "dashGridOptions"),
        Input("runs-search", "value"),
        State("runs-table", "dashGridOptions"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Output("shown-query", "data", allow_duplicate=True),
        Output("runs-chosen", "children"),
        Input("runs-table", "selectedRows"),
        Input("runs-search", "value"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def choose(rows: list[dict[str, Any]] | None, search: str | None, now: str | None) -> Any:
        if rows is None and search is None:
            return no_update, no_update, no_update
        names = [str(row["name"]) for row in rows or []]
        if not names and rows is None and "run" in read_query(now):
            names = [read_query(now)["run"]]
        fields = {"search": search, "run": names[0] if len(names) == 1 else None}
        query = to_query(fields)
        if read_query(query) == read_query(now):
            return no_update, no_update, _chosen(context, names)
        return query, "/" + query, _chosen(context, names)

    @app.callback(
        Output("runs-delete", "opened"),
        Output("runs-delete-name", "children"),
        Input("runs-delete-open", "n_clicks"),
        Input("runs-delete-no", "n_clicks"),
        State("runs-table", "selectedRows"),
        prevent_initial_call=True,
    )
    def ask(wanted: int | None, kept: int | None, rows: list[dict[str, Any]] | None) -> Any:
        if ctx.triggered_id == "runs-delete-open" and wanted and rows:
            return True, str(rows[0]["name"])
        return False, ""

    @app.callback(
        Output("page", "children", allow_duplicate=True),
        Input("runs-delete-yes", "n_clicks"),
        State("runs-delete-name", "children"),
        prevent_initial_call=True,
    )
    def delete(wanted: int | None, name: str | None) -> Any:
        if not wanted or not name:
            return no_update
        try:
            context.library.delete(name)
        except (WorkbenchError, OSError) as error:
            return refusal(str(error))
        return _layout(context, Query({}))


PAGE = Page("/", "Runs", "What is on disk, and where it comes from", _layout, _register)
