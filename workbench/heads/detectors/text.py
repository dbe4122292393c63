"""Detectors on natural text: attention sinks, entropy, and heads that sleep on one domain and work on another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.heads.detector import Array, Detector, Part, PromptScores, prompts, rows_mean, stacked, traced
from workbench.heads.detectors.rows import mean_over, sees_first, visible_keys
from workbench.tasks import Task
from workbench.tracing import Statistic, Trace
from workbench.tracing import statistics as S

SINK_EPSILON = 0.3


def random_visible_keys(task: Task) -> Int[Tensor, "prompt query"]:
    """For each query one of its visible keys, position 0 left out; none for the first two queries."""
    generator = torch.Generator().manual_seed(task.seed + 1)
    columns = torch.arange(task.batch.ids.shape[1])
    start = task.batch.starts[:, None]
    choices = columns - start
    keys = start + 1 + (torch.rand(task.batch.ids.shape, generator=generator) * (choices - 1).clamp(min=0)).long()
    return torch.where(choices >= 2, keys, -1)


def later_rows(task: Task) -> Bool[Tensor, "prompt query"]:
    """Rows that have a choice: all but each prompt's first."""
    return torch.arange(task.batch.ids.shape[1]) > task.batch.starts[:, None]


def where_first_is_seen(trace: Trace, name: str) -> Array:
    """Mean of a row statistic over the queries, but the first, that see position 0: a window hides it from others."""
    return np.asarray(mean_over(trace[name], sees_first(trace)).numpy())


def sink_statistics(task: Task) -> list[Statistic]:
    """What a sink is read from."""
    return [S.first(1), S.column_mean(), S.at_keys("random_key", random_visible_keys(task))]


def at_column(part: Part, name: str, columns: Int[Tensor, " prompt"]) -> Array:
    """A column statistic at one key per prompt, `[prompt, layer, head]`."""
    values = traced(part)[name]
    index = columns[:, None, None, None].expand(*values.shape[:3], 1)
    return np.asarray(torch.gather(values, 3, index)[..., 0].double().numpy())


def another_key(task: Task) -> Int[Tensor, " prompt"]:
    """One key of each prompt's first half, drawn at random, position 0 left out."""
    generator = torch.Generator().manual_seed(task.seed + 2)
    half = (task.batch.lengths // 2).clamp(min=2)
    draw = torch.rand(len(half), generator=generator)
    return task.batch.starts + 1 + (draw * (half - 1)).long()


def sink_indicator(parts: Sequence[Part]) -> PromptScores:
    """Whether alpha_1 > 0.3, per prompt; the null asks the same of another key in the prompt's first half."""

    def alpha(part: Part) -> Array:
        return at_column(part, "column_mean", prompts(part).batch.starts)

    def other(part: Part) -> Array:
        return at_column(part, "column_mean", another_key(prompts(part)))

    return PromptScores(
        stacked(parts, lambda part: (alpha(part) > SINK_EPSILON).astype(float)),
        stacked(parts, lambda part: (other(part) > SINK_EPSILON).astype(float)),
        ties=stacked(parts, alpha).mean(axis=0),
    )


def _first_token(parts: Sequence[Part]) -> PromptScores:
    return PromptScores(
        stacked(parts, lambda part: where_first_is_seen(traced(part), "first_1")),
        stacked(parts, lambda part: where_first_is_seen(traced(part), "random_key")),
    )


def _entropy(parts: Sequence[Part]) -> PromptScores:
    def uniform(part: Part) -> Array:
        """Entropy of attention spread evenly over what each query sees."""
        seen = visible_keys(traced(part)).clamp(min=1).double().log()
        rows = (prompts(part).batch.mask & later_rows(prompts(part)))[:, None, None]
        return np.asarray(mean_over(seen.expand_as(traced(part)["entropy"]), rows).numpy())

    return PromptScores(
        stacked(parts, lambda part: rows_mean(traced(part), "entropy", later_rows(prompts(part)))),
        stacked(parts, uniform),
    )


def _contrast(parts: Sequence[Part]) -> PromptScores:
    """First-token share on prose less that on code: a head dormant on prose and active on code is positive."""
    by_domain = {prompts(part).settings["domain"]: part for part in parts}
    prose, code = by_domain["prose"], by_domain["code"]
    return PromptScores(
        where_first_is_seen(traced(prose), "first_1"),
        where_first_is_seen(traced(code), "first_1"),
        unpaired=True,
    )


SINK = Detector(
    name="sink",
    title="Attention sink",
    probe="held_out",
    kind="text",
    measures="share of prompts in which position 0 draws more than 0.3 of the attention of all queries (Sink_1^0.3)",
    null="the same test for another key in the first half of the prompt",
    unit="share of prompts",
    positions="all queries that see the key",
    threshold=0.5,
    paper="Gu et al. 2025, When attention sink emerges in language models",
    url="https://arxiv.org/abs/2410.10781",
    statistics=sink_statistics,
    score=sink_indicator,
    curve="first_1",
    note="The indicator is taken per prompt and then averaged, as in the released code; equal scores are ranked by the "
    "mean of alpha_1. A head is named when it is a "
    "sink in most prompts; the paper reports only the average over all heads.",
)
FIRST_TOKEN = Detector(
    name="first_token",
    title="First-token share",
    probe="held_out",
    kind="text",
    measures="mean attention to position 0",
    null="mean attention to one other visible key, drawn at random per query",
    unit="attention mass",
    positions="all queries but the first that see position 0",
    threshold=0.5,
    paper="Qiu et al. 2025, Gated attention for large language models (F-attn)",
    url="https://arxiv.org/abs/2505.06708",
    statistics=sink_statistics,
    score=_first_token,
    curve="first_1",
    note="The paper averages over all queries; the first, whose share is 1 by necessity, is left out here.",
)
ENTROPY = Detector(
    name="entropy",
    title="Entropy",
    probe="held_out",
    kind="text",
    measures="mean entropy of a row of attention",
    null="entropy of uniform attention over the visible keys",
    unit="nats",
    positions="all queries but the first",
    threshold=None,
    paper="Clark et al. 2019, What does BERT look at?",
    url="https://arxiv.org/abs/1906.04341",
    statistics=lambda task: [S.entropy()],
    score=_entropy,
    better="lower",
    curve="entropy",
    note="Descriptive: the test only says that a head is more focused than uniform attention.",
)
ACTIVE_DORMANT = Detector(
    name="active_dormant",
    title="Active-dormant contrast",
    probe="held_out",
    kind="text",
    measures="first-token share on prose less first-token share on code",
    null="no difference between the domains (prompt labels shuffled)",
    unit="attention mass",
    positions="all queries but the first that see position 0",
    threshold=0.1,
    paper="Guo et al. 2024, Active-dormant attention heads",
    url="https://arxiv.org/abs/2410.13835",
    statistics=lambda task: [S.first(1)],
    score=_contrast,
    better="either",
    curve="first_1",
    note="The paper shows a scatter and names no threshold; 0.1 in absolute value is ours.",
)
