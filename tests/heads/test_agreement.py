"""Agreement of detectors against scipy, by enumeration, and where it does not exist."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from workbench.errors import RequestError
from workbench.heads.agreement import agreement, membership, strengths


def tables(columns: dict[str, list[float]], better: dict[str, str] | None = None, width: int = 4):
    rows = [
        {"model": "m", "detector": name, "layer": i // width, "head": i % width, "value": value}
        for name, values in columns.items()
        for i, value in enumerate(values)
    ]
    chosen = dict.fromkeys(columns, "higher") | (better or {})
    return pd.DataFrame(rows), pd.DataFrame({"detector": list(chosen), "better": list(chosen.values())})


def pair(table, a, b, **where):
    rows = table[(table.detector_a == a) & (table.detector_b == b)]
    for name, value in where.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.fixture
def noise(seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=40)
    return {"a": a, "b": a + rng.normal(size=40), "ties": np.round(a).clip(0), "c": rng.normal(size=40)}


def test_correlations_are_scipys_with_ties_and_without_missing_heads(noise):
    noise["holes"] = np.where(np.arange(40) % 3 == 0, np.nan, noise["b"])
    noise["other_holes"] = np.where(np.arange(40) < 8, np.nan, noise["c"])
    found = agreement(*tables(noise), resamples=20).correlations
    assert len(found) == 15
    for row in found.itertuples():
        both = ~np.isnan(noise[row.detector_a]) & ~np.isnan(noise[row.detector_b])
        wanted = stats.spearmanr(noise[row.detector_a][both], noise[row.detector_b][both]).statistic
        assert row.rho == pytest.approx(wanted, abs=1e-12)
        assert row.heads == both.sum()
        assert row.low <= row.high


def test_intervals_are_those_of_a_bootstrap_over_heads(noise):
    """Against scipy's own bootstrap of the same statistic, with other draws."""
    row = pair(agreement(*tables(noise), resamples=999, seed=3).correlations, "a", "b")
    wanted = stats.bootstrap(
        (noise["a"], noise["b"]), lambda x, y: stats.spearmanr(x, y).statistic, paired=True, vectorized=False,
        n_resamples=999, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert row.low == pytest.approx(wanted.low, abs=0.06)
    assert row.high == pytest.approx(wanted.high, abs=0.06)


def test_the_side_that_says_most_is_the_high_one(noise):
    signs = np.where(np.arange(40) % 2, 1.0, -1.0)
    columns = {"a": noise["a"], "low": -noise["a"], "size": np.abs(noise["c"]), "either": noise["c"] * signs}
    found = agreement(*tables(columns, {"low": "lower", "either": "either"}), resamples=10)
    assert pair(found.correlations, "a", "low").rho == pytest.approx(1)
    assert pair(found.correlations, "size", "either").rho == pytest.approx(1)
    assert pair(found.overlaps, "a", "low", k=10).jaccard == pytest.approx(1)
    matrix = found.matrix()
    assert np.allclose(matrix, matrix.T) and np.allclose(np.diag(matrix), 1)
    assert matrix.loc["low", "a"] == pytest.approx(1)


def test_constant_and_empty_detectors_have_no_correlation(noise):
    columns = {"a": noise["a"], "flat": np.zeros(40), "none": np.full(40, np.nan)}
    found = agreement(*tables(columns), resamples=10)
    row = pair(found.correlations, "a", "flat")
    assert np.isnan([row.rho, row.low, row.high]).all()
    assert "none" not in set(found.correlations.detector_b)
    # All heads tie: each is a quarter in the top 10 of 40, which is what chance gives.
    over = pair(found.overlaps, "a", "flat", k=10)
    assert over.shared == pytest.approx(over.chance_shared) == pytest.approx(2.5)


def test_chance_overlap_by_enumeration():
    """Two sets of 2 among 5 heads: all 100 pairs of sets."""
    heads, k = 5, 2
    sets = [set(chosen) for chosen in combinations(range(heads), k)]
    shared = [len(a & b) for a in sets for b in sets]
    values = np.arange(5.0)
    row = agreement(*tables({"a": values, "b": values}), tops=(k,), resamples=2).overlaps.iloc[0]
    assert row.chance_shared == pytest.approx(np.mean(shared))
    assert row.chance_jaccard == pytest.approx(np.mean([n / (2 * k - n) for n in shared]))
    assert row.p == pytest.approx(np.mean(np.array(shared) >= 2))
    assert (row.shared, row.jaccard) == (2, 1)


def test_ties_at_the_boundary_are_shared_out():
    values = np.array([3.0, 2, 1, 1, 1, 0])
    assert membership(values, 3) == pytest.approx([1, 1, 1 / 3, 1 / 3, 1 / 3, 0])
    assert membership(values, 2) == pytest.approx([1, 1, 0, 0, 0, 0])
    # The expected overlap of two tops whose ties are broken at random, by enumeration.
    picks = [{0, 1, last} for last in (2, 3, 4)]
    expected = np.mean([len(a & b) for a in picks for b in picks])
    row = agreement(*tables({"a": values, "b": values}), tops=(3,), resamples=2).overlaps.iloc[0]
    assert row.shared == pytest.approx(expected)


def test_tops_fit_the_model(noise):
    assert set(agreement(*tables(noise), resamples=2).overlaps.k) == {5, 10, 20}
    small = {name: values[:6] for name, values in noise.items()}
    assert set(agreement(*tables(small), resamples=2).overlaps.k) == {1}


def test_what_cannot_be_compared_is_refused(noise):
    scores, detectors = tables(noise)
    with pytest.raises(RequestError, match="twice"):
        strengths(pd.concat([scores, scores.head(1)]), detectors)
    with pytest.raises(RequestError, match="no head scores"):
        agreement(scores.head(0), detectors)
    with pytest.raises(RequestError, match=r"tops=\(0,\)"):
        agreement(scores, detectors, tops=(0,))
