"""Induction on random tokens with a lag of its own for each pair: "... A B ... A" -> B.

With one fixed lag a head can be right by attending at a fixed distance, and a small model trained so learns just that;
here each pair repeats a segment of another length.  Behind filler a segment of distinct tokens comes once, then its
beginning again, up to A.  Corruptions, one token each:

* "target": B is another token where it first stands, so the answer is that one: the metric changes its sign;
* "source": A is another token where it first stands, so nothing is to be completed.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.known_circuits import INDUCTION_GPT2_SMALL
from workbench.tasks.pair_texts import check_count, choose
from workbench.tasks.pairs import PairTask
from workbench.tasks.repeats import ordinary_ids

CORRUPTIONS = ("target", "source")


def lag_induction(
    tokenizer: PreTrainedTokenizerBase | int,
    prompts: int = 50,
    seed: int = 0,
    *,
    length: int = 48,
    lags: tuple[int, int] = (8, 24),
    repeated: int = 8,
    corruption: str = "target",
    bos: bool = True,
    bos_id: int | None = None,
) -> PairTask:
    """Roles A1 and B1 (where the pattern first stands), B1+1 and END (the second A); foil: the corrupt token.

    ``lags``: inclusive range of the distance from A1 to END.  ``repeated``: tokens of the segment that come again (at
    most the lag less one).  ``length`` leaves the start token out.  In place of a tokenizer the size of the vocabulary
    will do, with ``bos_id`` as the start token, as in `repeated_tokens`.
    """
    check_count("lag_induction", prompts)
    choose("corruption", corruption, CORRUPTIONS)
    _check_lags(lags, repeated, length)
    low, high = lags
    prefix, allowed = ordinary_ids(tokenizer, bos, bos_id)
    if len(allowed) < length + 1:
        raise RequestError(f"{length + 1} distinct tokens are needed, and there are {len(allowed)}; lower length.")
    generator = torch.Generator().manual_seed(seed)
    lag = torch.randint(low, high + 1, (prompts,), generator=generator)
    clean, corrupt, answers, foils, first = [], [], [], [], []
    for distance in lag.tolist():
        drawn = allowed[torch.randperm(len(allowed), generator=generator)[: length + 1]].tolist()
        again = min(repeated, distance - 1)
        once = drawn[: length - again]
        # The last `distance` of these are the segment.
        start = len(once) - distance
        row = [*prefix.ids, *once, *once[start : start + again]]
        source = len(prefix.ids) + start + again - 1
        changed = source + 1 if corruption == "target" else source
        clean.append(row)
        corrupt.append([*row[:changed], drawn[length], *row[changed + 1 :]])
        answers.append([row[source + 1]])
        foils.append([drawn[length]])
        first.append(source)
    column, end = torch.tensor(first), torch.full((prompts,), len(prefix.ids) + length - 1)
    return PairTask(
        name="lag_induction",
        caption=f"{prompts} pairs: random tokens repeated at a distance of {low} to {high}, corrupt: another "
        f"{corruption}; {prefix.policy}.",
        seed=seed,
        specials=prefix.policy,
        clean=Batch.from_ids(clean),
        corrupt=Batch.from_ids(corrupt),
        answers=torch.tensor(answers),
        foils=torch.tensor(foils),
        position=end,
        roles={"A1": column, "B1": column + 1, "B1+1": column + 2, "END": end},
        circuit=INDUCTION_GPT2_SMALL,
        info=tuple({"lag": one} for one in lag.tolist()),
    )


def _check_lags(lags: tuple[int, int], repeated: int, length: int) -> None:
    low, high = lags
    if repeated < 1 or not 3 <= low <= high or high + repeated > length:
        raise RequestError(
            f"lags={lags}, repeated={repeated}, length={length}: choose 3 <= low <= high, at least one repeated token, "
            "and a length of at least the highest lag and the repeated tokens together."
        )
