"""Copy-paste retrieval: heads whose attention finds the needle token that is about to be written.

Wu et al. count a hit when, at the step that writes token y, the head's heaviest key lies in the needle and holds y
itself. Retrieval rows are those of the token *before* the answer token. Teacher-forced, the gold answer stands in
the prompt and one pass serves all steps; greedy, the model writes the answer itself and a trial counts only if it
succeeded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workbench.heads.detector import Array, Detector, Part, PromptScores, prompts, stacked, traced
from workbench.tasks import Task, accepted
from workbench.tracing import Statistic
from workbench.tracing import statistics as S
from workbench.tracing.generate import Generation


def answer_key_per_row(task: Task) -> Tensor:
    """For each query the key that holds the token to be copied, -1 for rows that write no answer token."""
    return task.keys["needle"][..., 0]


def permuted_key_per_row(task: Task) -> Tensor:
    """The null: the same rows, with the needle's tokens dealt out in another order (no row keeps its own)."""
    keys = answer_key_per_row(task).clone()
    generator = torch.Generator().manual_seed(task.seed + 3)
    for row in keys:
        at = (row >= 0).nonzero().flatten()
        if len(at) > 1:
            shift = int(torch.randint(1, len(at), (1,), generator=generator))
            row[at] = row[at].roll(shift)
        else:
            row[at] = -1
    return keys


def _statistics(task: Task) -> list[Statistic]:
    return [
        S.argmax(),
        S.at_keys("needle_key", answer_key_per_row(task)),
        S.at_keys("permuted_key", permuted_key_per_row(task)),
    ]


def _hits(part: Part, keys: Tensor) -> Array:
    """Distinct needle tokens that were the heaviest key when they were due, over the tokens that could be copied."""
    ids, span = prompts(part).batch.ids, prompts(part).columns("answer_in_needle")
    heaviest = traced(part)["argmax"]
    due = torch.where(keys >= 0, torch.gather(ids, 1, keys.clamp(min=0)), -1)
    found = torch.gather(ids[:, None, None].expand(*heaviest.shape[:3], -1), 3, heaviest.clamp(min=0))
    inside = torch.gather(span[:, None, None].expand(*heaviest.shape[:3], -1), 3, heaviest.clamp(min=0))
    hit = (found == due[:, None, None]) & inside & (heaviest >= 0)
    # Set semantics, as the paper defines: each key counts once.
    counted = torch.zeros(*heaviest.shape[:3], ids.shape[1])
    counted.scatter_add_(3, torch.where(hit, heaviest, 0), hit.float())
    counts = (keys >= 0).sum(1).clamp(min=1)[:, None, None]
    return np.asarray(((counted > 0).sum(-1) / counts).double().numpy())


def _retrieval(parts: Sequence[Part]) -> PromptScores:
    return PromptScores(
        stacked(parts, lambda part: _hits(part, answer_key_per_row(prompts(part)))),
        stacked(parts, lambda part: _hits(part, permuted_key_per_row(prompts(part)))),
    )


def _copy_mass(parts: Sequence[Part]) -> PromptScores:
    def mean(part: Part, name: str, keys: Tensor) -> Array:
        return np.asarray(traced(part).mean(name, keys >= 0).double().numpy())

    return PromptScores(
        stacked(parts, lambda part: mean(part, "needle_key", answer_key_per_row(prompts(part)))),
        stacked(parts, lambda part: np.nan_to_num(mean(part, "permuted_key", permuted_key_per_row(prompts(part))))),
    )


def _greedy(parts: Sequence[Part]) -> PromptScores:
    """Trials that the model got right; a null from the needle's tokens in shuffled order."""
    values, nulls = [], []
    for task, found in parts:
        assert task is not None and isinstance(found, Generation) and found.texts is not None
        assert task.decoding is not None
        generator = torch.Generator().manual_seed(task.seed + 4)
        asked = [ids[mask] for ids, mask in zip(task.decoding.ids, task.decoding.mask, strict=True)]
        for index in accepted(found.texts, task.answers).nonzero().flatten().tolist():
            prompt = asked[index]
            assert task.answer_keys is not None
            span = task.answer_keys[index][task.answer_keys[index] >= 0]
            written = found.ids[index][found.ids[index] >= 0]
            shuffled = written[torch.randperm(len(written), generator=generator)]
            values.append(_greedy_hits(found["argmax"][index], prompt, written, span))
            nulls.append(_greedy_hits(found["argmax"][index], prompt, shuffled, span))
    shape = (0, *parts[0].found["argmax"].shape[1:3])
    return PromptScores(np.stack(values) if values else np.zeros(shape), np.stack(nulls) if nulls else np.zeros(shape))


def _greedy_hits(heaviest: Tensor, prompt: Tensor, written: Tensor, span: Tensor) -> Array:
    """As `_hits`, for one decoded prompt: `heaviest` `[layer, head, step]` counts from the prompt's first token."""
    steps = len(written)
    keys = heaviest[..., :steps]
    text = torch.cat([prompt, written])
    hit = (text[keys.clamp(min=0)] == written) & torch.isin(keys, span)
    counted = torch.zeros(*keys.shape[:2], len(text)).scatter_add_(2, torch.where(hit, keys, 0), hit.float())
    return np.asarray(((counted > 0).sum(-1) / max(1, len(span))).double().numpy())


RETRIEVAL = Detector(
    name="retrieval",
    title="Retrieval (copy-paste)",
    probe="needle",
    kind="needle",
    measures="share of the answer's tokens that were the head's heaviest key when they were due (gold answer given)",
    null="the same with the needle's tokens in another order",
    unit="share of tokens",
    positions="rows that write the answer",
    threshold=0.1,
    paper="Wu et al. 2024, Retrieval head mechanistically explains long-context factuality",
    url="https://arxiv.org/abs/2404.15574",
    statistics=_statistics,
    score=_retrieval,
    curve="needle_key",
    note="Each needle token counts once, as the paper defines; its code counts every hit and can exceed 1. Teacher-"
    "forced: every trial counts, whether or not the model would have succeeded.",
)
COPY_MASS = Detector(
    name="copy_mass",
    title="Copy mass",
    probe="needle",
    kind="needle",
    measures="mean attention to the needle token that is due (gold answer given)",
    null="mean attention to another of the needle's answer tokens",
    unit="attention mass",
    positions="rows that write the answer",
    threshold=0.1,
    paper="after Wu et al. 2024; mass in place of the heaviest key, as in Zhu et al. 2025, CompressKV",
    url="https://arxiv.org/abs/2508.02401",
    statistics=_statistics,
    score=_copy_mass,
    curve="needle_key",
    note="Graded where the copy-paste score is all or nothing: a head behind a strong sink still shows. CompressKV "
    "sums the mass on the whole needle; here it is the due token's, so that the null is sharp. The threshold is ours.",
)
RETRIEVAL_GREEDY = Detector(
    name="retrieval_greedy",
    title="Retrieval (greedy)",
    probe="needle",
    kind="needle_greedy",
    measures="share of the needle's answer tokens that were the head's heaviest key when the model wrote them itself",
    null="the same with the written tokens in shuffled order",
    unit="share of tokens",
    positions="decoding steps of accepted trials (ROUGE-1 recall above 0.5)",
    threshold=0.1,
    paper="Wu et al. 2024, Retrieval head mechanistically explains long-context factuality",
    url="https://arxiv.org/abs/2404.15574",
    statistics=lambda task: [S.argmax()],
    score=_greedy,
    note="As the paper runs it: greedy decoding, failed trials left out.",
)
