"""Differences of two runs against closed forms, scipy, and runs made for the purpose."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from workbench.errors import RunError
from workbench.heads.detector import PromptScores
from workbench.runs import RunWriter, compare_runs
from workbench.runs.differences import between, from_intervals, paired, two_samples
from workbench.runs.samples import Samples, read_samples, write_samples


def test_few_prompts_have_their_sign_flips_counted_exactly():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.normal(0.4, 1, size=(7, 5))
    found = paired(a, b)
    for head in range(5):
        exact = stats.permutation_test(
            (b[:, head] - a[:, head],), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=np.inf,
            vectorized=True,
        )  # fmt: skip
        assert found.p[head] == pytest.approx(exact.pvalue)
    # All prompts the same way: two of the 2^7 flips are that far from zero.
    assert paired(np.zeros((7, 1)), np.full((7, 1), 0.3)).p[0] == pytest.approx(2 / 128)


def test_pairing_takes_out_what_prompts_share():
    rng = np.random.default_rng(1)
    prompts = rng.normal(0, 5, size=(40, 1))
    a = prompts + rng.normal(0, 0.1, size=(40, 3))
    b = a + np.array([0.0, 0.2, 0.0]) + rng.normal(0, 0.1, size=(40, 3))
    close, wide = paired(a, b), two_samples(a, b)
    assert close.p[1] < 0.01 < wide.p[1]
    difference = (b - a).mean(0)
    assert np.all((close.low < difference) & (difference < close.high))
    # The interval of a mean of 40 is near that of the normal distribution.
    half = 1.96 * (b - a).std(0, ddof=1) / np.sqrt(40)
    np.testing.assert_allclose((close.high - close.low) / 2, half, rtol=0.15)
    assert np.all(wide.high - wide.low > 10 * (close.high - close.low))


def test_equal_scores_do_not_differ_and_missing_ones_say_nothing():
    a = np.ones((20, 3))
    b = a.copy()
    a[3, 2] = np.nan
    for found in (paired(a, b), two_samples(a, b)):
        np.testing.assert_allclose(found.p[:2], 1)
        np.testing.assert_allclose(found.low[:2], 0)
        assert np.isnan([found.low[2], found.high[2], found.p[2]]).all()
    assert np.isnan(paired(a[:1], b[:1]).p).all() and np.isnan(two_samples(a[:1], b).p).all()


def test_false_alarms_are_as_rare_as_promised():
    rng = np.random.default_rng(2)
    for make in (paired, two_samples):
        p = make(rng.normal(size=(30, 600)), rng.normal(size=(30, 600))).p
        assert 0.02 < (p < 0.05).mean() < 0.09


def test_two_intervals_are_joined_as_normal_distributions():
    value, half = np.array([0.5, 0.2]), np.array([0.1, 0.05])
    other, wide = np.array([0.9, 0.2]), np.array([0.2, 0.1])
    found = from_intervals((value, value - half, value + half), (other, other - wide, other + wide))
    joint = np.sqrt(half**2 + wide**2)
    np.testing.assert_allclose(found.high - found.low, 2 * joint)
    np.testing.assert_allclose(found.p, [2 * stats.norm.sf(0.4 / (joint[0] / 1.959964)), 1], rtol=1e-5)


def test_a_contrast_compares_what_each_prompt_of_either_sample_changed():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 30, 1, 2))
    shift = np.array([0.0, 1.0])
    a = Samples(first, ("x",), second, 60)
    b = Samples(first + shift, ("x",), second, 60)
    method, found = between(a, b, (np.array([0, 0]), np.array([0, 1])))
    assert method == "paired" and found.p[0] == 1 and found.p[1] < 0.001
    np.testing.assert_allclose(found.low[1], 1)
    # On other prompts, a contrast has four samples: only its intervals are compared.
    assert between(a, Samples(first, ("y",), second, 60), (np.array([0]), np.array([0]))) is None


def share_of(hits, count):
    """One head's share of prompts with its bootstrap interval, which has no width for none or all."""
    value = hits / count
    half = 1.96 * np.sqrt(value * (1 - value) / count)
    return tuple(np.array([one]) for one in (value, value - half, value + half))


