"""The view of a stored pattern as a picture of its own, for a report."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from workbench.apps.address import link, read_choice, read_number
from workbench.apps.library import RunLibrary
from workbench.apps.zoom.entries import highest_entries
from workbench.apps.zoom.tiles import FLOOR, SCALES, Look, automatic_top, levels, picture, shown_cell, unhidden
from workbench.reports.view import SIDE, PatternView, Peak
from workbench.runs.patterns import HOWS, StoredPattern

# The fields of an address that say which part of a pattern is shown, and how.
VIEW = ("row", "key", "span", "how", "scale", "top", "first")
_STRIPS = {"column_mean": "keys", "entropy": "rows", "sink": "rows"}
_PEAKS = 8


def pattern_view(library: RunLibrary, run: str, name: str, query: Mapping[str, str]) -> PatternView:
    """The part of a pattern that an address shows, square; all of it where the address names none."""
    pattern = library.pattern(run, name)
    how = read_choice(query, "how", HOWS, "max")
    scale = read_choice(query, "scale", SCALES, "log")
    first = query.get("first") == "1"
    automatic = 1.0 if scale == "log" else automatic_top(pattern, how, with_first=first)
    top = read_number(query, "top", 10 * FLOOR, 1.0, automatic)
    span = min(pattern.tokens, max(8, round(read_number(query, "span", 1, 4 * pattern.tokens, pattern.tokens))))
    level = min(max(0, round(np.log2(span / SIDE))), levels(pattern))
    cell = 1 << level
    read = shown_cell(pattern, cell)
    rows, keys = (_part(pattern, read_number(query, at, 0, pattern.tokens, 0), span, read) for at in ("row", "key"))
    values = pattern.view(rows, keys, read, how)
    shades = Look(how, scale, top).shades(values)
    times = read // cell
    shades = shades.repeat(times, 0).repeat(times, 1)
    high, wide = (-(-(part.stop - part.start) // cell) for part in (rows, keys))
    shades = unhidden(shades[:high, :wide], rows, keys, cell)
    strips = {
        strip: pattern.strip(strip, SIDE // 2, keys if along == "keys" else rows).tolist()
        for strip, along in _STRIPS.items()
        if strip in pattern.tensors
    }
    return PatternView(
        head=str(pattern.name), tokens=pattern.tokens, rows=(rows.start, rows.stop), keys=(keys.start, keys.stop),
        cell=read, how=how, scale=scale, floor=FLOOR if scale == "log" else 0.0, top=top,
        pictures={kind: picture(shades, kind == "dark") for kind in ("light", "dark")}, strips=strips,
        spans=tuple((int(one["first"]), int(one["last"]) + 1) for one in pattern.about.get("spans", [])),
        peaks=_peaks(library, run, pattern, (rows, keys), not first), first=first,
        address=link("/pattern", run=run, pattern=name, **{key: query[key] for key in VIEW if key in query}),
    )  # fmt: skip


def _part(pattern: StoredPattern, first: float, span: int, cell: int) -> slice:
    start = min(int(first), pattern.tokens - span) // cell * cell
    stop = min(pattern.tokens, -(-(start + span) // cell) * cell)
    return slice(start, stop)


def _peaks(
    library: RunLibrary, run: str, pattern: StoredPattern, part: tuple[slice, slice], skip_first: bool
) -> tuple[Peak, ...]:
    """The highest entries of the view, exact, with their tokens."""
    texts = library.frame(run, "tokens")["text"] if library.run(run).has_table("tokens") else None
    found = []
    for value, row, key in highest_entries(pattern, *part, _PEAKS, skip_first=skip_first):
        tokens = ("", "") if texts is None else tuple(str(texts.iloc[one])[:40] for one in (row, key))
        found.append(Peak(row, key, value, tokens[0], tokens[1]))
    return tuple(found)
