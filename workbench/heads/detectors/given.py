"""Retrieval by other prompts: facts that must be chained (HeadKV-R2), values of a JSON object (AttentionInfluence).

The gold answer is given and only its rows are measured, after prompts of any length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.heads.answers import given_answers, span_of
from workbench.heads.detector import Array, Detector, Part, Progress, PromptScores, prompts, stacked
from workbench.heads.detectors.needle import elsewhere
from workbench.heads.settings import Settings
from workbench.kernels.request import MAX_TOP_K
from workbench.tasks import NONE, REASONING_NEEDLES, Task, json_retrieval, needle_grid
from workbench.tracing import Model, Statistic
from workbench.tracing import statistics as S


def reasoning_needles(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[Task]:
    """Needles of two facts."""
    lengths, depths = settings.reasoning_lengths, settings.needle_depths
    return [needle_grid(tokenizer, lengths, depths, settings.seed, REASONING_NEEDLES)]


def json_objects(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[Task]:
    """JSON objects with one value asked for."""
    return [json_retrieval(tokenizer, settings.json_prompts, settings.json_pairs, settings.seed)]


def run_given(
    model: Model, task: Task, statistics: Sequence[Statistic], progress: Progress | None = None
) -> dict[str, Tensor]:
    """Statistics of the rows that write the gold answer, `[prompt, layer, head, answer token, ...]`."""
    return given_answers(model, task, statistics, progress).values


def _needle_sizes(task: Task) -> list[int]:
    spans = span_of(task, "needle")
    return (spans[:, 1] - spans[:, 0]).tolist()


def _top_keys(task: Task) -> list[Statistic]:
    return list(S.top_k(min(MAX_TOP_K, max(_needle_sizes(task)))))


def _heavy_mass(part: Part, keys: Tensor) -> Array:
    """Mean over steps of the probability of those keys among a prompt's k heaviest that are labelled."""
    task, found = prompts(part), part.found
    steps = task.n_answers.tolist()
    means = []
    for index, size in enumerate(_needle_sizes(task)):
        k = min(size, MAX_TOP_K)
        top = found["top_k"][index, :, :, : steps[index], :k]
        mass = found["top_k_mass"][index, :, :, : steps[index], :k].double()
        columns = torch.nn.functional.pad(keys[index], (0, 1))
        # -1 (fewer keys are visible) points at the entry added last, which is False.
        means.append((mass.nan_to_num() * columns[top]).sum(-1).mean(-1).numpy())
    return np.stack(means)


def _headkv(parts: Sequence[Part]) -> PromptScores:
    return PromptScores(
        stacked(parts, lambda part: _heavy_mass(part, prompts(part).columns("needle"))),
        stacked(parts, lambda part: _heavy_mass(part, elsewhere(prompts(part), prompts(part).seed + 5))),
    )


def _heaviest(task: Task) -> list[Statistic]:
    if task.answer_keys is None:
        raise RequestError(
            f"This detector needs answers whose tokens are followed to where they are copied from (answer_keys); "
            f"{task.name} has none. Use e.g. json_retrieval or needle_grid."
        )
    return [S.argmax()]


def _copies(part: Part, turned: bool) -> Array:
    """Distinct labelled keys that were the heaviest when their token was due (or another of them), over all of them."""
    task, heaviest = prompts(part), part.found["argmax"]
    assert task.answer_keys is not None
    generator = torch.Generator().manual_seed(task.seed + 3)
    shares = []
    for index, (ids, keys) in enumerate(zip(task.batch.ids, task.answer_keys, strict=True)):
        steps = (keys != NONE).nonzero().flatten()
        due = ids[keys[steps]]
        if turned and len(steps) > 1:
            due = due.roll(int(torch.randint(1, len(steps), (1,), generator=generator)))
        seen = heaviest[index][..., steps]
        span = task.columns("answer_in_needle")[index]
        hit = (ids[seen.clamp(min=0)] == due) & span[seen.clamp(min=0)] & (seen >= 0)
        counted = torch.zeros(*seen.shape[:2], len(ids)).scatter_add_(2, torch.where(hit, seen, 0), hit.float())
        shares.append(((counted > 0).sum(-1) / max(1, len(steps))).double().numpy())
    return np.stack(shares)


def _json(parts: Sequence[Part]) -> PromptScores:
    return PromptScores(
        stacked(parts, lambda part: _copies(part, turned=False)),
        stacked(parts, lambda part: _copies(part, turned=True)),
    )


HEADKV_R2 = Detector(
    name="headkv_r2",
    title="Retrieval and reasoning (HeadKV-R2)",
    probe="needle",
    kind="needle_reasoning",
    measures="mean probability of the needle's keys that are among the k heaviest (k the needle's length)",
    null="the same for an equally long span elsewhere in the haystack",
    unit="attention mass",
    positions="rows that write the gold answer to a question which chains two facts",
    threshold=None,
    paper="Fu et al. 2024, Not all heads matter: HeadKV",
    url="https://arxiv.org/abs/2410.19258",
    statistics=_top_keys,
    score=_headkv,
    note=f"No test of which token is looked at. k is at most {MAX_TOP_K}, the most that one pass keeps; longer needles "
    "are scored on so many keys. The published sum over steps is divided by the needle's length, this one by the "
    "number of steps, which makes it a mass. Teacher-forced: every trial counts, where the published loop decodes. No "
    "bar is published; the paper divides a cache by the scores. The needles are ours.",
)
JSON_RETRIEVAL = Detector(
    name="json_retrieval",
    title="Retrieval from JSON",
    probe="needle",
    kind="json",
    measures="share of the value's tokens that were the head's heaviest key when they were due (value given)",
    null="the same with the value's tokens in another order",
    unit="share of tokens",
    positions="rows that write the value asked for",
    threshold=0.1,
    paper="Hua et al. 2025, AttentionInfluence",
    url="https://arxiv.org/abs/2505.07293",
    statistics=_heaviest,
    score=_json,
    note="The copy-paste score of Wu et al. (and its bar) on AttentionInfluence's proxy task; that paper takes the top "
    "5 % of all heads, from 800 samples of up to 4,096 tokens with values of web text. Fewer and shorter objects here, "
    "values from pydoc's topics; each token counts once; a token that joins full stop and quotation mark is left out. "
    "`workbench.heads.influence` masks the heads on documents.",
)
