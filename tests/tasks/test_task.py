from __future__ import annotations

import dataclasses

import pytest
import torch

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks import NONE, Task


def make(**changes: object) -> Task:
    batch = Batch.from_ids([[5, 6, 7, 8], [5, 6, 9]])
    parts: dict[str, object] = {
        "name": "t",
        "caption": "two prompts",
        "seed": 0,
        "batch": batch,
        "specials": "nothing",
        "answer_ids": torch.tensor([[7, 8], [9, NONE]]),
        "answer_positions": torch.tensor([[1, 2], [1, NONE]]),
        "spans": {"middle": torch.tensor([[1, 3], [0, 2]])},
        "keys": {"own": torch.zeros(2, 4, 1, dtype=torch.long)},
        "settings": {"length": 4},
        "info": ({"a": 1}, {"a": 2}),
    }
    return Task(**{**parts, **changes})  # type: ignore[arg-type]


def test_answers_are_counted_and_spans_become_masks():
    task = make()
    assert len(task) == 2
    assert task.n_answers.tolist() == [2, 1]
    assert task.logit_positions.tolist() == [[1, 2], [1, 0]]
    assert task.columns("middle").tolist() == [[False, True, True, False], [True, True, False, False]]
    with pytest.raises(RequestError, match="no span 'end'; it has middle"):
        task.columns("end")


@pytest.mark.parametrize(
    ("ids", "positions", "message"),
    [
        # The token's own column in place of the row before it: the most common error of all.
        ([[7, 8], [9, NONE]], [[2, 3], [2, NONE]], "both an id and the row"),
        ([[7, NONE], [9, NONE]], [[2, NONE], [2, NONE]], "differ from the tokens behind"),
        ([[7, 8], [9, 9]], [[1, 2], [1, NONE]], "both an id and the row"),
    ],
)
def test_answers_that_do_not_follow_their_rows_are_refused(ids, positions, message):
    with pytest.raises(RequestError, match=message):
        make(answer_ids=torch.tensor(ids), answer_positions=torch.tensor(positions))


def test_answers_for_another_number_of_prompts_are_refused():
    with pytest.raises(RequestError, match="2 prompts"):
        make(answer_ids=torch.tensor([[7]]), answer_positions=torch.tensor([[1]]), spans={}, keys={})


def test_the_hash_covers_every_label_and_nothing_else():
    task = make()
    assert task.hash == make().hash
    assert task.hash == dataclasses.replace(task, caption="said otherwise").hash
    for changes in (
        {"seed": 1},
        {"specials": "start token"},
        {"settings": {"length": 5}},
        {"info": ({"a": 1}, {"a": 3})},
        {"spans": {"middle": torch.tensor([[1, 3], [0, 3]])}},
        {"spans": {"other": torch.tensor([[1, 3], [0, 2]])}},
        {"keys": {"own": torch.ones(2, 4, 1, dtype=torch.long)}},
        {"answer_keys": torch.tensor([[0, 0], [0, 0]])},
        {"answers": ("x", "y")},
        {"decoding": Batch.from_ids([[5], [5]])},
        {"answer_ids": torch.tensor([[7], [9]]), "answer_positions": torch.tensor([[1], [1]])},
    ):
        assert make(**changes).hash != task.hash, changes
