"""A model for a command: loaded under a display, certified, given back at the end."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, cast

from workbench.cli.options import DtypeName
from workbench.cli.progress import display
from workbench.cli.session import Session, listening
from workbench.errors import RequestError

if TYPE_CHECKING:
    from workbench.models.adapters import Adapter
    from workbench.studies import SurveySettings
    from workbench.tracing import Model

_LOADING_LOGGER = "workbench.models"


@contextmanager
def attached(session: Session, name: str, dtype: DtypeName | None, device: str | None) -> Iterator[Model]:
    """Load and certify a model; what takes time says so."""
    with display(session.err) as shown:
        shown.step("model", name, kept=False)
        session.silence_transformers()
        import torch

        from workbench.tracing import load

        began = time.monotonic()
        with listening(_LOADING_LOGGER, shown.note):
            wanted = None if dtype is None else getattr(torch, dtype.value)
            model = load(name, dtype=wanted, device=device, through=cast("Adapter | None", session.through))
    checks = model.certificate.checks
    session.note(
        f"{name}: {model.spec.n_layers} layers, {len(model.spec.heads())} heads, "
        f"{len(checks)} checks of its certificate passed, {time.monotonic() - began:.1f} s"
    )
    try:
        yield model
    finally:
        model.detach()


def default_run(command: str, model: str, *arguments: object) -> Path:
    """Where a command writes its run by default: one folder for each set of arguments, so that repeating the
    command finds what an interruption left."""
    slug = re.sub(r"[^a-z0-9.]+", "-", Path(model).name.lower()).strip("-.") or "model"
    digits = sha256(repr((model, *arguments)).encode()).hexdigest()[:6]
    return Path("runs") / f"{command}-{slug}-{digits}"


def count_steps(settings: SurveySettings) -> int:
    """Steps that a survey will tell its reporter of."""
    from workbench.heads.detection import choose

    kinds = {detector.kind for detector in choose(settings.detectors)}
    return len(kinds) + len(settings.verify) + 1


def predicted_peak(model: Model, settings: SurveySettings) -> str:
    """The prediction for the largest pass of a survey, as a sentence."""
    from workbench.heads import build_probe
    from workbench.heads.detection import choose
    from workbench.heads.kinds import KINDS, wanted_statistics

    found = []
    for kind in KINDS.values():
        detectors = [d for d in choose(settings.detectors) if d.kind == kind.name]
        if not detectors or not kind.traced:
            continue
        try:
            tasks = kind.tasks(model, settings.detection)
        except RequestError:
            if not settings.tolerant:
                raise
            continue
        for task in tasks:
            wanted = wanted_statistics(task, detectors)
            sites = tuple(dict.fromkeys(site for detector in detectors for site in detector.sites))
            found.append(model.predict_memory(task.batch, statistics=wanted, sites=sites))
    if any(settings.probe_of(name) == "held_out" for name in settings.verify):
        held_out = build_probe("held_out", model, settings.probes).tasks
        found += [model.predict_memory(task.batch, loss=True) for task in held_out]
    if not found:
        return "Memory is not predicted for decoding alone."
    return f"Memory: {max(found, key=lambda prediction: prediction.peak)} (the largest pass)."
