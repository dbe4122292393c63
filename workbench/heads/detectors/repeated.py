"""Detectors on repeated random tokens: previous-token, duplicate-token, induction and echo heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workbench.heads.detector import Detector, Part, PromptScores, prompts, rows_mean, stacked, traced
from workbench.heads.detectors.text import later_rows, random_visible_keys
from workbench.tasks import Task
from workbench.tracing import Statistic
from workbench.tracing import statistics as S


def second_copy(task: Task) -> Tensor:
    """Rows of the second copy: exactly one earlier occurrence of every token."""
    columns = torch.arange(task.batch.ids.shape[1])
    start = task.spans["repeats"][:, :1]
    period = torch.tensor([int(info["period"] or 0) for info in task.info])[:, None]
    return (columns >= start) & (columns < start + period)


def _statistics(task: Task) -> list[Statistic]:
    keys = task.keys
    return [
        S.offset(-1),
        S.at_keys("random_key", random_visible_keys(task)),
        S.at_keys("duplicate_key", keys["duplicate"][..., 0]),
        S.at_keys("induction_key", keys["induction"][..., 0]),
        S.at_keys("null_key", keys["null"][..., 0]),
        S.at_keys("echo_keys", keys["duplicate"]),
        S.at_keys("null_keys", keys["null"]),
    ]


def _previous(parts: Sequence[Part]) -> PromptScores:
    return PromptScores(
        stacked(parts, lambda part: rows_mean(traced(part), "offset_-1", later_rows(prompts(part)))),
        stacked(parts, lambda part: rows_mean(traced(part), "random_key", later_rows(prompts(part)))),
    )


def _on_second_copy(name: str) -> Callable[[Sequence[Part]], PromptScores]:
    def score(parts: Sequence[Part]) -> PromptScores:
        return PromptScores(
            stacked(parts, lambda part: rows_mean(traced(part), name, second_copy(prompts(part)))),
            stacked(parts, lambda part: rows_mean(traced(part), "null_key", second_copy(prompts(part)))),
        )

    return score


def _echo(parts: Sequence[Part]) -> PromptScores:
    return PromptScores(
        stacked(parts, lambda part: rows_mean(traced(part), "echo_keys", prompts(part).columns("repeats"))),
        stacked(parts, lambda part: rows_mean(traced(part), "null_keys", prompts(part).columns("repeats"))),
    )


PREVIOUS_TOKEN = Detector(
    name="previous_token",
    title="Previous token",
    probe="induction",
    kind="repeated",
    measures="mean attention to the token just before",
    null="mean attention to another visible key, drawn at random per query",
    unit="attention mass",
    positions="all queries but the first",
    threshold=0.4,
    paper="Olsson et al. 2022, In-context learning and induction heads",
    url="https://arxiv.org/abs/2209.11895",
    statistics=_statistics,
    score=_previous,
    curve="offset_-1",
    note="On random tokens, so that no content makes the previous token likely; 0.4 is customary, not published.",
)
DUPLICATE_TOKEN = Detector(
    name="duplicate_token",
    title="Duplicate token",
    probe="induction",
    kind="repeated",
    measures="mean attention to the same token in the first copy",
    null="mean attention to a key displaced from it by at most a quarter of the period",
    unit="attention mass",
    positions="queries of the second copy",
    threshold=0.2,
    paper="Wang et al. 2022, Interpretability in the wild",
    url="https://arxiv.org/abs/2211.00593",
    statistics=_statistics,
    score=_on_second_copy("duplicate_key"),
    curve="duplicate_key",
    note="0.2 is customary, not published.",
)
INDUCTION = Detector(
    name="induction",
    title="Induction",
    probe="induction",
    kind="repeated",
    measures="mean attention to the token after the same token in the first copy (prefix matching)",
    null="mean attention to a key displaced from it by at most a quarter of the period",
    unit="attention mass",
    positions="queries of the second copy",
    threshold=0.4,
    paper="Olsson et al. 2022, In-context learning and induction heads",
    url="https://arxiv.org/abs/2209.11895",
    statistics=_statistics,
    score=_on_second_copy("induction_key"),
    curve="induction_key",
    note="The paper's text says 'preceded'; its correction and all code attend to the token that followed. 0.4 is "
    "customary, not published.",
)
ECHO = Detector(
    name="echo",
    title="Echo",
    probe="induction",
    kind="repeated",
    measures="attention to all earlier occurrences of the same token together",
    null="attention to as many displaced keys",
    unit="attention mass",
    positions="queries of all copies but the first",
    threshold=0.2,
    paper="Tang et al. 2024, RazorAttention",
    url="https://arxiv.org/abs/2407.15891",
    statistics=_statistics,
    score=_echo,
    curve="echo_keys",
    note="The paper selects the top 1 % of KV heads on 4 x 2500 tokens; here a score per query head on shorter "
    "prompts, with a customary threshold.",
)
