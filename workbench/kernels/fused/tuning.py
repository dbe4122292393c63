"""Tile shapes by device, kernel, head width and element size.

The table holds what was fastest where it was measured; a device or shape that is not in it takes the fallback,
and says so once for each device and kernel.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple

import torch

_log = logging.getLogger("workbench")


class Tiles(NamedTuple):
    """Rows and keys of a tile, and how Triton runs it."""

    rows: int
    keys: int
    warps: int
    stages: int


# (capability, kernel, head width up to, bytes of an element)
TABLE: dict[tuple[tuple[int, int], str, int, int], Tiles] = {
    ((9, 0), "rows", 64, 2): Tiles(128, 128, 8, 3),
    ((9, 0), "rows", 128, 2): Tiles(128, 128, 8, 3),
    ((9, 0), "rows only", 64, 2): Tiles(128, 64, 8, 3),
    ((9, 0), "rows only", 128, 2): Tiles(128, 64, 8, 3),
    ((9, 0), "columns", 64, 2): Tiles(64, 128, 4, 3),
    ((9, 0), "columns", 128, 2): Tiles(64, 128, 4, 3),
    ((9, 0), "blocks", 64, 2): Tiles(128, 128, 8, 2),
    ((9, 0), "blocks", 128, 2): Tiles(128, 128, 8, 2),
}
INTERPRETED = Tiles(64, 64, 4, 1)


def tiles_for(kernel: str, dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The tile shape on this device for "rows" (with output), "rows only", "columns", "blocks", or a lesser kernel."""
    if device.type != "cuda":
        return INTERPRETED
    size = torch.finfo(dtype).bits // 8
    width = next(w for w in (64, 128, 256, 512) if dim <= w)
    return _lookup(torch.cuda.get_device_capability(device), kernel, width, size)


@lru_cache
def _lookup(capability: tuple[int, int], kernel: str, width: int, size: int) -> Tiles:
    found = TABLE.get((capability, kernel, width, size))
    if found is None:
        found = _fallback(width, size)
        if any(kernel == tuned for _, tuned, _, _ in TABLE):
            _warn(capability, kernel)
    return found


@lru_cache
def _warn(capability: tuple[int, int], kernel: str) -> None:
    """Once per device and kernel, whatever width or element size comes first."""
    _log.warning("no tuned tiles for kernel %r on capability %d.%d: using untuned ones", kernel, *capability)


def _fallback(width: int, size: int) -> Tiles:
    if size > 2:
        return Tiles(64, 32, 4, 2) if width <= 128 else Tiles(32, 32, 4, 1)
    return Tiles(64, 64, 4, 2) if width <= 128 else Tiles(64, 32, 4, 1)
