"""Prompts without natural text."""

from __future__ import annotations

import pytest

from workbench.errors import RequestError
from workbench.tasks import one_token, random_tokens


def test_random_tokens_are_ordinary_varied_and_repeatable():
    task = random_tokens(40, prompts=6, length=30, seed=3, bos_id=7)
    again, other = random_tokens(40, 6, 30, 3, bos_id=7), random_tokens(40, 6, 30, 4, bos_id=7)
    assert task.batch.ids.shape == (6, 30) and task.hash == again.hash != other.hash
    assert (task.batch.ids[:, 0] == 7).all() and (task.batch.ids[:, 1:] != 7).all()
    assert len(task.batch.ids[:, 1:].unique()) > 30
    assert "start token 7" in task.caption


def test_one_token_has_no_start_token_unless_asked():
    task = one_token(40, prompts=6, length=30, bos_id=7)
    assert (task.batch.ids == task.batch.ids[:, :1]).all() and len(task.batch.ids.unique()) > 1
    assert "nothing before" in task.caption and 7 not in task.batch.ids
    behind = one_token(40, prompts=6, length=30, bos=True, bos_id=7)
    assert (behind.batch.ids[:, 0] == 7).all() and (behind.batch.ids[:, 1:] == behind.batch.ids[:, 1:2]).all()
    assert behind.batch.ids.shape == (6, 30)


def test_a_text_span_and_answers_follow_the_convention():
    task = random_tokens(40, prompts=2, length=5, bos_id=7)
    assert task.columns("text").tolist() == [[False, True, True, True, True]] * 2
    assert task.answer_ids.tolist() == task.batch.ids[:, 1:].tolist()


@pytest.mark.parametrize("make", [random_tokens, one_token])
def test_too_few_prompts_or_tokens_are_refused(make):
    with pytest.raises(RequestError, match="at least one prompt of 2 tokens"):
        make(40, prompts=0, length=5)
    with pytest.raises(RequestError, match="at least one prompt of 3 tokens"):
        make(40, prompts=1, length=2, bos=True, bos_id=7)
    with pytest.raises(RequestError, match="bos_id=99"):
        make(40, prompts=1, length=5, bos=True, bos_id=99)
