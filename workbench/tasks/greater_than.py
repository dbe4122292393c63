"""Years that must be later: "The war lasted from the year 1732 to the year 17" -> "33" or more.

Hanna et al. 2023 (arXiv 2305.00586); the corrupt year ends in 01, which any continuation exceeds.  Tokenizers cut years
differently, so the same sentence comes in two forms, chosen by the tokenizer:

* "pairs": years are a century and two more digits, as in GPT-2.  Answers are the two-digit tokens above the year's
  (YY + 1 to 99), foils those up to it (00 to YY): the published probability difference.
* "digits": every digit is a token, as in Llama-2, Qwen and SmolLM2.  Answers are the tens above the year's, foils those
  below it; the year's own ten decides nothing and is left out, so YY runs from 10 to 89.

The scores of the two forms differ in size and are not to be compared.
"""

from __future__ import annotations

import re

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.tasks.encoding import encode
from workbench.tasks.known_circuits import GREATER_THAN_GPT2_SMALL
from workbench.tasks.pair_texts import Pair, assemble, check_count, choose, continuation, fill, pool
from workbench.tasks.pairs import PairTask
from workbench.tasks.word_lists import EVENTS

WORDINGS = {
    "original": "The{event:EVENT} lasted from the year {century:XX}{tens:TENS}{ones:YY} to the year {century}",
    "short": "The{event:EVENT} lasted from the year {century:XX}{tens:TENS}{ones:YY} to {century}",
}
CENTURIES = tuple(range(11, 18))
CORRUPT = "01"


def greater_than(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 50,
    seed: int = 0,
    *,
    wording: str = "original",
    bos: bool | None = None,
) -> PairTask:
    """Roles EVENT, XX (the century), YY, END and, where every digit is a token, TENS; years spread evenly over YY.

    ``wording``: "original", or "short" ("to 17" at the end) as in ACDC.
    """
    check_count("greater_than", prompts)
    choose("wording", wording, WORDINGS)
    events = pool(tokenizer, "events", EVENTS, ("The ",)).at_least(2)
    form = _form(tokenizer)
    years, unusual = _years(tokenizer, form)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(years))
    # Every second half of a year once before any comes twice.
    halves = [years[at] for at in shuffled]
    pairs = []
    for index in range(prompts):
        half, centuries = halves[index % len(halves)]
        words = {"event": f" {rng.choice(events.words)}", "century": str(rng.choice(centuries))}
        pairs.append(_pair(tokenizer, WORDINGS[wording], form, half, words))
    return assemble(
        tokenizer,
        pairs,
        name="greater_than",
        caption=f"a span of years and the beginning of the last one ({form} of digits are tokens); corrupt: from 01",
        seed=seed,
        bos=bos,
        metric="probability_difference",
        circuit=GREATER_THAN_GPT2_SMALL,
        dropped={"events": events.dropped, "years": unusual},
    )


def _cut(tokenizer: PreTrainedTokenizerBase, year: str) -> list[str]:
    """The pieces of digits that a year is cut into, within the sentence."""
    encoded = encode(tokenizer, f"from the year {year} to")
    pieces = [encoded.text[first:last] for first, last in encoded.offsets]
    return [piece for piece in pieces if re.fullmatch(r"\d+", piece)]


def _form(tokenizer: PreTrainedTokenizerBase) -> str:
    """Which of the two forms most years have."""
    lengths = [tuple(map(len, _cut(tokenizer, f"{century}{half}"))) for century in CENTURIES for half in (23, 45, 67)]
    for form, shape in (("pairs", (2, 2)), ("digits", (1, 1, 1, 1))):
        if lengths.count(shape) > len(lengths) / 2:
            return form
    cut = " | ".join(_cut(tokenizer, "1732"))
    raise RequestError(
        f"This tokenizer cuts the year 1732 into {cut or 'no digits'}; greater_than needs years of two tokens (17 | "
        "32) or of single digits. Use another task."
    )


def _years(tokenizer: PreTrainedTokenizerBase, form: str) -> tuple[list[tuple[str, tuple[int, ...]]], tuple[str, ...]]:
    """Second halves of years with the centuries in which the tokenizer cuts them as the form has it."""
    shape = [2, 2] if form == "pairs" else [1, 1, 1, 1]
    halves = range(2, 99) if form == "pairs" else range(10, 90)
    kept, unusual = [], []
    fitting = [one for one in CENTURIES if [len(piece) for piece in _cut(tokenizer, f"{one}{CORRUPT}")] == shape]
    for half in (f"{number:02d}" for number in halves):
        fits = {one: [len(piece) for piece in _cut(tokenizer, f"{one}{half}")] == shape for one in fitting}
        unusual += [f"{one}{half}" for one, good in fits.items() if not good]
        centuries = tuple(one for one, good in fits.items() if good)
        if centuries:
            kept.append((half, centuries))
    if len(kept) < 2:
        raise RequestError(f"This tokenizer cuts {len(kept)} years into {form}; two are needed. Use another task.")
    return kept, tuple(unusual)


def _pair(tokenizer: PreTrainedTokenizerBase, template: str, form: str, half: str, words: dict[str, str]) -> Pair:
    digits = form == "digits"

    def year(ending: str) -> dict[str, str]:
        return {**words, "tens": ending[0], "ones": ending[1]}

    # Where both digits are one token, that is what TENS would be too.
    clean, corrupt = (fill(template if digits else template.replace(":TENS", ""), year(one)) for one in (half, CORRUPT))
    every = [str(one) for one in range(10)] if digits else [f"{one:02d}" for one in range(100)]
    later = half[0] if digits else half
    ids = {text: continuation(tokenizer, clean.text, text) for text in every}
    known = {text: one for text, one in ids.items() if one is not None}
    return Pair(
        clean=clean,
        corrupt=corrupt,
        answers=tuple(one for text, one in known.items() if text > later),
        foils=tuple(one for text, one in known.items() if text < later or (text == later and not digits)),
        info={"year": int(words["century"] + half), "form": form},
    )
