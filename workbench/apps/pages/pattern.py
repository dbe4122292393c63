"""One head's pattern at any length: the zoomable map of a stored pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, dcc, html

from workbench.apps.address import Query, link
from workbench.apps.context import Context, Page
from workbench.apps.shell import refusal
from workbench.runs.patterns import stored_patterns

_HELP = (
    "Drag to move, wheel or + and - to zoom, arrows to move, Home for the whole pattern, N for the next high entry. "
    "Rows are queries (destinations), columns are keys (sources)."
)


def _layout(context: Context, query: Query) -> Any:
    runs = context.library.table()
    runs = runs[(runs["status"] == "complete")]
    name = query.get("run", "")
    if not name:
        return _choose(context, [str(one) for one in runs["name"]])
    run = context.library.run(name)
    known = stored_patterns(run)
    if not known:
        return refusal(
            f"The run {name} stores no pattern.", "workbench trace MODEL --file TEXT --patterns L18H6  # stores one"
        )
    pattern = query.get("pattern", next(iter(known)))
    # Refuses names that the run does not have.
    context.library.pattern(name, pattern)
    return html.Div([_bar(name, pattern, known), _viewer(name, pattern)])


def _bar(name: str, pattern: str, known: Mapping[str, Mapping[str, Any]]) -> Any:
    about = known[pattern]
    links = [
        dcc.Link(f"L{one['layer']}H{one['head']}", href=link("/pattern", run=name, pattern=key),
                 className="chip here" if key == pattern else "chip")
        for key, one in known.items()
    ]  # fmt: skip
    of = [str(about[key])[:80] for key in ("model", "prompt") if about.get(key)]
    return dmc.Group(
        [dmc.Title(f"Pattern of L{about['layer']}H{about['head']}", order=2),
         dmc.Text(", ".join([*of, f"run {name}"]), size="sm", c="dimmed"), html.Div(links, className="chips")],
        mb="xs",
    )  # fmt: skip


def _viewer(name: str, pattern: str) -> Any:
    """An empty place that `assets/zoom.js` fills."""
    return html.Div(
        [
            html.Div(className="zoom-controls"),
            html.Div(className="zoom-stage", tabIndex="0", role="img", **{"aria-label": f"Attention map. {_HELP}"}),
            html.Div(className="zoom-told token", role="status"),
            html.P(_HELP, className="caption"),
        ],
        className="zoom",
        id="zoom",
        **{"data-run": name, "data-pattern": pattern},
    )


def _choose(context: Context, names: list[str]) -> Any:
    found = []
    for name in names:
        for key, about in stored_patterns(context.library.run(name)).items():
            text = f"L{about['layer']}H{about['head']} in {name}"
            found.append(html.Li(dcc.Link(text, href=link("/pattern", run=name, pattern=key))))
    if not found:
        return refusal("No run here stores a pattern.", "workbench trace MODEL --file TEXT --patterns L18H6")
    return html.Div([dmc.Title("Patterns", order=2), html.Ul(found)])


def _register(app: Dash, context: Context) -> None:
    """The viewer works by itself, in the browser."""


PAGE = Page("/pattern", "Pattern", "One head's attention at any length", _layout, _register)
