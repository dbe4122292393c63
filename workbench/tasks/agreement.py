"""Subject and verb agree in number, whatever stands between them: "The teacher near the cars" -> " is", not " are".

Pairs as in work on subject-verb agreement (Finlayson et al. 2021, arXiv 2106.06087; Hanna et al. 2024, arXiv
2403.17806): clean has a singular subject, corrupt the plural of the same noun.  Scored by the total probability of the
verb forms that agree less that of those that do not, over verbs of which both forms are one token.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.tasks.pair_texts import Pair, assemble, check_count, choose, continuation, fill, templates_for
from workbench.tasks.pairs import PairTask
from workbench.tasks.word_lists import COUNTED, VERBS

# Kinds of sentences; {noun} stands between subject and verb and has a number of its own.
TEMPLATES = {
    "simple": "The{subject:SUBJECT}",
    "adjective": "The old{subject:SUBJECT}",
    "embedded": "I think that the{subject:SUBJECT}",
    "place": "The{subject:SUBJECT} near the{noun:NOUN}",
    "behind": "The{subject:SUBJECT} behind the{noun:NOUN}",
    "possession": "The{subject:SUBJECT} of the{noun:NOUN}",
    "company": "The{subject:SUBJECT} with the{noun:NOUN}",
    "subject_relative": "The{subject:SUBJECT} that saw the{noun:NOUN}",
    "object_relative": "The{subject:SUBJECT} that the{noun:NOUN} saw",
    "bare_relative": "The{subject:SUBJECT} the{noun:NOUN} saw",
}
NUMBERS = ("singular", "plural", "mixed")
LEAST_NOUNS, LEAST_VERBS = 4, 2


def agreement(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 50,
    seed: int = 0,
    *,
    number: str = "singular",
    bos: bool | None = None,
) -> PairTask:
    """Roles SUBJECT and END, and NOUN (the one in between) where all pairs have one.

    ``number``: of the clean subject; "mixed" for both in turn, so that a push towards one number helps nobody.
    """
    check_count("agreement", prompts)
    choose("number", number, NUMBERS)
    nouns, no_nouns = _whole(tokenizer, COUNTED, "The", LEAST_NOUNS, "nouns")
    verbs, no_verbs = _whole(tokenizer, VERBS, "The", LEAST_VERBS, "verbs")
    forms = [tuple(f" {verb[form]}" for verb in verbs) for form in range(2)]
    examples = {kind: _pair(kind, nouns[0], nouns[1], (0, 1), forms) for kind in TEMPLATES}
    kept, dropped = templates_for(tokenizer, "agreement", examples)
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(prompts):
        subject, noun = rng.choice(len(nouns), 2, replace=False)
        clean = {"singular": 0, "plural": 1, "mixed": index // len(kept) % 2}[number]
        pairs.append(_pair(kept[index % len(kept)], nouns[subject], nouns[noun], (clean, int(rng.integers(2))), forms))
    return assemble(
        tokenizer,
        pairs,
        name="agreement",
        caption=f"a {number} subject and {len(verbs)} verbs in both numbers; corrupt: the subject's other number",
        seed=seed,
        bos=bos,
        metric="probability_difference",
        dropped={"nouns": no_nouns, "verbs": no_verbs, "templates": dropped},
    )


def _whole(
    tokenizer: PreTrainedTokenizerBase, listed: tuple[tuple[str, str], ...], before: str, least: int, what: str
) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Words of which both forms are single tokens, and the first form of the others."""
    kept, seen = [], set[int]()
    for both in listed:
        ids = {continuation(tokenizer, before, f" {form}") for form in both}
        if None not in ids and len(ids) == 2 and not ids & seen:
            kept.append(both)
            seen |= {one for one in ids if one is not None}
    dropped = tuple(both[0] for both in listed if both not in kept)
    if len(kept) < least:
        raise RequestError(
            f"This tokenizer takes {len(kept)} of {len(listed)} {what} as single tokens in singular and plural, and "
            f"{least} are needed; use another task, or a tokenizer with a larger vocabulary."
        )
    return kept, dropped


def _pair(
    kind: str, subject: tuple[str, str], noun: tuple[str, str], numbers: tuple[int, int], forms: list[tuple[str, ...]]
) -> Pair:
    clean, between = numbers
    words = {"noun": f" {noun[between]}"}
    return Pair(
        clean=fill(TEMPLATES[kind], {**words, "subject": f" {subject[clean]}"}),
        corrupt=fill(TEMPLATES[kind], {**words, "subject": f" {subject[1 - clean]}"}),
        answers=forms[clean],
        foils=forms[1 - clean],
        info={
            "template": kind,
            "number": NUMBERS[clean],
            "noun_number": NUMBERS[between] if "{noun" in TEMPLATES[kind] else None,
        },
    )
