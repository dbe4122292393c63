"""What a worker does by name: plain fields in, plain results out, so that a trial can be sent to another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workbench.apps.readings import read_job
from workbench.apps.tokens import prompts
from workbench.apps.trials import read_trial, run_trial
from workbench.heads.detector import Progress
from workbench.tracing import Model

# The model, what was asked for, the folder of the lab, and who is told how far it is.
Job = Callable[[Model, Mapping[str, Any], Path, Progress], Mapping[str, Any]]


def _trial(model: Model, asked: Mapping[str, Any], folder: Path, progress: Progress) -> Mapping[str, Any]:
    del folder
    return run_trial(model, read_trial(asked), progress)


def _patterns(model: Model, asked: Mapping[str, Any], folder: Path, progress: Progress) -> Mapping[str, Any]:
    return prompts.measure(model, str(asked["prompt"]), prompts.patterns_folder(folder), progress)


JOBS: dict[str, Job] = {"trial": _trial, "patterns": _patterns, "reading": read_job}
