"""What a detector is: a task, the statistics it needs, and how they become a score per prompt and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from workbench.heads.inference import Better
from workbench.tasks import Task
from workbench.tracing import Statistic, Trace
from workbench.tracing.generate import Generation

# Detectors of one kind share their prompts and one forward pass.
Kind = Literal["text", "repeated", "needle", "needle_greedy"]
Array = np.ndarray[Any, np.dtype[np.float64]]


class Part(NamedTuple):
    """A task and what running it found."""

    task: Task
    found: Trace | Generation


@dataclass(frozen=True)
class PromptScores:
    """Scores per prompt, `[prompt, layer, head]`, and the same functional where the head's target is not.

    For a contrast of two samples (`unpaired`) the null holds the second sample and the score is the difference of
    means. `ties` ranks heads whose scores are equal (an indicator saturates).
    """

    values: Float[np.ndarray, "prompt layer head"]
    null: Float[np.ndarray, "other layer head"]
    unpaired: bool = False
    ties: Float[np.ndarray, "layer head"] | None = None


@dataclass(frozen=True)
class Detector:
    """A named score of a head.

    Attributes:
        measures: one sentence, for captions: what the number is.
        null: one sentence: what the null is.
        positions: which rows are averaged.
        threshold: the published (or, where none is published, customary) bar for naming a head; None for none.
        statistics: what the pass must measure on a task.
        score: from all parts of the kind to scores per prompt.
        curve: the statistic whose course over positions shows the head at work.
        note: known conflicts between paper and code, and which side we took.
    """

    name: str
    title: str
    kind: Kind
    measures: str
    null: str
    unit: str
    positions: str
    threshold: float | None
    paper: str
    url: str
    statistics: Callable[[Task], Sequence[Statistic]]
    score: Callable[[Sequence[Part]], PromptScores]
    better: Better = "higher"
    curve: str | None = None
    note: str = ""


def rows_mean(trace: Trace, name: str, rows: Tensor | None = None) -> Array:
    """Mean of a row statistic over the given rows of each prompt, as float64."""
    return np.asarray(trace.mean(name, rows).double().numpy())


def traced(part: Part) -> Trace:
    """The part's trace; kinds that decode have none."""
    assert isinstance(part.found, Trace)
    return part.found


def stacked(parts: Sequence[Part], one: Callable[[Part], Array]) -> Array:
    """Per-prompt values of all parts, one below the other."""
    return np.concatenate([one(part) for part in parts])
