"""The application: one Dash app over a folder of runs, and the headers that keep pages from doing more than showing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from dash import ALL, Dash, Input, Output, State, ctx, no_update, set_props
from flask import Flask, Response, request

from workbench.apps import export
from workbench.apps.address import Query, read_query
from workbench.apps.context import Context, Page
from workbench.apps.library import RunLibrary
from workbench.apps.live import Live
from workbench.apps.pages import PAGES
from workbench.apps.settings import AppSettings
from workbench.apps.shell import colours, frame, not_honoured, refusal
from workbench.apps.tokens import api as tokens
from workbench.apps.zoom.api import blueprint
from workbench.errors import WorkbenchError

_log = logging.getLogger("workbench")
_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>{%metas%}<meta name="viewport" content="width=device-width, initial-scale=1"><title>{%title%}</title>
<link rel="stylesheet" href="/theme.css">{%favicon%}{%css%}</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""


def create_app(settings: AppSettings, pages: Sequence[Page] = PAGES) -> Dash:
    """The app; `app.server` is what a WSGI server takes."""
    app = Dash(
        __name__,
        title="Attention Workbench",
        update_title="",
        serve_locally=True,
        suppress_callback_exceptions=True,
        index_string=_INDEX,
        compress=False,
        add_log_handler=False,
        on_error=_told,
    )
    context = Context(settings, RunLibrary(settings.runs), Live(settings))
    app.layout = frame(pages)
    _route(app, context, pages)
    _switch_scheme(app)
    export.register(app, context, pages)
    for page in pages:
        page.register(app, context)
    server: Flask = app.server
    server.config["MAX_CONTENT_LENGTH"] = settings.most_body_bytes
    # For whoever ends the server.
    server.extensions["workbench-live"] = context.live
    server.register_blueprint(blueprint(context.library))
    server.register_blueprint(tokens.blueprint(context.library, context.live))
    server.register_blueprint(export.blueprint(context.library, context.live))
    server.add_url_rule("/theme.css", "theme", lambda: Response(colours(), mimetype="text/css"))
    _guard(app, server, settings.hosts)
    return app


def _route(app: Dash, context: Context, pages: Sequence[Page]) -> None:
    """Pages by address. A page that rewrites its own query is not built anew; going back and forth is."""
    by_path = {page.path: page for page in pages}

    @app.callback(
        Output("page", "children"),
        Output("shown-query", "data"),
        Output({"nav": ALL}, "className"),
        Input("url", "pathname"),
        Input("url", "search"),
        Input("scheme", "data"),
        State("shown-query", "data"),
    )
    def show(path: str | None, search: str | None, scheme: str | None, shown: str | None) -> Any:
        path = (path or "/").rstrip("/") or "/"
        here = path + (search or "")
        # Figures are drawn anew in the other colours.
        if here == shown and ctx.triggered_id != "scheme":
            return no_update, no_update, [no_update] * len(pages)
        links = ["nav here" if page.path == path else "nav" for page in pages]
        return _shown(context, by_path.get(path), path, search, scheme == "dark"), here, links


def _shown(context: Context, page: Page | None, path: str, search: str | None, dark: bool) -> Any:
    if page is None:
        return refusal(f"There is no page {path[:80]}.", "The pages are in the list on the left.")
    query = Query(read_query(search), dark)
    try:
        shown = page.layout(context, query)
        return [not_honoured(list(query.told)), shown] if query.told else shown
    except WorkbenchError as error:
        return refusal(str(error))
    except Exception:  # noqa: BLE001 (a page must say that it failed, and leave the others alone)
        _log.exception("page %s", page.path)
        return refusal("This page failed, which is a fault of the workbench.", "The server's terminal has the reason.")


def _told(error: Exception) -> None:
    """Errors of callbacks are told on the page; what is shown stays."""
    if not isinstance(error, WorkbenchError):
        _log.error("callback", exc_info=error)
    words = str(error) if isinstance(error, WorkbenchError) else "This failed; the server's terminal has the reason."
    note = {"action": "show", "title": "Not done", "message": words[:600], "color": "orange", "autoClose": 12_000}
    set_props("notifications", {"sendNotifications": [note]})


def _switch_scheme(app: Dash) -> None:
    app.clientside_callback(
        "function(clicks, now) { return clicks ? (now === 'dark' ? 'light' : 'dark') : dash_clientside.no_update; }",
        Output("scheme", "data"),
        Input("toggle-scheme", "n_clicks"),
        State("scheme", "data"),
    )
    app.clientside_callback(
        "function(now) { return [now || 'light', now === 'dark' ? 'Light' : 'Dark']; }",
        Output("theme", "forceColorScheme"),
        Output("toggle-scheme", "children"),
        Input("scheme", "data"),
    )
    app.clientside_callback(
        "function(heads) { const n = (heads || []).length; return n ? `${n} head${n === 1 ? '' : 's'} chosen` : ''; }",
        Output("set-size", "children"),
        Input("head-set", "data"),
    )


def _guard(app: Dash, server: Flask, hosts: Sequence[str]) -> None:
    """Only scripts of ours run, nothing is loaded from elsewhere, nobody frames the page, no other site calls it."""
    policy: list[str] = []

    @server.before_request
    def known() -> Response | None:
        # A site whose name was made to point at this machine would otherwise read everything.
        host = request.host.rsplit(":", 1)[0]
        origin = urlsplit(request.headers.get("Origin", "")).netloc
        if host not in hosts or (origin and origin != request.host):
            return Response("This address is not served here.", 403)
        return None

    @server.before_request
    def understood() -> Response | None:
        if request.path != "/_dash-update-component" or request.method != "POST":
            return None
        body = request.get_json(force=True, silent=True)
        if isinstance(body, dict) and isinstance(body.get("inputs"), list) and body.get("output") in app.callback_map:
            return None
        return Response("This is no request of a page of this server; load the page anew.", 400)

    @server.after_request
    def headers(answer: Response) -> Response:
        if not policy:
            scripts = " ".join(app.csp_hashes())
            policy.append(
                f"default-src 'self'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; "
                "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; object-src 'none'; "
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
        answer.headers["Content-Security-Policy"] = policy[0]
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["X-Frame-Options"] = "DENY"
        answer.headers["Referrer-Policy"] = "no-referrer"
        answer.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        answer.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return answer


def open_port(app: Dash, port: int, threads: int = 8) -> Any:
    """A server on this machine alone; `run()` serves until it is interrupted."""
    from waitress.server import create_server

    return create_server(app.server, host="127.0.0.1", port=port, threads=threads, ident=None)
