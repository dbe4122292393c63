"""What lies between two runs' scores of one detector, head by head: an interval and a p-value of the difference.

Three ways and none, from the best that two runs allow; the table says which was taken:

`paired`
    Both have scores of the same prompts: the bootstrap of the mean of prompt-wise differences, and a sign-flip test.
    Of a detector that contrasts two samples, the prompt-wise differences of either are compared instead.
`samples`
    Scores of other prompts: both are resampled, and prompts' labels are shuffled between the runs.
`intervals`
    Only the two 95 % intervals are known: widths are added in squares, with Student's distribution for few prompts
    (Welch). It takes the two for independent, so that runs on the same prompts, which are not, get intervals that are
    too wide.
`none`
    A run has one prompt, its score is read off weights, or it is the same on every prompt and no share: nothing is
    known of what other prompts would give.

A score that is the same on every prompt has a bootstrap interval without width, which says nothing of other prompts.
Shares that are 0 or 1 throughout get Wilson's width instead (Newcombe 1998, Interval estimation for the difference
between independent proportions), and from intervals alone a p-value no smaller than Fisher's exact one. Where a
bootstrap interval and the test contradict each other, the interval is the test's own.

Resamples are drawn once for all heads (as counts, so that a resample is one row of a matrix product), which costs
milliseconds a detector. With n prompts a sign-flip p-value is at least 2 / 2^n.
"""

from __future__ import annotations

from itertools import combinations, product
from math import comb
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .samples import Samples

RESAMPLES, FLIPS = 1999, 9999
# With so few prompts all sign flips are tried.
_FEW = 13
# With so few ways to part prompts between two runs all are tried.
_PARTS = 20_000
_LEVEL = 0.05
_NORMAL = float(stats.norm.ppf(0.975))
METHODS = {
    "paired": "paired over the prompts, which are the same",
    "samples": "from the single prompts of both, taken as independent",
    "intervals": "from the two intervals alone, taken as independent",
    "none": "without an interval to compare, as a run has one prompt, reads weights, or scores all prompts the same",
}
Array = NDArray[np.float64]


class Between(NamedTuple):
    """B less A of each head: 95 % interval, two-sided p-value."""

    low: Array
    high: Array
    p: Array


def paired(a: Array, b: Array, seed: int = 0, *, share: bool = False) -> Between:
    """Of `[prompt, head]` scores on the same prompts; NaN with fewer than two, or where one is missing.

    `share` says that scores lie between 0 and 1.
    """
    difference = b - a
    count = len(difference)
    if count < 2:
        return nothing(difference.shape[1])
    rng = np.random.default_rng(seed)
    known = np.nan_to_num(difference)
    low, high = _percentiles(_counts(rng, count) @ known / count)
    if count <= _FEW:
        signs = np.array(list(product((-1.0, 1.0), repeat=count)))
        extra = 0
    else:
        signs = rng.choice((-1.0, 1.0), (FLIPS, count))
        extra = 1
    flipped = signs @ known
    found = Between(low, high, _two_sided(flipped, known.sum(0), extra, np.abs(known).max(0)))
    if share:
        # A difference of 0 on each prompt may be so by causality: only others are widened.
        found = _unseen(found, a, b, (np.ptp(known, 0) == 0) & (known[0] != 0))
    found = _agreeing(found, known.mean(0), flipped / count, share)
    return _known(found, np.isnan(difference).any(0))


def two_samples(a: Array, b: Array, seed: int = 0, *, share: bool = False) -> Between:
    """Of mean(b) - mean(a), `[prompt, head]` each, over two independent samples of prompts; `share` as above."""
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
    if comb(len(own), len(second)) <= _PARTS:
        chosen = np.array(list(combinations(range(len(own)), len(second))))
        parted = np.full((len(chosen), len(own)), -1 / len(first))
        np.put_along_axis(parted, chosen, 1 / len(second), axis=1)
        extra = 0
    else:
        parted = rng.permuted(np.tile(own, (FLIPS, 1)), axis=1)
        extra = 1
    shuffled = parted @ pooled
    found = Between(low, high, _two_sided(shuffled, own @ pooled, extra, np.abs(pooled).max(0)))
    if share:
        found = _unseen(found, a, b, np.ones(a.shape[1], dtype=bool))
    return _known(_agreeing(found, own @ pooled, shuffled, share), unknown)


