"""Pairs of heads: a model beside itself in another order, beside a deeper one, beside one that has nothing of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError, RunError
from workbench.runs import RunWriter
from workbench.runs.alignment import align, align_runs, profiles_of


def profiles(layers, heads, detectors=6, seed=0):
    index = pd.MultiIndex.from_product([range(layers), range(heads)], names=["layer", "head"])
    values = np.random.default_rng(seed).random((layers * heads, detectors))
    ranks = (values.argsort(0).argsort(0) + 0.5) / len(values)
    return pd.DataFrame(ranks, index=index, columns=[f"d{at}" for at in range(detectors)])


def test_heads_in_another_order_within_their_layers_are_found_again():
    a = profiles(6, 5)
    order = np.random.default_rng(1).permuted(np.tile(np.arange(5), (6, 1)), axis=1)
    b = a.copy()
    for layer in range(6):
        b.loc[[(layer, int(new)) for new in order[layer]]] = a.loc[[(layer, old) for old in range(5)]].to_numpy()
    found = align(a, b, window=0.1)
    assert found.alone == (0, 0) and found.distance < 1e-6 < 0.1 < found.null
    assert all(row.layer_a == row.layer_b and order[row.layer_a][row.head_a] == row.head_b
               for row in found.pairs.itertuples())  # fmt: skip
    assert (found.pairs["q"] < 0.05).all()
    np.testing.assert_allclose(found.held_out["rho"], 1)


def test_the_distance_is_the_root_mean_square_of_ranks():
    a, b = profiles(4, 3), profiles(4, 3, seed=2)
    for row in align(a, b, window=1).pairs.itertuples():
        difference = a.loc[(row.layer_a, row.head_a)] - b.loc[(row.layer_b, row.head_b)]
        assert row.distance == pytest.approx(np.sqrt((difference**2).mean()))


def test_no_pair_leaves_its_window_and_no_head_is_used_twice():
    a, b = profiles(4, 3), profiles(9, 4, seed=2)
    found = align(a, b, window=0.2)
    assert (found.pairs["depth_a"] - found.pairs["depth_b"]).abs().max() <= 0.2 + 1e-9
    for side in "ab":
        assert not found.pairs.duplicated([f"layer_{side}", f"head_{side}"]).any()
    assert len(found.pairs) == 12 and found.alone == (0, 24)


def test_unrelated_models_are_no_nearer_than_shuffled_ones():
    found = align(profiles(10, 8, 20), profiles(12, 8, 20, seed=3))
    assert (found.pairs["q"] < 0.05).mean() < 0.02
    assert found.distance == pytest.approx(found.null, rel=0.05)
    assert found.held_out["rho"].abs().mean() < 0.25


def test_what_cannot_be_aligned_is_refused(tmp_path):
    with pytest.raises(RequestError, match="profiles take at least 3"):
        align(profiles(2, 2, 2), profiles(2, 2, 2))
    with pytest.raises(RequestError, match="window=0"):
        align(profiles(2, 2), profiles(2, 2), window=0)
    with RunWriter.open(tmp_path / "run", kind="trace", title="T", fingerprint={}) as writer:
        run = writer.finish()
    with pytest.raises(RunError, match="no head scores to align by"):
        align_runs(run, run)


def test_profiles_are_ranks_turned_so_that_the_largest_says_most(tmp_path):
    rows = [(name, 0, head, value) for name, values in (("up", (1.0, 5.0, 3.0)), ("down", (1.0, 5.0, 3.0)),
                                                        ("flat", (1.0, 1.0, 1.0)), ("gone", (1.0, np.nan, 2.0)))
            for head, value in enumerate(values)]  # fmt: skip
    about = pd.DataFrame(
        {"detector": ["up", "down", "flat", "gone"], "better": ["higher", "lower", "higher", "higher"]}
    )
    with RunWriter.open(tmp_path / "run", kind="heads", title="T", fingerprint={}) as writer:
        writer.table("head_scores", pd.DataFrame(rows, columns=["detector", "layer", "head", "value"]))
        writer.table("detectors", about)
        found = profiles_of(writer.finish())
    assert list(found.columns) == ["up", "down"]
    np.testing.assert_allclose(found["up"], [1 / 6, 5 / 6, 1 / 2])
    np.testing.assert_allclose(found["down"], [5 / 6, 1 / 6, 1 / 2])
