"""What a task is scored by: one number a prompt, with its unit and which way is better.

The model is read once (`read_answers`): for each answer token the loss in nats and the most likely token.
Metrics are functions of these readings alone, so the same ones serve a clean run, an ablated one and a
random control.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.tasks.task import NONE, Task

GATE = 0.5

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class Readings:
    """For each answer token its loss in nats (NaN: none) and the most likely token (-1: none or unknown)."""

    loss: Float[Tensor, "prompt answer"]
    predicted: Int[Tensor, "prompt answer"]
    expected: Int[Tensor, "prompt answer"]


@dataclass(frozen=True)
class Metric:
    """A named function of the readings, one value a prompt."""

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    function: Callable[[Readings], Float[Tensor, " prompt"]]

    def __call__(self, readings: Readings) -> Float[Tensor, " prompt"]:
        return self.function(readings)


def read_answers(
    task: Task,
    *,
    logits: Float[Tensor, "prompt row vocab"] | None = None,
    loss: Float[Tensor, "prompt row"] | None = None,
) -> Readings:
    """Readings at the answers from logits, or from next-token losses alone (then no token is known).

    ``logits`` has one row for each column of the batch, or one for each of ``answer_positions``;
    ``loss[:, r]`` is the loss of the token *behind* column r, as in a trace.
    """
    if (logits is None) == (loss is None):
        raise RequestError("Give either logits or loss.")
    there = task.answer_positions != NONE
    row = task.answer_positions.clamp(min=0)
    if loss is not None:
        if loss.shape != (len(task), task.batch.ids.shape[1] - 1):
            raise RequestError(
                f"loss has shape {tuple(loss.shape)}; this task needs "
                f"{(len(task), task.batch.ids.shape[1] - 1)}: a value for each token but the first."
            )
        found = loss.float().cpu().gather(1, row).masked_fill(~there, torch.nan)
        return Readings(found, torch.full_like(task.answer_ids, NONE), task.answer_ids)
    assert logits is not None
    at_answers = _rows(task, logits.cpu(), row)
    target = task.answer_ids.clamp(min=0)
    # In pieces of a prompt, so that no float32 copy of all logits is made.
    losses = [
        torch.nn.functional.cross_entropy(one.float(), ids, reduction="none")
        for one, ids in zip(at_answers, target, strict=True)
    ]
    return Readings(
        torch.stack(losses).masked_fill(~there, torch.nan),
        at_answers.argmax(dim=-1).masked_fill(~there, NONE),
        task.answer_ids,
    )


def _rows(
    task: Task, logits: Float[Tensor, "prompt row vocab"], row: Int[Tensor, "prompt answer"]
) -> Float[Tensor, "prompt answer vocab"]:
    shape = logits.shape[:2]
    if shape == task.answer_positions.shape:
        return logits
    if shape == task.batch.ids.shape:
        return logits.take_along_dim(row[..., None], dim=1)
    raise RequestError(
        f"logits of shape {tuple(logits.shape)} fit neither the {tuple(task.batch.ids.shape)} columns of the "
        f"batch nor the {tuple(task.answer_positions.shape)} answers."
    )


def _mean_loss(readings: Readings) -> Float[Tensor, " prompt"]:
    return readings.loss.nanmean(dim=1)


def _perplexity(readings: Readings) -> Float[Tensor, " prompt"]:
    return readings.loss.nanmean(dim=1).exp()


def _mean_log_probability(readings: Readings) -> Float[Tensor, " prompt"]:
    return -readings.loss.nanmean(dim=1)


def _match_share(readings: Readings) -> Float[Tensor, " prompt"]:
    there = readings.expected != NONE
    if bool((readings.predicted[there] == NONE).any()):
        raise RequestError("This metric needs the most likely tokens: read the answers from logits, not from loss.")
    right = (readings.predicted == readings.expected) & there
    return right.sum(dim=1) / there.sum(dim=1)


INDUCTION_LOSS = Metric("induction_loss", "Loss on the repeated tokens", "nats per token", "lower", _mean_loss)
COPY_ACCURACY = Metric("copy_accuracy", "Repeated tokens predicted right", "share", "higher", _match_share)
HELD_OUT_LOSS = Metric("held_out_loss", "Loss on ordinary text", "nats per token", "lower", _mean_loss)
# Each prompt's own, so that there is an interval over prompts; a corpus perplexity is the exponential of the mean loss.
PERPLEXITIES: dict[str, Metric] = {
    domain: Metric(f"perplexity_{domain}", f"Perplexity on {domain}", "perplexity", "lower", _perplexity)
    for domain in ("prose", "code")
}
ANSWER_LOG_PROBABILITY = Metric(
    "answer_log_probability",
    "Log-probability of the answer",
    "nats per token",
    "higher",
    _mean_log_probability,
)
ANSWER_MATCH = Metric("answer_match", "Answer tokens predicted right", "share", "higher", _match_share)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *(INDUCTION_LOSS, COPY_ACCURACY, HELD_OUT_LOSS, ANSWER_LOG_PROBABILITY, ANSWER_MATCH),
        *PERPLEXITIES.values(),
    )
}


@dataclass(frozen=True)
class TextMetric:
    """A named function of what was generated and what was asked for."""

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    function: Callable[[str, str], float]

    def __call__(self, generated: Sequence[str], answers: Sequence[str]) -> Float[Tensor, " prompt"]:
        if len(generated) != len(answers):
            raise RequestError(f"{len(generated)} generated texts for {len(answers)} answers; give one for each.")
        pairs = zip(generated, answers, strict=True)
        return torch.tensor([self.function(text, answer) for text, answer in pairs], dtype=torch.float32)


def rouge1_recall(generated: str, answer: str) -> float:
    """ROUGE-1 recall: the share of the answer's words, lower case and counted, that were generated."""
    wanted = Counter(_WORD.findall(answer.lower()))
    if not wanted:
        raise RequestError(f"The answer {answer!r} has no words to be recalled.")
    found = Counter(_WORD.findall(generated.lower()))
    return sum((wanted & found).values()) / sum(wanted.values())


NEEDLE_RECALL = TextMetric("needle_recall", "Words of the answer generated", "share", "higher", rouge1_recall)


def needle_recall(generated: str, answer: str) -> float:
    """How much of the needle's answer a generated text recalls, 0 to 1."""
    return rouge1_recall(generated, answer)


def accepted(generated: Sequence[str], answers: Sequence[str]) -> Bool[Tensor, " prompt"]:
    """Which prompts count as retrieved: ROUGE-1 recall above one half."""
    return NEEDLE_RECALL(generated, answers) > GATE
