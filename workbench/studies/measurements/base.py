"""What a measurement is: named parameters with their defaults, and a function from a model to tidy tables.

A measurement's `version` belongs to the identity of every cell it measured. Raise it when a change of code changes
numbers: cells of the old version are then measured anew, and no table mixes both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from workbench.errors import RequestError
from workbench.heads import KINDS, Ablator, HeadScores, Probe, ProbeSettings, Settings, build_probe
from workbench.heads.detection import choose
from workbench.heads.detector import Progress
from workbench.models import Head
from workbench.studies.measuring import measure
from workbench.studies.reference import reference_ablator
from workbench.tasks import PairTask, Task
from workbench.tracing import Model
from workbench.tracing.edits import How

Tables = dict[str, pd.DataFrame]
Sizes = dict[str, int | str | tuple[int, ...]]
# Prompts of probes are never those that found the heads.
PROBE_SEED = 1000


class Parameters(BaseModel):
    """What a cell's numbers depend on; every value can be written in a study file, and none is mutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0


@dataclass(frozen=True)
class Measurement:
    """A named measurement.

    Attributes:
        version: raised when a change of code changes numbers.
        title: what is measured, in a few words.
        tables: the tables that it may yield.
        family: those whose p-values make one family of tests over all cells of a study.
    """

    name: str
    version: int
    title: str
    parameters: type[Parameters]
    run: Callable[[Bench, Any, Progress | None], Tables]
    tables: tuple[str, ...]
    family: tuple[str, ...] = ()


class Bench:
    """A model in this process, and what cells measured one after the other share: head scores, and prompts seen."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._scores: dict[tuple[tuple[str, ...], Settings], tuple[HeadScores, list[Task]]] = {}
        self._prompts: dict[str, dict[str, Any]] = {}

    def scores(self, detectors: Sequence[str], settings: Settings, progress: Progress | None = None) -> HeadScores:
        """Scores by the named detectors; asked for again, they are not measured again."""
        key = (tuple(detectors), settings)
        if key not in self._scores:
            chosen, parts, tasks = choose(detectors), [], []
            for kind in KINDS.values():
                of_kind = [detector for detector in chosen if detector.kind == kind.name]
                if of_kind:
                    found = measure(self.model, kind, of_kind, settings, progress=progress)
                    parts += found.scores
                    tasks += found.tasks
            self._scores[key] = HeadScores.join(parts), tasks
        scores, seen = self._scores[key]
        self.note(seen)
        return scores

    def probe(self, name: str, settings: ProbeSettings) -> Probe:
        """A probe, its prompts noted."""
        probe = build_probe(name, self.model, settings)
        self.note(probe.tasks)
        return probe

    def ablator(self, how: How, probe: Probe, settings: Settings, strength: float = 1.0) -> Ablator:
        """A form of ablation with what it needs."""
        return reference_ablator(self.model, how, probe, settings, strength)

    def note(self, tasks: Iterable[Task]) -> None:
        """Prompts that the cell at hand reads."""
        for task in tasks:
            self._prompts[task.hash] = {
                "name": task.name, "n": len(task), "tokens": int(task.batch.mask.sum()), "sha256": task.hash,
                "caption": task.caption, "specials": task.specials,
            }  # fmt: skip

    def note_pairs(self, task: PairTask) -> None:
        """Pairs that the cell at hand reads; their tokens are those of the clean prompts."""
        self._prompts[task.hash] = {
            "name": task.name, "n": len(task), "tokens": int(task.clean.mask.sum()), "sha256": task.hash,
            "caption": task.caption, "specials": task.specials,
        }  # fmt: skip

    def noted(self) -> list[dict[str, Any]]:
        """The prompts noted since the last call."""
        found, self._prompts = list(self._prompts.values()), {}
        return found


S = TypeVar("S", Settings, ProbeSettings)


def sized(settings: S, sizes: Mapping[str, Any], what: str) -> S:
    """Settings with some sizes changed by name; an unknown name is answered with the nearest."""
    known = [field.name for field in fields(settings) if field.name != "seed"]
    for name in sizes:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"{what} has no size {name!r}.{hint} There are {', '.join(known)}.")
    return replace(settings, **sizes)


def heads_of(table: pd.DataFrame) -> list[Head]:
    """The heads of a table with columns layer and head."""
    return [Head(int(layer), int(head)) for layer, head in zip(table["layer"], table["head"], strict=True)]


def spearman(a: Any, b: Any) -> float:
    """Rank correlation; NaN where one side is constant or has fewer than three values."""
    first, second = (pd.Series(np.asarray(side, dtype=float)).rank() for side in (a, b))
    if len(first) < 3 or first.nunique() < 2 or second.nunique() < 2:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])
