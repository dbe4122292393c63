from __future__ import annotations

import pytest
import torch

from workbench.dynamics import InductionSettings, repeat_accuracy, repeated_segments, train_induction
from workbench.errors import RequestError

LAYER_0 = [(0, head) for head in range(4)]
LAYER_1 = [(1, head) for head in range(4)]


def test_segments_are_distinct_and_repeat_with_their_own_period():
    drawn = repeated_segments(300, torch.Generator().manual_seed(0))
    assert drawn.ids.shape == (300, 64)
    assert set(drawn.periods.tolist()) == set(range(10, 33))
    for row, period in zip(drawn.ids.tolist(), drawn.periods.tolist(), strict=True):
        assert row[0] == 0
        assert len(set(row[1 : 1 + period])) == period
        assert all(1 <= token <= 64 for token in row[1:])
        assert all(row[at] == row[at - period] for at in range(1 + period, 64))
    assert drawn.predictable.sum(1).tolist() == [62 - period for period in drawn.periods.tolist()]


@pytest.mark.parametrize("periods", [(0, 5), (9, 8), (10, 63), (10, 70)])
def test_periods_that_do_not_fit_are_refused(periods):
    with pytest.raises(RequestError, match="do not fit"):
        repeated_segments(1, torch.Generator(), periods=periods)


def test_training_is_reproducible_and_leaves_global_randomness_alone():
    settings = InductionSettings(steps=4, batch=8, check_every=2, evaluation_sequences=4)
    before = torch.get_rng_state()
    calls = []
    first = train_induction(settings=settings, progress=calls.append)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    second = train_induction(settings=settings)
    assert first.history == second.history == tuple(calls)
    assert [at.step for at in calls] == [2, 4]
    other = train_induction(settings=InductionSettings(**{**vars(settings), "seed": 1}))
    assert other.history != first.history


def test_impossible_settings_are_refused():
    with pytest.raises(RequestError, match="steps=0"):
        train_induction(steps=0)


def test_training_reaches_the_published_accuracy(trained):
    assert trained.steps <= 1000
    assert trained.accuracy >= 0.98
    # A sudden rise after a plateau: nothing is learnt about copying in the first 200 steps.
    early = [at.accuracy for at in trained.history if at.step <= 200]
    assert max(early) < 0.1
    assert trained.history[0].loss > trained.history[-1].loss


def test_heads_score_as_published(trained, sequences, measure_patterns):
    found = measure_patterns(trained.model, sequences.ids)
    query = torch.arange(1, 64)
    previous = found[..., query, query - 1].mean(dim=(1, 3))
    later = torch.arange(64) > sequences.periods[:, None]
    key = (torch.arange(64) - sequences.periods[:, None] + 1).clamp(min=0)
    on_key = found.gather(4, key[None, :, None, :, None].expand(2, -1, 4, -1, 1))[..., 0]
    induction = (on_key * later[None, :, None]).sum(dim=(1, 3)) / later.sum()
    assert 0.25 <= float(previous[0].max()) <= 0.4
    assert float(previous[1].max()) < 0.05
    assert float(induction[0].max()) < 0.05
    assert float(induction[1].min()) > 0.35
    assert float(induction[1].max()) < 0.65


def test_one_previous_token_head_carries_the_model_and_induction_heads_are_redundant(
    trained, sequences, measure_patterns, zero_heads
):
    model = trained.model

    def accuracy(heads: list[tuple[int, int]]) -> float:
        with zero_heads(model, heads):
            return repeat_accuracy(model, sequences)

    query = torch.arange(1, 64)
    previous = measure_patterns(model, sequences.ids)[0][..., query, query - 1].mean(dim=(0, 2))
    carrier = int(previous.argmax())
    assert accuracy([]) >= 0.98
    assert accuracy([(0, carrier)]) < 0.8
    for head in range(4):
        if head != carrier:
            assert accuracy([(0, head)]) > accuracy([(0, carrier)]) + 0.1
        assert accuracy([(1, head)]) >= 0.98
    assert accuracy(LAYER_1) < 0.2
    assert accuracy(LAYER_0) < 0.2
