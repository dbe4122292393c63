"""What the zoomable pattern in the browser asks the server for: facts, tiles, values, strips, the next high entry, and
the numbers of a view."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from flask import Blueprint, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from workbench.apps.library import RunLibrary
from workbench.apps.zoom.entries import view_table
from workbench.apps.zoom.tiles import FLOOR, PIXELS, Look, automatic_top, levels, shown_cell, tile
from workbench.errors import RequestError, WorkbenchError
from workbench.runs.patterns import StoredPattern

STRIPS = ("column_mean", "entropy", "sink")
MOST_BINS = 4096
_NEIGHBOURS = 24


def blueprint(library: RunLibrary) -> Blueprint:
    """Routes under `/zoom`; every number is checked, every text goes out as JSON."""
    routes = Blueprint("zoom", __name__, url_prefix="/zoom")

    @routes.errorhandler(WorkbenchError)
    def refused(error: WorkbenchError) -> tuple[Response, int]:
        return jsonify(error=str(error)), 404 if not isinstance(error, RequestError) else 400

    @routes.errorhandler(HTTPException)
    def failed(error: HTTPException) -> tuple[Response, int]:
        return jsonify(error=error.description), error.code or 500

    views: dict[str, Callable[..., Response]] = {
        "about": _about,
        "tile/<int:level>/<int:row>/<int:column>.png": _picture,
        "value": _value_at,
        "strip/<strip>": _marginal,
        "tokens": _tokens,
        "next": _following,
        "view.csv": _numbers,
    }
    for path, view in views.items():
        routes.add_url_rule(f"/<run>/<name>/{path}", view.__name__, partial(view, library))
    return routes


def _about(library: RunLibrary, run: str, name: str) -> Response:
    pattern = library.pattern(run, name)
    tops, with_first = (
        {
            how: library.computed(
                run, ("top", name, how, first), partial(automatic_top, pattern, how, with_first=first)
            )
            for how in ("mean", "max")
        }
        for first in (False, True)
    )
    return jsonify(
        head=pattern.name,
        tokens=pattern.tokens,
        levels=levels(pattern),
        pixels=PIXELS,
        base=pattern.base,
        floor=FLOOR,
        window=pattern.masking.window,
        tops=tops,
        tops_with_first=with_first,
        strips=[strip for strip in STRIPS if strip in pattern.tensors],
        spans=pattern.about.get("spans", []),
    )


def _picture(library: RunLibrary, run: str, name: str, level: int, row: int, column: int) -> Response:
    look = Look(
        request.args.get("how", "max"),
        request.args.get("scale", "log"),
        _number("top", 1.0),
        request.args.get("dark") == "1",
    )
    answer = Response(tile(library.pattern(run, name), level, row, column, look), mimetype="image/png")
    # The address says everything about a tile of a finished run but whether the run was made anew.
    answer.headers["Cache-Control"] = "private, max-age=300"
    return answer


def _value_at(library: RunLibrary, run: str, name: str) -> Response:
    pattern = library.pattern(run, name)
    row, key = _place("row", pattern), _place("key", pattern)
    return jsonify(_value(library, run, pattern, row, key, _whole("level", 0, levels(pattern))))


def _marginal(library: RunLibrary, run: str, name: str, strip: str) -> Response:
    pattern = library.pattern(run, name)
    if strip not in STRIPS or strip not in pattern.tensors:
        raise RequestError(f"There is no strip {strip[:40]!r}; choose from {', '.join(STRIPS)}.")
    first, last = _whole("from", 0, pattern.tokens - 1), _whole("to", 1, pattern.tokens, pattern.tokens)
    if first >= last:
        raise RequestError(f"from={first} to={last}: a part of the tokens is needed.")
    values = pattern.strip(strip, _whole("bins", 1, MOST_BINS, 512), slice(first, last))
    return jsonify(values=[float(f"{one:.6g}") for one in values])


def _tokens(library: RunLibrary, run: str, name: str) -> Response:
    pattern = library.pattern(run, name)
    first = _whole("from", 0, pattern.tokens - 1)
    last = min(pattern.tokens, first + _whole("count", 1, 512, _NEIGHBOURS))
    return jsonify(first=first, tokens=_texts(library, run, first, last))


def _following(library: RunLibrary, run: str, name: str) -> Response:
    """The next entry of `above` or more behind a place (at it as well with `here=1`); behind the last, the first."""
    pattern = library.pattern(run, name)
    level = _number("above", 0.1)
    if not 1e-4 <= level <= 1:
        raise RequestError(f"above={level}: give a probability from 0.0001 to 1.")
    row, key, skip = _place("row", pattern), _place("key", pattern), request.args.get("first") != "1"
    found = pattern.next_high(row, key - (request.args.get("here") == "1"), level, skip_first=skip)
    around = found is None
    # From the very beginning, so that the entry asked from is found again where it is the only one.
    found = found or pattern.next_high(0, -1, level, skip_first=skip)
    if found is None:
        return jsonify(found=None)
    return jsonify(found={"row": found[0], "key": found[1], "value": found[2]}, around=around)


def _numbers(library: RunLibrary, run: str, name: str) -> Response:
    """The entries of a view, or its cells where they are too many, as CSV."""
    pattern = library.pattern(run, name)
    rows, keys = (
        slice(_whole(f"{of}s_from", 0, pattern.tokens - 1), _whole(f"{of}s_to", 1, pattern.tokens, pattern.tokens))
        for of in ("row", "key")
    )
    for of, part in (("rows", rows), ("keys", keys)):
        if part.start >= part.stop:
            raise RequestError(f"{of} from {part.start} to {part.stop}: a part of the tokens is needed.")
    how = request.args.get("how", "max")
    texts = list(library.frame(run, "tokens")["text"].map(str)) if library.run(run).has_table("tokens") else None
    answer = Response(view_table(pattern, rows, keys, how, texts), mimetype="text/csv")
    answer.headers["Cache-Control"] = "no-store"
    return answer


def _value(library: RunLibrary, run: str, pattern: StoredPattern, row: int, key: int, level: int) -> dict[str, object]:
    """What stands under the pointer: the entry itself, exact, and the cell that is drawn there."""
    cell = shown_cell(pattern, 1 << level)
    start, left = row // cell * cell, key // cell * cell
    part = slice(start, min(start + cell, pattern.tokens)), slice(left, min(left + cell, pattern.tokens))
    return {
        "row": row,
        "key": key,
        "value": float(pattern.entries(slice(row, row + 1), slice(key, key + 1))[0, 0]),
        "cell": cell,
        "mean": float(pattern.view(*part, cell, "mean")[0, 0]),
        "max": float(pattern.view(*part, cell, "max")[0, 0]),
        "row_token": _texts(library, run, row, row + 1),
        "key_token": _texts(library, run, key, key + 1),
        "before_row": _texts(library, run, max(0, row - 6), row),
        "before_key": _texts(library, run, max(0, key - 6), key),
        "entropy": float(pattern.tensors.read("entropy", slice(row, row + 1))[0]),
    }


def _texts(library: RunLibrary, run: str, first: int, last: int) -> list[str]:
    """Token texts, cut to a length that a line can show; empty where the run has none."""
    if not library.run(run).has_table("tokens"):
        return []
    column = library.frame(run, "tokens")["text"]
    return [str(text)[:80] for text in column.iloc[first:last]]


def _place(name: str, pattern: StoredPattern) -> int:
    return _whole(name, 0, pattern.tokens - 1)


def _whole(name: str, low: int, high: int, default: int | None = None) -> int:
    given = request.args.get(name)
    if given is None:
        return low if default is None else min(default, high)
    if not given.isascii() or not given.isdigit() or len(given) > 12 or not low <= int(given) <= high:
        raise RequestError(f"{name}={given[:20]!r}: a whole number from {low} to {high} is needed.")
    return int(given)


def _number(name: str, default: float) -> float:
    given = request.args.get(name)
    try:
        found = default if given is None else float(given)
    except ValueError:
        found = np.nan
    if not np.isfinite(found):
        raise RequestError(f"{name}={(given or '')[:20]!r}: a number is needed.")
    return found
