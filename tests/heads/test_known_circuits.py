"""Detectors and ablations on models whose circuit is known: written by hand, and trained."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.heads import Claim, build_probe, detect, verify
from workbench.heads.verification import Ablator, verify_claim
from workbench.models import Head

REPEATED = ["previous_token", "duplicate_token", "induction", "echo"]


def value(scores, detector, head):
    rows = scores.table.query("detector == @detector and layer == @head[0] and head == @head[1]")
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.fixture(scope="module")
def by_hand(handwritten, handwritten_settings):
    return detect(handwritten, REPEATED, settings=handwritten_settings)


@pytest.fixture(scope="module")
def by_training(toy, toy_settings):
    return detect(toy, REPEATED, settings=toy_settings)


def test_handwritten_heads_score_one(by_hand):
    """circuits.md 10.5: previous-token score 1 in layer 0, induction score 1 in layer 1, nothing else anywhere."""
    previous, induction = value(by_hand, "previous_token", Head(0, 0)), value(by_hand, "induction", Head(1, 0))
    assert previous.value == pytest.approx(1.0, abs=1e-6) and induction.value == pytest.approx(1.0, abs=1e-6)
    assert value(by_hand, "previous_token", Head(1, 0)).value < 0.1
    assert value(by_hand, "induction", Head(0, 0)).value < 0.05
    assert max(value(by_hand, "duplicate_token", Head(layer, 0)).value for layer in (0, 1)) < 0.05
    assert induction.null < 0.05 and induction.low > 0.99 and induction.p <= 1 / 2**6 + 1e-9


def test_handwritten_model_fails_without_its_previous_token_head(handwritten, handwritten_probes):
    probe = build_probe("induction", handwritten, handwritten_probes)
    ablator = Ablator("zero")
    intact, without = probe.measure(handwritten), probe.measure(handwritten, [ablator([Head(0, 0)])])
    assert intact["copy_accuracy"].min() == 1.0
    assert without["copy_accuracy"].mean() < 0.15


def test_trained_toy_has_one_previous_token_head_and_several_induction_heads(by_training):
    """circuits.md 10.2: scores of about .36 and .5 at convergence, in layers 0 and 1; redundancy in layer 1."""
    previous = by_training.top("previous_token", 1)[0]
    assert previous.layer == 0 and 0.15 < value(by_training, "previous_token", previous).value < 0.6
    induction = [value(by_training, "induction", Head(1, head)).value for head in range(4)]
    assert min(induction) > 0.3
    assert max(value(by_training, "induction", Head(0, head)).value for head in range(4)) < 0.1


def test_trained_toy_breaks_without_its_previous_token_head_and_not_without_one_induction_head(
    toy, toy_probes, by_training
):
    probe = build_probe("induction", toy, toy_probes)
    intact = probe.measure(toy)["copy_accuracy"].mean()
    previous = by_training.top("previous_token", 1)

    def accuracy(heads):
        return probe.measure(toy, [Ablator("zero")(heads)])["copy_accuracy"].mean()

    assert intact > 0.98
    assert accuracy(previous) < 0.8
    assert min(accuracy([Head(1, head)]) for head in range(4)) > intact - 0.03
    assert accuracy([Head(1, head) for head in range(4)]) < 0.2


def test_verification_of_a_true_and_of_a_false_claim(toy, toy_probes, by_training):
    """The previous-token head beats every matched control; a head of no consequence does not."""
    probe, ablator = build_probe("induction", toy, toy_probes), Ablator("zero")
    true = verify_claim(toy, Claim("previous_token", tuple(by_training.top("previous_token", 1)), probe), ablator)
    row = true.table.set_index("metric").loc["copy_accuracy"]
    assert row.effect < -0.15 and row.high < row.control_low and row.beaten == 10 and row.p < 0.01
    assert len(true.draws) == 20 and (true.draws.groupby("metric").size() == 10).all()
    false = verify_claim(toy, Claim("induction", (Head(1, 0),), probe), ablator)
    row = false.table.set_index("metric").loc["copy_accuracy"]
    assert abs(row.effect) < 0.03


def test_verify_takes_names_and_has_its_own_reference(toy, toy_probes):
    probe = build_probe("induction", toy, toy_probes)
    for how in ("mean", "resample", "uniform", "to_sink"):
        found = verify(toy, ["L1H0", "L1H1"], probe=probe, how=how)
        assert found.table["how"].tolist() == [how] * 2 and np.isfinite(found.table["effect"]).all()
