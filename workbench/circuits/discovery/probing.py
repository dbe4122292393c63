"""Subnetwork probing: which inputs of heads and which MLPs can be replaced without loss, learned by gates.

One hard-concrete gate on each query head's q, each key/value head's k and v and each MLP's output, trained to keep
the loss low and the gates closed (Cao, Sanh & Rush 2021, arXiv 2104.03514, in the form of Conmy et al. 2023, arXiv
2304.14997).  What a closed gate lets through instead is the corrupt value, the mean, or zero.

Published settings are 3000 steps at a rate of 0.001 with one draw of gates a step; the defaults here draw gates for
every prompt and take fewer, larger steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.discovery import concrete
from workbench.circuits.discovery.found import Found, Progress, chosen, course
from workbench.circuits.discovery.gated import Prepared, frozen, prepare
from workbench.circuits.discovery.objective import Objective
from workbench.circuits.forks import Ablation
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Metric
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

SITES: tuple[Site, ...] = ("q", "k", "v", "mlp_out")
# How often the settled gates are weighed, to keep the best.
CHECK = 25


def subnetwork_probing(
    model: Model,
    task: PairTask,
    *,
    penalty: float = 1.0,
    steps: int = 400,
    rate: float = 0.05,
    loss: Literal["kl", "metric"] | str = "kl",
    metric: str | Metric | None = None,
    ablation: Ablation | str = "patching",
    seed: int = 0,
    progress: Progress | None = None,
    memory_limit: int | None = None,
) -> Found:
    """Gates of inputs in [0, 1]; the circuit keeps the edges into open ones (at least 0.5).

    `penalty` is lambda: the mean probability of being open counts so many units of the loss. A node's score is the
    largest gate of its inputs. Where parts stand in for each other (copies of one head), gates cannot know which
    one to keep, and another seed may keep another.
    """
    if penalty < 0 or rate <= 0:
        raise RequestError(f"penalty={penalty}, rate={rate}: a penalty is not negative, and a rate above 0.")
    began = time.perf_counter()
    graph = Graph.of(model)
    prepared = prepare(model, task, SITES, ablation=ablation, memory_limit=memory_limit)
    probe = _Probe(
        graph, prepared, Objective.of(task, [one.ends for one in prepared], loss, metric), ablation, penalty, rate, seed
    )
    with frozen(model.attachment.hf_model):
        rows, note = concrete.train(steps, probe.step, progress)
        probe.weigh()
    gates = concrete.settled(probe.best).double().cpu().numpy()
    inputs = np.append(gates, np.nan)
    nodes = np.full(len(graph.writers), np.nan)
    for reader, gate in enumerate(gates):
        for writer in graph.feeds(reader):
            nodes[writer] = np.fmax(nodes[writer], gate)
    alpha = probe.best.double().cpu().numpy()
    kept = graph.exists & np.append(gates >= concrete.OPEN, True)[None]
    objective = probe.objective
    return Found(
        graph, "subnetwork probing", task.name, objective.label, len(task), seed,
        nodes=nodes, inputs=inputs, notes=tuple(filter(None, ["gates in [0, 1], without sign", note])),
        ablation=ablation, seconds=time.perf_counter() - began,
        work={"forwards": (2 + len(rows) + probe.weighed) * len(task), "backwards": len(rows) * len(task)},
        clean=objective.clean.double().cpu().numpy(), corrupt=objective.corrupt.double().cpu().numpy(),
        circuit=chosen(graph, kept, "subnetwork probing", task), log=course(rows), tensors={"alpha": alpha},
    )  # fmt: skip


class _Probe:
    """Gates in the order of the graph's readers, without the logits."""

    def __init__(
        self,
        graph: Graph,
        prepared: Sequence[Prepared],
        objective: Objective,
        ablation: str,
        penalty: float,
        rate: float,
        seed: int,
    ) -> None:
        self.graph, self.prepared, self.objective = graph, prepared, objective
        self.ablation, self.penalty = ablation, penalty
        device = objective.full.device
        self.alpha = concrete.start(len(graph.readers) - 1).detach().to(device).requires_grad_(True)
        self.optimiser = torch.optim.Adam([self.alpha], lr=rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.best, self.lowest, self.weighed = self.alpha.detach().clone(), np.inf, 0
        self.prompts = sum(len(one.group.prompts) for one in prepared)
        self._instead = [
            {(site, layer): one.instead(ablation, site, layer) for site, layer in one.clean.sites if site in SITES}
            for one in prepared
        ]

    def step(self, number: int) -> dict[str, float]:
        if number and number % CHECK == 0:
            self.weigh()
        slope, total = torch.zeros_like(self.alpha), 0.0
        for place, one in enumerate(self.prepared):
            gates = concrete.sampled(self.alpha, len(one.group.prompts), self.generator)
            lost = self._loss(place, gates)
            (found,) = torch.autograd.grad(lost, self.alpha)
            slope, total = slope + found, total + float(lost.detach())
        size = concrete.open_share(self.alpha).mean()
        (found,) = torch.autograd.grad(self.penalty * size, self.alpha)
        self.alpha.grad = slope + found
        self.optimiser.step()
        return {"loss": total, "open": float(size.detach())}

    def _loss(self, place: int, gates: Float[Tensor, "prompt gate"]) -> Tensor:
        """This group's part of the mean loss over all prompts."""
        one, instead = self.prepared[place], self._instead[place]

        def rewrite(site: Site, layer: int, value: Tensor) -> Tensor:
            if site == "z":
                return value
            places = self.graph.layers[layer]
            own = gates[:, {"q": places.q, "k": places.k, "v": places.v, "mlp_out": places.mlp}[site]]
            wide = own[:, None, :, None] if value.ndim == 4 else own[:, None]
            other = instead[site, layer].to(value)
            return other + wide.to(value) * (value - other)

        return self.objective(one.run(rewrite), one.group.prompts).sum() / self.prompts

    @torch.no_grad()
    def weigh(self) -> None:
        """Keep these gates if, opened and shut for good, they cost less than all before."""
        shut = (concrete.settled(self.alpha.detach()) >= concrete.OPEN).to(self.alpha)
        lost = sum(
            float(self._loss(place, shut.expand(len(one.group.prompts), -1))) for place, one in enumerate(self.prepared)
        )
        total = lost + self.penalty * float(concrete.open_share(self.alpha).mean())
        self.weighed += 1
        if total <= self.lowest:
            self.lowest, self.best = total, self.alpha.detach().clone()
