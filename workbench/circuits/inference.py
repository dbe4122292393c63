"""From per-prompt effects to claims: intervals of effects and of normalised recovery, and permutation p-values.

Prompts are the sample, changes the hypotheses; all changes share their resamples, so that intervals of one table can
be compared. A recovery is a ratio of means (effects over the gap between the clean and the corrupt run), never a mean
of ratios, and is never clipped: a negative head lies outside of [0, 1] for good reason.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES = 1999
# Sign flips are taken all, and not drawn, up to so many prompts.
EXACT_PROMPTS = 11
# A gap below this share of the metric's own size is no gap.
VANISHES = 1e-3


class Interval(NamedTuple):
    """A value and its 95 % percentile bootstrap interval over prompts; NaN bounds with a single prompt."""

    value: Float[np.ndarray, " change"]
    low: Float[np.ndarray, " change"]
    high: Float[np.ndarray, " change"]


def gap_refusal(clean: Float[np.ndarray, " prompt"], corrupt: Float[np.ndarray, " prompt"]) -> str:
    """Why recovery is not defined: the runs' means are too close to each other; empty where it is."""
    gap = float(clean.mean() - corrupt.mean())
    size = float(np.abs(np.concatenate([clean, corrupt])).mean())
    if np.isfinite(gap) and abs(gap) > VANISHES * size and gap != 0:
        return ""
    return (
        f"the clean and the corrupt run score alike ({clean.mean():.4g} and {corrupt.mean():.4g}), so that there is no "
        "gap to recover; choose another corruption or another metric"
    )


def gap_doubt(clean: Float[np.ndarray, " prompt"], corrupt: Float[np.ndarray, " prompt"], seed: int = 0) -> str:
    """Why shares of the gap say nothing about other prompts: its 95 % interval holds 0; empty where they do.

    They may then be of any size and either sign, and tables give effects in units of the metric alone.
    """
    gap = clean - corrupt
    if len(gap) < 2:
        return ""
    low, high = np.percentile(_resampled(len(gap), seed, RESAMPLES) @ gap, [2.5, 97.5])
    if not low <= 0 <= high:
        return ""
    return (
        f"the gap between the clean and the corrupt run, {gap.mean():.4g} [{low:.4g}, {high:.4g}] over {len(gap)} "
        "pairs, is not told from 0, so that no share of it is given; take more pairs, another corruption or metric"
    )


def recovery(
    effects: Float[np.ndarray, "change prompt"],
    clean: Float[np.ndarray, " prompt"],
    corrupt: Float[np.ndarray, " prompt"],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Mean effect over mean gap, both resampled together; NaN where the gap vanishes (see `gap_refusal`)."""
    gap = clean - corrupt
    if gap_refusal(clean, corrupt):
        nothing = np.full(len(effects), np.nan)
        return Interval(nothing, nothing, nothing)
    value = effects.mean(1) / gap.mean()
    if effects.shape[1] < 2:
        return Interval(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    weights = _resampled(effects.shape[1], seed, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = (effects @ weights.T) / (weights @ gap)
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=1)
    return Interval(value, low, high)


def mean_effect(effects: Float[np.ndarray, "change prompt"], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean over prompts, in units of the metric."""
    value = effects.mean(1)
    if effects.shape[1] < 2:
        return Interval(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    drawn = effects @ _resampled(effects.shape[1], seed, resamples).T
    low, high = np.percentile(drawn, [2.5, 97.5], axis=1)
    return Interval(value, low, high)


def sign_flip_p(
    effects: Float[np.ndarray, "change prompt"], seed: int = 0, resamples: int = RESAMPLES
) -> Float[np.ndarray, " change"]:
    """Two-sided permutation p-value: could prompt-wise effects be of either sign?

    All sign flips of up to 11 prompts, 1,999 drawn ones of more. NaN with one prompt; 1 where nothing changes.
    """
    prompts = effects.shape[1]
    if prompts < 2:
        return np.full(len(effects), np.nan)
    exact = prompts <= EXACT_PROMPTS
    if exact:
        bits = (np.arange(1 << prompts)[:, None] >> np.arange(prompts)) & 1
        signs = 1.0 - 2.0 * bits
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, prompts))
    observed = np.abs(effects.sum(1))
    extreme = np.zeros(len(effects))
    # Sums of the same numbers in another order differ in their last bits.
    threshold = observed * (1 - 1e-12)
    for rows in np.array_split(signs, max(1, len(signs) // 128)):
        extreme += (np.abs(effects @ rows.T) >= threshold[:, None]).sum(1)
    p = extreme / len(signs) if exact else (extreme + 1) / (len(signs) + 1)
    return np.where((effects == 0).all(1), 1.0, p)


def q_values(p: Float[np.ndarray, " change"]) -> Float[np.ndarray, " change"]:
    """Benjamini-Hochberg q-values over the p-values that exist; NaN elsewhere."""
    q, known = np.full_like(p, np.nan), ~np.isnan(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known])
    return q


def _resampled(prompts: int, seed: int, resamples: int) -> Float[np.ndarray, "resample prompt"]:
    """How much each prompt counts in each bootstrap sample."""
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return counts / prompts
