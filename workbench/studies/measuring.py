"""One kind of prompts, run for its detectors: all in one pass, or one by one where some cannot run on this model.

What a model cannot be asked (text without a tokenizer, learned sinks that it has not, more memory than there is) is
an error raised on purpose, `RequestError` or `ModelRefused`. A tolerant measurement notes its message as the reason;
any other error is a fault, and stops everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workbench.errors import ModelRefused, RequestError
from workbench.heads import HeadScores, Settings
from workbench.heads.detection import score
from workbench.heads.detector import Detector, Kind, Progress
from workbench.tasks import Task
from workbench.tracing import Model

CANNOT = (RequestError, ModelRefused)


@dataclass
class Measured:
    """Scores, of which detectors, on which prompts; and what could not run, with the reasons."""

    scores: list[HeadScores] = field(default_factory=list)
    detectors: list[Detector] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def skip(self, detectors: Sequence[Detector], error: Exception) -> None:
        self.skipped += [
            {"detector": one.name, "title": one.title, "kind": one.kind, "reason": str(error)} for one in detectors
        ]


def measure(
    model: Model,
    kind: Kind,
    detectors: Sequence[Detector],
    settings: Settings,
    *,
    tolerant: bool = False,
    progress: Progress | None = None,
) -> Measured:
    """Run a kind for its detectors. Unless `tolerant`, what cannot run raises its error."""
    found = Measured()
    try:
        found.tasks = kind.tasks(model, settings)
    except CANNOT as error:
        if not tolerant:
            raise
        found.skip(detectors, error)
        return found
    try:
        _run(found, model, kind, detectors, settings, tolerant, progress)
    except CANNOT as error:
        if not tolerant:
            raise
        if len(detectors) == 1:
            found.skip(detectors, error)
            return found
        # The pass serves all or none: which of them it cannot serve shows when each has its own.
        for detector in detectors:
            try:
                _run(found, model, kind, [detector], settings, tolerant, progress)
            except CANNOT as own:
                found.skip([detector], own)
    return found


def _run(
    found: Measured,
    model: Model,
    kind: Kind,
    detectors: Sequence[Detector],
    settings: Settings,
    tolerant: bool,
    progress: Progress | None,
) -> None:
    """One pass for these detectors, and their scores; an error of the pass itself is raised."""
    parts = kind.parts(model, detectors, found.tasks, settings, progress)
    for detector in detectors:
        try:
            found.scores.append(score(model, detector, parts, settings.seed))
            found.detectors.append(detector)
        except CANNOT as error:
            if not tolerant:
                raise
            found.skip([detector], error)
