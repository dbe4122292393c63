"""Kinds of prompts whose detectors intervene: heads ablated one by one (`causal`), and gated (`gating`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import RequestError
from workbench.heads.ablation_map import ablation_maps, worse
from workbench.heads.detector import Array, Detector, Kind, Progress
from workbench.heads.gating import Gates, GateSettings, fit_gates
from workbench.heads.probes import Probe, ProbeSettings, build_probe
from workbench.heads.settings import Settings
from workbench.tasks import Task
from workbench.tracing import Model
from workbench.tracing.edits import How

PREFIX = "ablation_"


@dataclass(frozen=True)
class SingleEffects:
    """`effects[how]`: how much worse the probe's first metric gets without each head, `[prompt, layer, head]`."""

    metric: str
    effects: dict[How, Array]


def causal_probe(model: Model, settings: Settings) -> Probe:
    """The probe that single heads are tested by, with the few short prompts that a pass for each head allows."""
    return build_probe(
        settings.causal_probe,
        model,
        ProbeSettings(
            seed=settings.seed,
            bos_id=settings.bos_id,
            induction_prompts=settings.causal_prompts,
            induction_length=settings.causal_length,
            needle_lengths=settings.greedy_lengths,
            needle_depths=settings.causal_prompts,
            held_out_prompts=settings.causal_prompts,
            held_out_length=2 * settings.causal_length + 1,
        ),
    )


def _tasks(model: Model, settings: Settings) -> list[Task]:
    return list(causal_probe(model, settings).tasks)


def _run_causal(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Any:
    """One task with each head ablated alone, in every form that the detectors ask for."""
    assert task is not None
    probe = causal_probe(model, settings)
    hows: list[Any] = [detector.name.removeprefix(PREFIX) for detector in detectors]
    one = Probe(probe.name, (task,), probe.metrics, probe.run, probe.decodes)
    found = ablation_maps(model, one, hows, progress=progress)
    metric = probe.metrics[0]
    sign = worse(metric.better)
    return SingleEffects(metric.name, {how: sign(made.effects[metric.name]) for how, made in found.items()})


def _run_gating(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Gates:
    if task is None:
        raise RequestError("Gates are fitted to the answers of prompts; give the kind a task.")
    wanted = GateSettings(steps=settings.gating_steps, masks=settings.gating_masks, seed=settings.seed)
    return fit_gates(model, task, wanted, progress=progress)


CAUSAL = Kind("causal", "short prompts, each head ablated alone", _tasks, _run_causal, costly=True)
GATING = Kind("gating", "short prompts, every head behind a gate that is learned", _tasks, _run_gating, costly=True)
