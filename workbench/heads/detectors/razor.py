"""RazorAttention: echo and induction mass on repeated random tokens, and the KV heads that they select.

For a query at column i of a segment repeated with period P behind a start token, averaged over all i of later copies:

* echo: `sum_m A[i, i - mP]`, all earlier copies of the same token;
* induction: `sum_m A[i, i - mP + 1]`, the tokens after those.

A KV head scores what the best of its query heads does. The paper keeps the cache of the top 1 % of KV heads by echo
and the top 14 % by induction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import pandas as pd

from workbench.errors import RequestError
from workbench.heads.detector import Detector, Part, PromptScores, prompts, rows_mean, stacked, traced
from workbench.heads.detectors.repeated import ECHO
from workbench.models import Spec
from workbench.tasks import Task
from workbench.tracing import Statistic
from workbench.tracing import statistics as S

ECHO_SHARE, INDUCTION_SHARE = 0.01, 0.14


def _statistics(task: Task) -> list[Statistic]:
    keys = task.keys
    return [
        S.at_keys("induction_keys", keys["induction"]),
        S.at_keys("null_keys", keys["null"]),
    ]


def _induction(parts: Sequence[Part]) -> PromptScores:
    return PromptScores(
        stacked(parts, lambda part: rows_mean(traced(part), "induction_keys", prompts(part).columns("repeats"))),
        stacked(parts, lambda part: rows_mean(traced(part), "null_keys", prompts(part).columns("repeats"))),
    )


def kv_scores(table: pd.DataFrame, detector: str, spec: Spec) -> pd.DataFrame:
    """From a table of `HeadScores`: layer, kv_head, value (the largest among its query heads), the head that has it."""
    rows = table[table.detector == detector]
    if rows.empty:
        raise RequestError(f"No scores of {detector!r}; run detect(model, [{detector!r}]) first.")
    group = rows.layer.map({layer.index: layer.group for layer in spec.layers})
    rows = rows.assign(kv_head=rows["head"] // group).sort_values("value", ascending=False, kind="stable")
    best = rows.groupby(["layer", "kv_head"], as_index=False).first()
    return best[["layer", "kv_head", "value", "head"]]


def razor_heads(
    table: pd.DataFrame, spec: Spec, *, echo: float = ECHO_SHARE, induction: float = INDUCTION_SHARE
) -> list[tuple[int, int]]:
    """(layer, KV head) of the top shares by echo and by induction together; each share is rounded up to whole heads.

    `table`, of `HeadScores`, must hold `razor_echo` and `razor_induction`.
    """
    chosen: set[tuple[int, int]] = set()
    for name, share in (("razor_echo", echo), ("razor_induction", induction)):
        if not 0 <= share <= 1:
            raise RequestError(f"A share of {share} of the KV heads by {name}; choose 0 to 1.")
        ranked = kv_scores(table, name, spec).sort_values("value", ascending=False, kind="stable")
        # A share of all heads that is whole but for rounding stays whole.
        count = ceil(round(share * len(ranked), 9))
        chosen |= {(int(row.layer), int(row.kv_head)) for row in ranked.head(count).itertuples()}
    return sorted(chosen)


_NOTE = (
    "Per query head; `kv_scores` takes the largest of a KV head and `razor_heads` the published shares. The paper "
    "repeats 2500 tokens 4 times; here the prompts of the other detectors of repeats. As in its formulas: no mass on "
    "the start token counts, and averages run over later copies alone (a port averages over the whole matrix)."
)
# One definition: the paper's, which `echo` holds against a customary bar.
RAZOR_ECHO = replace(
    ECHO, name="razor_echo", title="RazorAttention echo", threshold=None,
    note=f"The same number as `echo`, without its customary bar. {_NOTE}",
)  # fmt: skip
RAZOR_INDUCTION = Detector(
    name="razor_induction",
    title="RazorAttention induction",
    kind="repeated",
    probe="induction",
    measures="attention to the tokens after all earlier copies of the same token together",
    null="attention to as many displaced keys",
    unit="attention mass",
    positions="queries of all copies but the first",
    threshold=None,
    paper="Tang et al. 2024, RazorAttention",
    url="https://arxiv.org/abs/2407.15891",
    statistics=_statistics,
    score=_induction,
    curve="induction_keys",
    note=f"`induction` reads the second copy and the nearest occurrence alone. {_NOTE}",
)