@pytest.mark.parametrize(("hits", "of"), [((83, 8), (100, 8)), ((8, 0), (8, 8)), ((0, 3), (100, 6)), ((8, 8), (8, 9))])
def test_all_or_none_of_few_prompts_is_no_certainty(hits, of):
    exact = stats.fisher_exact([[hits[0], of[0] - hits[0]], [hits[1], of[1] - hits[1]]]).pvalue
    a, b = (np.repeat([1.0, 0.0], [hit, count - hit])[:, None] for hit, count in zip(hits, of, strict=True))
    counts = tuple(np.array([float(count)]) for count in of)
    by_prompts = two_samples(a, b, share=True)
    by_intervals = from_intervals(share_of(hits[0], of[0]), share_of(hits[1], of[1]), counts, share=True)
    # Fisher's sums over likelihoods, not distances, so that the two differ a little where sizes do.
    assert by_prompts.p[0] == pytest.approx(exact, rel=0.1, abs=1e-3)
    assert by_intervals.p[0] >= exact * (1 - 1e-6)
    for found in (by_prompts, by_intervals):
        assert found.low[0] < (b.mean() - a.mean()) + 1e-12 and found.high[0] > found.low[0] + 0.05
        assert (found.p[0] < 0.05) == bool(found.low[0] > 0 or found.high[0] < 0)


def test_an_interval_without_width_that_is_no_share_tells_nothing():
    other, flat = share_of(83, 100), (np.ones(1),) * 3
    counts = np.array([100.0]), np.array([8.0])
    assert np.isnan(from_intervals(other, flat, counts).p[0])
    # Nor does one of how many prompts nobody knows, or a share that is neither 0 nor 1.
    assert np.isnan(from_intervals(other, flat, share=True).p[0])
    assert np.isnan(from_intervals(other, (np.full(1, 0.5),) * 3, counts, share=True).low[0])


def test_few_prompts_are_judged_by_students_distribution():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(5, 400)), rng.normal(size=(7, 400))
    half = [stats.norm.ppf(0.975) * one.std(0) / np.sqrt(len(one)) for one in (a, b)]
    sides = [(one.mean(0), one.mean(0) - width, one.mean(0) + width) for one, width in zip((a, b), half, strict=True)]
    found = from_intervals(*sides, (np.full(400, 5.0), np.full(400, 7.0)))
    welch = stats.ttest_ind(b, a, equal_var=False)
    np.testing.assert_allclose(found.p, welch.pvalue, rtol=1e-6)
    apart = (found.low > 0) | (found.high < 0)
    np.testing.assert_array_equal(apart, found.p < 0.05)


def test_interval_and_test_say_the_same():
    rng = np.random.default_rng(7)
    a, b = rng.random((6, 500)) < 0.4, rng.random((6, 500)) < 0.7
    for found in (paired(1.0 * a, 1.0 * b, share=True), two_samples(1.0 * a, 1.0 * b, share=True)):
        apart = (found.low > 0) | (found.high < 0)
        np.testing.assert_array_equal(apart, found.p < 0.05)
        assert (found.low >= -1).all() and (found.high <= 1).all()
    # Five prompts that all moved: the bootstrap is sure, the sign flips (2 / 2^5) are not.
    few = paired(np.zeros((5, 1)), np.ones((5, 1)))
    assert few.p[0] == pytest.approx(2 / 32) and few.low[0] <= 0


def run_of(path, values, prompts="same", left_out=0, second=None):
    """A run of one detector; `values` are `[prompt, layer, head]`."""

    class Prompts:
        hash = prompts

        def __len__(self):
            return len(values) + left_out

    heads = [(layer, head) for layer in range(values.shape[1]) for head in range(values.shape[2])]
    rows = [("sink", layer, head, values[:, layer, head].mean(), 0.0, 1.0) for layer, head in heads]
    with RunWriter.open(path, kind="heads", title="T", fingerprint={}) as writer:
        writer.table("head_scores", pd.DataFrame(rows, columns="detector layer head value low high".split()))
        write_samples(writer, "text", {"sink": PromptScores(values, values)}, [Prompts()])
        return writer.finish()


