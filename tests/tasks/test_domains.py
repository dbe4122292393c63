from __future__ import annotations

import pytest
import torch

from workbench.errors import RequestError
from workbench.tasks import corpus, text_domains


def test_each_prompt_has_exactly_the_asked_tokens(tokenizer):
    tasks = text_domains(tokenizer, prompts=12, length=40, seed=1)
    assert list(tasks) == ["prose", "code"]
    for name, task in tasks.items():
        assert task.batch.ids.shape == (12, 40)
        assert not task.batch.padded
        assert task.settings["domain"] == name
        assert task.specials in task.caption
        assert torch.equal(task.answer_ids, task.batch.ids[:, 1:])
        assert torch.equal(task.answer_positions, torch.arange(39).expand(12, -1))


def test_the_start_token_follows_the_policy(bare, starting):
    def first(tokenizer, bos=None):
        return text_domains(tokenizer, ["prose"], prompts=5, length=24, bos=bos)["prose"]

    assert (first(starting).batch.ids[:, 0] == 0).all()
    assert (first(starting).spans["text"] == torch.tensor([1, 24])).all()
    assert not (first(starting, bos=False).batch.ids == 0).any()
    assert not (first(bare).batch.ids == 0).any()
    assert (first(bare).spans["text"] == torch.tensor([0, 24])).all()
    assert (first(bare, bos=True).batch.ids[:, 0] == 0).all()
    # The end token that this tokenizer adds is left out.
    assert not (first(starting).batch.ids == 1).any()


def test_prompts_are_the_texts_that_they_say(bare):
    for task in text_domains(bare, prompts=10, length=32).values():
        for ids, text in zip(task.batch.ids.tolist(), task.batch.texts, strict=True):
            assert bare.decode(ids).rstrip("\ufffd").strip().startswith(text.strip()[:80])
        assert all(text[0].isupper() for text in text_domains(bare, ["prose"], 10, 32)["prose"].batch.texts)
        assert len({one["document"] for one in task.info}) == 10


def test_passages_do_not_overlap(bare):
    task = text_domains(bare, ["prose"], prompts=300, length=16)["prose"]
    documents = {document.name: document.text for document in corpus.prose_documents()}
    passages: dict[str, list[str]] = {}
    for text, one in zip(task.batch.texts, task.info, strict=True):
        passages.setdefault(one["document"], []).append(text)
    assert len(passages) > 30
    for name, texts in passages.items():
        # In order from some place on, then from the beginning up to there.
        end, turns, first = 0, 0, documents[name].index(texts[0])
        for text in texts:
            at = documents[name].find(text, end)
            if at < 0:
                turns, at = turns + 1, documents[name].index(text)
            end = at + len(text)
        assert turns == 0 or (turns == 1 and end <= first)


def test_the_seed_decides_which_passages(bare):
    def draw(seed):
        return text_domains(bare, prompts=6, length=32, seed=seed)

    for name in ("prose", "code"):
        assert draw(0)[name].hash == draw(0)[name].hash
        assert draw(0)[name].hash != draw(1)[name].hash
        assert draw(0)[name].settings["corpus_sha256"] != draw(1)[name].settings["corpus_sha256"]


def test_impossible_requests_are_refused(bare, starting):
    with pytest.raises(RequestError, match="'verse' is unknown; choose from prose, code"):
        text_domains(bare, ["verse"])
    with pytest.raises(RequestError, match=r"hold \d+ passages of 3000 tokens"):
        text_domains(bare, ["prose"], prompts=50, length=3000)
    with pytest.raises(RequestError, match="3 tokens"):
        text_domains(starting, length=2)
