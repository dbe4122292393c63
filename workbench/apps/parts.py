"""Parts that pages share: figures with their exports, tables, badges, facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
import plotly.graph_objects as go
from dash import dcc, html

from workbench.figures import caption_of

# Interaction stays, plotly's own buttons and its link home do not.
CONFIG = {"displayModeBar": False, "displaylogo": False, "responsive": True, "doubleClick": "reset"}
_EXPORTS = {"png": "PNG", "svg": "SVG", "csv": "CSV"}


def figure_panel(
    name: str | Mapping[str, str], figure: go.Figure, *, title: str = "", height: int | None = None
) -> Any:
    """A figure, what it shows in words, and its exports (made in the browser by `assets/export.js`)."""
    if height is not None:
        figure.update_layout(height=height)
    # Without a height of its own a graph takes what a grid leaves it.
    style = {"height": figure.layout.height or 450}
    graph = dcc.Graph(id=name, figure=figure, config=CONFIG, className="graph", style=style)
    below = [html.Figcaption(caption_of(figure), className="caption"), exports(title)]
    return html.Figure([graph, html.Div(below, className="below")], className="panel", **{"data-title": title})


def exports(title: str) -> Any:
    """Buttons that save the figure beside them."""
    buttons = [
        html.Button(
            text, className="export", type="button", **{"data-export": kind, "aria-label": f"{title}: save {text}"}
        )
        for kind, text in _EXPORTS.items()
    ]
    return html.Div(buttons, className="exports")


def data_grid(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Mapping[str, Any]],
    *,
    height: int = 420,
    select: str | None = None,
    **options: Any,
) -> Any:
    """A table with sorting and filters; cells are shown as text, whatever they hold."""
    grid: dict[str, Any] = {
        "animateRows": False,
        "suppressColumnVirtualisation": True,
        "enableCellTextSelection": True,
        "rowHeight": 30,
        "headerHeight": 32,
        **options,
    }
    if select is not None:
        grid["rowSelection"] = {"mode": select, "checkboxes": select == "multiRow", "enableClickSelection": True}
    return dag.AgGrid(
        id=name,
        rowData=list(rows),
        columnDefs=list(columns),
        defaultColDef={"sortable": True, "resizable": True, "filter": True, "floatingFilter": False},
        dashGridOptions=grid,
        className="grid",
        style={"height": height},
    )


def certificate_badge(passed: bool | None) -> Any:
    """Whether the workbench's view of the model was proven to equal the model."""
    if passed is None:
        return dmc.Badge("no certificate", color="gray", variant="light")
    return dmc.Badge("certified", color="teal", variant="light") if passed else dmc.Badge("not certified", color="red")


def facts(rows: Iterable[tuple[str, Any]]) -> Any:
    """Names and values side by side."""
    cells = [html.Div([html.Dt(name), html.Dd(value if value not in (None, "") else "–")]) for name, value in rows]
    return html.Dl(cells, className="facts")
