"""Ticks of position axes: round numbers that stay readable in a narrow card, at least three of them."""

from __future__ import annotations

import math

FEWEST = 3
_MOST = 9


def position_ticks(low: float, high: float, logarithmic: bool) -> list[int]:
    """Whole round numbers from low to high: 1, 2, 5 a decade on a logarithmic axis, else evenly spaced ones."""
    low, high = math.ceil(low), math.floor(high)
    if high - low < FEWEST - 1:
        return list(range(low, high + 1))
    if logarithmic:
        decades = range(math.floor(math.log10(max(low, 1))), math.ceil(math.log10(max(high, 1))) + 1)
        for parts in ((1, 2, 5), (1, 3), (1,)):
            ticks = [part * 10**power for power in decades for part in parts if low <= part * 10**power <= high]
            if FEWEST <= len(ticks) <= _MOST:
                return ticks
    return _even(low, high)


def _even(low: int, high: int) -> list[int]:
    """The widest of the round steps that leaves four ticks, or three where no step leaves more."""
    steps = [part * 10**power for power in range(math.ceil(math.log10(high)) + 1, -1, -1) for part in (5, 2, 1)]
    for wanted in (FEWEST + 1, FEWEST):
        for step in steps:
            ticks = list(range(-(-low // step) * step, high + 1, step))
            if len(ticks) >= wanted:
                return ticks
    return [low, high]
