"""Pronouns expected of professions: "The nurse left early because" -> " she" rather than " he".

The shape of the pairs of Hanna et al. 2024 (arXiv 2403.17806): the corrupt prompt has "man" or "woman" in place of the
profession, whichever is against its stereotype.  What counts is the logit of the pronoun that the stereotype expects
less that of the other: a measure of bias, not of being right.  No circuit of agreed heads is known for it.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.tasks.pair_texts import Pair, assemble, check_count, fill, pool, templates_for
from workbench.tasks.pairs import PairTask
from workbench.tasks.word_lists import DOINGS, FEMALE_PROFESSIONS, MALE_PROFESSIONS

TEMPLATE = "The{who:SUBJECT} {doing} {link}"
LINKS = ("because", "and said that")
PRONOUNS = {"female": (" she", " he"), "male": (" he", " she")}
AGAINST = {"female": "man", "male": "woman"}


def gender(
    tokenizer: PreTrainedTokenizerBase, prompts: int = 50, seed: int = 0, *, bos: bool | None = None
) -> PairTask:
    """Roles SUBJECT and END; female and male stereotypes in turn, foil: the other pronoun."""
    check_count("gender", prompts)
    kept = {
        "female": pool(tokenizer, "professions taken for women's", FEMALE_PROFESSIONS, ("The ",)).at_least(2),
        "male": pool(tokenizer, "professions taken for men's", MALE_PROFESSIONS, ("The ",)).at_least(2),
    }
    pool(tokenizer, "nouns for a person", ("man", "woman"), ("The ",)).at_least(2)
    examples = {link: _pair("female", kept["female"].words[0], DOINGS[0], link) for link in LINKS}
    links, dropped = templates_for(tokenizer, "gender", examples)
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(prompts):
        stereotype = ("female", "male")[index % 2]
        who = str(rng.choice(kept[stereotype].words))
        pairs.append(_pair(stereotype, who, str(rng.choice(DOINGS)), str(rng.choice(links))))
    return assemble(
        tokenizer,
        pairs,
        name="gender",
        caption="a profession and the pronoun that its stereotype expects; corrupt: man or woman, against it",
        seed=seed,
        bos=bos,
        dropped={**{f"{of} professions": found.dropped for of, found in kept.items()}, "templates": dropped},
    )


def _pair(stereotype: str, who: str, doing: str, link: str) -> Pair:
    expected, other = PRONOUNS[stereotype]

    return Pair(
        clean=fill(TEMPLATE, {"who": f" {who}", "doing": doing, "link": link}),
        corrupt=fill(TEMPLATE, {"who": f" {AGAINST[stereotype]}", "doing": doing, "link": link}),
        answers=(expected,),
        foils=(other,),
        info={"template": f"{doing} {link}", "stereotype": stereotype, "profession": who},
    )
