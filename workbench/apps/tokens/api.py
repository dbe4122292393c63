"""What the token view in the browser asks the server for: tokens and heads, exact patterns, thumbnails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flask import Blueprint, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from workbench.apps.library import RunLibrary
from workbench.apps.live import Live
from workbench.apps.tokens import prompts, short
from workbench.apps.tokens.short import ShortPatterns
from workbench.errors import RequestError, WorkbenchError

_Find = Callable[[], ShortPatterns]


def blueprint(library: RunLibrary, live: Live) -> Blueprint:
    """Routes under `/tokens`; the query says whose patterns: `run` with `pattern` or `example`, or `job`."""
    routes = Blueprint("tokens", __name__, url_prefix="/tokens")

    @routes.errorhandler(WorkbenchError)
    def refused(error: WorkbenchError) -> tuple[Response, int]:
        return jsonify(error=str(error)), 400 if isinstance(error, RequestError) else 404

    @routes.errorhandler(HTTPException)
    def failed(error: HTTPException) -> tuple[Response, int]:
        return jsonify(error=error.description), error.code or 500

    views: dict[str, Callable[[_Find], Response]] = {"about": _about, "weights": _weights, "small": _small}
    for path, view in views.items():
        routes.add_url_rule(f"/{path}", path, partial(view, partial(_asked, library, live)))
    return routes


def _asked(library: RunLibrary, live: Live) -> ShortPatterns:
    """The patterns that the query names."""
    job, run = request.args.get("job", ""), request.args.get("run", "")
    if job:
        return prompts.kept(job, live.state(job), live.folder)
    if not run:
        raise RequestError("Neither a run nor a job is named; open the page 'Pattern'.")
    if request.args.get("example"):
        return short.example(library, run, request.args["example"])
    return short.stored(library, run, request.args.get("pattern", ""))


def _about(find: _Find) -> Response:
    found = find()
    return jsonify(
        tokens=[short.shown(text) for text in found.texts],
        # After these tokens a line ends.
        breaks=[at for at, text in enumerate(found.texts) if "\n" in text],
        heads=[str(head) for head in found.heads],
        start=str(found.start),
        windows={str(layer): window for layer, window in found.windows.items()},
        cell=short.cell_of(len(found.texts)),
    )


def _weights(find: _Find) -> Response:
    found = find()
    return _bytes(found.triangle(found.named(request.args.get("head", ""))))


def _small(find: _Find) -> Response:
    given = request.args.get("layer", "")
    if not given.isascii() or not given.isdigit() or len(given) > 6:
        raise RequestError(f"layer={given[:20]!r}: a layer's number is needed.")
    return _bytes(find().thumbnails(int(given)))


def _bytes(value: bytes) -> Response:
    return Response(value, mimetype="application/octet-stream", headers={"Cache-Control": "no-store"})
