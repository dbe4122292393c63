"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary".

Wang et al. 2022 (arXiv 2211.00593): fifteen templates, in which the first clause names the indirect object IO and the
subject S in either order (ABBA: IO first; BABA: S first) and the second repeats S.  Names, places and objects are our
own lists, those that are one token here.  Corruptions:

* "s2_io": S2 becomes IO, so the answer is S: the metric changes its sign;
* "s2_random": S2 becomes a third name, so neither is repeated;
* "abc": three other names, which takes all information about the answer away;
* "order": the two names of the first clause change places, which keeps the answer.

`references` are "abc" texts whichever corruption is chosen: what the paper takes means over, template by template.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.tasks.known_circuits import IOI_GPT2_SMALL
from workbench.tasks.pair_texts import Filled, Pair, assemble, check_count, choose, fill, pool, templates_for
from workbench.tasks.pairs import PairTask
from workbench.tasks.word_lists import NAMES, OBJECTS, PLACES

# First and second name of the first clause; S2 of the second.
TEMPLATES = (
    "Then,{one:ONE} and{two:TWO} went to the{place}.{s2:S2} gave a{object} to",
    "Then,{one:ONE} and{two:TWO} had a lot of fun at the{place}.{s2:S2} gave a{object} to",
    "Then,{one:ONE} and{two:TWO} were working at the{place}.{s2:S2} decided to give a{object} to",
    "Then,{one:ONE} and{two:TWO} were thinking about going to the{place}.{s2:S2} wanted to give a{object} to",
    "Then,{one:ONE} and{two:TWO} had a long argument, and afterwards{s2:S2} said to",
    "After{one:ONE} and{two:TWO} went to the{place},{s2:S2} gave a{object} to",
    "When{one:ONE} and{two:TWO} got a{object} at the{place},{s2:S2} decided to give it to",
    "When{one:ONE} and{two:TWO} got a{object} at the{place},{s2:S2} decided to give the{object} to",
    "While{one:ONE} and{two:TWO} were working at the{place},{s2:S2} gave a{object} to",
    "While{one:ONE} and{two:TWO} were commuting to the{place},{s2:S2} gave a{object} to",
    "After the lunch,{one:ONE} and{two:TWO} went to the{place}.{s2:S2} gave a{object} to",
    "Afterwards,{one:ONE} and{two:TWO} went to the{place}.{s2:S2} gave a{object} to",
    "Then,{one:ONE} and{two:TWO} had a long argument. Afterwards{s2:S2} said to",
    "The{place}{one:ONE} and{two:TWO} went to had a{object}.{s2:S2} gave it to",
    "Friends{one:ONE} and{two:TWO} found a{object} at the{place}.{s2:S2} gave it to",
)
ORDERS = ("mixed", "ABBA", "BABA")
CORRUPTIONS = ("s2_io", "s2_random", "abc", "order")
LEAST_NAMES = 6


def ioi(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 50,
    seed: int = 0,
    *,
    order: str = "mixed",
    corruption: str = "s2_io",
    templates: Sequence[int] | None = None,
    bos: bool | None = None,
) -> PairTask:
    """Pairs with the roles IO, S1, S1+1, S2 and END; foil: S.

    ``order``: "ABBA", "BABA", or "mixed" for both in turn.  ``templates``: which of the fifteen (all that fit).
    ``bos``: None does what the tokenizer does, True puts a start token before each prompt, False none.
    """
    check_count("ioi", prompts)
    choose("order", order, ORDERS)
    choose("corruption", corruption, CORRUPTIONS)
    names = pool(tokenizer, "names", NAMES, ("so ", "so, ", "so. ")).at_least(LEAST_NAMES)
    places = pool(tokenizer, "places", PLACES).at_least(1)
    objects = pool(tokenizer, "objects", OBJECTS).at_least(1)
    orders = ("ABBA", "BABA") if order == "mixed" else (order,)
    words = {"place": f" {places.words[0]}", "object": f" {objects.words[0]}"}
    kept, dropped = templates_for(
        tokenizer,
        "ioi",
        {TEMPLATES[at]: _pair(TEMPLATES[at], orders[0], corruption, names.words, words) for at in _chosen(templates)},
    )
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(prompts):
        words = {"place": f" {rng.choice(places.words)}", "object": f" {rng.choice(objects.words)}"}
        five = [str(name) for name in rng.choice(names.words, LEAST_NAMES - 1, replace=False)]
        # Every template in both orders before any comes twice.
        template = kept[index // len(orders) % len(kept)]
        pairs.append(_pair(template, orders[index % len(orders)], corruption, five, words))
    return assemble(
        tokenizer,
        pairs,
        name="ioi",
        caption=f"two names, one of them twice ({order}), corrupt: {corruption}",
        seed=seed,
        bos=bos,
        circuit=IOI_GPT2_SMALL,
        dropped={
            "names": names.dropped,
            "places": places.dropped,
            "objects": objects.dropped,
            "templates": dropped,
        },
    )


def _chosen(templates: Sequence[int] | None) -> Sequence[int]:
    listed = range(len(TEMPLATES)) if templates is None else templates
    wrong = [at for at in listed if not 0 <= at < len(TEMPLATES)]
    if wrong or not len(listed):
        raise RequestError(f"templates={list(listed)}: name at least one of 0 to {len(TEMPLATES) - 1}.")
    return listed


def _pair(template: str, order: str, corruption: str, names: Sequence[str], words: dict[str, str]) -> Pair:
    io, s, *others = names[:5]
    a, b, c = others
    changed = {"s2_io": (io, s, io), "s2_random": (io, s, a), "abc": (a, b, c), "order": (io, s, s)}

    def text(io: str, s: str, s2: str, shown: str) -> Filled:
        one, two = (io, s) if shown == "ABBA" else (s, io)
        found = fill(template, {**words, "one": f" {one}", "two": f" {two}", "s2": f" {s2}"})
        return Filled(found.text, _roles(found, order))

    other = {"ABBA": "BABA", "BABA": "ABBA"}[order]
    return Pair(
        clean=text(io, s, s, order),
        corrupt=text(*changed[corruption], other if corruption == "order" else order),
        answers=(f" {io}",),
        foils=(f" {s}",),
        info={"template": template, "order": order, "io": io, "s": s},
        reference=text(a, b, c, order),
    )


def _roles(found: Filled, order: str) -> dict[str, tuple[int, int]]:
    """Where the clean prompt has its names; in a corrupt one other names stand there."""
    labels = ("IO", "S1") if order == "ABBA" else ("S1", "IO")
    roles = {labels[0]: found.places["ONE"], labels[1]: found.places["TWO"], "S2": found.places["S2"]}
    after = roles["S1"][1]
    after += len(found.text[after:]) - len(found.text[after:].lstrip())
    return {**roles, "S1+1": (after, after + 1)}
