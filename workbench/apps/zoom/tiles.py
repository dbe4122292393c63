"""Tiles of a stored pattern as pictures: 256 x 256 pixels, each a cell of 2^level x 2^level entries."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from workbench.errors import RequestError
from workbench.figures import palette
from workbench.runs.patterns import HOWS, StoredPattern

PIXELS = 256
# Cells up to this size are computed from q and k; between it and the pyramid's finest, pixels share its cells.
EXACT = 4
# Probabilities below are drawn as nothing on a logarithmic scale.
FLOOR = 1e-6
Scale = Literal["linear", "log"]
SCALES: tuple[Scale, ...] = get_args(Scale)
# Palette entries: 255 shades, and what the mask hides.
_SHADES, _HIDDEN = 255, 255


@dataclass(frozen=True)
class Look:
    """How cells are drawn: their mean or their maximum, on a linear or a logarithmic scale that ends at `top`."""

    how: str = "max"
    scale: str = "log"
    top: float = 1.0
    dark: bool = False

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise RequestError(f"how={self.how!r}: cells show their {' or their '.join(HOWS)}.")
        if self.scale not in SCALES:
            raise RequestError(f"scale={self.scale!r}: choose {' or '.join(SCALES)}.")
        if not FLOOR < self.top <= 1.0:
            raise RequestError(f"top={self.top}: the scale ends at a probability above {FLOOR} and up to 1.")

    def shades(self, values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
        """The palette entry of each value."""
        if self.scale == "log":
            floor = np.log10(FLOOR)
            shares = (np.log10(np.maximum(values, FLOOR)) - floor) / (np.log10(self.top) - floor)
        else:
            shares = values / self.top
        found: NDArray[np.uint8] = np.clip(shares * (_SHADES - 1), 0, _SHADES - 1).astype(np.uint8)
        return found


def levels(pattern: StoredPattern) -> int:
    """The coarsest level: the whole pattern in one tile."""
    level = 0
    while pattern.tokens > PIXELS << level:
        level += 1
    return level


def tile(pattern: StoredPattern, level: int, row: int, column: int, look: Look) -> bytes:
    """The picture of one tile, PNG; transparent beyond the pattern and where the mask hides all of a cell."""
    most = levels(pattern)
    if not 0 <= level <= most:
        raise RequestError(f"level {level}: this pattern has levels 0 (single entries) to {most} (all of it).")
    cell = 1 << level
    span, count = PIXELS * cell, -(-pattern.tokens // (PIXELS * cell))
    if not (0 <= row < count and 0 <= column < count):
        raise RequestError(f"tile {row}, {column} of level {level}: rows and columns run from 0 to {count - 1}.")
    rows, keys = (slice(at * span, min((at + 1) * span, pattern.tokens)) for at in (row, column))
    shades = np.full((PIXELS, PIXELS), _HIDDEN, dtype=np.uint8)
    if keys.start < rows.stop:
        read = shown_cell(pattern, cell)
        values = pattern.view(rows, keys, read, look.how)
        if read > cell:
            values = values.repeat(read // cell, 0).repeat(read // cell, 1)
        high, wide = (-(-(part.stop - part.start) // cell) for part in (rows, keys))
        shades[:high, :wide] = unhidden(look.shades(values[:high, :wide]), rows, keys, cell)
    return picture(shades, look.dark)


def unhidden(shades: NDArray[np.uint8], rows: slice, keys: slice, cell: int) -> NDArray[np.uint8]:
    """Shades of cells with those that the mask hides left out: their first key is after their last row."""
    first, last = np.arange(rows.start, rows.stop, cell), np.arange(keys.start, keys.stop, cell)
    found: NDArray[np.uint8] = np.where(last > first[:, None] + cell - 1, np.uint8(_HIDDEN), shades)
    return found


def shown_cell(pattern: StoredPattern, cell: int) -> int:
    """The cells that pixels of this size are drawn from."""
    return pattern.base if EXACT < cell < pattern.base else cell


def automatic_top(pattern: StoredPattern, how: str, *, with_first: bool = False) -> float:
    """Where a linear scale ends: the 99.9th percentile of the finest stored cells, those of position 0 left out.

    Most heads rest on position 0; with it in the range, everything else is drawn in the palest shade.
    """
    cells = pattern.tensors.read(f"{how}_{pattern.base}")[:, 0 if with_first else 1 :]
    seen = cells[cells > 0]
    if not seen.size:
        return 1.0
    # Of large maps, every so many cells say the same.
    seen = seen[:: max(1, seen.size // 1_000_000)]
    return float(np.clip(np.quantile(seen.astype(np.float32), 0.999), 10 * FLOOR, 1.0))


@lru_cache(maxsize=2)
def _colours(dark: bool) -> bytes:
    stops = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in palette(dark).sequential]
    at = np.linspace(0, len(stops) - 1, _SHADES)
    shades = np.stack([np.interp(at, range(len(stops)), [stop[i] for stop in stops]) for i in range(3)], 1)
    return np.concatenate([shades.round(), [[0, 0, 0]]]).astype(np.uint8).tobytes()


def picture(shades: NDArray[np.uint8], dark: bool) -> bytes:
    """Palette entries as PNG."""
    image = Image.fromarray(shades, mode="P")
    image.putpalette(_colours(dark))
    out = io.BytesIO()
    image.save(out, "PNG", transparency=_HIDDEN, compress_level=1)
    return out.getvalue()
