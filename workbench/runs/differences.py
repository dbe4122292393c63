"""What lies between two runs' scores of one detector, head by head: an interval and a p-value of the difference.

Three ways and none, from the best that two runs allow; the table says which was taken:

`paired`
    Both have scores of the same prompts: the bootstrap of the mean of prompt-wise differences, and a sign-flip test.
    Of a detector that contrasts two samples, the prompt-wise differences of either are compared instead.
`samples`
    Scores of other prompts: both are resampled, and prompts' labels are shuffled between the runs.
`intervals`
    Only the two 95 % intervals are known: a normal approximation, widths added in squares. It takes the two for
    independent, so that runs on the same prompts, which are not, get intervals that are too wide.
`none`
    A run has one prompt, or its score is read off weights: nothing is known of what other prompts would give.

Resamples are drawn once for all heads (as counts, so that a resample is one row of a matrix product), which costs
milliseconds a detector. With n prompts a sign-flip p-value is at least 2 / 2^n.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .samples import Samples

RESAMPLES, FLIPS = 1999, 9999
# With so few prompts all sign flips are tried.
_FEW = 13
_NORMAL = float(stats.norm.ppf(0.975))
METHODS = {
    "paired": "paired over the prompts, which are the same",
    "samples": "from the single prompts of both, which are others",
    "intervals": "from the two intervals alone, taken as independent",
    "none": "without an interval, as a run has one prompt or reads weights",
}
Array = NDArray[np.float64]


class Between(NamedTuple):
    """B less A of each head: 95 % interval, two-sided p-value."""

    low: Array
    high: Array
    p: Array


def paired(a: Array, b: Array, seed: int = 0) -> Between:
    """Of `[prompt, head]` scores on the same prompts; NaN with fewer than two, or where one is missing."""
    difference = b - a
    count = len(difference)
    if count < 2:
        return nothing(difference.shape[1])
    rng = np.random.default_rng(seed)
    low, high = _percentiles(_counts(rng, count) @ np.nan_to_num(difference) / count)
    if count <= _FEW:
        signs = np.array(list(product((-1.0, 1.0), repeat=count)))
        extra = 0
    else:
        signs = rng.choice((-1.0, 1.0), (FLIPS, count))
        extra = 1
    known = np.nan_to_num(difference)
    p = _two_sided(signs @ known, known.sum(0), extra, np.abs(known).max(0))
    return _known(Between(low, high, p), np.isnan(difference).any(0))


def two_samples(a: Array, b: Array, seed: int = 0) -> Between:
    """Of mean(b) - mean(a), `[prompt, head]` each, over two independent samples of prompts."""
    unknown = np.isnan(a).any(0) | np.isnan(b).any(0)
    if min(len(a), len(b)) < 2:
        return nothing(a.shape[1])
    first, second = np.nan_to_num(a), np.nan_to_num(b)
    rng = np.random.default_rng(seed)
    low, high = _percentiles(
        _counts(rng, len(second)) @ second / len(second) - _counts(rng, len(first)) @ first / len(first)
    )
    pooled = np.concatenate([first, second])
    own = np.concatenate([np.full(len(first), -1 / len(first)), np.full(len(second), 1 / len(second))])
    shuffled = rng.permuted(np.tile(own, (FLIPS, 1)), axis=1)
    p = _two_sided(shuffled @ pooled, own @ pooled, 1, np.abs(pooled).max(0))
    return _known(Between(low, high, p), unknown)


def from_intervals(a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]) -> Between:
    """Of two values with their 95 % intervals (value, low, high), taken as independent and normal."""
    difference = b[0] - a[0]
    below = np.hypot(a[2] - a[0], b[0] - b[1])
    above = np.hypot(a[0] - a[1], b[2] - b[0])
    # The side that faces zero decides.
    error = np.where(difference > 0, below, above) / _NORMAL
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(difference == 0, 0.0, np.abs(difference) / error)
    p = np.asarray(2 * stats.norm.sf(z), dtype=np.float64)
    return _known(Between(difference - below, difference + above, p), np.isnan(difference + below + above))


def between(a: Samples, b: Samples, heads: tuple[Any, Any], seed: int = 0) -> tuple[str, Between] | None:
    """By single prompts, where both runs keep them and they fit; `heads` are (layers, heads) of the rows wanted."""
    first, second = a.values[:, *heads], b.values[:, *heads]
    same = a.same_rows(b)
    if a.second is None and b.second is None:
        return ("paired", paired(first, second, seed)) if same else ("samples", two_samples(first, second, seed))
    if same and a.second is not None and b.second is not None:
        return "paired", two_samples(b.second[:, *heads] - a.second[:, *heads], second - first, seed)
    return None


def nothing(heads: int) -> Between:
    """No interval and no p-value."""
    missing = np.full(heads, np.nan)
    return Between(missing, missing, missing)


def _counts(rng: np.random.Generator, count: int) -> Array:
    """How often each prompt is drawn, resample by resample."""
    return np.asarray(rng.multinomial(count, np.full(count, 1 / count), RESAMPLES), dtype=np.float64)


def _percentiles(means: Array) -> tuple[Array, Array]:
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def _two_sided(drawn: Array, found: Array, extra: int, size: Array) -> Array:
    """Share of draws at least as far from 0 as what was found (which counts as one unless it is among them)."""
    # Rounding, against the `size` of scores, must not make a draw that equals what was found smaller than it.
    reached = np.abs(drawn) >= np.abs(found) - 1e-10 * size
    return np.asarray((reached.sum(0) + extra) / (len(drawn) + extra), dtype=np.float64)


def _known(found: Between, unknown: Any) -> Between:
    low, high, p = (np.where(unknown, np.nan, part) for part in found)
    return Between(low, high, p)