def from_intervals(
    a: tuple[Array, Array, Array],
    b: tuple[Array, Array, Array],
    counts: tuple[Array, Array] | None = None,
    *,
    share: bool = False,
) -> Between:
    """Of two values with their 95 % bootstrap intervals (value, low, high), taken as independent.

    `counts` are the prompts behind either: few make Student's distribution of the normal one. NaN where an interval
    has no width, unless the values are shares (`share`) of 0 or 1 and counts are known: these get Wilson's width.
    """
    sides = []
    for at, (value, low, high) in enumerate((a, b)):
        count = np.full(len(value), np.inf) if counts is None else np.asarray(counts[at], dtype=np.float64)
        sides.append(_side(value, low, high, np.where(np.isnan(count), np.inf, count), share))
    (lower_a, upper_a, freedom_a), (lower_b, upper_b, freedom_b) = sides
    difference = b[0] - a[0]
    below, above = _joint(upper_a, lower_b, freedom_a, freedom_b), _joint(lower_a, upper_b, freedom_a, freedom_b)
    bounds = [error * stats.t.ppf(0.975, freedom) for error, freedom in (below, above)]
    # The side that faces zero decides.
    error, freedom = (np.where(difference > 0, *both) for both in zip(below, above, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(difference == 0, 0.0, np.abs(difference) / error)
    p = np.asarray(2 * stats.t.sf(z, freedom), dtype=np.float64)
    low, high = difference - bounds[0], difference + bounds[1]
    if share and counts is not None:
        constant = (a[1] == a[2]) | (b[1] == b[2])
        p = np.maximum(p, _fisher(a[0], b[0], counts, constant))
        low, high = np.maximum(low, -1), np.minimum(high, 1)
    # No interval leaves out zero where the test does not.
    low, high = (
        np.where(p >= _LEVEL, how(bound, 0.0), bound) for how, bound in ((np.minimum, low), (np.maximum, high))
    )
    return _known(Between(low, high, p), np.isnan(difference + low + high + p))


def between(
    a: Samples, b: Samples, heads: tuple[Any, Any], seed: int = 0, *, share: bool = False
) -> tuple[str, Between] | None:
    """By single prompts, where both runs keep them and they fit; `heads` are (layers, heads) of the rows wanted."""
    first, second = a.values[:, *heads], b.values[:, *heads]
    same = a.same_rows(b)
    if a.second is None and b.second is None:
        if same:
            return "paired", paired(first, second, seed, share=share)
        return "samples", two_samples(first, second, seed, share=share)
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


def _side(value: Array, low: Array, high: Array, count: Array, share: bool) -> tuple[Array, Array, Array]:
    """Half an interval below and above a value, for a normal distribution, and the degrees of freedom behind them."""
    lower, upper = value - low, high - value
    flat = (lower == 0) & (upper == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The bootstrap's spread is that of the sample, which is smaller than that of what it is drawn from.
        growth = np.where(np.isinf(count), 1.0, np.sqrt(count / (count - 1)))
        # Wilson's bound of none, or all, of so many.
        wilson = np.where(np.isinf(count), np.nan, _NORMAL**2 / (count + _NORMAL**2))
    wilson = np.where(share, wilson, np.nan)
    lower = np.where(flat, np.where(value == 1, wilson, np.where(value == 0, 0.0, np.nan)), lower * growth)
    upper = np.where(flat, np.where(value == 0, wilson, np.where(value == 1, 0.0, np.nan)), upper * growth)
    return lower, upper, np.where(flat, np.inf, count - 1)


def _joint(x: Array, y: Array, freedom_x: Array, freedom_y: Array) -> tuple[Array, Array]:
    """Standard error and degrees of freedom (Welch) of two half intervals together."""
    both = np.hypot(x, y)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = both**4 / (x**4 / freedom_x + y**4 / freedom_y)
    return both / _NORMAL, np.where(np.isnan(freedom), np.inf, freedom)


def _fisher(a: Array, b: Array, counts: tuple[Array, Array], wanted: Any) -> Array:
    """Fisher's exact p-value of two shares that are whole numbers of prompts; 0 where not wanted, or not so."""
    found = np.zeros(len(a))
    of_a, of_b = (np.asarray(count, dtype=np.float64) for count in counts)
    whole = (np.abs(a * of_a - np.round(a * of_a)) < 1e-6) & (np.abs(b * of_b - np.round(b * of_b)) < 1e-6)
    cells = np.stack([np.round(a * of_a), np.round(b * of_b), of_a, of_b], axis=1)
    known: dict[tuple[int, ...], float] = {}
    for at in np.flatnonzero(wanted & whole):
        hits_a, hits_b, all_a, all_b = key = tuple(map(int, cells[at]))
        if key not in known:
            known[key] = float(stats.fisher_exact([[hits_a, all_a - hits_a], [hits_b, all_b - hits_b]]).pvalue)
        found[at] = known[key]
    return found


def _unseen(found: Between, a: Array, b: Array, wanted: Any) -> Between:
    """Wider where either sample is 0 or 1 throughout: other prompts may give something else."""
    sides: list[tuple[Array, Array, Array]] = []
    flat = np.zeros(a.shape[1], dtype=bool)
    for sample in (a, b):
        constant = np.ptp(sample, 0) == 0
        flat |= constant & np.isin(sample[0], (0.0, 1.0))
        # Rounding of means must give a constant sample no width.
        value = np.where(constant, sample[0], sample.mean(0))
        half = np.where(constant, 0.0, _NORMAL * sample.std(0) / np.sqrt(len(sample)))
        sides.append((value, value - half, value + half))
    counts = (np.full(a.shape[1], float(len(a))), np.full(a.shape[1], float(len(b))))
    wide = from_intervals(sides[0], sides[1], counts, share=True)
    take = wanted & flat & ~np.isnan(wide.low)
    low = np.where(take, np.minimum(found.low, wide.low), found.low)
    return Between(low, np.where(take, np.maximum(found.high, wide.high), found.high), found.p)


def _agreeing(found: Between, difference: Array, drawn: Array, share: bool) -> Between:
    """The test's own interval where the bootstrap's contradicts it: as far either way as 95 % of draws lie from 0."""
    told = found.p < _LEVEL
    against = told != ((found.low > 0) | (found.high < 0))
    reach = np.quantile(np.abs(drawn), 1 - _LEVEL, axis=0, method="higher")
    # Ties of draws and rounding apart, this includes zero where the test does not tell.
    own = [difference - reach, difference + reach]
    if share:
        own = [np.maximum(own[0], -1), np.minimum(own[1], 1)]
    low, high = np.where(told, own[0], np.minimum(own[0], 0)), np.where(told, own[1], np.maximum(own[1], 0))
    return Between(np.where(against, low, found.low), np.where(against, high, found.high), found.p)
