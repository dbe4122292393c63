"""Distributed alignment search: the directions of one site whose exchange moves the metric most.

A subspace with orthonormal columns Q is learned so that the receiving run, with Q Q^T (other - own) added to its
activation at one site and position, goes as far towards the other run's metric as it can (Geiger et al. 2024, arXiv
2303.02536, who train on the labels of the other run; here it is the task's metric):

1. Both runs are recorded once; the receiving one is taken up at the site's layer and first changed token.
2. Q is the orthonormal factor (QR) of a free matrix, which Adam moves; the weights stand still.
3. The best Q that was met is kept.

Directions are chosen to work on the prompts that they are trained on, so what they do there says little: learn on
some pairs (`task.select`), report others with `patch_subspaces`, and set `random_subspace` of equal rank beside them.
A subspace can also do more than the whole site, where the rest of it works the other way, and it can work through
directions that the model does not use by itself (Makelov et al. 2023, arXiv 2311.17030).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits import recorded
from workbench.circuits.blocks import Blocks, CannotRun
from workbench.circuits.discovery import concrete
from workbench.circuits.discovery.gated import frozen
from workbench.circuits.effects import DIRECTIONS
from workbench.circuits.engine import Engine, chunks
from workbench.circuits.lanes import Lane, sort_out
from workbench.circuits.patching import Progress
from workbench.circuits.recorded import Group, Metric, OfRun, Recorded, record
from workbench.circuits.spots import RESIDUAL, Spot
from workbench.circuits.subspaces import Basis, Subspace, Within, check_rank, dimension
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

SITES: frozenset[str] = RESIDUAL | {"z"}
# Rows that are run, and held for their gradients, together.
ROWS = 1024


@dataclass(frozen=True, eq=False)
class LearnedSubspace(Subspace):
    """A subspace found by training.

    `losses` are the mean metric of the training prompts before each step and after the last, negative for denoising;
    the basis is that of the lowest. `note` says if training was cut short.
    """

    losses: tuple[float, ...] = ()
    note: str = ""


def learn_subspace(
    model: Model,
    task: PairTask,
    spot: Spot,
    rank: int = 1,
    *,
    steps: int = 100,
    rate: float = 0.1,
    seed: int = 0,
    direction: str = "denoising",
    metric: str | Metric | None = None,
    progress: Progress | None = None,
    memory_limit: int | None = None,
) -> LearnedSubspace:
    """The `rank` directions at a spot whose exchange moves the metric most towards that of the other run.

    Args:
        spot: resid_pre, resid_mid, resid_post, attn_out, mlp_out or one head's z, at one position or role.
        steps: Adam's, on all of the task's prompts, at a `rate` that falls to nothing.
        direction: "denoising" puts what the clean run has along the directions into the corrupt run, to raise the
            metric; "noising" the reverse, to lower it.

    Other sites, and spots at which no prompt can be moved, are refused.
    """
    dim = _check(model, spot, rank, rate, direction)
    _, measure = recorded.metric_of(task, metric)
    parts = [_Part.of(model, task, group, spot, direction, measure, memory_limit) for group in recorded.groups(task)]
    if not any(one.lanes for one in parts):
        raise RequestError(
            f"{spot.node}.{spot.site} at {spot.position!r} moves no prompt of {task.name}: the runs do not differ yet, "
            "or nothing that is read comes of it. Choose another position."
        )
    free = torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed)).to(model.device)
    fit = _Fit(parts, spot, measure, free, rate, steps, -1.0 if direction == "denoising" else 1.0)
    with frozen(model.attachment.hf_model):
        _, note = concrete.train(steps, fit.step, progress)
        fit.weigh()
    return LearnedSubspace(fit.best, losses=tuple(fit.losses), note=note)


def _check(model: Model, spot: Spot, rank: int, rate: float, direction: str) -> int:
    """The site's dimension; refuses what has no directions to learn."""
    if spot.site not in SITES:
        raise RequestError(f"{spot.site} of {spot.node} cannot be learned; choose from {', '.join(sorted(SITES))}.")
    if spot.site == "z" and spot.head is None:
        raise RequestError(f"z of layer {spot.layer} has a space for each head; name one: 'L{spot.layer}H0'.")
    if spot.position is None:
        raise RequestError(f"{spot.node}.{spot.site} at every position: name one position, or a role of the task.")
    if direction not in DIRECTIONS:
        raise RequestError(f"direction={direction!r}: choose {' or '.join(DIRECTIONS)}.")
    if not rate > 0:
        raise RequestError(f"rate={rate}: the rate of learning is above 0.")
    dim = dimension(model, spot)
    check_rank(spot, rank, dim)
    return dim


