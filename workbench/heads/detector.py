"""What a detector is: a kind of prompts, the statistics it needs, and how they become a score per prompt and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.inference import Better
from workbench.heads.settings import Settings
from workbench.tasks import Task
from workbench.tracing import Model, Statistic, Trace
from workbench.tracing.standing import EditedModel

Progress = Callable[[int, int], None]
Array = np.ndarray[Any, np.dtype[np.float64]]


class Part(NamedTuple):
    """A task (none where weights alone are read) and what running it found: a `Trace`, or what the kind returns."""

    task: Task | None
    found: Any


@dataclass(frozen=True)
class PromptScores:
    """Scores per prompt, `[prompt, layer, head]`, and the same functional where the head's target is not.

    For a contrast of two samples (`unpaired`) the null holds the second sample and the score is the difference of
    means. An `exact` score has one row and no sampling error (it is read off the weights); its null holds random
    draws, or nothing. `ties` ranks heads whose scores are equal (an indicator saturates).
    """

    values: Float[np.ndarray, "prompt layer head"]
    null: Float[np.ndarray, "other layer head"]
    unpaired: bool = False
    exact: bool = False
    ties: Float[np.ndarray, "layer head"] | None = None


@dataclass(frozen=True)
class Kind:
    """Prompts that several detectors share, and the one run that serves them all.

    Attributes:
        tasks: the prompts for a model (none where weights alone are read).
        run: one task (or None) with everything that the detectors ask for.
        traced: whether `run` is one trace of each task, whose memory can be predicted.
        costly: takes minutes where others take seconds; an atlas runs it only when asked for.
    """

    name: str
    title: str
    tasks: Callable[[Model, Settings], list[Task]]
    run: Callable[[Model, Task | None, Sequence[Detector], Settings, Progress | None], Any]
    traced: bool = False
    costly: bool = False

    def parts(
        self,
        model: Model,
        detectors: Sequence[Detector],
        tasks: Sequence[Task],
        settings: Settings,
        progress: Progress | None = None,
    ) -> list[Part]:
        """Every task run once, with what these detectors need of it; `RequestError` where an edit would not be seen."""
        if isinstance(model, EditedModel) and not self.traced:
            raise RequestError(
                f"Prompts of the kind {self.name!r} read weights, gradients or single calls, where the ablation of "
                f"{', '.join(model.removed['heads'])} would not be seen; measure these detectors on the intact model."
            )
        if not tasks:
            return [Part(None, self.run(model, None, detectors, settings, progress))]
        parts, total, done = [], sum(len(task) for task in tasks), 0
        for task in tasks:
            count = None if progress is None else partial(_shifted, progress, done, total)
            parts.append(Part(task, self.run(model, task, detectors, settings, count)))
            done += len(task)
            if progress is not None:
                progress(done, total)
        return parts


def _shifted(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def nothing(task: Task) -> Sequence[Statistic]:
    """No statistics: a detector that reads sites or weights."""
    return ()


@dataclass(frozen=True)
class Detector:
    """A named score of a head.

    Attributes:
        kind: name of the prompts it shares with others (`workbench.heads.kinds.KINDS`).
        measures: one sentence, for captions: what the number is.
        null: one sentence: what the null is.
        positions: which rows are averaged.
        threshold: the published (or, where none is published, customary) bar for naming a head; None for none.
        statistics: what the pass must measure on a task; `sites` what else it must keep.
        score: from all parts of the kind to scores per prompt.
        curve: the statistic whose course over positions shows the head at work.
        probe: what should suffer without the heads it names (`workbench.heads.probes`); None if it claims nothing.
        note: known conflicts between paper and code, and which side we took.
        costly: takes minutes where others take seconds (trains, or patches head by head); so does all of a `Kind`
            that is.
    """

    name: str
    title: str
    kind: str
    measures: str
    null: str
    unit: str
    positions: str
    threshold: float | None
    paper: str
    url: str
    score: Callable[[Sequence[Part]], PromptScores]
    statistics: Callable[[Task], Sequence[Statistic]] = nothing
    sites: tuple[str, ...] = ()
    better: Better = "higher"
    curve: str | None = None
    probe: str | None = None
    note: str = ""
    costly: bool = False


def rows_mean(trace: Trace, name: str, rows: Tensor | None = None) -> Array:
    """Mean of a row statistic over the given rows of each prompt, as float64."""
    return np.asarray(trace.mean(name, rows).double().numpy())


def prompts(part: Part) -> Task:
    """The part's task; kinds that read weights have none."""
    assert part.task is not None
    return part.task


def traced(part: Part) -> Trace:
    """The part's trace; kinds that decode have none."""
    assert isinstance(part.found, Trace)
    return part.found


def stacked(parts: Sequence[Part], one: Callable[[Part], Array]) -> Array:
    """Per-prompt values of all parts, one below the other."""
    return np.concatenate([one(part) for part in parts])
