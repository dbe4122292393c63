"""Prompts on their way through a method: both runs, what stands in for clean values, and gradients at chosen points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.circuits.attribution.baselines import Baselines
from workbench.circuits.attribution.passes import Gradients, Key, Parts, Pass, differentiate, run
from workbench.circuits.attribution.rules import Attend
from workbench.circuits.attribution.settings import Settings
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Group, Metric
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

# A metric that may look at the clean run's logits: (logits, prompts of the task, clean logits) -> one a row.
Target = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Job:
    """What stays the same for all prompts; `frozen`: all norms' scales are taken as given."""

    model: Model
    task: PairTask
    graph: Graph
    target: Target
    settings: Settings
    baselines: Baselines
    attend: Attend
    frozen: bool
    work: dict[str, int] = field(default_factory=lambda: {"forwards": 0, "backwards": 0})

    @property
    def parallel(self) -> bool:
        return self.model.spec.parallel

    def plain(self, ids: Int[Tensor, "row token"]) -> Pass:
        """A run without gradients."""
        self.work["forwards"] += len(ids)
        return run(self.model, ids, self.attend, gradients=False)

    def differentiated(
        self, ids: Int[Tensor, "row token"], prompts: Int[Tensor, " row"], clean: Tensor, put: Mapping[Key, Tensor]
    ) -> tuple[Pass, Callable[[int | None], Gradients]]:
        """A run with gradients, and what gives them (once for each layer left out)."""
        self.work["forwards"] += len(ids)
        one = run(self.model, ids, self.attend, put=put)
        with torch.enable_grad():
            metric = self.target(one.logits, prompts, clean)

        def back(drop: int | None = None) -> Gradients:
            self.work["backwards"] += len(ids)
            return differentiate(one, metric, self.parallel, drop)

        return one, back


@dataclass(eq=False)
class Chunk:
    """Some prompts of a group: `[prompt, token, ...]` of both runs, and of the one that gradients begin with.

    `change` is what is put in place less what is there; `sign` turns its effect into what helps.
    """

    job: Job
    prompts: Int[Tensor, " prompt"]
    clean_ids: Int[Tensor, "prompt token"]
    corrupt_ids: Int[Tensor, "prompt token"]

    def __post_init__(self) -> None:
        job = self.job
        noising = job.settings.direction == "noising"
        clean, corrupt = job.plain(self.clean_ids), job.plain(self.corrupt_ids)
        self.clean_logits = clean.logits
        self.metrics = tuple(
            job.target(run.logits, self.prompts, clean.logits).double().cpu() for run in (clean, corrupt)
        )
        self.clean, self.corrupt = (run.parts(job.parallel) for run in (clean, corrupt))
        self.base = (clean if noising else corrupt).cut()
        self.base_ids = self.clean_ids if noising else self.corrupt_ids
        self.there = self.clean if noising else self.corrupt
        self.put = job.baselines.values(self.prompts, self.corrupt) if noising else self.clean
        self.change: Parts = {key: self.put[key] - value for key, value in self.there.items()}
        self.sign = -1.0 if noising else 1.0

    def at_base(self) -> tuple[Pass, Callable[[int | None], Gradients]]:
        """Gradients where the run begins."""
        return self.job.differentiated(self.base_ids, self.prompts, self.clean_logits, {})

    def between(self, key: Key, shares: Sequence[float], points: int) -> Iterator[tuple[Pass, Gradients]]:
        """Gradients where one part is so much of the clean run (`shares`) and the rest of what stands in for it.

        `points` of all prompts run together, point by point in rows. The part's ends are the two runs' own for
        `embed`, and else what is there and what is put in its place.
        """
        if key[0] == "embed":
            start, end = self.corrupt[key], self.clean[key]
        else:
            noising = self.job.settings.direction == "noising"
            start, end = (self.put[key], self.there[key]) if noising else (self.there[key], self.put[key])
        for first in range(0, len(shares), points):
            own = shares[first : first + points]
            mixed = torch.cat([start + share * (end - start) for share in own])
            rows = len(own)
            one, back = self.job.differentiated(
                self.base_ids.repeat(rows, 1),
                self.prompts.repeat(rows),
                self.clean_logits.repeat(rows, 1),
                {key: mixed},
            )
            yield one, back(None)


def chunks(job: Job, group: Group, prompts: int) -> Iterator[Chunk]:
    """A group's prompts, so many at a time."""
    clean, corrupt = group.cut(job.task.clean), group.cut(job.task.corrupt)
    for rows in torch.split(torch.arange(len(clean)), prompts):
        yield Chunk(job, group.prompts[rows], clean.ids[rows], corrupt.ids[rows])


def plain_target(measure: Metric) -> Target:
    """A metric that looks at one run alone."""

    def target(logits: Tensor, prompts: Tensor, clean: Tensor) -> Tensor:
        return measure(logits, prompts)

    return target


def divergence(logits: Tensor, prompts: Tensor, clean: Tensor) -> Float[Tensor, " row"]:
    """Kullback-Leibler divergence of a run from the clean one, negative so that higher is better; in nats."""
    own, whole = logits.float().log_softmax(-1), clean.detach().float().log_softmax(-1)
    return -(whole.exp() * (whole - own)).sum(-1)
