"""Faithfulness: how much of the gap between the model and nothing a circuit keeps, over the size of circuits.

f(C) = (m(C) - m(nothing)) / (m(model) - m(nothing)), a ratio of means over prompts, never clipped: above 1 where what
was left out worked against the task. The areas are those of MIB's circuit track (Mueller et al. 2025,
arXiv 2504.13151): trapezoids over the shares of edges below on a linear axis, so that half of it lies between 50 and
100 %. CPR is that under f (higher is better, scores ranked with their sign), CMD that under |1 - f| (lower is better,
ranked by size). As the axis begins at .001, a perfect curve has CPR .999 and CMD 0; one that is 0 up to half of the
edges and 1 with all has CPR .25 and CMD .749.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from workbench.circuits.inference import RESAMPLES, Interval, gap_refusal, recovery

Array = np.ndarray[Any, np.dtype[np.float64]]
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Areas(NamedTuple):
    """CPR and CMD, or the bounds of their intervals; arrays where many curves were given."""

    cpr: Float[np.ndarray, "*curve"]
    cmd: Float[np.ndarray, "*curve"]


class AreaIntervals(NamedTuple):
    """Areas under a curve with their 95 % percentile bootstrap intervals over prompts."""

    value: Areas
    low: Areas
    high: Areas


def faithfulness(
    values: Float[np.ndarray, "circuit prompt"],
    clean: Float[np.ndarray, " prompt"],
    baseline: Float[np.ndarray, " prompt"],
    seed: int = 0,
) -> Interval:
    """f of each circuit from the metric of every prompt; NaN where the gap vanishes (`inference.gap_refusal`)."""
    return recovery(values - baseline, clean, baseline, seed)


def areas(fractions: Float[np.ndarray, " point"], f: Float[np.ndarray, "*curve point"]) -> Areas:
    """CPR and CMD of curves at rising shares of edges."""
    widths = np.diff(fractions)
    under: Array = np.asarray(((f[..., 1:] + f[..., :-1]) / 2 * widths).sum(-1))
    off = np.abs(1 - f)
    return Areas(under, np.asarray(((off[..., 1:] + off[..., :-1]) / 2 * widths).sum(-1)))


def area_intervals(
    fractions: Float[np.ndarray, " point"],
    values: Float[np.ndarray, "point prompt"],
    clean: Float[np.ndarray, " prompt"],
    baseline: Float[np.ndarray, " prompt"],
    seed: int = 0,
) -> AreaIntervals:
    """Areas of one curve, all of whose points share their resamples of prompts."""
    nothing = Areas(np.asarray(np.nan), np.asarray(np.nan))
    if gap_refusal(clean, baseline):
        return AreaIntervals(nothing, nothing, nothing)
    gained, gap, prompts = values - baseline, clean - baseline, len(clean)
    value = areas(fractions, gained.mean(1) / gap.mean())
    if prompts < 2:
        return AreaIntervals(value, nothing, nothing)
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = areas(fractions, (counts @ gained.T) / (counts @ gap)[:, None])
    bounds = [np.nanpercentile(one, [2.5, 97.5]) for one in drawn]
    low, high = (Areas(*(np.asarray(one[side]) for one in bounds)) for side in range(2))
    return AreaIntervals(value, low, high)
