"""From per-prompt values to claims: bootstrap intervals, permutation p-values, false-discovery q-values.

The prompts of a task are the sample; heads are many hypotheses at once. All functions work on `[prompt, head]`
arrays and use scipy's resampling.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES = 1999
Better = Literal["higher", "lower", "either"]
_ALTERNATIVE = {"higher": "greater", "lower": "less", "either": "two-sided"}
Array = np.ndarray[Any, np.dtype[np.float64]]


class Interval(NamedTuple):
    """Mean over prompts and its 95 % percentile bootstrap interval."""

    value: Float[np.ndarray, " head"]
    low: Float[np.ndarray, " head"]
    high: Float[np.ndarray, " head"]


def bootstrap_mean(values: Float[np.ndarray, "prompt head"], seed: int, resamples: int = RESAMPLES) -> Interval:
    """Interval of the mean over prompts; with a single prompt it is as wide as our ignorance: NaN."""
    mean = values.mean(axis=0)
    if len(values) < 2:
        return Interval(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan))
    low, high = _percentiles(values, np.random.default_rng(seed), resamples)
    return Interval(mean, low, high)


def bootstrap_difference(
    a: Float[np.ndarray, "first head"], b: Float[np.ndarray, "second head"], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Interval of mean(a) - mean(b) over two independent samples of prompts."""
    result = stats.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        axis=0,
        paired=False,
        vectorized=True,
        n_resamples=resamples,
        batch=64,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Interval(a.mean(axis=0) - b.mean(axis=0), interval.low, interval.high)


def _percentiles(values: Array, rng: np.random.Generator, resamples: int) -> tuple[Array, Array]:
    result = stats.bootstrap(
        (values,), np.mean, axis=0, vectorized=True, n_resamples=resamples, batch=64, method="percentile", rng=rng
    )
    return result.confidence_interval.low, result.confidence_interval.high


def paired_p(
    values: Float[np.ndarray, "prompt head"], null: Float[np.ndarray, "prompt head"], better: Better, seed: int
) -> Float[np.ndarray, " head"]:
    """Sign-flip permutation p-value per head: could prompt-wise differences to the null be of either sign?

    NaN with fewer than two prompts, and for a head with a NaN. Heads whose values equal their null everywhere get 1.
    """
    difference = values - null
    if len(difference) < 2:
        return np.full(difference.shape[1], np.nan)
    result = stats.permutation_test(
        (difference,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=64,
        alternative=_ALTERNATIVE[better],
        axis=0,
        rng=np.random.default_rng(seed),
    )
    p = np.where((difference == 0).all(axis=0), 1.0, np.asarray(result.pvalue))
    return np.where(np.isnan(difference).any(axis=0), np.nan, p)


def unpaired_p(
    a: Float[np.ndarray, "first head"], b: Float[np.ndarray, "second head"], seed: int
) -> Float[np.ndarray, " head"]:
    """Two-sided permutation p-value per head for mean(a) = mean(b): prompts' labels are shuffled. NaN for a NaN."""
    result = stats.permutation_test(
        (a, b),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        permutation_type="independent",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=64,
        alternative="two-sided",
        axis=0,
        rng=np.random.default_rng(seed),
    )
    unknown = np.isnan(a).any(axis=0) | np.isnan(b).any(axis=0)
    return np.where(unknown, np.nan, np.asarray(result.pvalue))


def drawn_p(
    value: Float[np.ndarray, " head"], null: Float[np.ndarray, "draw head"], better: Better
) -> Float[np.ndarray, " head"]:
    """Share of random draws that say at least as much as the value itself, which counts as one.

    NaN without draws, and for a head whose value or any of whose draws is NaN.
    """
    if not len(null):
        return np.full_like(value, np.nan)
    signed, drawn = {
        "higher": (value, null),
        "lower": (-value, -null),
        "either": (np.abs(value - null.mean(axis=0)), np.abs(null - null.mean(axis=0))),
    }[better]
    p = (1 + (drawn >= signed).sum(axis=0)) / (1 + len(null))
    return np.where(np.isnan(value) | np.isnan(null).any(axis=0), np.nan, p)


def q_values(p: Float[np.ndarray, " hypothesis"]) -> Float[np.ndarray, " hypothesis"]:
    """Benjamini-Hochberg q-values over the p-values that exist; NaN elsewhere."""
    q = np.full_like(p, np.nan)
    known = ~np.isnan(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known])
    return q
