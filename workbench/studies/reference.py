"""Where an ablation's values come from: prompts that no metric is measured on."""

from __future__ import annotations

from workbench.heads import KINDS, Ablator, Probe, Settings
from workbench.heads.verification import other_prompts
from workbench.models import Batch
from workbench.tracing import Model
from workbench.tracing.edits import How

# Prompts that mean outputs are taken over.
REFERENCE_PROMPTS = 16


def reference_ablator(model: Model, how: How, probe: Probe, detection: Settings, strength: float = 1.0) -> Ablator:
    """Mean outputs come from the detectors' own prompts (prose and code; repeats where there is no tokenizer).

    Resampled ones have to stand in the probe's own columns, so they come from its other prompts.
    """
    if how not in ("mean", "q_mean"):
        others = other_prompts(probe.tasks[0].batch) if how == "resample" else None
        return Ablator(how, reference=others, strength=strength)
    return Ablator.prepare(model, how, reference_prompts(model, detection), strength)


def reference_prompts(model: Model, detection: Settings) -> Batch:
    """Some of the detectors' own prompts: prose and code, repeats where there is no tokenizer."""
    kind = KINDS["text" if model.tokenizer is not None else "repeated"]
    tasks = kind.tasks(model, detection)
    return Batch.from_ids([row for task in tasks for row in task.batch.ids[: REFERENCE_PROMPTS // len(tasks)].tolist()])