@dataclass(eq=False)
class _Part:
    """One group of prompts, ready to be run from the spot on.

    `unmoved` is the summed metric of prompts that no patch changes, `count` how many prompts have the place.
    """

    group: Group
    engine: Engine
    other: Recorded
    lanes: list[Lane]
    unmoved: float
    count: int

    @classmethod
    def of(
        cls, model: Model, task: PairTask, group: Group, spot: Spot, direction: str, measure: Metric, limit: int | None
    ) -> _Part:
        receiving, giving = (task.clean, task.corrupt) if direction == "noising" else (task.corrupt, task.clean)
        own = (spot.place, spot.layer)
        base = record(model, group.cut(receiving), {*recorded.starting_sites(model), own}, limit)
        other = record(model, group.cut(giving), [own], limit)
        same = recorded.first_difference(base.batch, other.batch)
        try:
            engine = Engine(model.attachment, Blocks(model.attachment, group.tokens), base, OfRun(other, same))
            with torch.no_grad():
                engine.check()
        except CannotRun as reason:
            raise RequestError(f"{model.spec.architecture}: {reason}, which learning needs.") from None
        job = sort_out([(spot,)], task, group, same, engine.last)
        still = job.exists[0].clone()
        for lane in job.lanes:
            still[lane.prompts] = False
        scores = measure(base.logits, group.prompts).double().cpu()
        return cls(group, engine, other, job.lanes, float(scores[still].sum()), int(job.exists.sum()))

    def scores(self, spot: Spot, subspace: Subspace, measure: Metric) -> Iterator[Float[Tensor, " prompt"]]:
        """The metric of prompts that the exchange moves, a chunk at a time."""
        engine, found = self.engine, list[Tensor]()
        within = Within({replace(spot, position=None): subspace}, "exchange")
        engine.values = within.values(self.group, engine.blocks, engine.base, self.other)

        def finish(lanes: list[Lane], logits: Tensor) -> None:
            found.append(measure(logits, torch.cat([self.group.prompts[lane.prompts] for lane in lanes])))

        for chunk in chunks(self.lanes, ROWS):
            engine.run(chunk, finish)
            yield found.pop()


class _Fit:
    """A basis on its way, and the best so far."""

    def __init__(
        self, parts: list[_Part], spot: Spot, measure: Metric, free: Tensor, rate: float, steps: int, sign: float
    ) -> None:
        self.parts, self.spot, self.measure, self.sign = parts, spot, measure, sign
        self.rate, self.steps = rate, steps
        self.free = free.requires_grad_()
        self.optimiser = torch.optim.Adam([self.free], lr=rate)
        self.losses: list[float] = []
        self.best: Basis = torch.linalg.qr(free.detach()).Q

    def weigh(self) -> Float[Tensor, "dim rank"]:
        """Measure the present basis and keep it if it is the best; its gradient."""
        basis = torch.linalg.qr(self.free.detach()).Q.requires_grad_()
        gradient = torch.zeros_like(basis)
        total, count = sum(one.unmoved for one in self.parts), sum(one.count for one in self.parts)
        for part in self.parts:
            for scores in part.scores(self.spot, Subspace(basis), self.measure):
                # One chunk's activations are let go before the next one runs.
                gradient += torch.autograd.grad(self.sign / count * scores.sum(), basis)[0]
                total += float(scores.detach().double().sum())
        loss = self.sign * total / count
        if all(loss < one for one in self.losses):
            self.best = basis.detach().clone()
        self.losses.append(loss)
        return gradient

    def step(self, number: int) -> dict[str, float]:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * (1 - number / self.steps)
        gradient = self.weigh()
        (self.free.grad,) = torch.autograd.grad(torch.linalg.qr(self.free).Q, self.free, gradient)
        self.optimiser.step()
        return {"loss": self.losses[-1]}
