"""Intervals, recoveries and p-values against their definitions."""

from __future__ import annotations

import itertools

import numpy as np

from workbench.circuits.inference import gap_doubt, gap_refusal, mean_effect, q_values, recovery, sign_flip_p


def test_recovery_is_a_ratio_of_means_and_is_not_clipped() -> None:
    clean, corrupt = np.array([2.0, 4.0, 6.0]), np.array([0.0, 1.0, -1.0])
    effects = np.array([[2.0, 3.0, 7.0], [-4.0, -4.0, -4.0], [24.0, 0.0, 0.0]])
    found = recovery(effects, clean, corrupt)
    np.testing.assert_allclose(found.value, [1.0, -1.0, 2.0])
    np.testing.assert_allclose([found.low[0], found.high[0]], [1.0, 1.0])
    assert found.low[2] == 0
    assert found.high[2] > 3
    drawn = mean_effect(np.array([[0.0, 1.0] * 50]))
    np.testing.assert_allclose([drawn.low[0], drawn.high[0]], [0.4, 0.6], atol=0.02)


def test_a_vanishing_gap_is_refused_with_its_reason() -> None:
    clean, corrupt = np.array([5.0, -5.0]), np.array([-5.0, 5.0004])
    assert "score alike" in gap_refusal(clean, corrupt)
    assert np.isnan(recovery(np.ones((3, 2)), clean, corrupt).value).all()
    assert not gap_refusal(clean, np.array([-5.0, 4.0]))


def test_a_gap_that_may_be_of_either_sign_is_doubted() -> None:
    rng = np.random.default_rng(0)
    corrupt = rng.normal(0, 1, 16)
    clean = corrupt + rng.normal(0, 1, 16)
    clean += 0.01 - (clean - corrupt).mean()
    assert not gap_refusal(clean, corrupt)
    assert "0.01 [" in gap_doubt(clean, corrupt) and "not told from 0" in gap_doubt(clean, corrupt)
    assert not gap_doubt(clean + 5, corrupt) and not gap_doubt(clean[:1], corrupt[:1])


def test_sign_flips_are_all_taken_for_few_prompts() -> None:
    effects = np.array([[0.3, 0.2, 0.5, 0.1], [0.3, -0.2, 0.5, -0.1], [0.0, 0.0, 0.0, 0.0]])
    expected = []
    for row in effects:
        sums = [
            abs(sum(s * x for s, x in zip(signs, row, strict=True))) for signs in itertools.product((1, -1), repeat=4)
        ]
        expected.append(np.mean([total >= abs(row.sum()) - 1e-12 for total in sums]))
    np.testing.assert_allclose(sign_flip_p(effects), expected)
    assert sign_flip_p(effects)[2] == 1
    assert np.isnan(sign_flip_p(effects[:, :1])).all()
    many = np.stack([np.ones(30), np.where(np.arange(30) % 2, 1.0, -1.0)])
    p = sign_flip_p(many)
    assert p[0] == 1 / 2000
    assert p[1] == 1
    np.testing.assert_allclose(q_values(np.array([0.01, np.nan, 0.04])), [0.02, np.nan, 0.04])
