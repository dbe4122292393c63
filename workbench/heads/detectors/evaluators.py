"""The evaluators of Olsson et al. 2022 on random tokens: prefix matching, copying, and the QK trace.

* 25 random tokens four times behind a start token: attention to the tokens after earlier occurrences of the current
  one, and to the previous token (for the QK trace);
* 25 random tokens once without a start token: whether a head raises the logits of the tokens that it attends to. Full
  patterns of these short prompts are held; a length that makes them large is refused by the trace.

In-context learning and induction heads, arXiv 2209.11895.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.heads.composition import trace_products
from workbench.heads.detector import Array, Detector, Kind, Part, Progress, PromptScores, prompts, rows_mean
from workbench.heads.repeats import random_repeats
from workbench.heads.settings import Settings
from workbench.heads.weights import HeadWeights, weights_for
from workbench.models import Batch
from workbench.tasks import Task
from workbench.tracing import Model, Statistic, Trace
from workbench.tracing import statistics as S

ONCE = "random_tokens_once"
_SITES = ("pattern", "z")


@dataclass(frozen=True)
class Evaluated:
    """What the kind found on one of its two tasks."""

    weights: HeadWeights
    trace: Trace


def _tasks(model: Model, settings: Settings) -> list[Task]:
    """The repeated prompts, and the first copy of each of them alone."""
    size = (settings.evaluator_prompts, settings.evaluator_length, settings.evaluator_copies)
    repeated = random_repeats(model, *size, settings.seed, settings.bos_id)
    first = repeated.columns("first_copy")
    batch = Batch.from_ids([row[kept].tolist() for row, kept in zip(repeated.batch.ids, first, strict=True)])
    nothing = torch.empty(len(batch), 0, dtype=torch.long)
    once = Task(
        name=ONCE,
        caption=f"{len(batch)} prompts of {settings.evaluator_length} random tokens, no start token.",
        seed=settings.seed,
        batch=batch,
        specials="nothing before the text",
        answer_ids=nothing,
        answer_positions=nothing,
        settings={"prompts": len(batch), "length": settings.evaluator_length},
    )
    return [repeated, once]


def _statistics(task: Task) -> list[Statistic]:
    if task.name == ONCE:
        return []
    return [
        S.offset(-1),
        S.at_keys("induction_keys", task.keys["induction"]),
        S.at_keys("null_keys", task.keys["null"]),
    ]


def _run(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Evaluated:
    assert task is not None
    sites = _SITES if task.name == ONCE and any(one.name == "token_copying" for one in detectors) else ()
    statistics = list({s.name: s for one in detectors for s in one.statistics(task)}.values())
    found = model.trace(task.batch, statistics=statistics, sites=sites, progress=progress)
    return Evaluated(weights_for(model, settings), found)


EVALUATORS = Kind("evaluators", "random tokens, four times and once", _tasks, _run)


def _of(parts: Sequence[Part], once: bool) -> tuple[Task, Evaluated]:
    (part,) = (part for part in parts if (prompts(part).name == ONCE) is once)
    return prompts(part), part.found


def _prefix_matching(parts: Sequence[Part]) -> PromptScores:
    task, found = _of(parts, once=False)
    rows = task.columns("repeats")
    return PromptScores(rows_mean(found.trace, "induction_keys", rows), rows_mean(found.trace, "null_keys", rows))


def raised_share(raised: Tensor, pattern: Tensor, order: Tensor) -> Tensor:
    """Mean over queries but the first of sum_j A_ij raised_i[order_j] / sum_k raised_i[k]; `[prompt, head]`.

    `raised` and `pattern` are `[prompt, head, query, key]`, `raised` by the place of its token in the prompt.
    """
    attended = (pattern * raised[..., order]).sum(-1)
    total = raised.sum(-1)
    share = torch.where(total > 0, attended / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return share[..., 1:].mean(-1)


def _token_copying(parts: Sequence[Part]) -> PromptScores:
    task, found = _of(parts, once=True)
    weights, ids = found.weights, task.batch.ids
    length = ids.shape[1]
    columns = weights.unembedding[:, ids.to(weights.device)].permute(1, 0, 2)
    columns = columns - weights.unembedding.mean(1)[:, None]
    # Every token's logit read at another one's place.
    order = torch.roll(torch.arange(length), 1 + length // 2)
    values, null = [], []
    for layer in range(weights.spec.n_layers):
        z = found.trace.site("z", layer).to(weights.device, weights.dtype)
        written = torch.einsum("p t h d, h d e -> p h t e", z, weights.layer(layer).output)
        raised = (written @ columns[:, None]).clamp(min=0)
        pattern = found.trace.site("pattern", layer).to(raised)
        values.append(raised_share(raised, pattern, torch.arange(length)))
        null.append(raised_share(raised, pattern, order))
    return PromptScores(weights.padded(values), weights.padded(null))


def _qk_trace(parts: Sequence[Part]) -> PromptScores:
    """Prompts differ in the previous-token scores alone; the null shuffles these over the heads."""
    task, found = _of(parts, once=False)
    weights = found.weights
    later = torch.arange(task.batch.ids.shape[1]) > task.batch.starts[:, None]
    heads = weights.spec.heads()
    layer, head = np.array([h.layer for h in heads]), np.array([h.head for h in heads])
    previous = rows_mean(found.trace, "offset_-1", later)[:, layer, head]
    table = trace_products(weights)[:, :, layer, head]
    rng = np.random.default_rng(weights.seed)
    shuffled = np.stack([rng.permutation(row) for row in previous])

    def summed(scores: Array) -> Array:
        return np.asarray(np.einsum("l h e, p e -> p l h", table, scores))

    return PromptScores(summed(previous), summed(shuffled))


_PAPER = "Olsson et al. 2022, In-context learning and induction heads"
_URL = "https://arxiv.org/abs/2209.11895"

PREFIX_MATCHING = Detector(
    name="prefix_matching",
    title="Prefix matching",
    kind="evaluators",
    measures="mean attention to all tokens that followed earlier occurrences of the current token",
    null="as many keys displaced from the earlier occurrences by at most a quarter of the period",
    unit="attention mass",
    positions="queries of all copies but the first",
    threshold=0.4,
    paper=_PAPER,
    url=_URL,
    statistics=_statistics,
    score=_prefix_matching,
    probe="induction",
    note="25 tokens four times, as in the paper, whose text says 'preceded' and means 'followed'. Tokens are drawn "
    "from the whole vocabulary, where the paper leaves out the most and least common. 0.4 is customary, not published.",
)
TOKEN_COPYING = Detector(
    name="token_copying",
    title="Copying of attended tokens",
    kind="evaluators",
    measures="share of what the head adds to the logits of the prompt's tokens (above its mean over the vocabulary, "
    "where positive) that goes to the tokens it attends to, weighted by attention",
    null="the tokens shuffled: what goes to other tokens of the prompt",
    unit="share of raised logits",
    positions="all queries but the first, prompts of 25 random tokens without a start token",
    threshold=None,
    paper=_PAPER,
    url=_URL,
    statistics=_statistics,
    score=_token_copying,
    probe="induction",
    note="The paper describes the ratio in words and rescales it to -1 .. 1; the weighting by attention is our "
    "reading, and the share is not rescaled: 1 is a perfect copier, one over the number of tokens is chance.",
)
QK_TRACE = Detector(
    name="qk_trace",
    title="QK trace",
    kind="evaluators",
    measures="sum over earlier heads of their previous-token score times tr(W_E W_QK W_OV^T W_E^T): whether queries "
    "meet keys that hold the token before them",
    null="the previous-token scores shuffled over heads",
    unit="units of the weights",
    positions="all queries but the first (previous-token scores)",
    threshold=None,
    paper=_PAPER,
    url=_URL,
    statistics=_statistics,
    score=_qk_trace,
    probe="induction",
    note="Previous-token scores are taken on random tokens, where the paper has natural text. Rotary QK circuits enter "
    "by their mean over distances of 1 to 64 tokens. Intervals are over prompts: the weights have no sampling error.",
)
