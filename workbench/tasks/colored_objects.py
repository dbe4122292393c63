"""Colours of objects, asked after one example: "... a red pencil, a blue cup, and a green ball. What color is the cup?"

The shape of BIG-bench's task as Merullo et al. 2023 (arXiv 2310.08744) ask it: one answered question, then one with
three objects of three colours; the two share neither objects nor colours.  The corrupt prompt asks for another of the
three, so one token differs and the answer is one of the foils.  GPT-2 medium is right on 49.6 % of the published ones.

``form="stated"`` asks small models the same in a plainer shape, without an example: "The pencil is red, the cup is
blue, and the ball is green. What color is the cup? The cup is"; both mentions of the object change.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.tasks.known_circuits import COLORED_OBJECTS_GPT2_MEDIUM
from workbench.tasks.pair_texts import Filled, Pair, assemble, check_count, choose, fill, pool, templates_for
from workbench.tasks.pairs import PairTask
from workbench.tasks.word_lists import COLOURS, INTRODUCTIONS, SURFACES, THINGS

TEMPLATE = (
    "Q: On the {surface0}, {intro0} {a0}{c0} {o0}, {a1}{c1} {o1}, and {a2}{c2} {o2}. What color is the {asked0}?\n"
    "A:{answer:EXAMPLE}\n"
    "Q: On the {surface1}, {intro1} {a3}{c3:C1}{o3:O1}, {a4}{c4:C2}{o4:O2}, and {a5}{c5:C3}{o5:O3}. "
    "What color is the{asked1:ASKED}?\nA:"
)
STATED = (
    "The{o0:O1} is{c0:C1}, the{o1:O2} is{c1:C2}, and the{o2:O3} is{c2:C3}. "
    "What color is the{asked:ASKED}? The{asked} is"
)
FORMS = ("question", "stated")
LISTED = 3


def colored_objects(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 50,
    seed: int = 0,
    *,
    form: str = "question",
    bos: bool | None = None,
) -> PairTask:
    """Roles C1 to C3 and O1 to O3 (what is listed), EXAMPLE (the example's answer), ASKED and END; foils: both others.

    `info` says which of the three is asked for, clean and corrupt. ``form``: "question", or "stated", which has no
    EXAMPLE.
    """
    check_count("colored_objects", prompts)
    choose("form", form, FORMS)
    if form == "stated":
        return _stated(tokenizer, prompts, seed, bos)
    colours = pool(tokenizer, "colours", COLOURS, ("is a ", "is an ")).at_least(2 * LISTED)
    # Answers begin with a capital.
    answers = pool(tokenizer, "colours with a capital", [one.capitalize() for one in colours.words], ("A: ",))
    colours = pool(tokenizer, "colours", [one for one in COLOURS if one.capitalize() in answers.words], ("is a ",))
    colours.at_least(2 * LISTED)
    things = pool(tokenizer, "objects", THINGS, ("is a red ", "is the ")).at_least(2 * LISTED)
    rng = np.random.default_rng(seed)

    def draw() -> Pair:
        shades = [str(one) for one in rng.choice(colours.words, 2 * LISTED, replace=False)]
        objects = [str(one) for one in rng.choice(things.words, 2 * LISTED, replace=False)]
        example = int(rng.integers(LISTED))
        asked, other = (int(one) for one in rng.choice(LISTED, 2, replace=False))
        words = {f"surface{at}": str(rng.choice(SURFACES)) for at in range(2)}
        words |= {f"intro{at}": str(rng.choice(INTRODUCTIONS)) for at in range(2)}
        return _pair(shades, objects, (example, asked, other), words)

    templates_for(tokenizer, "colored_objects", {"": draw()})
    return assemble(
        tokenizer,
        [draw() for _ in range(prompts)],
        name="colored_objects",
        caption="an answered question about the colours of three objects, then one to answer; corrupt asks for another",
        seed=seed,
        bos=bos,
        circuit=COLORED_OBJECTS_GPT2_MEDIUM,
        dropped={
            "colours": tuple(one for one in COLOURS if one not in colours.words),
            "objects": things.dropped,
        },
    )


def _stated(tokenizer: PreTrainedTokenizerBase, prompts: int, seed: int, bos: bool | None) -> PairTask:
    colours = pool(tokenizer, "colours", COLOURS, ("is ",)).at_least(LISTED)
    things = pool(tokenizer, "objects", THINGS, ("The ", "is the ")).at_least(LISTED)
    rng = np.random.default_rng(seed)

    def draw() -> Pair:
        shades = [f" {one}" for one in rng.choice(colours.words, LISTED, replace=False)]
        objects = [f" {one}" for one in rng.choice(things.words, LISTED, replace=False)]
        clean, corrupt = (int(one) for one in rng.choice(LISTED, 2, replace=False))
        words = {f"o{at}": one for at, one in enumerate(objects)} | {f"c{at}": one for at, one in enumerate(shades)}
        return Pair(
            clean=fill(STATED, {**words, "asked": objects[clean]}),
            corrupt=fill(STATED, {**words, "asked": objects[corrupt]}),
            answers=(shades[clean],),
            foils=tuple(shade for at, shade in enumerate(shades) if at != clean),
            info={"asked": clean, "asked_corrupt": corrupt, "object": objects[clean].strip()},
        )

    templates_for(tokenizer, "colored_objects", {"": draw()})
    return assemble(
        tokenizer,
        [draw() for _ in range(prompts)],
        name="colored_objects",
        caption="the colours of three objects as stated, one of them asked back; corrupt asks for another",
        seed=seed,
        bos=bos,
        circuit=COLORED_OBJECTS_GPT2_MEDIUM,
        dropped={"colours": colours.dropped, "objects": things.dropped},
    )


def _pair(shades: list[str], objects: list[str], asked: tuple[int, int, int], words: dict[str, str]) -> Pair:
    for at, (shade, thing) in enumerate(zip(shades, objects, strict=True)):
        # Roles are of words alone: their space belongs to them.
        gap = "" if at < LISTED else " "
        words |= {f"a{at}": ("an" if shade[0] in "aeiou" else "a") + ("" if gap else " ")}
        words |= {f"c{at}": gap + shade, f"o{at}": gap + thing}
    example, clean, corrupt = asked
    words |= {"asked0": objects[example], "answer": f" {shades[example].capitalize()}"}

    def text(which: int) -> Filled:
        return fill(TEMPLATE, {**words, "asked1": f" {objects[LISTED + which]}"})

    answers = [f" {shade.capitalize()}" for shade in shades[LISTED:]]
    return Pair(
        clean=text(clean),
        corrupt=text(corrupt),
        answers=(answers[clean],),
        foils=tuple(answer for at, answer in enumerate(answers) if at != clean),
        info={"asked": clean, "asked_corrupt": corrupt, "object": objects[LISTED + clean]},
    )
