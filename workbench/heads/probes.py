"""What is measured before and after an ablation: a probe runs its prompts once and yields one number per prompt.

| probe | metrics | prompts |
| --- | --- | --- |
| `induction` | induction loss (nats per token), copy accuracy | random tokens, twice |
| `needle` | needle recall (ROUGE-1 of the greedy answer) | a fact in a long text |
| `answer` | log-probability of the gold answer, share of its tokens ranked first | the same, teacher-forced |
| `json` | the same as `answer` | a value of a JSON object |
| `held_out` | held-out loss (nats per token) | prose and code |
| `perplexity` | perplexity on prose, perplexity on code (each prompt's own) | prose, code |

In which phase an ablation acts is a setting: probes that decode pass it on, those that are given the answer take the
rows that produce all but its first token for the steps of decoding, and the others have no such phases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
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
    PERPLEXITIES,
    Metric,
    Readings,
    Task,
    TextMetric,
    needle_grid,
    read_answers,
    text_domains,
)
from workbench.tasks.json_retrieval import json_retrieval
from workbench.tracing import Edit, Model
from workbench.tracing.edits import Ablation
from workbench.tracing.generate import PHASES, Phase


@dataclass(frozen=True)
class Probe:
    """Prompts and the metrics that one run of them yields.

    `run` gives each metric's value per prompt of a task; a metric may belong to some of the tasks alone. `decodes`
    tells that the model writes by itself.
    """

    name: str
    tasks: tuple[Task, ...]
    metrics: tuple[Metric | TextMetric, ...]
    run: Callable[[Model, Task, Sequence[Edit]], Mapping[str, Array]]
    decodes: bool = False

    @property
    def caption(self) -> str:
        return " ".join(task.caption for task in self.tasks)

    def measure(self, model: Model, edits: Sequence[Edit] = ()) -> dict[str, Array]:
        """Each metric's value per prompt, all tasks that have it one after the other."""
        found = [self.run(model, task, edits) for task in self.tasks]
        return {
            metric.name: np.concatenate([part[metric.name] for part in found if metric.name in part])
            for metric in self.metrics
        }


@dataclass(frozen=True)
class ProbeSettings:
    """Sizes of the probes' prompts; their seed is not the detectors', so that no head is tested on what found it."""

    seed: int = 1000
    bos_id: int | None = None
    induction_prompts: int = 6
    induction_length: int = 50
    needle_lengths: tuple[int, ...] = (160,)
    needle_depths: int = 2
    greedy_tokens: int = 50
    json_prompts: int = 4
    json_pairs: int = 5
    held_out_prompts: int = 6
    held_out_length: int = 64
    phase: Phase = "both"


def build_probe(name: str, model: Model, settings: ProbeSettings) -> Probe:
    """A probe for this model's tokenizer."""
    if name not in _BUILDERS:
        raise RequestError(f"No probe {name!r}; there are {', '.join(_BUILDERS)}.")
    check_phase(name, settings.phase)
    return _BUILDERS[name](model, settings)


def check_phase(name: str, phase: Phase) -> None:
    """Refuse a phase that there is not, or that the probe does not have."""
    if phase not in PHASES:
        raise RequestError(f"phase={phase!r} is no phase of decoding; choose one of {', '.join(PHASES)}.")
    if phase != "both" and name not in PHASED:
        raise RequestError(
            f"phase={phase!r}: the probe {name!r} does not answer anything, so that it has no phases; choose "
            f"one of {', '.join(PHASED)}."
        )


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
        written = model.generate(task.decoding, settings.greedy_tokens, edits=edits, phase=settings.phase).texts
        assert written is not None
        return {NEEDLE_RECALL.name: _array(NEEDLE_RECALL(written, task.answers))}

    return Probe("needle", (_grid(model, settings),), (NEEDLE_RECALL,), run, decodes=True)


def _answer(model: Model, settings: ProbeSettings) -> Probe:
    return _given("answer", _grid(model, settings), settings)


def _json(model: Model, settings: ProbeSettings) -> Probe:
    task = json_retrieval(_tokenizer(model), settings.json_prompts, settings.json_pairs, settings.seed)
    return _given("json", task, settings)


def _given(name: str, task: Task, settings: ProbeSettings) -> Probe:
    """How likely the gold answer is, which stands in the prompt."""

    def run(model: Model, task: Task, edits: Sequence[Edit]) -> Mapping[str, Array]:
        readings = _readings(model, task, in_phase(task, edits, settings.phase))
        return {metric.name: _array(metric(readings)) for metric in (ANSWER_LOG_PROBABILITY, ANSWER_MATCH)}

    return Probe(name, (task,), (ANSWER_LOG_PROBABILITY, ANSWER_MATCH), run)


def in_phase(task: Task, edits: Sequence[Edit], phase: Phase) -> Sequence[Edit]:
    """Ablations limited to the columns that a decoding model would have seen in this phase.

    The row before the first answer token ends the prompt, so it belongs to "prefill"; the rows after it are steps.
    """
    if phase == "both":
        return edits
    first = torch.where(task.answer_positions >= 0, task.answer_positions, task.batch.ids.shape[1]).amin(1)
    steps = torch.arange(task.batch.ids.shape[1])[None] > first[:, None]
    chosen = steps if phase == "decode" else ~steps
    return [
        replace(edit, positions=chosen if edit.positions is None else chosen & edit.positions)
        if isinstance(edit, Ablation)
        else edit
        for edit in edits
    ]


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


def _perplexity(model: Model, settings: ProbeSettings) -> Probe:
    def run(model: Model, task: Task, edits: Sequence[Edit]) -> Mapping[str, Array]:
        readings = read_answers(task, loss=model.trace(task.batch, edits=edits, loss=True).loss)
        metric = PERPLEXITIES[str(task.settings["domain"])]
        return {metric.name: _array(metric(readings))}

    return Probe("perplexity", _held_out(model, settings).tasks, tuple(PERPLEXITIES.values()), run)


# Probes whose prompts ask for an answer, so that reading and writing are two phases.
PHASED = ("needle", "answer", "json")
_BUILDERS: dict[str, Callable[[Model, ProbeSettings], Probe]] = {
    "induction": _induction,
    "needle": _needle,
    "answer": _answer,
    "json": _json,
    "held_out": _held_out,
    "perplexity": _perplexity,
}
