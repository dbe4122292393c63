"""Attribution and discovery as runs: `baseline`, then `search`, whose scores are written down whole.

The kinds are `attribute` (estimates from gradients, or what parts write straight to the logits) and `discover` (what a
search keeps); `workbench.studies.circuit_scores` says what the tables and arrays are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from workbench.circuits import direct_logit_attribution
from workbench.circuits.attribution import METHODS as ATTRIBUTION
from workbench.circuits.attribution import attribute
from workbench.circuits.discovery import METHODS as DISCOVERY
from workbench.circuits.discovery import discover, settings_of
from workbench.errors import RequestError
from workbench.runs import Run, RunWriter
from workbench.studies.circuit_scores import write_scores
from workbench.studies.pairs import baseline, describe
from workbench.studies.survey import Reporter, Silent, model_facts
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

Kind = Literal["attribute", "discover"]
# Direct logit attribution: what parts write to the logits, with nothing patched.
DIRECT = "direct"
STEPS = 2
_OURS = ("progress", "seed", "metric")


@dataclass(frozen=True)
class SearchSettings:
    """A method by name and the settings of its own; metric and seed are every method's."""

    kind: Kind = "attribute"
    method: str = "eap-ig"
    metric: str | None = None
    seed: int = 0
    own: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse methods and settings that do not exist; needs no model."""
        known = method_names(self.kind)
        if self.method not in known:
            raise RequestError(f"method={self.method!r} is unknown; choose from {', '.join(known)}.")
        if self.kind == "discover":
            settings = defaults(self.method)
            for name in self.own:
                if name not in settings:
                    listed = ", ".join(settings) or "none"
                    raise RequestError(f"{self.method} has no setting {name!r}; it has {listed}.")
        if self.method == DIRECT and (self.metric is not None or self.own):
            raise RequestError(f"{DIRECT} reads the logits of answers and foils as they are; leave other settings out.")

    def stated(self, task: PairTask) -> dict[str, Any]:
        """For a manifest."""
        plain = {"kind": self.kind, "method": self.method, "seed": self.seed, "task": task.name, "pairs": len(task)}
        return plain | ({} if self.metric is None else {"metric": self.metric}) | dict(self.own)


def method_names(kind: Kind) -> tuple[str, ...]:
    """The methods of a kind."""
    return (*ATTRIBUTION, DIRECT) if kind == "attribute" else tuple(DISCOVERY)


def defaults(method: str) -> dict[str, Any]:
    """Settings that a method of discovery has of its own, with their defaults."""
    return {name: value for name, value in settings_of(method).items() if name not in _OURS}


def search_run(
    model: Model,
    task: PairTask,
    path: str | Path,
    *,
    settings: SearchSettings | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    command: str | None = None,
    asked: tuple[str, str, int | None, int] | None = None,
) -> Run:
    """Score or search a model on a task into a run at `path`; continues one that was interrupted.

    `asked` is how model, task, pairs and seed were named, for whoever evaluates the run.
    """
    settings, told = settings or SearchSettings(), reporter or Silent()
    settings.check()
    stated = settings.stated(task)
    title = f"Parts that do {task.name} in {model.source.name}: {settings.method}"
    with RunWriter.open(
        path, kind=settings.kind, title=title, overwrite=overwrite, command=command,
        fingerprint={"model": model_facts(model), "settings": stated, "pairs": task.hash, "kind": settings.kind},
    ) as writer:  # fmt: skip
        describe(writer, model, task, stated)
        writer.manifest["circuits"] |= {"what": settings.kind, "method": settings.method, "asked": asked}
        baseline(model, task, writer, told, settings.metric)
        kept = writer.has("search")
        told.step("search", settings.method, kept)
        if not kept:
            began = time.monotonic()
            _search(model, task, settings, writer, told)
            writer.done("search", seconds=time.monotonic() - began)
        return writer.finish()


def _search(model: Model, task: PairTask, settings: SearchSettings, writer: RunWriter, told: Reporter) -> None:
    if settings.method == DIRECT:
        found = direct_logit_attribution(model, task, seed=settings.seed)
        writer.table("contributions", found.table())
        writer.table("prompt_contributions", found.per_prompt())
        writer.manifest["circuits"] |= {"error": found.error, "notes": list(found.notes), "metric": "logit_difference"}
        return
    own: dict[str, Any] = {"seed": settings.seed, **settings.own}
    if settings.metric is not None:
        own["metric"] = settings.metric
    if settings.kind == "attribute":
        write_scores(writer, attribute(model, task, settings.method, progress=told.advance, **own))
        return
    takes = settings_of(settings.method)
    if settings.metric is not None and "metric" not in takes:
        raise RequestError(f"{settings.method} has an objective of its own; leave the metric out.")
    if "progress" in takes:
        own["progress"] = told.advance
    write_scores(writer, discover(model, task, settings.method, **{k: v for k, v in own.items() if k in takes}))
