"""Passkeys in a book: long-range recall that DuoAttention's gates are trained on, made of our own text.

After Xiao et al. 2024, DuoAttention (arXiv 2410.10819): word sequences are hidden in prose, "the first passkey to the
vault" and so on, and asked for one after the other behind it. The label tokens are those of all questions and answers.
Published sizes: ten passkeys of 32 words in 1000 to 32000 tokens of BookSum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks import corpus
from workbench.tasks.encoding import default_prefix, encode, padding_id
from workbench.tasks.haystack import Haystack, sentence_before
from workbench.tasks.task import NONE, Task
from workbench.tasks.turns import check_counts

WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
).split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
_BEFORE, _AFTER = "This is a very long story book: <book> ", " </book>.\n\n"
_NEEDLE = "Remember this sequence of words, it's the {ordinal} passkey to the vault: {words}."
_QUESTION = "Based on the content of the book, what is the {ordinal} passkey to the vault?\nPasskey:"
LEAST_HAYSTACK = 32


@dataclass(frozen=True)
class _Cell:
    ids: tuple[int, ...]
    text: str
    labels: tuple[int, int]
    answers: tuple[int, ...]


def passkeys(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 16,
    length: int = 256,
    keys: int = 2,
    words: int = 6,
    seed: int = 0,
) -> Task:
    """Prompts of at most `length` tokens with `keys` passkeys of `words` words, all asked for at the end.

    Spans: `labels`, every token behind the book (questions and answers). The answers are the passkeys' words.
    """
    check_counts("passkeys", [("prompts", prompts, 1), ("keys", keys, 1), ("words", words, 1)])
    if keys > len(ORDINALS):
        raise RequestError(f"{keys} passkeys were asked for; at most {len(ORDINALS)} have names.")
    rng, prefix = np.random.default_rng(seed), default_prefix(tokenizer)
    cells = [_fit(tokenizer, prefix.ids, length, keys, words, rng) for _ in range(prompts)]
    texts = [cell.text for cell in cells]
    batch = Batch.from_ids([cell.ids for cell in cells], pad_id=padding_id(tokenizer), texts=texts)
    most = max(len(cell.answers) for cell in cells)
    rows = torch.tensor([[*cell.answers, *[NONE] * (most - len(cell.answers))] for cell in cells])
    return Task(
        name="passkeys",
        caption=(
            f"{prompts} prompts of up to {length} tokens of prose that hide {keys} passkeys of {words} words and ask "
            f"for them; {prefix.policy}."
        ),
        seed=seed,
        batch=batch,
        specials=prefix.policy,
        answer_ids=torch.where(rows == NONE, NONE, batch.ids.gather(1, rows.clamp(min=0) + 1)),
        answer_positions=rows,
        spans={"labels": torch.tensor([cell.labels for cell in cells])},
        settings={
            "prompts": prompts, "length": length, "keys": keys, "words": words,
            "corpus_sha256": corpus.digest(texts),
        },
    )  # fmt: skip


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    prefix: tuple[int, ...],
    length: int,
    keys: int,
    words: int,
    rng: np.random.Generator,
) -> _Cell:
    """One prompt, its prose cut until the whole fits."""
    secrets = [" ".join(str(word) for word in rng.choice(WORDS, words)) for _ in range(keys)]
    shares = sorted(float(share) for share in rng.uniform(0.05, 0.95, keys))
    hay = Haystack(tokenizer, int(rng.integers(2**31)))
    bare = len(prefix) + len(_build(tokenizer, prefix, "", secrets, shares).ids)
    if length - bare < LEAST_HAYSTACK:
        raise RequestError(
            f"A length of {length} tokens is too short for {keys} passkeys of {words} words and their questions; the "
            f"minimum with this tokenizer is about {bare + LEAST_HAYSTACK}."
        )
    budget = length - bare
    while True:
        cell = _build(tokenizer, prefix, hay.first(budget), secrets, shares)
        excess = len(cell.ids) - length
        if excess <= 0:
            return cell
        budget -= excess


def _build(
    tokenizer: PreTrainedTokenizerBase,
    prefix: tuple[int, ...],
    hay: str,
    secrets: Sequence[str],
    shares: Sequence[float],
) -> _Cell:
    book, used = "", 0
    for ordinal, secret, share in zip(ORDINALS, secrets, shares, strict=False):
        at = max(used, sentence_before(hay, share * len(hay)))
        book += f"{hay[used:at]} {_NEEDLE.format(ordinal=ordinal, words=secret)}"
        used = at
    text = _BEFORE + (book + hay[used:]).strip() + _AFTER
    labels_at, answers = len(text), []
    for ordinal, secret in zip(ORDINALS, secrets, strict=False):
        text += _QUESTION.format(ordinal=ordinal)
        answers.append((len(text) + 1, len(text) + 1 + len(secret)))
        text += f" {secret}\n\n"
    text = text.rstrip("\n")
    whole, shift = encode(tokenizer, text), len(prefix)
    rows: list[int] = []
    for bounds in answers:
        first, last = whole.tokens_in(*bounds)
        rows += range(first + shift - 1, last + shift - 1)
    labels = whole.tokens_in(labels_at, len(text))
    return _Cell((*prefix, *whole.ids), text, (labels[0] + shift, labels[1] + shift), tuple(rows))
