"""Intervals and p-values against closed forms and exact enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from workbench.heads.inference import bootstrap_difference, bootstrap_mean, drawn_p, paired_p, q_values, unpaired_p


def test_bootstrap_interval_is_that_of_the_normal_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 2))
    value, low, high = bootstrap_mean(values, seed=0)
    half = 1.96 * values.std(axis=0, ddof=1) / 20
    np.testing.assert_allclose(value, values.mean(axis=0))
    np.testing.assert_allclose(low, value - half, atol=0.04)
    np.testing.assert_allclose(high, value + half, atol=0.04)


def test_one_prompt_gives_no_interval():
    value, low, high = bootstrap_mean(np.array([[0.5, 1.0]]), seed=0)
    assert value.tolist() == [0.5, 1.0] and np.isnan(low).all() and np.isnan(high).all()


def test_difference_of_two_samples():
    rng = np.random.default_rng(2)
    a, b = rng.normal(1, 1, (300, 1)), rng.normal(0, 1, (200, 1))
    value, low, high = bootstrap_difference(a, b, seed=0)
    half = 1.96 * np.sqrt(a.var(ddof=1) / 300 + b.var(ddof=1) / 200)
    np.testing.assert_allclose([low[0], high[0]], [value[0] - half, value[0] + half], atol=0.04)


@pytest.mark.parametrize("better", ["higher", "lower", "either"])
def test_paired_p_equals_enumeration_of_all_signs(better):
    difference = np.array([0.3, -0.1, 0.5, 0.2, -0.4, 0.7])
    means = np.array([(difference * signs).mean() for signs in itertools.product([1, -1], repeat=6)])
    upper = np.mean(means >= difference.mean() - 1e-12)
    lower = np.mean(means <= difference.mean() + 1e-12)
    truth = {"higher": upper, "lower": lower, "either": min(1.0, 2 * min(upper, lower))}[better]
    found = paired_p(difference[:, None] + 1, np.ones((6, 1)), better, seed=0)
    np.testing.assert_allclose(found, [truth], atol=1e-9)


def test_equal_to_the_null_is_no_evidence():
    values = np.ones((5, 2))
    assert paired_p(values, values, "higher", seed=0).tolist() == [1.0, 1.0]
    assert np.isnan(paired_p(values[:1], values[:1], "higher", seed=0)).all()


def test_p_values_of_true_nulls_are_uniform():
    rng = np.random.default_rng(3)
    p = paired_p(rng.normal(size=(30, 400)), rng.normal(size=(30, 400)), "higher", seed=0)
    assert abs(np.mean(p < 0.1) - 0.1) < 0.045 and abs(np.mean(p < 0.5) - 0.5) < 0.08
    q = unpaired_p(rng.normal(size=(20, 200)), rng.normal(size=(25, 200)), seed=0)
    assert abs(np.mean(q < 0.2) - 0.2) < 0.085


def test_q_values_follow_benjamini_and_hochberg_and_skip_gaps():
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.5])
    np.testing.assert_allclose(q_values(p), [0.04, np.nan, 0.16 / 3, 0.16 / 3, 0.5])


@pytest.mark.parametrize("better", ["higher", "lower", "either"])
def test_nothing_is_claimed_of_what_is_unknown(better):
    value = np.array([3.0, np.nan, 3.0, 3.0])
    null = np.zeros((4, 4))
    null[1, 2] = np.nan
    known = 1.0 if better == "lower" else 0.2
    np.testing.assert_array_equal(drawn_p(value, null, better), [known, np.nan, np.nan, known])
    values = np.random.default_rng(0).normal(5, 1, (8, 3))
    values[2, 1] = np.nan
    assert np.isnan(paired_p(values, np.zeros((8, 3)), better, seed=0)).tolist() == [False, True, False]
    assert np.isnan(unpaired_p(values, np.zeros((8, 3)), seed=0)).tolist() == [False, True, False]
