"""Export of a page: the offline report of the run that it shows, as `workbench report` writes it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from threading import BoundedSemaphore, Lock

from dash import ClientsideFunction, Dash, Input, Output, State
from flask import Blueprint, Response, jsonify, request, send_file
from werkzeug.exceptions import HTTPException

from workbench.apps.address import Query, link, read_query
from workbench.apps.context import Context, Page
from workbench.apps.head_export import at_head
from workbench.apps.library import RunLibrary, shortened
from workbench.apps.live import Live
from workbench.apps.trial_run import TrialRun
from workbench.apps.trials import read_trial
from workbench.apps.zoom.picture import pattern_view
from workbench.errors import RequestError, RunNotFound, WorkbenchError
from workbench.reports import BUDGET_BYTES, RunLike, render
from workbench.reports.view import PatternView
from workbench.runs import Run

# Writing takes seconds of the processor: one report is made at a time, and few wait for theirs.
MOST_ASKED = 3
_log = logging.getLogger("workbench")
_Render = Callable[[RunLike, Run | None, PatternView | None], str]


_AS = f"as one offline HTML file of at most {BUDGET_BYTES / 1e6:.0f} MB, as `workbench report` does."


_WHY = {
    "/": "choose a run in the table to save its report. The list of runs shows no run by itself.",
    "/lab": "no trial is shown. Run one, or take one from the history, to save it.",
    "/pattern": "this page shows no run. A prompt typed here belongs to none; its figures are saved beside them.",
}


class Busy(WorkbenchError):
    """More reports are asked for than are made at a time."""


def address_of(run: str = "", against: str = "", **shown: str) -> str:
    """Where the report of a run is found, that of a run beside another one, or that of a trial."""
    return link("/export/report.html", run=run, against=against, **shown)


def study_of(trial: str) -> str:
    """Where a trial is found as a study."""
    return link("/export/study.toml", trial=trial)


def blueprint(library: RunLibrary, live: Live) -> Blueprint:
    """`/export/report.html?run=NAME`, with `&against=NAME` the two compared, with `&pattern=NAME` and a view's fields
    that view; `?trial=ID` for a trial of the lab. Refusals go out as JSON.

    Names stand in the query, where any text can: a path would end at a slash or a line's end in them.
    """
    routes = Blueprint("export", __name__, url_prefix="/export")

    @routes.errorhandler(WorkbenchError)
    def refused(error: WorkbenchError) -> tuple[Response, int]:
        code = 503 if isinstance(error, Busy) else 404 if isinstance(error, RunNotFound) else 400
        return jsonify(error=str(error)), code

    @routes.errorhandler(Exception)
    def failed(error: Exception) -> tuple[Response, int]:
        if isinstance(error, HTTPException):
            return jsonify(error=error.description), error.code or 500
        _log.error("export", exc_info=error)
        return jsonify(error="The report failed, a fault of the workbench; the server's terminal has the reason."), 500

    routes.add_url_rule("/report.html", "report", partial(_report, library, live, _in_turn()))
    routes.add_url_rule("/study.toml", "study", partial(_study, live))
    return routes


def _in_turn() -> _Render:
    asked, at_work = BoundedSemaphore(MOST_ASKED), Lock()

    def made(run: RunLike, against: Run | None, view: PatternView | None) -> str:
        if not asked.acquire(blocking=False):
            raise Busy(f"{MOST_ASKED} reports are being written already; export again in a few seconds.")
        try:
            with at_work:
                return render(run, against=against, view=view)
        finally:
            asked.release()

    return made


def _report(library: RunLibrary, live: Live, made: _Render) -> Response:
    run, against, pattern, trial = (request.args.get(name, "") for name in ("run", "against", "pattern", "trial"))
    if trial:
        return _saved(made(TrialRun(trial, live.state(trial), live.name), None, None), f"trial-{trial}")
    # Opened anew, so that a report is only made of files that pass their checksums.
    first = Run.open(library.path(run))
    second = Run.open(library.path(against)) if against else None
    view = pattern_view(library, run, pattern, request.args) if pattern else None
    page = made(first, second, view)
    head = request.args.get("head", "")
    if head:
        try:
            page = at_head(page, library, live, run, head, request.args.get("tokens", ""), BUDGET_BYTES)
        except ValueError as error:
            raise RequestError(str(error)) from error
        return _saved(page, f"{run}-{head}")
    return _saved(page, f"{run}-against-{against}" if against else run)


def _study(live: Live) -> Response:
    trial = request.args.get("trial", "")
    text, command = read_trial(live.state(trial).get("asked", {})).study(str(live.name))
    told = f"# Save as probes/from-the-lab/study.toml and run:\n# {command}\n\n{text}"
    answer = send_file(BytesIO(told.encode()), "application/toml", as_attachment=True, download_name="study.toml")
    answer.headers["Cache-Control"] = "no-store"
    return answer


def _saved(report: str, name: str) -> Response:
    page = report.encode()
    answer = send_file(BytesIO(page), "text/html", as_attachment=True, download_name=f"{_file_name(name)}.html")
    answer.headers["Cache-Control"] = "no-store"
    return answer


def _file_name(run: str) -> str:
    """A name that every system takes: what is not a letter, a digit or plain is left out."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", run)[:120].strip("_.") or "run"


def register(app: Dash, context: Context, pages: Sequence[Page]) -> None:
    """The header's button: what it would save follows from the address; the browser fetches and saves it."""
    by_path = {page.path: page for page in pages}

    @app.callback(
        Output("export-page", "disabled"),
        Output("export-about", "title"),
        Output("export-why", "children"),
        Output("export-address", "data"),
        Input("url", "pathname"),
        Input("url", "search"),
    )
    def offer(path: str | None, search: str | None) -> tuple[bool, str, str, str]:
        page = by_path.get((path or "/").rstrip("/") or "/")
        disabled, told, address = offered(context, page, Query(read_query(search)))
        # A disabled button's title is read by few: the reason stands there as text for those who listen.
        return disabled, told, told if disabled else "", address

    app.clientside_callback(
        ClientsideFunction("workbench", "exportPage"),
        Output("export-page", "loading"),
        Input("export-page", "n_clicks"),
        State("export-address", "data"),
        prevent_initial_call=True,
    )


def offered(context: Context, page: Page | None, query: Query) -> tuple[bool, str, str]:
    """Whether the button is disabled, what it tells, and where the report is found."""
    try:
        runs = [] if page is None else list(page.subject(context, query))[:2]
        for run in runs:
            context.library.path(run)
    except WorkbenchError as error:
        return True, f"Nothing to export: {error}", ""
    shown = dict(page.shown(context, query)) if page is not None else {}
    trial = shown.get("trial")
    if trial:
        return False, f"Save this trial {_AS}", address_of(trial=trial)
    if not runs:
        why = _WHY.get(page.path if page else "", "this page shows no run. Choose one first.")
        return True, f"Nothing to export: {why}", ""
    what = " beside ".join(shortened(run) for run in runs)
    return False, f"Save {what} {_AS}", address_of(*runs, **shown)
