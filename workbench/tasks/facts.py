"""Factual recall: "Keep in mind, the capital of France is" -> " Paris"; corrupt: another country, its capital the foil.

Prompts of Lv et al. 2024 (arXiv 2403.19521): fifteen beginnings, here with a longer list of countries.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.tasks.known_circuits import FACTS_GPT2_SMALL
from workbench.tasks.pair_texts import Pair, assemble, check_count, fill, pool, templates_for
from workbench.tasks.pairs import PairTask
from workbench.tasks.word_lists import CAPITALS

BEGINNINGS = (
    "It's crucial to know that",
    "You are right to say that",
    "Therefore, it's correct to state that",
    "When asked, always remember that",
    "We confirm that",
    "Don't forget,",
    "Bear in mind,",
    "Keep in mind,",
    "Just a reminder,",
    "As we all know,",
    "According to the textbook,",
    "I am sure that",
    "Without a doubt,",
    "In case you didn't know,",
    "To emphasize,",
)
TEMPLATE = "{beginning} the capital of{country:COUNTRY} is"


def facts(tokenizer: PreTrainedTokenizerBase, prompts: int = 50, seed: int = 0, *, bos: bool | None = None) -> PairTask:
    """Roles COUNTRY and END; the beginnings in turn."""
    check_count("facts", prompts)
    countries = pool(tokenizer, "countries", [country for country, _ in CAPITALS], ("capital of ",)).at_least(2)
    capitals = pool(tokenizer, "capitals", [capital for _, capital in CAPITALS], ("It is ",)).at_least(2)
    known = [both for both in CAPITALS if both[0] in countries.words and both[1] in capitals.words]
    asked = pool(tokenizer, "countries whose capital is one too", [country for country, _ in known], ("capital of ",))
    asked.at_least(2)
    examples = {beginning: _pair(beginning, known[0], known[1]) for beginning in BEGINNINGS}
    kept, dropped = templates_for(tokenizer, "facts", examples)
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(prompts):
        clean, corrupt = rng.choice(len(known), 2, replace=False)
        pairs.append(_pair(kept[index % len(kept)], known[clean], known[corrupt]))
    return assemble(
        tokenizer,
        pairs,
        name="facts",
        caption="the capital of a country; corrupt: of another",
        seed=seed,
        bos=bos,
        circuit=FACTS_GPT2_SMALL,
        dropped={"countries": countries.dropped, "capitals": capitals.dropped, "templates": dropped},
    )


def _pair(beginning: str, clean: tuple[str, str], corrupt: tuple[str, str]) -> Pair:
    def text(country: str) -> str:
        return f" {country}"

    return Pair(
        clean=fill(TEMPLATE, {"beginning": beginning, "country": text(clean[0])}),
        corrupt=fill(TEMPLATE, {"beginning": beginning, "country": text(corrupt[0])}),
        answers=(f" {clean[1]}",),
        foils=(f" {corrupt[1]}",),
        info={"template": beginning, "country": clean[0], "country_corrupt": corrupt[0]},
    )