def test_runs_are_paired_only_on_the_same_prompts(tmp_path):
    rng = np.random.default_rng(4)
    values = rng.normal(size=(30, 2, 3))
    moved = values.copy()
    moved[:, 1, 2] += 0.5 + rng.normal(0, 0.05, 30)
    a = run_of(tmp_path / "a", values)
    np.testing.assert_allclose(read_samples(a)["sink"].values, values, atol=1e-6)
    found = compare_runs(a, run_of(tmp_path / "b", moved))
    assert set(found["method"]) == {"paired"} and "paired over the prompts" in found.attrs["notes"][-1]
    # Kind by kind: what other prompts a run has beside those of this detector does not matter.
    more = run_of(tmp_path / "more", moved)
    more.manifest["prompts"] = [{"name": "names", "sha256": "2"}]
    a.manifest["prompts"] = [{"name": "text", "sha256": "1"}]
    beside = compare_runs(a, more)
    assert set(beside["method"]) == {"paired"} and "1 in more only (names)" in beside.attrs["notes"][1]
    assert "measured on the same ones" in beside.attrs["notes"][1]
    told = found[found["q"] < 0.05]
    assert told[["layer", "head"]].to_numpy().tolist() == [[1, 2]]
    assert told["low"].item() < 0.5 < told["high"].item()
    others = compare_runs(a, run_of(tmp_path / "c", moved, prompts="others"))
    assert set(others["method"]) == {"samples"} and not (others["q"] < 0.05).all()
    assert "The prompts of sink are not the same in both" in others.attrs["notes"][-1]
    # As many rows, but of which prompts nobody knows.
    unknown = compare_runs(a, run_of(tmp_path / "d", moved, left_out=1))
    assert set(unknown["method"]) == {"samples"}
    assert "some have no score" in unknown.attrs["notes"][-1]


def trace_run(path, means, array=None, **settings):
    rows = [("entropy", layer, head, float(means[layer, head])) for layer, head in np.ndindex(means.shape)]
    with RunWriter.open(path, kind="trace", title="T", fingerprint={}) as writer:
        writer.table("statistic_means", pd.DataFrame(rows, columns="statistic layer head mean".split()))
        if array is not None:
            dims = ("prompt", "layer", "head", "query")
            writer.array("statistics", xr.Dataset({"entropy": (dims, array.astype(np.float32))}))
        writer.manifest["settings"] = settings
        writer.manifest["prompts"] = [{"name": "text", "sha256": "1"}]
        return writer.finish()


def test_traces_are_compared_by_their_statistics(tmp_path):
    means = np.array([[1.0, 2.0], [3.0, 4.0]])
    a = trace_run(tmp_path / "a", means)
    b = trace_run(tmp_path / "b", means + 0.5, ablate={"heads": ["L0H1"], "how": "zero"})
    found = compare_runs(a, b)
    np.testing.assert_allclose(found["difference"], 0.5)
    assert found[["low", "high", "p", "q"]].isna().all(axis=None) and set(found["method"]) == {"none"}
    notes = " ".join(found.attrs["notes"])
    assert "one text has no interval" in notes and "B is without L0H1 (zero ablation)" in notes


def test_head_scores_and_a_trace_are_not_compared(tmp_path):
    a = trace_run(tmp_path / "a", np.zeros((2, 3)))
    with pytest.raises(RunError, match="compare two of a kind"):
        compare_runs(a, run_of(tmp_path / "b", np.zeros((4, 2, 3))))


def test_traces_over_several_prompts_have_intervals(tmp_path):
    rng = np.random.default_rng(5)
    array = rng.normal(size=(12, 2, 2, 9))
    array[:, :, :, 0] = np.nan  # padding
    other = array + np.array([[0.0, 0.0], [0.0, 0.4]])[None, :, :, None]
    means = [np.nanmean(one, (0, 3)) for one in (array, other)]
    runs = [trace_run(tmp_path / name, mean, one) for name, mean, one in zip("ab", means, (array, other), strict=True)]
    found = compare_runs(*runs).set_index(["layer", "head"])
    assert set(found["method"]) == {"paired"}
    assert found.loc[(1, 1), "q"] < 0.01 and found.loc[(0, 0), "p"] == 1
    np.testing.assert_allclose(found.loc[(1, 1), ["low", "high"]].astype(float), 0.4, atol=1e-5)
