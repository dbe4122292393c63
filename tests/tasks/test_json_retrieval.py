from __future__ import annotations

import json
import re

import pytest

from workbench.errors import RequestError
from workbench.tasks import NONE, json_retrieval


@pytest.fixture(scope="module", params=["bare", "starting", "chatting"])
def made(request):
    tokenizer = request.getfixturevalue(request.param)
    return json_retrieval(tokenizer, prompts=3, pairs=4, seed=1), tokenizer


def test_the_object_holds_keys_shots_and_the_answer(made):
    task, _ = made
    for text, answer in zip(task.batch.texts, task.answers, strict=True):
        found = json.loads(re.search(r"\{.*\}", text).group())
        assert len(found) == 4 and all(re.fullmatch(r"[A-Za-z0-9]{32}", key) for key in found)
        asked = re.findall(r"Key: (\w+)\nValue:", text)
        assert len(asked) == len(set(asked)) == 4
        assert found[asked[-1]] == answer and text.endswith(answer)
        assert all(f"Key: {key}\nValue:\n{found[key]}\n\n" in text for key in asked[:-1])
        assert text.startswith("Please extract the value") or task.settings["chat"]


def test_values_are_short_distinct_sentences(made):
    task, tokenizer = made
    objects = [json.loads(re.search(r"\{.*\}", text).group()) for text in task.batch.texts]
    values = [value for one in objects for value in one.values()]
    assert len(set(values)) == len(values) == 12
    assert max(len(tokenizer(value, add_special_tokens=False)["input_ids"]) for value in values) <= 30


def test_answer_tokens_are_followed_to_the_value(made):
    task, tokenizer = made
    ids = task.batch.ids
    for prompt, answer in enumerate(task.answers):
        first, last = task.spans["answer"][prompt].tolist()
        assert tokenizer.decode(ids[prompt, first:last].tolist()).strip() == answer
        keys, rows = task.answer_keys[prompt], task.answer_positions[prompt]
        there = keys != NONE
        assert there.sum() >= int(task.n_answers[prompt]) - 2
        assert (ids[prompt, keys[there]] == ids[prompt, rows[there] + 1]).all()
        start, end = task.spans["needle"][prompt].tolist()
        assert (keys[there] >= start).all() and (keys[there] < end).all()
        real = task.decoding.ids[prompt][task.decoding.mask[prompt]]
        assert real.tolist() == ids[prompt, :first].tolist()


def test_the_seed_decides_and_bad_sizes_are_refused(bare):
    assert json_retrieval(bare, 2, 4, seed=3).hash == json_retrieval(bare, 2, 4, seed=3).hash
    assert json_retrieval(bare, 2, 4, seed=3).hash != json_retrieval(bare, 2, 4, seed=4).hash
    with pytest.raises(RequestError, match="pairs=3"):
        json_retrieval(bare, pairs=3)
    with pytest.raises(RequestError, match="more than max_length=100"):
        json_retrieval(bare, 1, 4, max_length=100)
    with pytest.raises(RequestError, match="are needed"):
        json_retrieval(bare, prompts=100_000)
    with pytest.raises(RequestError, match="no chat template"):
        json_retrieval(bare, 1, chat=True)
