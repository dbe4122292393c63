"""A word looked up in a JSON object by a random key, in pairs: the pair form of `json_retrieval`.

The same instruction, questions and answered examples (AttentionInfluence, arXiv 2505.07293), with values of one token,
so that one position decides, and shorter keys (the published ones have 32 characters).  Corruptions:

* "values": the value asked for and another change places in the object (two tokens), so the answer changes;
* "key": the question asks for the other's key, of as many tokens.
"""

from __future__ import annotations

import json
import string

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.tasks.encoding import encode
from workbench.tasks.json_retrieval import _ASK, _QUESTION, SHOTS
from workbench.tasks.pair_texts import Filled, Pair, assemble, check_count, choose, pool, templates_for
from workbench.tasks.pairs import PairTask
from workbench.tasks.word_lists import ANSWER_WORDS

CORRUPTIONS = ("values", "key")
TRIES = 200


def json_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 50,
    seed: int = 0,
    *,
    pairs: int = 6,
    key_length: int = 8,
    corruption: str = "values",
    bos: bool | None = None,
) -> PairTask:
    """Roles KEY and VALUE (asked for, in the object), OTHER_KEY, OTHER_VALUE (the foil), ASKED (in the question), END.

    ``pairs``: keys of the object, three of them for the answered examples.
    """
    check_count("json_pairs", prompts)
    choose("corruption", corruption, CORRUPTIONS)
    if pairs < SHOTS + 2 or not 4 <= key_length <= 64:
        raise RequestError(
            f"pairs={pairs}, key_length={key_length}: at least {SHOTS + 2} pairs and keys of 4 to 64 characters."
        )
    words = pool(tokenizer, "values", ANSWER_WORDS, ('"x": "', "Value:\n")).at_least(pairs)
    rng = np.random.default_rng(seed)

    def draw() -> Pair:
        values = [str(one) for one in rng.choice(words.words, pairs, replace=False)]
        asked, other, *shots = rng.permutation(pairs)[: SHOTS + 2].tolist()
        keys = _keys(tokenizer, rng, pairs, key_length, (asked, other))
        return _pair(keys, values, (asked, other), shots, corruption)

    templates_for(tokenizer, "json_pairs", {"": draw()})
    return assemble(
        tokenizer,
        [draw() for _ in range(prompts)],
        name="json_pairs",
        caption=f"JSON objects of {pairs} random keys, asked for one value after {SHOTS} examples; corrupt: "
        f"other {corruption}",
        seed=seed,
        bos=bos,
        dropped={"values": words.dropped},
    )


def _keys(
    tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, pairs: int, length: int, alike: tuple[int, int]
) -> list[str]:
    """Random keys, two of which have as many tokens."""
    letters = list(string.ascii_letters + string.digits)

    def draw() -> str:
        return "".join(rng.choice(letters, length))

    def tokens(key: str) -> int:
        return len(encode(tokenizer, f"Key: {key}\n").ids)

    keys = [draw() for _ in range(pairs)]
    first, second = alike
    for _ in range(TRIES):
        if tokens(keys[first]) == tokens(keys[second]):
            return keys
        keys[second] = draw()
    raise RequestError(f"No two keys of {length} characters have as many tokens; choose another key_length.")


def _pair(keys: list[str], values: list[str], places: tuple[int, int], shots: list[int], corruption: str) -> Pair:
    asked, other = places

    def text(values: list[str], which: int) -> Filled:
        listed = json.dumps(dict(zip(keys, values, strict=True)))
        before = _ASK.partition("{context}")[0]
        words = _ASK.format(context=listed)
        words += "".join(f"{_QUESTION.format(key=keys[shot])}{values[shot]}\n\n" for shot in shots)
        question = words + _QUESTION.format(key=keys[which])
        roles = {}
        for label, place in (("", asked), ("OTHER_", other)):
            key_at = question.index(f'"{keys[place]}"', len(before)) + 1
            value_at = key_at + len(keys[place]) + len('": "')
            roles[f"{label}KEY"] = (key_at, key_at + len(keys[place]))
            roles[f"{label}VALUE"] = (value_at, value_at + len(values[place]))
        at = question.rindex(keys[which])
        return Filled(question, {**roles, "ASKED": (at, at + len(keys[which]))})

    swapped = list(values)
    swapped[asked], swapped[other] = values[other], values[asked]
    return Pair(
        clean=text(values, asked),
        corrupt=text(swapped, asked) if corruption == "values" else text(values, other),
        answers=(values[asked],),
        foils=(values[other],),
        info={"key": keys[asked], "value": values[asked]},
    )
