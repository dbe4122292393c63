"""Answers to a task's prompts, the model's own or the gold ones, with statistics of the rows that write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Progress
from workbench.models import Batch
from workbench.tasks import NONE, Task, accepted
from workbench.tracing import Generation, Model, Statistic
from workbench.tracing.continuations import continue_greedily, continue_with
from workbench.tracing.generate import stop_tokens, texts_of


def span_of(task: Task, name: str) -> Tensor:
    """A labelled span `[prompt, 2]`, or a refusal that names what the task lacks."""
    if name not in task.spans:
        raise RequestError(
            f"This detector needs prompts with a span {name!r} labelled; {task.name} has "
            f"{', '.join(task.spans) or 'none'}. Use a task that hides something, e.g. needle_grid."
        )
    return task.spans[name]


def decoding_of(task: Task) -> Batch:
    """The prompts without a reply."""
    if task.decoding is None or not task.answers:
        raise RequestError(f"{task.name} has no prompts to be answered (decoding, answers); use e.g. needle_grid.")
    return task.decoding


def prompts_of(batch: Batch) -> list[list[int]]:
    """Token ids of each prompt, padding left out."""
    return [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]


def written_answers(
    model: Model,
    task: Task,
    statistics: Sequence[Statistic],
    max_new_tokens: int,
    progress: Progress | None = None,
    stop_ids: Sequence[int] | None = None,
) -> Generation:
    """What the model writes itself; statistics of the answers that are right (`accepted`), of others NaN or -1."""
    if model.tokenizer is None:
        raise RequestError("Answers are judged as text; load the model with a tokenizer.")
    stops = stop_tokens(model) if stop_ids is None else set(stop_ids)

    def right(index: int, written: Sequence[int]) -> bool:
        (text,) = texts_of(model, torch.tensor([list(written)]), stops) or [""]
        return bool(accepted([text], [task.answers[index]])[0])

    return continue_greedily(
        model, prompts_of(decoding_of(task)), max_new_tokens, statistics=statistics, stop_ids=stops, wanted=right,
        progress=progress,
    )  # fmt: skip


def given_answers(
    model: Model, task: Task, statistics: Sequence[Statistic], progress: Progress | None = None
) -> Generation:
    """The gold answers, teacher-forced: statistics of their rows alone."""
    there = task.answer_positions != NONE
    if not bool(there.any(1).all()):
        raise RequestError(f"{task.name}: a prompt has no answer labelled; use a task with gold answers.")
    prompts, answers = [], []
    for ids, positions, mask in zip(task.batch.ids, task.answer_positions, there, strict=True):
        rows = positions[mask]
        if not torch.equal(rows, torch.arange(int(rows[0]), int(rows[0]) + len(rows))):
            raise RequestError(f"{task.name}: the answer is no run of tokens; trace the task instead.")
        prompts.append(ids[: int(rows[0]) + 1].tolist())
        answers.append(ids[rows + 1].tolist())
    return continue_with(model, prompts, answers, statistics=statistics, progress=progress)
