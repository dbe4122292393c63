"""Single entries of a part of a stored pattern, exact: the highest ones, and tables of all that a view shows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from workbench.apps.zoom.tiles import FLOOR, shown_cell
from workbench.runs.patterns import StoredPattern

# Rows of a table of a view at most; a larger view is told in cells.
MOST_LINES = 1 << 17
# Rows whose entries are computed at once in the first column of blocks, and blocks that are looked at before the rest
# are sorted.
_ROWS, _FIRST = 1024, 64
_HOW = {"max": "maximum", "mean": "mean"}
Entry = tuple[float, int, int]


def highest_entries(
    pattern: StoredPattern, rows: slice, keys: slice, count: int, *, skip_first: bool = True
) -> list[Entry]:
    """The highest (probability, row, key) of a part, the highest first, exact; those of key 0 are left out.

    The pyramid's maxima say which blocks can hold them; these are computed again. Entries below `FLOOR`, which no
    picture shows either, are not listed.
    """
    base = pattern.base
    found: list[Entry] = []
    # Maxima of the first column of blocks are those of key 0, mostly, and say nothing about the other keys.
    if keys.start == 0 and skip_first:
        for start in range(rows.start, rows.stop, _ROWS):
            block = slice(start, min(start + _ROWS, rows.stop)), slice(1, min(base, keys.stop))
            found = _best(found, pattern, *block, count)
    bounds, corner = _bounds(pattern, rows, keys, skip_first)
    flat = bounds.ravel()
    ahead = np.argpartition(-flat, _FIRST)[:_FIRST] if flat.size > _FIRST else np.arange(flat.size)
    for place in _places(flat, ahead, bounds.shape[1], corner):
        found = _best(found, pattern, *_block(place, base, rows, keys), count)
    least = found[-1][0] if len(found) == count else FLOOR
    rest = np.setdiff1d(np.flatnonzero(flat > least), ahead)
    for place in _places(flat, rest, bounds.shape[1], corner):
        if len(found) == count and bounds[place[0] - corner[0], place[1] - corner[1]] <= found[-1][0]:
            break
        found = _best(found, pattern, *_block(place, base, rows, keys), count)
    return found


def _bounds(
    pattern: StoredPattern, rows: slice, keys: slice, skip_first: bool
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """What the entries of each block are at most, and the first block; blocks that need no look are at zero."""
    own = [slice(part.start // pattern.base, -(-part.stop // pattern.base)) for part in (rows, keys)]
    tops = pattern.tensors.read(f"max_{pattern.base}", *own)
    # Maxima are rounded to float16.
    bounds = np.minimum(tops.astype(np.float32) + np.spacing(tops).astype(np.float32), 1.0)
    if keys.start == 0 and skip_first:
        bounds[:, 0] = 0.0
    return np.where(bounds >= FLOOR, bounds, np.float32(0.0)), (own[0].start, own[1].start)


def _places(
    flat: NDArray[np.float32], chosen: NDArray[np.intp], width: int, corner: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """Blocks by the highest bound first, those at zero left out."""
    for one in chosen[np.argsort(-flat[chosen], kind="stable")].tolist():
        if flat[one] > 0:
            yield corner[0] + one // width, corner[1] + one % width


def _block(place: tuple[int, int], base: int, rows: slice, keys: slice) -> tuple[slice, slice]:
    row, key = (
        slice(max(at * base, part.start), min((at + 1) * base, part.stop))
        for at, part in zip(place, (rows, keys), strict=True)
    )
    return row, key


def _best(found: list[Entry], pattern: StoredPattern, rows: slice, keys: slice, count: int) -> list[Entry]:
    """What was found, with the entries of one more block that are among the highest."""
    if rows.start >= rows.stop or keys.start >= keys.stop:
        return found
    part = pattern.entries(rows, keys).numpy()
    least = found[-1][0] if len(found) == count else FLOOR
    flat = part.ravel()
    high = np.flatnonzero(flat > least)
    if high.size > count:
        high = high[np.argpartition(-flat[high], count - 1)[:count]]
    wide = part.shape[1]
    more = [(float(flat[one]), rows.start + one // wide, keys.start + one % wide) for one in high.tolist()]
    return sorted([*found, *more], key=lambda entry: (-entry[0], *entry[1:]))[:count]


def view_table(pattern: StoredPattern, rows: slice, keys: slice, how: str, texts: Sequence[str] | None) -> str:
    """What a view shows, as CSV: each entry that the mask shows where they are few enough, exact, with both tokens;
    else cells, whose first and last rows and keys stand in columns of their own, with their mean or maximum."""
    cell = shown = 1
    while _count(rows, shown) * _count(keys, shown) > MOST_LINES:
        cell *= 2
        shown = shown_cell(pattern, cell)
    rows, keys = _whole(rows, shown, pattern.tokens), _whole(keys, shown, pattern.tokens)
    values = pattern.view(rows, keys, shown, how)
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\r\n")
    if shown == 1:
        table.writerow(["row", "key", "probability", *([] if texts is None else ["row token", "key token"])])
    else:
        table.writerow(["first row", "last row", "first key", "last key", f"{_HOW[how]} of the cell"])
    for i, j in zip(*np.nonzero(_shown(pattern, rows, keys, shown)), strict=True):
        row, key, value = rows.start + int(i) * shown, keys.start + int(j) * shown, f"{float(values[i, j]):.6g}"
        if shown == 1:
            tokens = [] if texts is None else [_plain(texts[row]), _plain(texts[key])]
            table.writerow([row, key, value, *tokens])
        else:
            last_row, last_key = (min(at + shown, pattern.tokens) - 1 for at in (row, key))
            table.writerow([row, last_row, key, last_key, value])
    return out.getvalue()


def _count(part: slice, cell: int) -> int:
    last: int = -(-part.stop // cell)
    return last - int(part.start) // cell


def _whole(part: slice, cell: int, tokens: int) -> slice:
    """A part in whole cells."""
    return slice(part.start // cell * cell, min(tokens, -(-part.stop // cell) * cell))


def _shown(pattern: StoredPattern, rows: slice, keys: slice, cell: int) -> NDArray[np.bool_]:
    """Cells of which the mask (and the window) shows an entry."""
    first_row, first_key = (np.arange(part.start, part.stop, cell) for part in (rows, keys))
    last_row, last_key = (np.minimum(first + cell, pattern.tokens) - 1 for first in (first_row, first_key))
    found: NDArray[np.bool_] = first_key <= last_row[:, None]
    if pattern.masking.window is not None:
        found &= last_key > first_row[:, None] - pattern.masking.window
    return found


def _plain(text: str) -> str:
    """A token as text; one that begins like a formula of a spreadsheet is marked as text."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
