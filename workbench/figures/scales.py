"""Colour ranges of score maps: where a scale starts and ends, its ticks, and the threshold among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.figures.text import number
from workbench.figures.theme import Palette

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """A colour axis: its range, its colours, its ticks with their texts."""

    low: float
    high: float
    colours: tuple[str, ...]
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def axis(self, bar: Mapping[str, Any]) -> dict[str, Any]:
        """The axis as plotly wants it, with `bar` as its colour bar."""
        last = len(self.colours) - 1
        stops = [[i / last, colour] for i, colour in enumerate(self.colours)]
        ticks = {"tickvals": list(self.ticks), "ticktext": list(self.labels)}
        return {"cmin": self.low, "cmax": self.high, "colorscale": stops, "colorbar": {**bar, **ticks}}

    def mark(self, value: float, colours: Palette) -> str:
        """The ink or page colour, whichever stands out more on the colour of `value`."""
        share = (value - self.low) / (self.high - self.low)
        behind = luminance(self.colours[round(min(max(share, 0.0), 1.0) * (len(self.colours) - 1))])
        return max((colours.ink, colours.page), key=lambda colour: contrast(luminance(colour), behind))


def strength(values: Any, better: object) -> Any:
    """Values turned so that the strongest is the largest; detectors may seek low ones, or either sign."""
    if better == "lower":
        return -values
    return np.abs(values) if better == "either" else values


def scale_for(values: Array, info: Mapping[str, Any], colours: Palette) -> Scale:
    """From 0 to the largest value, around 0 where values have both signs; the threshold has its own tick."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    both_signs = low < -0.05 * max(high, 1e-9)
    reach = max(-low, high)
    low, high = (-reach, reach) if both_signs else (0.0, high if high > 0 else 1.0)
    ticks = {tick: number(tick) for tick in round_ticks(low, high)}
    threshold = info.get("threshold")
    cut = float(threshold) if isinstance(threshold, Real) else math.nan
    cuts = [cut, -cut] if both_signs and info.get("better") == "either" else [cut]
    for place in cuts:
        if low <= place <= high:
            ticks = {t: text for t, text in ticks.items() if abs(t - place) > 0.06 * (high - low)}
            ticks[place] = f"<b>◂ {number(place)}</b>"
    if cut > high:
        # no head reaches it: say so at the end of the scale
        ticks[high] = f"{ticks[high]}<br><b>&lt; {number(cut)}</b>"
    shades = colours.diverging if both_signs else colours.sequential
    return Scale(low, high, shades, tuple(ticks), tuple(ticks.values()))


def round_ticks(low: float, high: float) -> list[float]:
    """Five round numbers or fewer from low to high; the ends are always there."""
    step = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(step))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= step * (1 - 1e-9))
    inside = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    kept = [float(np.round(t, 12)) for t in inside if min(high - t, t - low if low < 0 else t + step) > 0.4 * step]
    return [low, *kept, high] if low < 0 else [*kept, high]


def luminance(colour: str) -> float:
    """Relative luminance of a hexadecimal colour, as the accessibility guidelines define it."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: float, other: float) -> float:
    """Contrast ratio of two luminances, 1 to 21."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
