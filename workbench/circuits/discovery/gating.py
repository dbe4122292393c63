"""Causal head gating: heads that help, hurt or do not matter, by gates that are pushed up and then down.

Nam et al. 2025 (arXiv 2505.13737): every head's z is multiplied by g = sigma(theta) and the gates are fitted to the
answers' log-probability, needing no corrupt prompts; from there once with a regulariser that pushes gates up and once
with one that pushes them down:  loss_up = NLL - lambda mean theta,  loss_down = NLL + lambda mean theta,  theta cut off
at +-4 within.  A head that stays open though pushed down facilitates, one that stays shut though pushed up
interferes, one that follows either push does not matter.

The public package's signs contradict its comments; these follow the paper. Defaults are the package's, with fewer
steps and masks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.discovery import concrete
from workbench.circuits.discovery.found import Found, Progress, course
from workbench.circuits.discovery.gated import Prepared, frozen, prepare
from workbench.circuits.discovery.objective import Objective
from workbench.circuits.graph import Graph
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

LIMIT, CLIP = 4.0, 1.0
# Stage -> which way the regulariser pushes.
PUSHES = {"none": 0.0, "up": 1.0, "down": -1.0}


def causal_head_gating(
    model: Model,
    task: PairTask,
    *,
    penalty: float = 0.1,
    steps: int = 150,
    rate: float = 1.0,
    masks: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
    memory_limit: int | None = None,
) -> Found:
    """Gates of heads after the three fits: `tensors` has "none", "up" and "down", `[mask, writer]`.

    A head's score is down + up - 1, means over the masks: 1 for one that facilitates, -1 for one that interferes, 0
    for one that does not matter.  Masks begin at random gates and differ in nothing else.
    """
    if penalty <= 0 or rate <= 0 or masks < 1:
        raise RequestError(f"penalty={penalty}, rate={rate}, masks={masks}: all are above 0.")
    began = time.perf_counter()
    graph = Graph.of(model)
    prepared = prepare(model, task, (), ablation="zero", memory_limit=memory_limit)
    objective = Objective.of(task, [one.ends for one in prepared], "metric", "log_probability")
    heads = np.concatenate([np.arange(one.heads.start, one.heads.stop) for one in graph.layers])
    begin = torch.rand(masks, len(heads), generator=torch.Generator().manual_seed(seed)).clamp(1e-3, 1 - 1e-3)
    theta, rows, note = torch.logit(begin).to(model.device), [], ""
    found = {name: np.full((masks, len(graph.writers)), np.nan) for name in PUSHES}
    with frozen(model.attachment.hf_model):
        for number, (name, push) in enumerate(PUSHES.items()):
            fit = _Fit(graph, prepared, objective, theta, push * penalty, rate)
            told = None if progress is None else _after(progress, number * steps, len(PUSHES) * steps)
            course_of, note = concrete.train(steps, fit.step, told)
            rows += [{"push": push, **row} for row in course_of]
            found[name][:, heads] = torch.sigmoid(fit.theta.detach()).double().cpu().numpy()
            if name == "none":
                theta = fit.theta.detach()
            if note:
                break
    passes = len(rows) * masks * len(task)
    return Found(
        graph, "causal head gating", task.name, objective.label, len(task), seed,
        nodes=(found["down"] + found["up"] - 1).mean(0), ablation="zero",
        notes=tuple(filter(None, ["1 facilitates, -1 interferes, 0 does not matter", note])),
        work={"forwards": passes + 2 * len(task), "backwards": passes}, seconds=time.perf_counter() - began,
        clean=objective.clean.double().cpu().numpy(), corrupt=objective.corrupt.double().cpu().numpy(),
        log=course(rows), tensors=found,
    )  # fmt: skip


def _after(progress: Progress, done: int, total: int) -> Progress:
    return lambda step, steps: progress(done + step, total)


class _Fit:
    """One fit of all masks, side by side."""

    def __init__(
        self,
        graph: Graph,
        prepared: Sequence[Prepared],
        objective: Objective,
        theta: Float[Tensor, "mask head"],
        push: float,
        rate: float,
    ) -> None:
        self.prepared, self.objective, self.push = prepared, objective, push
        self.sizes = [one.heads.stop - one.heads.start for one in graph.layers]
        self.theta = theta.clone().requires_grad_(True)
        self.optimiser = torch.optim.Adam([self.theta], lr=rate)

    def step(self, number: int) -> dict[str, float]:
        slope, total = torch.zeros_like(self.theta), 0.0
        for one in self.prepared:
            lost = self._loss(one) / len(self.objective.full)
            slope, total = slope + torch.autograd.grad(lost, self.theta)[0], total + float(lost.detach())
        pushed = -self.push * self.theta.clamp(-LIMIT, LIMIT).mean(1).sum()
        self.theta.grad = slope + torch.autograd.grad(pushed, self.theta)[0]
        # Masks are fits of their own, and their gradients are clipped apart.
        size = self.theta.grad.norm(dim=1, keepdim=True)
        self.theta.grad = self.theta.grad * (CLIP / size.clamp(min=CLIP))
        self.optimiser.step()
        return {"loss": total / len(self.theta)}

    def _loss(self, one: Prepared) -> Float[Tensor, ""]:
        """The summed NLL of a group's prompts under all masks."""
        masks, prompts = len(self.theta), one.shape[0]
        gates = torch.split(torch.sigmoid(self.theta).repeat_interleave(prompts, 0), self.sizes, 1)

        def rewrite(site: Site, layer: int, value: Tensor) -> Tensor:
            return value * gates[layer][:, None, :, None].to(value) if site == "z" else value

        logits = one.run(rewrite, copies=masks)
        return self.objective(logits, one.group.prompts.repeat(masks)).sum()
