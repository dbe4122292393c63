"""Documents with a query, one-hop needles and passkeys: what stands where, with tokenizers of every kind."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import RequestError
from workbench.tasks import NONE
from workbench.tasks.documents import NO_QUERY, NOTES, document_queries, document_spans
from workbench.tasks.one_hop import INFERRED, NAMED, OneHop, one_hop
from workbench.tasks.passkeys import WORDS, passkeys


def text_of(tokenizer, task, prompt, span):
    first, last = task.spans[span][prompt].tolist()
    return tokenizer.decode(task.batch.ids[prompt, first:last], skip_special_tokens=True).strip()


def words(text):
    return " ".join(text.split())


def test_documents_come_first_and_are_the_same_without_a_query(tokenizer):
    asked, none = document_queries(tokenizer, prompts=4, documents=3, seed=1)
    for prompt, info in enumerate(asked.info):
        note = NOTES[prompt]
        gold = words(text_of(tokenizer, asked, prompt, "gold"))
        assert gold == words(f"[{info['gold'] + 1}] {note.title}\n{note.text}")
        query = text_of(tokenizer, asked, prompt, "query")
        assert note.question in query and NO_QUERY in text_of(tokenizer, none, prompt, "query")
        end = int(document_spans(asked)[prompt].max())
        assert end <= int(asked.spans["query"][prompt, 0])
        assert torch.equal(asked.batch.ids[prompt, :end], none.batch.ids[prompt, :end])
        assert int(asked.spans["query"][prompt, 1]) == int(asked.batch.lengths[prompt])
    assert torch.equal(document_spans(asked), document_spans(none))
    assert len({info["gold"] for info in asked.info}) == 3
    assert asked.hash != none.hash and asked.hash == document_queries(tokenizer, 4, 3, 1)[0].hash


def test_more_documents_than_notes_are_refused(bare):
    with pytest.raises(RequestError, match="there are 10 notes"):
        document_queries(bare, documents=11)
    with pytest.raises(RequestError, match="documents=1"):
        document_queries(bare, documents=1)


@pytest.mark.parametrize("needles", [INFERRED, NAMED], ids=["inferred", "named"])
def test_one_hop_prompts_hold_the_needle_and_the_reply(tokenizer, needles):
    task = one_hop(tokenizer, prompts=len(needles), length=300, needles=needles)
    assert int(task.batch.lengths.max()) <= 300
    for prompt, needle in enumerate(needles):
        assert words(text_of(tokenizer, task, prompt, "needle")) == needle.text
        assert words(text_of(tokenizer, task, prompt, "reply")) == f"{needle.lead} {needle.answer}."
        assert needle.answer in text_of(tokenizer, task, prompt, "answer")
        assert (needle.answer in text_of(tokenizer, task, prompt, "context")) == needle.literal
        rows = task.answer_positions[prompt][task.answer_positions[prompt] != NONE]
        assert int(rows[0]) + 1 == int(task.spans["answer"][prompt, 0])
        sizes = {name: int(task.spans[name][prompt].diff()) for name in ("needle", "elsewhere")}
        assert sizes["needle"] == sizes["elsewhere"]
        a, b = task.spans["needle"][prompt].tolist(), task.spans["elsewhere"][prompt].tolist()
        assert b[1] <= a[0] or a[1] <= b[0]
        assert int(task.decoding.lengths[prompt]) == int(task.spans["reply"][prompt, 0])


def test_a_corrupt_twin_differs_in_the_needle_alone(tokenizer):
    task = one_hop(tokenizer, prompts=3, length=300, corrupt=True)
    assert [info["role"] for info in task.info] == ["clean", "corrupt"] * 3
    for prompt in range(0, 6, 2):
        different = (task.batch.ids[prompt] != task.batch.ids[prompt + 1]).nonzero().flatten()
        first, last = task.spans["needle"][prompt].tolist()
        assert len(different) and first <= int(different.min()) and int(different.max()) < last
        assert torch.equal(task.answer_ids[prompt], task.answer_ids[prompt + 1])


def test_needles_that_give_the_answer_away_and_prompts_too_short_are_refused(bare):
    with pytest.raises(RequestError, match="give the answer 'Paris' away"):
        OneHop("leak", "Marta sees the tower.", "Is it Paris?", "It is", "Paris")
    with pytest.raises(RequestError, match="too short for needle 'kitchen'"):
        one_hop(bare, length=40)


def test_passkeys_are_asked_for_behind_the_book(tokenizer):
    task = passkeys(tokenizer, prompts=3, length=420, keys=2, words=3, seed=2)
    assert int(task.batch.lengths.max()) <= 420
    for prompt in range(3):
        first, last = task.spans["labels"][prompt].tolist()
        labels = words(tokenizer.decode(task.batch.ids[prompt, first:last], skip_special_tokens=True))
        book = words(tokenizer.decode(task.batch.ids[prompt, :first], skip_special_tokens=True))
        assert last == int(task.batch.lengths[prompt])
        secrets = [labels.split("Passkey: ")[at].split(" Based")[0] for at in (1, 2)]
        for ordinal, secret in zip(("first", "second"), secrets, strict=True):
            assert f"it's the {ordinal} passkey to the vault: {secret}." in book
            assert len(secret.split()) == 3 and set(secret.split()) <= set(WORDS)
        asked = task.answer_ids[prompt][task.answer_ids[prompt] != NONE]
        assert tokenizer.decode(asked).split() == " ".join(secrets).split()


def test_passkeys_that_do_not_fit_are_refused(bare):
    with pytest.raises(RequestError, match="too short for 2 passkeys"):
        passkeys(bare, length=80)
    with pytest.raises(RequestError, match="at most 10"):
        passkeys(bare, keys=11)
