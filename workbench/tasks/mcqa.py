"""Multiple choice whose options are copied from the question, labelled at random: what is found is the label.

Lieberum et al. 2023 (arXiv 2307.09458) studied how a large model writes the label of the right option; their MMLU
items are beyond small models, so here the question states its own answer, behind answered examples.  Roles follow the
paper: labels, options, the last token.  Labels are "letters" (A to D), "digits" (1 to 4) or "random" (four other
capitals a prompt, used by the examples too), always in random order of correctness.  Corruptions:

* "order": the right option and another change places, so another label is right;
* "labels": the question's labels are replaced by four unused ones.

Scored by the logit of the right label less the mean of the other labels.
"""

from __future__ import annotations

import string

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.tasks.known_circuits import MCQA_CHINCHILLA
from workbench.tasks.pair_texts import Filled, Pair, assemble, check_count, choose, fill, pool, templates_for
from workbench.tasks.pairs import PairTask
from workbench.tasks.word_lists import COLOURS, THINGS

OPTIONS = 4
LABELS = {"letters": "ABCD", "digits": "1234", "random": string.ascii_uppercase}
CORRUPTIONS = ("order", "labels")


def mcqa(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 50,
    seed: int = 0,
    *,
    labels: str = "letters",
    corruption: str = "order",
    shots: int = 2,
    bos: bool | None = None,
) -> PairTask:
    """Roles LABEL1 to LABEL4, OPTION1 to OPTION4, STATED (the colour in the question) and END, of the last question.

    ``shots``: answered examples before it, with the same labels.  `info` has the place of the right option, from 0.
    """
    check_count("mcqa", prompts)
    choose("labels", labels, LABELS)
    choose("corruption", corruption, CORRUPTIONS)
    if not 0 <= shots <= 8:
        raise RequestError(f"shots={shots}: give 0 to 8 answered examples.")
    capitals = pool(tokenizer, "labels", string.ascii_uppercase, ("(", "Answer: (")).at_least(2 * OPTIONS)
    allowed = pool(tokenizer, "labels", LABELS[labels], ("(", "Answer: (")).at_least(OPTIONS)
    colours = pool(tokenizer, "colours", COLOURS, ("is ", "(A) ")).at_least(OPTIONS)
    things = pool(tokenizer, "objects", THINGS, ("The ", "is the ")).at_least(shots + 1)
    rng = np.random.default_rng(seed)

    def draw() -> Pair:
        chosen = list(allowed.words) if labels != "random" else _some(rng, allowed.words, OPTIONS)
        unused = _some(rng, [one for one in capitals.words if one not in chosen], OPTIONS)
        asked = _some(rng, things.words, shots + 1)
        examples = "".join(_example(rng, thing, _some(rng, colours.words, OPTIONS), chosen) for thing in asked[1:])
        right, other = rng.choice(OPTIONS, 2, replace=False).tolist()
        question = (asked[0], _some(rng, colours.words, OPTIONS))
        return _pair(examples, question, (chosen, unused), (right, other), corruption)

    templates_for(tokenizer, "mcqa", {"": draw()})
    return assemble(
        tokenizer,
        [draw() for _ in range(prompts)],
        name="mcqa",
        caption=f"a colour asked back by its label ({labels}), {shots} examples; corrupt: other {corruption}",
        seed=seed,
        bos=bos,
        circuit=MCQA_CHINCHILLA,
        dropped={"labels": allowed.dropped, "colours": colours.dropped, "objects": things.dropped},
    )


def _some(rng: np.random.Generator, listed: list[str] | tuple[str, ...], count: int) -> list[str]:
    return [str(one) for one in rng.choice(listed, count, replace=False)]


def _question(thing: str, stated: str, options: list[str], labels: list[str]) -> Filled:
    template = "The{thing} is{stated:STATED}. What color is the{thing}?\n"
    words = {"thing": f" {thing}", "stated": f" {stated}"}
    for at, (option, label) in enumerate(zip(options, labels, strict=True), start=1):
        template += f"({{l{at}:LABEL{at}}}){{o{at}:OPTION{at}}}\n"
        words |= {f"l{at}": label, f"o{at}": f" {option}"}
    return fill(template + "Answer: (", words)


def _example(rng: np.random.Generator, thing: str, options: list[str], labels: list[str]) -> str:
    right = int(rng.integers(OPTIONS))
    return f"{_question(thing, options[right], options, labels).text}{labels[right]})\n\n"


def _pair(
    examples: str,
    question: tuple[str, list[str]],
    labels: tuple[list[str], list[str]],
    places: tuple[int, int],
    corruption: str,
) -> Pair:
    (thing, options), (chosen, unused), (right, other) = question, labels, places
    stated, swapped = options[right], list(options)
    swapped[right], swapped[other] = options[other], stated

    def text(options: list[str], labels: list[str]) -> Filled:
        found = _question(thing, stated, options, labels)
        shift = len(examples)
        return Filled(
            examples + found.text,
            {role: (first + shift, last + shift) for role, (first, last) in found.places.items()},
        )

    corrupt = text(swapped, chosen) if corruption == "order" else text(options, unused)
    return Pair(
        clean=text(options, chosen),
        corrupt=corrupt,
        answers=(chosen[right],),
        foils=tuple(label for at, label in enumerate(chosen) if at != right),
        info={"right": right, "other": other if corruption == "order" else None, "labels": "".join(chosen)},
    )
