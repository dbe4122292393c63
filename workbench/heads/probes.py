"""What is measured before and after an ablation: a probe runs its prompts once and yields one number per prompt.

| probe | metrics | prompts |
| --- | --- | --- |
| `induction` | induction loss (nats per token), copy accuracy | random tokens, twice |
| `needle` | needle recall (ROUGE-1 of the greedy answer) | a fact in a long text |
| `answer` | log-probability of the gold answer, share of its tokens ranked first | the same, teacher-forced |
| `held_out` | held-out loss (nats per token) | prose and code |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Array
from workbench.heads.repeats import random_repeats
from workbench.tasks import (
    ANSWER_LOG_PROBABILITY,
    ANSWER_MATCH,
    COPY_ACCURACY,
    HELD_OUT_LOSS,
    INDUCTION_LOSS,
    NEEDLE_RECALL,
    Metric,
    Readings,
    Task,
    TextMetric,
    needle_grid,
    read_answers,
    text_domains,
)
from workbench.tracing import Edit, Model


@dataclass(frozen=True)
class Probe:
    """Prompts and the metrics that one run of them yields."""

    name: str
    tasks: tuple[Task, ...]
    metrics: tuple[Metric | TextMetric, ...]
    run: Callable[[Model, Task, Sequence[Edit]], Mapping[str, Array]]

    @property
    def caption(self) -> str:
        return " ".join(task.caption for task in self.tasks)

    def measure(self, model: Model, edits: Sequence[Edit] = ()) -> dict[str, Array]:
        """Each metric's value per prompt, all tasks one after the other."""
        found = [self.run(model, task, edits) for task in self.tasks]
        return {metric.name: np.concatenate([part[metric.name] for part in found]) for metric in self.metrics}


@dataclass(frozen=True)
class ProbeSettings:
    """Sizes of the probes' prompts; their seed is not the detectors', so that no head is tested on what found it."""

    seed: int = 1000
    bos_id: int | None = None
    induction_prompts: int = 6
    induction_length: int = 50
    needle_lengths: tuple[int, ...] = (160,)
    needle_depths: int = 2
    held_out_prompts: int = 6
    held_out_length: int = 64


def build_probe(name: str, model: Model, settings: ProbeSettings) -> Probe:
    """A probe for this model's tokenizer."""
    if name not in _BUILDERS:
        raise RequestError(f"No probe {name!r}; there are {', '.join(_BUILDERS)}.")
    return _BUILDERS[name](model, settings)


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise RequestError(
            "This probe is made of text and needs a tokenizer; load the model with one, or use 'induction'."
        )
    return model.tokenizer


def _readings(model: Model, task: Task, edits: Sequence[Edit]) -> Readings:
    """Losses and predictions at the answers, from one pass that computes no other logits."""
    found = model.trace(task.batch, edits=edits, logits=task.answer_positions.clamp(min=0))
    return read_answers(task, logits=found.logits)


def _array(values: Tensor) -> Array:
    return np.asarray(values.double().numpy())


def _induction(model: Model, settings: ProbeSettings) -> Probe:
    def run(model: Model, task: Task, edits: Sequence[Edit]) -> Mapping[str, Array]:
        readings = _readings(model, task, edits)
        return {metric.name: _array(metric(readings)) for metric in (INDUCTION_LOSS, COPY_ACCURACY)}

    task = random_repeats(
        model, settings.induction_prompts, settings.induction_length, 2, settings.seed, settings.bos_id
    )
    return Probe("induction", (task,), (INDUCTION_LOSS, COPY_ACCURACY), run)


def _needle(model: Model, settings: ProbeSettings) -> Probe:
    def run(model: Model, task: Task, edits: Sequence[Edit]) -> Mapping[str, Array]:
        assert task.decoding is not None
        written = model.generate(task.decoding, int(task.n_answers.max()) + 8, edits=edits).texts
        assert written is not None
        return {NEEDLE_RECALL.name: _array(NEEDLE_RECALL(written, task.answers))}

    return Probe("needle", (_grid(model, settings),), (NEEDLE_RECALL,), run)


def _answer(model: Model, settings: ProbeSettings) -> Probe:
    def run(model: Model, task: Task, edits: Sequence[Edit]) -> Mapping[str, Array]:
        readings = _readings(model, task, edits)
        return {metric.name: _array(metric(readings)) for metric in (ANSWER_LOG_PROBABILITY, ANSWER_MATCH)}

    return Probe("answer", (_grid(model, settings),), (ANSWER_LOG_PROBABILITY, ANSWER_MATCH), run)


def _grid(model: Model, settings: ProbeSettings) -> Task:
    return needle_grid(_tokenizer(model), settings.needle_lengths, settings.needle_depths, settings.seed)


def _held_out(model: Model, settings: ProbeSettings) -> Probe:
    def run(model: Model, task: Task, edits: Sequence[Edit]) -> Mapping[str, Array]:
        readings = read_answers(task, loss=model.trace(task.batch, edits=edits, loss=True).loss)
        return {HELD_OUT_LOSS.name: _array(HELD_OUT_LOSS(readings))}

    tasks = text_domains(
        _tokenizer(model), prompts=settings.held_out_prompts, length=settings.held_out_length, seed=settings.seed
    )
    return Probe("held_out", tuple(tasks.values()), (HELD_OUT_LOSS,), run)


_BUILDERS: dict[str, Callable[[Model, ProbeSettings], Probe]] = {
    "induction": _induction,
    "needle": _needle,
    "answer": _answer,
    "held_out": _held_out,
}
