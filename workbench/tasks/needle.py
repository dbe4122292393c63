"""A needle in a haystack: copy-paste retrieval on a grid of lengths and depths.

After Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality (arXiv 2404.15574):

1. Context: contiguous prose, cut to fit, with the needle put in at a depth and moved left until the token
   before it ends a sentence.
2. The question behind it: ``Based on the content of the book, Question: ... Answer:`` as plain text for a
   base model, as one user turn (the context between ``<book>`` and ``</book>``) where the tokenizer has a
   chat template.
3. The gold answer behind that, for teacher forcing; in a chat turn behind the words that lead up to it in
   the needle, because chat models answer in whole sentences and would never begin with the bare words.
   Each answer token is followed to the token of the needle that it is copied from; those that the tokenizer
   cut differently there are left out of that list and counted.

One pass over such a prompt scores the rows that produce the answer, as greedy decoding would if it were
right. Whether the model is right is asked by decoding from `Task.decoding` and `accepted`: ROUGE-1 recall
above one half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks import corpus
from workbench.tasks.encoding import Encoded, encode, padding_id
from workbench.tasks.haystack import Haystack, about_book, hidden, refuse_straddling, shifted
from workbench.tasks.needles import NEEDLES, Needle
from workbench.tasks.task import NONE, Task, Value
from workbench.tasks.turns import Turn

LEAST_HAYSTACK = 32
LEAST_ALIGNED = 0.5


@dataclass(frozen=True)
class _Prompt:
    """One cell of the grid, tokenised, with its labels as columns (start token counted)."""

    ids: tuple[int, ...]
    text: str
    reply_start: int
    answer_start: int
    answer_keys: tuple[int, ...]
    spans: dict[str, tuple[int, int]]
    depth: float


def needle_grid(
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int] = (256, 512),
    depths: int = 5,
    seed: int = 0,
    needles: Sequence[Needle] = NEEDLES,
    chat: bool | None = None,
) -> Task:
    """One prompt for each needle, length and depth; no prompt, answer included, is longer than its length.

    ``chat``: None uses the tokenizer's chat template if there is one, False never, True insists on it.
    """
    if not lengths or not needles or depths < 1:
        raise RequestError(
            f"lengths={list(lengths)}, depths={depths}, {len(needles)} needles: the grid is empty; "
            "ask for at least one of each."
        )
    turn = Turn.of(tokenizer, chat)
    _check_lengths(tokenizer, turn, needles, lengths)
    percents = [float(percent) for percent in np.linspace(0, 100, depths)] if depths > 1 else [50.0]
    starts = np.random.default_rng(seed).integers(0, 2**31, size=len(needles))
    cells: list[_Prompt] = []
    info: list[dict[str, Value]] = []
    for needle, start in zip(needles, starts, strict=True):
        haystack = Haystack(tokenizer, int(start))
        for length in lengths:
            for percent in percents:
                cell = _fit(tokenizer, turn, haystack, needle, length, percent)
                cells.append(cell)
                info.append(
                    {
                        "needle": needle.name,
                        "length": length,
                        "depth": percent,
                        "real_depth": round(cell.depth, 2),
                        "tokens": len(cell.ids),
                        "dropped": cell.answer_keys.count(NONE),
                    }
                )
    return _assemble(
        tokenizer,
        turn,
        cells,
        answers=tuple(needle.answer for needle in needles for _ in range(len(lengths) * len(percents))),
        info=tuple(info),
        seed=seed,
        settings={
            "lengths": list(lengths),
            "depths": percents,
            "needles": [needle.name for needle in needles],
            "chat": turn.chat,
            "dropped_answer_tokens": sum(cell.answer_keys.count(NONE) for cell in cells),
            "corpus_sha256": corpus.digest(cell.text for cell in cells),
        },
    )


def _lead(turn: Turn, needle: Needle) -> str:
    """What stands between the prompt and the answer."""
    return (needle.reply or needle.lead) if turn.chat else " "


def _check_lengths(
    tokenizer: PreTrainedTokenizerBase, turn: Turn, needles: Sequence[Needle], lengths: Sequence[int]
) -> None:
    least = LEAST_HAYSTACK + max(_overhead(tokenizer, turn, needle) for needle in needles)
    if min(lengths) < least:
        raise RequestError(
            f"A length of {min(lengths)} tokens is too short for needle, question and answer; the minimum "
            f"with this tokenizer is {least}."
        )


def _overhead(tokenizer: PreTrainedTokenizerBase, turn: Turn, needle: Needle) -> int:
    bare = about_book(turn, needle.text, needle.question) + _lead(turn, needle) + needle.answer
    return len(turn.prefix.ids) + len(encode(tokenizer, bare).ids)


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    haystack: Haystack,
    needle: Needle,
    length: int,
    percent: float,
) -> _Prompt:
    """Cut the haystack until the whole prompt fits; joints can cost a token or two."""
    budget = length - _overhead(tokenizer, turn, needle)
    while True:
        cell = _build(tokenizer, turn, haystack.first(budget), needle, percent)
        excess = len(cell.ids) - length
        if excess <= 0:
            return cell
        budget -= excess


def _build(tokenizer: PreTrainedTokenizerBase, turn: Turn, hay: str, needle: Needle, percent: float) -> _Prompt:
    context = hidden(tokenizer, hay, needle.text, percent)
    prompt = about_book(turn, context, needle.question)
    reply_at, answer_at = len(prompt), len(prompt) + len(_lead(turn, needle))
    whole = encode(tokenizer, prompt + _lead(turn, needle) + needle.answer)
    needle_at, question_at = prompt.index(needle.text), prompt.rindex(needle.question)
    source_at = needle_at + len(needle.lead)
    reply, answer = (whole.tokens_in(at, len(whole.text)) for at in (reply_at, answer_at))
    refuse_straddling(whole, reply[0], reply_at)
    refuse_straddling(whole, answer[0], answer_at)
    source = whole.tokens_in(source_at, source_at + len(needle.answer))
    needle_span = whole.tokens_in(needle_at, needle_at + len(needle.text))
    context_at = prompt.index(context)
    context_span = whole.tokens_in(context_at, context_at + len(context))
    hay_tokens = context_span[1] - context_span[0] - (needle_span[1] - needle_span[0])
    shift = len(turn.prefix.ids)
    keys = align(whole, answer, answer_at, source, source_at)
    if sum(key != NONE for key in keys) < LEAST_ALIGNED * len(keys):
        raise RequestError(
            f"Needle {needle.name!r}: {sum(key == NONE for key in keys)} of {len(keys)} answer tokens are "
            "cut differently in the needle with this tokenizer, too many to follow; use another needle."
        )
    spans = {
        "context": context_span,
        "needle": needle_span,
        "answer_in_needle": source,
        "question": whole.tokens_in(question_at, question_at + len(needle.question)),
        "answer": answer,
    }
    return _Prompt(
        ids=(*turn.prefix.ids, *whole.ids),
        text=whole.text,
        reply_start=reply[0] + shift,
        answer_start=answer[0] + shift,
        answer_keys=tuple(key + shift if key != NONE else NONE for key in keys),
        spans=shifted(spans, shift),
        depth=100 * (needle_span[0] - context_span[0]) / max(hay_tokens, 1),
    )


def align(
    whole: Encoded, answer: tuple[int, int], answer_at: int, source: tuple[int, int], source_at: int
) -> list[int]:
    """For each answer token the token of the needle with the same id at the same characters."""
    places = {(whole.offsets[key][0] - source_at, whole.offsets[key][1] - source_at): key for key in range(*source)}
    keys = []
    for token in range(*answer):
        first, last = whole.offsets[token]
        key = places.get((first - answer_at, last - answer_at), NONE)
        keys.append(key if key != NONE and whole.ids[key] == whole.ids[token] else NONE)
    return keys


def _assemble(
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    cells: Sequence[_Prompt],
    answers: tuple[str, ...],
    info: tuple[dict[str, Value], ...],
    seed: int,
    settings: dict[str, object],
) -> Task:
    pad = padding_id(tokenizer)
    batch = Batch.from_ids([cell.ids for cell in cells], pad_id=pad, texts=[cell.text for cell in cells])
    most = max(len(cell.answer_keys) for cell in cells)
    positions, keys = (torch.full((len(cells), most), NONE) for _ in range(2))
    for index, cell in enumerate(cells):
        n = len(cell.answer_keys)
        positions[index, :n] = torch.arange(cell.answer_start - 1, cell.answer_start - 1 + n)
        keys[index, :n] = torch.tensor(cell.answer_keys)
    ids = torch.where(positions == NONE, NONE, batch.ids.gather(1, positions.clamp(min=0) + 1))
    how = "in a chat turn" if turn.chat else "as plain text"
    return Task(
        name="needle",
        caption=(
            f"{len(cells)} prompts that hide a needle in prose from pydoc's topics and ask for it {how} "
            f"(up to {max(settings['lengths'])} tokens); {turn.prefix.policy}."  # type: ignore[call-overload]
        ),
        seed=seed,
        batch=batch,
        specials=turn.prefix.policy,
        answer_ids=ids,
        answer_positions=positions,
        answer_keys=keys,
        spans={name: torch.tensor([cell.spans[name] for cell in cells]) for name in cells[0].spans},
        keys={"needle": per_query(batch, positions, keys)},
        decoding=Batch.from_ids([cell.ids[: cell.reply_start] for cell in cells], pad_id=pad, side="left"),
        answers=answers,
        settings=settings,
        info=info,
    )


def per_query(
    batch: Batch, positions: Int[Tensor, "prompt answer"], keys: Int[Tensor, "prompt answer"]
) -> Int[Tensor, "prompt query 1"]:
    """For each query column the key that its answer token is copied from."""
    table = torch.full((*batch.ids.shape, 1), NONE)
    prompt, answer = (keys != NONE).nonzero(as_tuple=True)
    table[prompt, positions[prompt, answer], 0] = keys[prompt, answer]
    return table
