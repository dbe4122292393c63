"""Where an ablation's values come from: prompts that no metric is measured on."""

from __future__ import annotations

from workbench.heads import KINDS, Ablator, Probe, Settings
from workbench.heads.verification import other_prompts
from workbench.models import Batch
from workbench.tracing import Model
from workbench.tracing.edits import How

# Prompts that mean outputs are taken over.
REFERENCE_PROMPTS = 16


def reference_ablator(model: Model, how: How, probe: Probe, detection: Settings) -> Ablator:
    """Mean outputs come from the detectors' own prompts (prose and code; repeats where there is no tokenizer).

    Resampled ones have to stand in the probe's own columns, so they come from its other prompts.
    """
    if how not in ("mean", "q_mean"):
        return Ablator.prepare(model, how, other_prompts(probe.tasks[0].batch)) if how == "resample" else Ablator(how)
    kind = KINDS["text" if model.tokenizer is not None else "repeated"]
    tasks = kind.tasks(model, detection)
    ids = [row for task in tasks for row in task.batch.ids[: REFERENCE_PROMPTS // len(tasks)].tolist()]
    return Ablator.prepare(model, how, Batch.from_ids(ids))
