from __future__ import annotations

import pytest
import torch

from workbench.errors import RequestError
from workbench.tasks import NONE, repeated_tokens


def brute_force(task, first: int) -> dict[str, list[list[set[int]]]]:
    """Keys by comparing tokens: they are distinct within a copy, so equal tokens are earlier occurrences."""
    rows = task.batch.ids.tolist()
    duplicate = [
        [{j for j in range(first, i) if row[j] == row[i]} if i >= first else set() for i in range(len(row))]
        for row in rows
    ]
    induction = [[{j + 1 for j in keys} for keys in row] for row in duplicate]
    return {"duplicate": duplicate, "induction": induction}


CASES = [
    {"prompts": 3, "length": 12, "copies": 2},
    {"prompts": 2, "length": 9, "copies": 4},
    {"prompts": 5, "length": 16, "copies": 2, "periods": (8, 20)},
    {"prompts": 3, "length": 12, "copies": 2, "bos": False},
    {"prompts": 20, "length": 6, "copies": 2},
    {"prompts": 20, "length": 4, "copies": 3},
]


@pytest.mark.parametrize("case", CASES)
def test_keys_are_the_earlier_occurrences_and_their_successors(case):
    task = repeated_tokens(60, bos_id=7, seed=3, **case)
    first = 0 if case.get("bos") is False else 1
    assert task.batch.ids.shape == (case["prompts"], case["length"] * case["copies"] + first)
    assert not task.batch.padded
    expected = brute_force(task, first)
    for name in ("duplicate", "induction"):
        found = [[{key for key in keys if key != NONE} for keys in row] for row in task.keys[name].tolist()]
        assert found == expected[name]
    assert ((task.batch.ids == 7).sum(1) == first).all()


@pytest.mark.parametrize("case", CASES)
def test_null_keys_are_near_and_never_right(case):
    task = repeated_tokens(60, bos_id=7, seed=3, **case)
    first = 0 if case.get("bos") is False else 1
    duplicate, null = task.keys["duplicate"], task.keys["null"]
    there = duplicate != NONE
    assert torch.equal(null != NONE, there)
    query = torch.arange(null.shape[1])[None, :, None].expand_as(null)
    period = torch.tensor([one["period"] for one in task.info])[:, None, None].expand_as(null)
    assert (null >= first)[there].all()
    assert (null < query - 1)[there].all()
    assert ((null - duplicate).abs() <= (period // 4).clamp(min=2))[there].all()
    for name in ("duplicate", "induction"):
        assert not (null[..., :, None] == task.keys[name][..., None, :])[there].any()
    # No systematic shift towards or away from the query, where there is room on both sides.
    free = there & (duplicate >= first + period // 4)
    shift = (null - duplicate)[free].float()
    assert abs(float(shift.mean())) < 0.35 * float(shift.abs().mean())


def test_nearest_keys_come_first():
    task = repeated_tokens(60, prompts=1, length=9, copies=4, bos_id=0)
    assert task.keys["duplicate"][0, -1].tolist() == [27, 18, 9]
    assert task.keys["induction"][0, -1].tolist() == [28, 19, 10]


@pytest.mark.parametrize("case", CASES)
def test_answers_are_what_the_first_copy_foretells(case):
    task = repeated_tokens(60, bos_id=7, seed=3, **case)
    first = 0 if case.get("bos") is False else 1
    for prompt, row in enumerate(task.batch.ids.tolist()):
        period = task.info[prompt]["period"]
        rows = [at for at in task.answer_positions[prompt].tolist() if at != NONE]
        assert rows == list(range(first + period, len(row) - 1))
        assert all(row[at + 1] == row[at + 1 - period] for at in rows)
    spans = task.spans
    assert torch.equal(spans["first_copy"][:, 1], spans["repeats"][:, 0])
    assert (spans["first_copy"][:, 0] == first).all()


def test_special_tokens_occur_at_the_start_alone(bare):
    task = repeated_tokens(bare, prompts=30, length=50)
    assert (task.batch.ids[:, 0] == bare.bos_token_id).all()
    assert int(task.batch.ids[:, 1:].min()) > 3
    assert "<s>" in task.specials
    assert "<s>" in task.caption
    assert (repeated_tokens(bare, bos=False).batch.ids > 3).all()


def test_the_seed_decides_everything(bare):
    assert repeated_tokens(bare, seed=1).hash == repeated_tokens(bare, seed=1).hash
    assert repeated_tokens(bare, seed=1).hash != repeated_tokens(bare, seed=2).hash


def test_periods_differ_between_prompts():
    task = repeated_tokens(100, prompts=40, length=20, periods=(10, 25), bos_id=0)
    periods = [one["period"] for one in task.info]
    assert set(periods) <= set(range(10, 26))
    assert len(set(periods)) > 8
    assert task.n_answers.tolist() == [39 - period for period in periods]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": 60}, "name the start token"),
        ({"tokenizer": 60, "bos_id": 60}, "name the start token"),
        ({"tokenizer": 20, "bos_id": 0}, "vocabulary has 19"),
        ({"tokenizer": 60, "bos_id": 0, "length": 3}, "at least 4"),
        ({"tokenizer": 60, "bos_id": 0, "copies": 1}, "two copies"),
        ({"tokenizer": 60, "bos_id": 0, "length": 10, "periods": (8, 19)}, "do not repeat within 20"),
        ({"tokenizer": 60, "bos_id": 0, "length": 10, "periods": (12, 9)}, "do not repeat"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(RequestError, match=message):
        repeated_tokens(**arguments)


def test_a_tokenizer_brings_its_own_start_token(bare):
    with pytest.raises(RequestError, match="leave bos_id out"):
        repeated_tokens(bare, bos_id=4)
