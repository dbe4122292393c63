from __future__ import annotations

import pytest
import torch

from workbench.errors import RequestError
from workbench.tasks import NEEDLES, NONE, Needle, Task, needle_grid

LENGTHS = (320, 400)


@pytest.fixture(scope="module", params=["bare", "starting", "chatting"])
def grid(request) -> tuple[Task, object]:
    tokenizer = request.getfixturevalue(request.param)
    return needle_grid(tokenizer, LENGTHS, depths=3, seed=2), tokenizer


def needle_of(task: Task, prompt: int) -> Needle:
    return next(needle for needle in NEEDLES if needle.name == task.info[prompt]["needle"])


def text_of(task: Task, tokenizer, prompt: int, span: str) -> str:
    first, last = task.spans[span][prompt].tolist()
    return tokenizer.decode(task.batch.ids[prompt, first:last].tolist()).strip()


def test_the_grid_has_one_prompt_a_cell_and_none_is_too_long(grid):
    task, _ = grid
    cells = [(one["needle"], one["length"], one["depth"]) for one in task.info]
    assert len(cells) == len(set(cells)) == len(task) == len(NEEDLES) * 2 * 3
    for length, one in zip(task.batch.lengths.tolist(), task.info, strict=True):
        assert one["tokens"] == length <= one["length"]
        # Only at full depth is an unfinished sentence left out.
        if one["depth"] < 100:
            assert length >= one["length"] - 4


def test_spans_hold_what_they_are_called_after(grid):
    task, tokenizer = grid
    for prompt in range(len(task)):
        needle = needle_of(task, prompt)
        assert text_of(task, tokenizer, prompt, "needle") == needle.text
        assert text_of(task, tokenizer, prompt, "question") == needle.question
        assert text_of(task, tokenizer, prompt, "answer") == needle.answer
        assert text_of(task, tokenizer, prompt, "answer_in_needle").rstrip(".") == needle.answer
        context, inside = task.spans["context"][prompt], task.spans["needle"][prompt]
        assert context[0] <= inside[0]
        assert inside[1] <= context[1] <= task.spans["question"][prompt, 0]
        assert int(task.spans["answer"][prompt, 1]) == int(task.batch.lengths[prompt])


def test_the_needle_stands_behind_a_sentence(grid):
    task, tokenizer = grid
    for prompt in range(len(task)):
        context, needle = task.spans["context"][prompt], task.spans["needle"][prompt]
        before = tokenizer.decode(task.batch.ids[prompt, context[0] : needle[0]].tolist()).rstrip()
        if before.removeprefix("<book>"):
            assert before.rstrip('")”')[-1] in ".!?"
        depth, real = task.info[prompt]["depth"], task.info[prompt]["real_depth"]
        assert real <= depth + 2
    at_depth = {depth: [one["real_depth"] for one in task.info if one["depth"] == depth] for depth in (0, 50, 100)}
    assert max(at_depth[0]) <= 1
    assert 15 < sum(at_depth[50]) / len(at_depth[50]) <= 50
    assert min(at_depth[100]) >= 99


def test_rows_produce_the_answer_and_keys_hold_the_same_token(grid):
    task, _ = grid
    ids = task.batch.ids
    for prompt in range(len(task)):
        positions = [at for at in task.answer_positions[prompt].tolist() if at != NONE]
        first, last = task.spans["answer"][prompt].tolist()
        assert positions == list(range(first - 1, last - 1))
        source = range(*task.spans["answer_in_needle"][prompt].tolist())
        keys = task.answer_keys[prompt, : len(positions)].tolist()
        aligned = [(row, key) for row, key in zip(positions, keys, strict=True) if key != NONE]
        assert len(aligned) >= len(positions) / 2
        assert [key for _, key in aligned] == sorted({key for _, key in aligned})
        for row, key in aligned:
            assert key in source
            assert ids[prompt, key] == ids[prompt, row + 1]
        assert task.info[prompt]["dropped"] == len(positions) - len(aligned)
        table = task.keys["needle"][prompt, :, 0]
        assert {(row, int(table[row])) for row in (table != NONE).nonzero().flatten().tolist()} == set(aligned)


def test_answers_align_in_full(grid):
    task, _ = grid
    assert task.settings["dropped_answer_tokens"] == 0


def test_in_a_chat_turn_the_reply_is_the_needles_own_sentence(chatting):
    task = needle_grid(chatting, (320,), depths=2)
    for prompt in range(len(task)):
        needle = needle_of(task, prompt)
        reply = task.batch.texts[prompt].split("<|turn|>assistant\n")[1]
        assert reply == needle.lead + needle.answer
        assert task.answer_positions[prompt, 0] > task.decoding.mask[prompt].sum()


