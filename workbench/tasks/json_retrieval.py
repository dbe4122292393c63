"""A value looked up in a JSON object by a random key: the proxy task of AttentionInfluence (arXiv 2505.07293).

1. An object of a few pairs: keys are 32 random letters and digits, values sentences of at most 30 tokens, here of
   prose from pydoc's topics (the paper takes web text).
2. The paper's instruction, the object, three questions with their answers about other keys of it, and one more
   question; the paper does not print how a question is written, so that wording is ours.
3. The answer behind that for teacher forcing, on a line of its own, so that it is cut into the same tokens as behind
   a quotation mark. A last token that joins full stop and quotation mark is left out of the list of copies.

The published task has 800 samples of up to 4,096 tokens.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks import corpus
from workbench.tasks.encoding import encode, padding_id
from workbench.tasks.haystack import refuse_straddling
from workbench.tasks.needle import align, per_query
from workbench.tasks.task import NONE, Task
from workbench.tasks.turns import Turn

KEY_LENGTH = 32
LONGEST_VALUE = 30
SHORTEST_VALUE = 6
SHOTS = 3

_ASK = (
    "Please extract the value corresponding to the specified key from the following JSON object. Output only the value "
    "of the corresponding key and nothing else. The JSON data is as follows: {context}\n\n"
)
_QUESTION = "Key: {key}\nValue:\n"


@dataclass(frozen=True)
class _Sample:
    ids: tuple[int, ...]
    text: str
    answer_start: int
    answer_keys: tuple[int, ...]
    spans: dict[str, tuple[int, int]]
    value: str


def json_retrieval(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 8,
    pairs: int = 6,
    seed: int = 0,
    max_length: int = 4096,
    chat: bool | None = None,
) -> Task:
    """One object and one question a prompt; `pairs` counts the shots' keys too.

    Spans: "context" (the object), "needle" (the value asked for, in the object), "answer_in_needle" (the same),
    "question" (the key, as asked for) and "answer". ``chat`` as in `needle_grid`.
    """
    if prompts < 1 or pairs < SHOTS + 1:
        raise RequestError(
            f"prompts={prompts}, pairs={pairs}: ask for at least one prompt of {SHOTS + 1} pairs, one for each of "
            f"{SHOTS} shots and one for the question."
        )
    turn, rng = Turn.of(tokenizer, chat), np.random.default_rng(seed)
    sentences = _sentences(tokenizer, rng, prompts * pairs)
    samples = [
        _sample(tokenizer, turn, rng, sentences[first : first + pairs])
        for first in range(0, prompts * pairs, pairs)
    ]  # fmt: skip
    longest = max(len(sample.ids) for sample in samples)
    if longest > max_length:
        raise RequestError(
            f"An object of {pairs} pairs makes a prompt of {longest} tokens, more than max_length={max_length}; ask "
            "for fewer pairs or allow more tokens."
        )
    settings: dict[str, object] = {
        "pairs": pairs,
        "shots": SHOTS,
        "chat": turn.chat,
        "dropped_answer_tokens": sum(sample.answer_keys.count(NONE) for sample in samples),
        "corpus_sha256": corpus.digest(sample.text for sample in samples),
    }
    return _assemble(tokenizer, turn, samples, seed, settings)


def _sentences(tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, wanted: int) -> list[str]:
    """Distinct sentences that JSON writes as they are, in random order."""
    found: dict[str, None] = {}
    pieces = [piece for document in corpus.prose_documents() for piece in document.pieces]
    left = [pieces[at] for at in rng.permutation(len(pieces))]
    # Paragraphs in turn, a sentence of each: neighbours begin alike too often.
    while left:
        later = []
        for piece in left:
            end = next(iter(corpus.sentence_ends(piece)), len(piece))
            sentence, rest = piece[:end].strip(), piece[end:].strip()
            plain = sentence[:1].isupper() and json.dumps(sentence) == f'"{sentence}"'
            if plain and SHORTEST_VALUE <= len(encode(tokenizer, sentence).ids) <= LONGEST_VALUE:
                found[sentence] = None
                if len(found) == wanted:
                    return list(found)
            later += [rest] if rest else []
        left = later
    raise RequestError(
        f"The prose holds {len(found)} sentences of {SHORTEST_VALUE} to {LONGEST_VALUE} tokens, and {wanted} are "
        "needed; ask for fewer prompts or pairs."
    )


def _sample(tokenizer: PreTrainedTokenizerBase, turn: Turn, rng: np.random.Generator, values: Sequence[str]) -> _Sample:
    letters = list(string.ascii_letters + string.digits)
    keys = ["".join(rng.choice(letters, KEY_LENGTH)) for _ in values]
    context = json.dumps(dict(zip(keys, values, strict=True)))
    *shots, asked = rng.permutation(len(values))[: SHOTS + 1].tolist()
    words = _ASK.format(context=context)
    words += "".join(f"{_QUESTION.format(key=keys[shot])}{values[shot]}\n\n" for shot in shots)
    question = _QUESTION.format(key=keys[asked])
    # A chat template writes its own line break before the reply.
    prompt = turn.around(words + (question.rstrip("\n") if turn.chat else question))
    whole = encode(tokenizer, prompt + values[asked])
    answer_at, context_at = len(prompt), prompt.index(context)
    source_at = context_at + context.index(json.dumps(values[asked])) + 1
    spans = {
        "context": whole.tokens_in(context_at, context_at + len(context)),
        "needle": whole.tokens_in(source_at, source_at + len(values[asked])),
        "question": whole.tokens_in(prompt.rindex(keys[asked]), prompt.rindex(keys[asked]) + KEY_LENGTH),
        "answer": whole.tokens_in(answer_at, len(whole.text)),
    }
    spans["answer_in_needle"] = spans["needle"]
    refuse_straddling(whole, spans["answer"][0], answer_at)
    found = align(whole, spans["answer"], answer_at, spans["needle"], source_at)
    if sum(key != NONE for key in found) < len(found) / 2:
        raise RequestError(
            f"{found.count(NONE)} of {len(found)} tokens of {values[asked]!r} are cut differently in the object with "
            "this tokenizer, too many to follow; pass the other setting of chat."
        )
    shift = len(turn.prefix.ids)
    return _Sample(
        ids=(*turn.prefix.ids, *whole.ids),
        text=whole.text,
        answer_start=spans["answer"][0] + shift,
        answer_keys=tuple(key + shift if key != NONE else NONE for key in found),
        spans={name: (first + shift, last + shift) for name, (first, last) in spans.items()},
        value=values[asked],
    )


def _assemble(
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    samples: Sequence[_Sample],
    seed: int,
    settings: dict[str, object],
) -> Task:
    pad = padding_id(tokenizer)
    batch = Batch.from_ids([one.ids for one in samples], pad_id=pad, texts=[one.text for one in samples])
    most = max(len(one.answer_keys) for one in samples)
    row = partial(torch.full, (len(samples), most))
    positions, keys = row(NONE), row(NONE)
    for index, one in enumerate(samples):
        n = len(one.answer_keys)
        positions[index, :n] = torch.arange(one.answer_start - 1, one.answer_start - 1 + n)
        keys[index, :n] = torch.tensor(one.answer_keys)
    return Task(
        name="json_retrieval",
        caption=(
            f"{len(samples)} JSON objects of {settings['pairs']} pairs with random keys and sentences from pydoc's "
            f"topics, asked for one value after {SHOTS} examples; {turn.prefix.policy}."
        ),
        seed=seed,
        batch=batch,
        specials=turn.prefix.policy,
        answer_ids=torch.where(positions == NONE, NONE, batch.ids.gather(1, positions.clamp(min=0) + 1)),
        answer_positions=positions,
        answer_keys=keys,
        spans={name: torch.tensor([one.spans[name] for one in samples]) for name in samples[0].spans},
        keys={"needle": per_query(batch, positions, keys)},
        decoding=Batch.from_ids([one.ids[: one.answer_start] for one in samples], pad_id=pad, side="left"),
        answers=tuple(one.value for one in samples),
        settings=settings,
        info=tuple({"tokens": len(one.ids), "dropped": one.answer_keys.count(NONE)} for one in samples),
    )
