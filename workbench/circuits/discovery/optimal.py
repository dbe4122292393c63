"""Optimal ablation: the constant that a head or an MLP can be replaced by at the least cost, and that cost.

a*_n = argmin_a E_x loss(model with n's output set to a), the same a for all prompts and positions; Delta_opt(n) is the
loss that is left over that of the model (Li & Janson 2024, arXiv 2409.09951).  Zero and means count against a part
that they take the model off its distribution; the best constant counts only the information that is gone.

A head's constant stands for z, so that it is something the head could write, and an MLP's for its output.  Training
begins at the mean or at zero, whichever costs less, and the best constant met is kept: on the training prompts
Delta_opt is never above either.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.discovery import concrete
from workbench.circuits.discovery.found import Found, Progress
from workbench.circuits.discovery.gated import Prepared, frozen, has_mlp, prepare
from workbench.circuits.discovery.objective import Objective
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Metric
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

SITES: tuple[Site, ...] = ("z", "mlp_out")
# Rows (nodes x prompts x tokens) that are trained together.
ROWS = 4096


class Part(NamedTuple):
    """A node: its place among the writers, and where its output stands."""

    writer: int
    site: Site
    layer: int
    head: int


def optimal_ablation(
    model: Model,
    task: PairTask,
    *,
    nodes: Sequence[str] | None = None,
    steps: int = 100,
    rate: float = 0.1,
    loss: Literal["kl", "metric"] | str = "kl",
    metric: str | Metric | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    memory_limit: int | None = None,
) -> Found:
    """Delta_opt of every head and MLP (or those named), each ablated alone; positive helps.

    `tensors` holds "mean" and "zero", the same cost under these constants `[writer]`, and the constants themselves,
    `constant NODE`. Means are over all positions of the references (of the corrupt prompts, where there are none).
    Steps are Adam's on all prompts, in units of the part's own size, at a rate that falls to nothing.
    """
    if rate <= 0:
        raise RequestError(f"rate={rate}: the rate of learning is above 0.")
    began = time.perf_counter()
    graph = Graph.of(model)
    parts = _parts(model, graph, nodes)
    prepared = prepare(model, task, SITES, ablation="mean", memory_limit=memory_limit)
    objective = Objective.of(task, [one.ends for one in prepared], loss, metric)
    costs = {how: np.full((len(task), len(graph.writers)), np.nan) for how in ("mean", "zero", "optimal")}
    constants: dict[str, np.ndarray] = {}
    work, note, done = 0, "", 0
    try:
        with frozen(model.attachment.hf_model):
            for chunk in _chunks(parts, prepared):
                fit = _Fit(chunk, prepared, objective, rate, steps)
                _, note = concrete.train(steps, fit.step, None)
                fit.finish()
                for how, cost in fit.costs.items():
                    costs[how][:, [part.writer for part in chunk]] = cost.T
                for part, constant in zip(chunk, fit.best, strict=True):
                    constants[f"constant {graph.writers[part.writer]}"] = constant.cpu().numpy()
                work, done = work + fit.evaluations * len(chunk) * len(task), done + len(chunk)
                if progress is not None:
                    progress(done, len(parts))
                if note:
                    break
    except KeyboardInterrupt:
        # Parts that were not reached have no score.
        note = f"interrupted after {done} of {len(parts)} parts"
    base = objective.of_full.double().cpu().numpy()[:, None]
    left = {how: cost - base for how, cost in costs.items()}
    return Found(
        graph, "optimal ablation", task.name, objective.label, len(task), seed,
        nodes=left["optimal"].mean(0), node_per_prompt=left["optimal"],
        notes=tuple(filter(None, ["on the prompts that the constants were learned from", note])), ablation="optimal",
        work={"forwards": work + 2 * len(task), "backwards": work}, seconds=time.perf_counter() - began,
        clean=objective.clean.double().cpu().numpy(), corrupt=objective.corrupt.double().cpu().numpy(),
        tensors={"mean": left["mean"].mean(0), "zero": left["zero"].mean(0), **constants},
    )  # fmt: skip


def _parts(model: Model, graph: Graph, nodes: Sequence[str] | None) -> list[Part]:
    every = [
        Part(writer, "z", layer, head)
        for layer, places in enumerate(graph.layers)
        for head, writer in enumerate(range(places.heads.start, places.heads.stop))
    ]
    every += [Part(places.mlp_out.start, "mlp_out", i, 0) for i, places in enumerate(graph.layers) if has_mlp(model, i)]
    if nodes is None:
        return every
    wanted = {graph.writer(name) for name in nodes}
    if 0 in wanted or not wanted:
        raise RequestError(f"nodes={list(nodes)}: name heads ('L0H0') and MLPs ('L0.mlp'); embed is not ablated.")
    return [part for part in every if part.writer in wanted]


def _chunks(parts: Sequence[Part], prepared: Sequence[Prepared]) -> list[list[Part]]:
    """Parts of one site and layer, as many as fit together."""
    most = max(1, ROWS // max(one.shape[0] * one.shape[1] for one in prepared))
    found: list[list[Part]] = []
    for part in parts:
        last = found[-1] if found else []
        if last and len(last) < most and (last[0].site, last[0].layer) == (part.site, part.layer):
            last.append(part)
        else:
            found.append([part])
    return found


class _Fit:
    """Constants of some parts of one layer, each in a copy of the prompts of its own."""

    def __init__(
        self, parts: Sequence[Part], prepared: Sequence[Prepared], objective: Objective, rate: float, steps: int
    ) -> None:
        self.parts, self.prepared, self.objective = parts, prepared, objective
        self.steps, self.evaluations = steps, 0
        seen = [torch.cat([self._own(part, one.base.at(part.site, part.layer)) for one in prepared]) for part in parts]
        mean, zero = torch.stack([one.mean(0) for one in seen]), torch.zeros(len(parts), seen[0].shape[1]).to(seen[0])
        self.costs = {}
        with torch.no_grad():
            for how, constant in (("mean", mean), ("zero", zero)):
                self.costs[how] = self._cost(constant).double().cpu().numpy()
        from_mean = self.costs["mean"].mean(1) <= self.costs["zero"].mean(1)
        self.begin = torch.where(torch.as_tensor(from_mean, device=mean.device)[:, None], mean, zero)
        self.costs["optimal"] = np.where(from_mean[:, None], self.costs["mean"], self.costs["zero"])
        self.best = self.begin.clone()
        self.size = torch.stack([one.square().mean().sqrt() for one in seen]).clamp(min=1e-6)[:, None]
        self.moved = torch.zeros_like(self.begin, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.moved], lr=rate)
        self.rate = rate

    @staticmethod
    def _own(part: Part, value: Tensor) -> Float[Tensor, "row dim"]:
        own = value[:, :, part.head] if part.site == "z" else value
        return own.flatten(0, 1).float()

    def _cost(self, constant: Float[Tensor, "part dim"]) -> Float[Tensor, "part prompt"]:
        """The loss of every prompt under each part's constant."""
        self.evaluations += 1
        total = constant.new_zeros(len(self.parts), len(self.objective.full))
        for one in self.prepared:
            total = total.index_copy(1, one.group.prompts.to(total.device), self._group(one, constant))
        return total

    def _group(self, one: Prepared, constant: Tensor) -> Float[Tensor, "part prompt"]:
        prompts, parts = one.shape[0], self.parts
        where = torch.arange(len(parts), device=constant.device).repeat_interleave(prompts)
        heads = torch.tensor([part.head for part in parts], device=constant.device)[where]

        def rewrite(site: Site, layer: int, value: Tensor) -> Tensor:
            if (site, layer) != (parts[0].site, parts[0].layer):
                return value
            if site == "mlp_out":
                return constant[where][:, None].expand_as(value).to(value)
            own: Tensor = torch.arange(value.shape[2], device=value.device)[None] == heads[:, None]
            return torch.where(own[:, None, :, None], constant[where][:, None, None].to(value), value)

        logits = one.run(rewrite, copies=len(parts), first=parts[0].layer)
        return self.objective(logits, one.group.prompts.repeat(len(parts))).view(len(parts), prompts)

    def step(self, number: int) -> dict[str, float]:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * (1 - number / self.steps)
        constant = self.begin + self.moved * self.size
        cost = self._cost(constant)
        (self.moved.grad,) = torch.autograd.grad(cost.mean(1).sum(), self.moved)
        self._keep(cost.detach(), constant.detach())
        self.optimiser.step()
        return {"loss": float(cost.detach().mean())}

    @torch.no_grad()
    def finish(self) -> None:
        """Weigh the last step as well."""
        constant = self.begin + self.moved * self.size
        self._keep(self._cost(constant), constant)

    def _keep(self, cost: Float[Tensor, "part prompt"], constant: Float[Tensor, "part dim"]) -> None:
        found = cost.double().cpu().numpy()
        better: np.ndarray = found.mean(1) < self.costs["optimal"].mean(1)
        self.costs["optimal"][better] = found[better]
        self.best[torch.as_tensor(better, device=constant.device)] = constant[
            torch.as_tensor(better, device=constant.device)
        ]