def test_the_chat_template_is_used_if_there_is_one_and_not_refused(chatting, bare):
    turned, plain = (
        needle_grid(chatting, (320,), depths=1),
        needle_grid(chatting, (320,), depths=1, chat=False),
    )
    assert turned.batch.texts[0].startswith("<|turn|>user\n<book>")
    assert "chat template" in turned.specials
    assert not (turned.batch.ids == chatting.bos_token_id).any()
    assert "<book>" not in plain.batch.texts[0]
    assert (plain.batch.ids[:, 0] == chatting.bos_token_id).all()
    with pytest.raises(RequestError, match="no chat template"):
        needle_grid(bare, (320,), chat=True)


@pytest.mark.parametrize("name", ["org/tiny-1b-Instruct", "tiny-2b-it", "/models/Tiny-Chat-v0.3/"])
def test_plain_prompts_for_a_chat_model_without_a_template_are_asked_for_by_name(bare, name, monkeypatch):
    monkeypatch.setattr(bare, "name_or_path", name)
    with pytest.raises(RequestError, match="chat model, but its tokenizer has no chat template"):
        needle_grid(bare, (320,), depths=1)
    plain = needle_grid(bare, (320,), depths=1, chat=False)
    # A name that says nothing of chats, also in a folder that does.
    monkeypatch.setattr(bare, "name_or_path", "instruct/tiny-1b-italian")
    assert torch.equal(needle_grid(bare, (320,), depths=1).batch.ids, plain.batch.ids)


def test_prompts_to_decode_are_the_prompts_without_their_answers(grid):
    task, tokenizer = grid
    assert task.answers == tuple(needle_of(task, prompt).answer for prompt in range(len(task)))
    for prompt in range(len(task)):
        real = task.decoding.ids[prompt][task.decoding.mask[prompt]]
        assert bool(task.decoding.mask[prompt, -1])
        assert torch.equal(real, task.batch.ids[prompt, : len(real)])
        end = "<|turn|>assistant" if task.settings["chat"] else "Answer:"
        assert tokenizer.decode(real.tolist()).rstrip().endswith(end)


def test_the_seed_decides_the_haystack(bare):
    def draw(seed):
        return needle_grid(bare, (320,), depths=2, seed=seed)

    assert draw(0).hash == draw(0).hash
    assert draw(0).hash != draw(1).hash
    assert draw(0).settings["corpus_sha256"] != draw(1).settings["corpus_sha256"]


def test_prose_is_repeated_where_a_length_exceeds_it(bare):
    task = needle_grid(bare, (80_000,), depths=1, needles=NEEDLES[:1])
    assert 80_000 - 4 <= int(task.batch.lengths[0]) <= 80_000
    assert task.batch.texts[0].count(NEEDLES[0].text) == 1


def test_too_short_lengths_are_refused_with_the_minimum(bare):
    with pytest.raises(RequestError, match=r"A length of 40 tokens is too short.*minimum") as refused:
        needle_grid(bare, (40, 320))
    least = int(str(refused.value).rstrip(".").split()[-1])
    assert max(needle_grid(bare, (least,), depths=2).batch.lengths) <= least
    with pytest.raises(RequestError, match="too short"):
        needle_grid(bare, (least - 1,))


def test_needles_that_cannot_be_followed_are_refused(bare):
    with pytest.raises(RequestError, match="exactly once"):
        Needle("bad", "A cat sat here.", "Who?", "a dog")
    with pytest.raises(RequestError, match="exactly once"):
        Needle("bad", "Here sat a cat and a cat.", "Who?", "a cat")
    # "statement" is one token, of which "state" is no part that could be followed.
    part = Needle("part", "The gate opens to the statement.", "What does the gate open to?", "state")
    with pytest.raises(RequestError, match="1 of 1 answer tokens are cut differently"):
        needle_grid(bare, (320,), needles=[part])


def test_answer_tokens_that_the_needle_lacks_are_dropped_and_counted(bare):
    part = Needle("part", "The gate opens to the other statement.", "To what?", "the other state")
    task = needle_grid(bare, (320,), needles=[part], depths=1)
    assert [key == NONE for key in task.answer_keys[0].tolist()] == [False, False, True]
    assert task.info[0]["dropped"] == task.settings["dropped_answer_tokens"] == 1
    assert task.n_answers.tolist() == [3]


def test_empty_grids_are_refused(bare):
    with pytest.raises(RequestError, match="the grid is empty"):
        needle_grid(bare, ())
    with pytest.raises(RequestError, match="the grid is empty"):
        needle_grid(bare, needles=())
