"""Whether detectors name the same heads: rank correlations over all heads, overlaps of their top heads.

1. Scores are turned so that a high one says most (the lowest entropy, the largest contrast of either sign).
2. Spearman's correlation of each pair of detectors over the heads that both score; its 95 % interval resamples
   heads, the same ones for all pairs.
3. For several k, how many of their top k heads two detectors share, as a count and as Jaccard's index, beside what
   two random sets of k heads share. Where heads are tied at the k-th place, each counts with its share of the places
   left, so that no order among equals is made up.

Heads of one layer read the same residual and are no independent sample, so that intervals and p-values here are
narrower than those of a sample of models would be; they say how much rests on a few heads. Two detectors that measure
the same thing on the same prompts agree by construction: agreement is no second evidence.

Cost: one ranking of the heads a resample, about 5 ms for 300 heads and 60 detectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from workbench.errors import RequestError
from workbench.heads.inference import q_values

RESAMPLES = 999
TOPS = (5, 10, 20, 50)
LEAST_HEADS = 4


@dataclass(frozen=True)
class Agreement:
    """`correlations`: detector_a, detector_b, rho, low, high, heads (both scored), NaN where one is constant.
    `overlaps`: detector_a, detector_b, k, shared, jaccard, chance_shared, chance_jaccard, heads, p, q (over the pairs
    of one k). Each pair once, in the order of the detectors.
    """

    correlations: pd.DataFrame
    overlaps: pd.DataFrame

    def matrix(self) -> pd.DataFrame:
        """Rank correlations, every detector by every detector, 1 on the diagonal."""
        return square(self.correlations)


def square(correlations: pd.DataFrame) -> pd.DataFrame:
    """The pairs of a table of correlations as a symmetric matrix."""
    names = list(dict.fromkeys([*correlations["detector_a"], *correlations["detector_b"]]))
    place = {name: index for index, name in enumerate(names)}
    values = np.eye(len(names))
    a, b = (correlations[side].map(place).to_numpy(dtype=int) for side in ("detector_a", "detector_b"))
    values[a, b] = values[b, a] = correlations["rho"].to_numpy(dtype=float)
    return pd.DataFrame(values, index=names, columns=names)


def strengths(scores: pd.DataFrame, detectors: pd.DataFrame) -> pd.DataFrame:
    """Heads by detectors, each score turned so that the largest says most; NaN where a detector has no score.

    `scores` and `detectors` are the tables of `HeadScores`. The index is (layer, head). Detectors without any value
    are left out.
    """
    if scores.empty:
        raise RequestError("There are no head scores to compare; run detectors first.")
    better: Mapping[str, str] = dict(zip(detectors["detector"], detectors["better"], strict=True))
    twice = scores[scores.duplicated(["detector", "layer", "head"])]
    if len(twice):
        row = twice.iloc[0]
        raise RequestError(f"{row['detector']!r} scores L{row['layer']}H{row['head']} twice; give one run's scores.")
    order = list(dict.fromkeys(scores["detector"]))
    wide = scores.pivot(index=["layer", "head"], columns="detector", values="value")[order].astype(float)
    turned = wide.apply(lambda column: _turned(column, better.get(str(column.name), "higher")))
    return turned.loc[:, turned.notna().any()]


def _turned(values: pd.Series, better: str) -> pd.Series:
    if better == "lower":
        return -values
    return values.abs() if better == "either" else values


def agreement(
    scores: pd.DataFrame,
    detectors: pd.DataFrame,
    *,
    tops: Sequence[int] = TOPS,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Agreement:
    """Correlations and overlaps of all pairs of detectors, from the tables of `HeadScores`."""
    if any(k < 1 for k in tops):
        raise RequestError(f"tops={tuple(tops)}: ask for at least one head.")
    wide = strengths(scores, detectors)
    return Agreement(_correlations(wide, seed, resamples), _overlaps(wide, fitting(tops, len(wide))))


def fitting(tops: Sequence[int], heads: int) -> tuple[int, ...]:
    """Those tops that leave more heads out than in; a quarter of the heads where none does."""
    return tuple(k for k in sorted(set(tops)) if 2 * k <= heads) or (max(1, heads // 4),)


def _pairs(names: Sequence[object]) -> Iterator[tuple[int, int]]:
    return ((a, b) for a in range(len(names)) for b in range(a + 1, len(names)))


def _correlations(wide: pd.DataFrame, seed: int, resamples: int) -> pd.DataFrame:
    values = wide.to_numpy(dtype=float)
    names, rng = list(wide.columns), np.random.default_rng(seed)
    rho = _spearman(values)
    drawn = np.empty((resamples, *rho.shape))
    for index in range(resamples):
        drawn[index] = _spearman(values[rng.integers(len(values), size=len(values))])
    known = ~np.isnan(values)
    rows = []
    for a, b in _pairs(names):
        own = drawn[:, a, b][~np.isnan(drawn[:, a, b])]
        # A detector that is constant in most resamples has no interval to speak of.
        settled = np.isfinite(rho[a, b]) and 2 * len(own) > resamples
        low, high = np.percentile(own, [2.5, 97.5]) if settled else (np.nan, np.nan)
        heads = int((known[:, a] & known[:, b]).sum())
        rows.append((str(names[a]), str(names[b]), rho[a, b], low, high, heads))
    return pd.DataFrame(rows, columns=["detector_a", "detector_b", "rho", "low", "high", "heads"])


def _spearman(values: Float[np.ndarray, "head detector"]) -> Float[np.ndarray, "detector detector"]:
    """Rank correlations of the columns, ties ranked in the middle; each pair over the heads that both have.

    Detectors that score the same heads are ranked together.
    """
    patterns, group = np.unique(~np.isnan(values), axis=1, return_inverse=True)
    columns = [np.flatnonzero(group.ravel() == one) for one in range(patterns.shape[1])]
    found = np.full((values.shape[1], values.shape[1]), np.nan)
    for first, second in combinations_with_replacement(range(len(columns)), 2):
        heads = patterns[:, first] & patterns[:, second]
        if heads.sum() < LEAST_HEADS:
            continue
        a, b = (_unit_ranks(values[np.ix_(heads, columns[one])]) for one in (first, second))
        part = np.clip(a.T @ b, -1, 1)
        found[np.ix_(columns[first], columns[second])] = part
        found[np.ix_(columns[second], columns[first])] = part.T
    return found


def _unit_ranks(values: Float[np.ndarray, "head detector"]) -> Float[np.ndarray, "head detector"]:
    """Ranks less their mean, of length one; NaN where all are equal."""
    ranks = stats.rankdata(values, axis=0)
    ranks -= ranks.mean(axis=0)
    length = np.sqrt((ranks**2).sum(axis=0))
    return np.asarray(ranks / np.where(length > 0, length, np.nan))


def _overlaps(wide: pd.DataFrame, tops: Sequence[int]) -> pd.DataFrame:
    values, names = wide.to_numpy(dtype=float), list(wide.columns)
    known = ~np.isnan(values)
    rows = []
    for k in tops:
        for a, b in _pairs(names):
            both = known[:, a] & known[:, b]
            heads = int(both.sum())
            if 2 * k > heads:
                continue
            shared = float((membership(values[both, a], k) * membership(values[both, b], k)).sum())
            rows.append((str(names[a]), str(names[b]), k, shared, shared / (2 * k - shared), *_chance(heads, k), heads))
    columns = ["detector_a", "detector_b", "k", "shared", "jaccard", "chance_shared", "chance_jaccard", "heads"]
    table = pd.DataFrame(rows, columns=columns)
    # A count in shares is not above chance unless its whole part is.
    whole = np.floor(table["shared"].to_numpy(dtype=float) + 1e-9)
    table["p"] = stats.hypergeom.sf(whole - 1, table["heads"], table["k"], table["k"])
    table["q"] = np.nan
    for k in tops:
        rows_of = table["k"] == k
        table.loc[rows_of, "q"] = q_values(table.loc[rows_of, "p"].to_numpy(dtype=float))
    return table


def membership(values: Float[np.ndarray, " head"], k: int) -> Float[np.ndarray, " head"]:
    """How far each head belongs to the top k: 1 above the k-th value, a share of the places left at it, 0 below.

    The shares sum to k. Among equals at the boundary each has the same chance of a place.
    """
    bar = np.partition(values, len(values) - k)[len(values) - k]
    above, level = values > bar, values == bar
    return np.asarray(above + level * ((k - above.sum()) / level.sum()))


def _chance(heads: int, k: int) -> tuple[float, float]:
    """What two random sets of k heads share on average: a count, and Jaccard's index."""
    counts = np.arange(k + 1)
    weights = stats.hypergeom.pmf(counts, heads, k, k)
    return k * k / heads, float((weights * counts / (2 * k - counts)).sum())
