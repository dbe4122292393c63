from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workbench.errors import RequestError
from workbench.tasks import TOKEN_CLASSES, long_texts, token_classes


def test_prompts_have_the_asked_length_and_are_the_texts_that_they_say(bare):
    task = long_texts(bare, prompts=4, length=300, seed=3)
    assert task.batch.ids.shape == (4, 300) and not task.batch.padded
    assert [one["domain"] for one in task.info] == ["prose", "code", "prose", "code"]
    for ids, text in zip(task.batch.ids.tolist(), task.batch.texts, strict=True):
        assert bare.decode(ids).startswith(text[:400])
    assert len(set(task.batch.texts)) == 4
    again, other = long_texts(bare, 4, 300, 3), long_texts(bare, 4, 300, 4)
    assert again.hash == task.hash != other.hash


def test_the_start_token_counts(starting):
    task = long_texts(starting, prompts=2, length=40)
    assert task.batch.ids.shape == (2, 40) and (task.batch.ids[:, 0] == 0).all()
    assert (task.spans["text"] == torch.tensor([1, 40])).all()


def test_classes_are_disjoint_and_say_what_the_token_is(bare):
    ids = torch.tensor([bare("42 apples, 7\n\nend (x)")["input_ids"]])
    marks = token_classes(bare, ids)
    words = [bare.decode([token]) for token in ids[0].tolist()]
    assert set(marks) == set(TOKEN_CLASSES)
    assert sum(mark.int() for mark in marks.values()).max() == 1
    for at, word in enumerate(words):
        expected = {
            "start": at == 0,
            "newline": at > 0 and "\n" in word and not word.strip(),
            "digits": at > 0 and word.strip().isdigit(),
            "punctuation": at > 0 and bool(word.strip()) and all(c in ",()" for c in word.strip()),
        }
        assert {name: bool(mark[0, at]) for name, mark in marks.items()} == expected, word
    # What the sentence was made for: some token of each class.
    assert all(mark.any() for mark in marks.values())


def test_marks_are_part_of_the_hash(bare):
    task = long_texts(bare, prompts=1, length=64)
    moved = {name: mark.roll(1, dims=1) for name, mark in task.marks.items()}
    assert replace(task, marks=moved).hash != task.hash


def test_too_little_is_refused(bare):
    with pytest.raises(RequestError, match="length=10"):
        long_texts(bare, length=10)
    with pytest.raises(RequestError, match="prompts=0"):
        long_texts(bare, prompts=0)


def test_prompts_may_be_longer_than_the_corpus(bare):
    assert long_texts(bare, prompts=1, length=70_000).batch.ids.shape == (1, 70_000)
