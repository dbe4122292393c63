"""Arguments of a function, in order, in its docstring: after two documented ones the third follows ":param".

Heimersheim & Janiak 2023, for a four-layer attention-only model: a definition with two leading arguments, three that
are documented and one behind them; the docstring documents the first two of the three.  Corruptions as in their code:

* "random_random": the documented arguments are unrelated ones in the definition, and others yet in the docstring;
* "random_doc": other arguments in the docstring alone;
* "random_def": other arguments in the definition alone;
* "random_answer": another third argument in the definition alone.

Scored by the answer's logit less the largest of all other identifiers that were drawn for the pair.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.tasks.known_circuits import DOCSTRING_ATTN_ONLY_4L
from workbench.tasks.pair_texts import Filled, Pair, assemble, check_count, choose, fill, pool, templates_for
from workbench.tasks.pairs import PairTask
from workbench.tasks.word_lists import IDENTIFIERS, NOUNS

TEMPLATE = (
    "\ndef{method}(self,{p0},{p1},{a:A_DEF},{b:B_DEF},{c:C_DEF},{suffix}):\n"
    '    """{d0}{d1}{d2}\n\n'
    "    :param{a_doc:A_DOC}:{e0}{e1}\n"
    "    :param{b_doc:B_DOC}:{f0}{f1}\n"
    "    :param"
)
CORRUPTIONS = ("random_random", "random_doc", "random_def", "random_answer")
DESCRIBED = ("d1", "d2", "e0", "e1", "f0", "f1")
DRAWN = 12


def docstring(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 50,
    seed: int = 0,
    *,
    corruption: str = "random_random",
    bos: bool | None = None,
) -> PairTask:
    """Roles A_DEF, B_DEF, C_DEF (the answer in the definition), A_DOC, B_DOC and END."""
    check_count("docstring", prompts)
    choose("corruption", corruption, CORRUPTIONS)
    identifiers = pool(
        tokenizer, "identifiers", IDENTIFIERS, ("def ", "def it(self, ", "    :param ")
    ).at_least(DRAWN)  # fmt: skip
    # The first word stands right behind the quotation marks.
    listed = [word for word in NOUNS if word not in IDENTIFIERS]
    firsts = pool(tokenizer, "first nouns", listed, ('    """',)).at_least(1)
    nouns = pool(tokenizer, "nouns", listed, ('    """so ', "    :param so: ")).at_least(len(DESCRIBED))
    rng = np.random.default_rng(seed)

    def draw() -> Pair:
        words = {"d0": str(rng.choice(firsts.words))}
        others = [word for word in nouns.words if word != words["d0"]]
        described = rng.choice(others, len(DESCRIBED), replace=False)
        words |= {place: f" {word}" for place, word in zip(DESCRIBED, described, strict=True)}
        return _pair([str(one) for one in rng.choice(identifiers.words, DRAWN, replace=False)], words, corruption)

    templates_for(tokenizer, "docstring", {"": draw()})
    return assemble(
        tokenizer,
        [draw() for _ in range(prompts)],
        name="docstring",
        caption=f"a function whose docstring has two of three arguments, the third is to come; corrupt: {corruption}",
        seed=seed,
        bos=bos,
        metric="logit_margin",
        circuit=DOCSTRING_ATTN_ONLY_4L,
        dropped={"identifiers": identifiers.dropped, "nouns": nouns.dropped, "first nouns": firsts.dropped},
    )


def _pair(identifiers: list[str], words: dict[str, str], corruption: str) -> Pair:
    method, p0, p1, suffix, a, b, c, *unrelated = identifiers
    words = {**words, "method": f" {method}", "p0": f" {p0}", "p1": f" {p1}", "suffix": f" {suffix}"}

    def text(defined: list[str], documented: list[str]) -> Filled:
        found = dict(zip(("a", "b", "c", "a_doc", "b_doc"), (*defined, *documented), strict=True))
        return fill(TEMPLATE, words | {place: f" {name}" for place, name in found.items()})

    corrupt = {
        "random_random": (unrelated[:3], unrelated[3:5]),
        "random_doc": ([a, b, c], unrelated[3:5]),
        "random_def": (unrelated[:3], [a, b]),
        "random_answer": ([a, b, unrelated[2]], [a, b]),
    }[corruption]
    return Pair(
        clean=text([a, b, c], [a, b]),
        corrupt=text(*corrupt),
        answers=(f" {c}",),
        foils=tuple(f" {one}" for one in (p0, p1, suffix, a, b, *unrelated)),
        info={"answer": c},
    )
