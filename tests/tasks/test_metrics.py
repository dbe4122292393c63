from __future__ import annotations

import pytest
import torch

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks import (
    METRICS,
    NEEDLE_RECALL,
    NONE,
    Task,
    accepted,
    needle_recall,
    read_answers,
    repeated_tokens,
)


@pytest.fixture
def task() -> Task:
    return Task(
        name="t",
        caption="two prompts",
        seed=0,
        batch=Batch.from_ids([[0, 1, 2, 3], [0, 3, 1]]),
        specials="nothing",
        answer_ids=torch.tensor([[2, 3], [1, NONE]]),
        answer_positions=torch.tensor([[1, 2], [1, NONE]]),
    )


@pytest.fixture
def logits() -> torch.Tensor:
    """Right on the first answer with probability 1/2 (the rest share the other half), wrong on the others."""
    found = torch.full((2, 4, 4), -50.0)
    found[0, 1] = torch.tensor([1 / 6, 1 / 6, 1 / 2, 1 / 6]).log()
    found[0, 2] = torch.tensor([0.9, 0.03, 0.03, 0.04]).log()
    found[1, 1] = torch.tensor([0.2, 0.3, 0.4, 0.1]).log()
    return found


def test_metrics_by_hand(task, logits):
    readings = read_answers(task, logits=logits)
    assert readings.predicted.tolist() == [[2, 0], [2, NONE]]
    loss = torch.tensor([-(torch.tensor([0.5, 0.04]).log().mean()), -torch.tensor(0.3).log()])
    for name, expected in {
        "induction_loss": loss,
        "held_out_loss": loss,
        "answer_log_probability": -loss,
        "copy_accuracy": torch.tensor([0.5, 0.0]),
        "answer_match": torch.tensor([0.5, 0.0]),
    }.items():
        torch.testing.assert_close(METRICS[name](readings), expected)


def test_all_rows_answer_rows_and_losses_give_the_same(task, logits):
    whole = read_answers(task, logits=logits)
    at_rows = logits.take_along_dim(task.logit_positions[..., None], dim=1)
    kept = read_answers(task, logits=at_rows)
    following = task.batch.ids[:, 1:, None]
    loss = -logits[:, :-1].log_softmax(-1).gather(2, following)[..., 0]
    loss[1, 2] = torch.nan
    from_loss = read_answers(task, loss=loss)
    for readings in (kept, from_loss):
        torch.testing.assert_close(readings.loss, whole.loss, equal_nan=True)
    assert torch.equal(kept.predicted, whole.predicted)
    assert bool((from_loss.predicted == NONE).all())
    with pytest.raises(RequestError, match="from logits"):
        METRICS["copy_accuracy"](from_loss)


def test_half_precision_logits_are_scored_in_float32(task, logits):
    readings = read_answers(task, logits=logits.bfloat16())
    assert readings.loss.dtype == torch.float32
    torch.testing.assert_close(readings.loss, read_answers(task, logits=logits).loss, atol=0.02, rtol=0, equal_nan=True)


def test_readings_of_another_shape_are_refused(task, logits):
    with pytest.raises(RequestError, match="either logits or loss"):
        read_answers(task)
    with pytest.raises(RequestError, match="either logits or loss"):
        read_answers(task, logits=logits, loss=torch.zeros(2, 4))
    with pytest.raises(RequestError, match="fit neither"):
        read_answers(task, logits=logits[:, :3])
    with pytest.raises(RequestError, match=r"loss has shape \(2, 4\)"):
        read_answers(task, loss=torch.zeros(2, 4))


def test_a_perfect_copier_scores_one_and_a_shifted_one_nothing():
    task = repeated_tokens(40, prompts=4, length=10, periods=(8, 12), bos_id=0)
    following = torch.nn.functional.one_hot(task.batch.ids.roll(-1, dims=1), 40).float() * 100
    perfect = read_answers(task, logits=following)
    assert METRICS["copy_accuracy"](perfect).tolist() == [1.0] * 4
    assert METRICS["induction_loss"](perfect).max() < 1e-6
    own = torch.nn.functional.one_hot(task.batch.ids, 40).float() * 100
    shifted = read_answers(task, logits=own)
    assert METRICS["copy_accuracy"](shifted).tolist() == [0.0] * 4
    assert METRICS["induction_loss"](shifted).min() > 50


def test_every_metric_says_its_unit_and_direction():
    assert set(METRICS) == {
        "induction_loss", "copy_accuracy", "held_out_loss", "answer_log_probability", "answer_match",
        "perplexity_prose", "perplexity_code",
    }  # fmt: skip
    for metric in [*METRICS.values(), NEEDLE_RECALL]:
        perplexity = metric.name.startswith("perplexity")
        assert metric.unit in (("perplexity",) if perplexity else ("nats per token", "share"))
        assert metric.better == ("lower" if perplexity or metric.name.endswith("loss") else "higher")


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("Seven copper owls!", 1.0),
        ("owls, COPPER ones", 2 / 3),
        ("copper copper copper", 1 / 3),
        ("", 0.0),
        ("a sevens owl", 0.0),
    ],
)
def test_recall_counts_words(generated, expected):
    assert needle_recall(generated, "seven copper owls") == pytest.approx(expected)


def test_repeated_words_must_be_recalled_as_often():
    assert needle_recall("the barrel", "the barrel in the market") == pytest.approx(2 / 5)


def test_the_gate_is_above_one_half():
    answers = ["one two"] * 3
    assert accepted(["one", "one two", "none"], answers).tolist() == [False, True, False]
    with pytest.raises(RequestError, match="2 generated texts for 3"):
        NEEDLE_RECALL(["a", "b"], answers)
    with pytest.raises(RequestError, match="no words"):
        needle_recall("x", "...")
