"""Edge pruning: a gate on every edge, trained to give the model's own distribution with few of them open.

Bhaskar et al. 2024 (arXiv 2406.16778): a reader's input is  sum_u z_uv a_u(circuit) + (1 - z_uv) a_u(corrupt),  with
hard-concrete gates z; the loss is  KL(model || circuit) + l1 (s - t) + l2 (s - t)^2,  s the expected sparsity and t
its target, which rises from 0 over a warm-up; l1 and l2 go up the gradient while the gates go down.  In the end as
many edges are kept as the target allows, those with the largest gates.

Published settings are 3000 steps (2500 of warm-up), all rates 0.8, gates that begin wide open, and targets above 1
to over-ask; gates of whole nodes, which the paper's own IOI run leaves out, are not here. The defaults are for
small models.
"""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import torch

from workbench.circuits.discovery import concrete
from workbench.circuits.discovery.edgewise import Edgewise
from workbench.circuits.discovery.found import Found, Progress, chosen, course
from workbench.circuits.forks import Ablation
from workbench.circuits.recorded import Metric
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model


def edge_pruning(
    model: Model,
    task: PairTask,
    *,
    target: float = 0.9,
    keep: int | None = None,
    steps: int = 600,
    warm_up: float = 5 / 6,
    rate: float = 0.1,
    multiplier_rate: float = 0.1,
    loss: Literal["kl", "metric"] | str = "kl",
    metric: str | Metric | None = None,
    ablation: Ablation | str = "patching",
    seed: int = 0,
    progress: Progress | None = None,
    memory_limit: int | None = None,
) -> Found:
    """Gates of edges in [0, 1] and the circuit of the largest.

    `target` is the share of edges to be cut while training, `keep` how many are kept in the end: unless given, the
    rest of the target, or, where that is 1 or more, those with gates of at least 0.5.  `tensors` holds "alpha", which
    ranks edges with equal gates, and "loss" of the circuit, prompt by prompt.
    """
    _check(target, keep, warm_up, rate, multiplier_rate)
    began = time.perf_counter()
    sight = Edgewise(model, task, ablation, loss, metric, memory_limit)
    if keep is not None and keep > sight.graph.count:
        raise RequestError(f"keep={keep}: the graph has {sight.graph.count} edges.")
    gates = _Gates(sight, target, max(1, round(warm_up * steps)), rate, multiplier_rate, seed)
    rows, note = concrete.train(steps, gates.step, progress)
    alpha = gates.alpha.detach()
    count = keep if keep is not None or target >= 1 else round((1 - target) * len(alpha))
    shut = concrete.settled(alpha) >= concrete.OPEN
    if count is not None:
        # The threshold that leaves so many, found by sorting; alpha tells gates apart that are all 0 or all 1.
        shut = torch.zeros_like(shut).scatter(0, alpha.argsort(descending=True, stable=True)[:count], True)
    kept = sight.laid(shut.float()).cpu().numpy() > 0
    graph = sight.graph
    cost = sight.losses(torch.as_tensor(kept, dtype=torch.float32)[None])[0]
    values, order = (sight.laid(one).double().cpu().numpy() for one in (concrete.settled(alpha), alpha))
    return Found(
        graph, "edge pruning", task.name, sight.label, len(task), seed,
        edges=np.where(graph.exists, values, np.nan), ablation=ablation,
        notes=tuple(filter(None, ["gates in [0, 1], without sign", note])), work=sight.work,
        seconds=time.perf_counter() - began, clean=sight.clean, corrupt=sight.corrupt,
        circuit=chosen(graph, kept, "edge pruning", task), log=course(rows),
        tensors={"alpha": np.where(graph.exists, order, np.nan), "loss": cost.numpy()},
    )  # fmt: skip


def _check(target: float, keep: int | None, warm_up: float, rate: float, multiplier_rate: float) -> None:
    if not 0 < target <= 1.5:
        raise RequestError(f"target={target}: a share of edges to cut, above 0 (values above 1 over-ask, up to 1.5).")
    if keep is not None and keep < 1:
        raise RequestError(f"keep={keep}: keep at least one edge.")
    if not 0 < warm_up <= 1 or rate <= 0 or multiplier_rate <= 0:
        raise RequestError(
            f"warm_up={warm_up}, rate={rate}, multiplier_rate={multiplier_rate}: a share of the steps up to 1, and "
            "rates above 0, are needed."
        )


class _Gates:
    """One gate an edge, in the order in which the graph's edges lie in its matrix."""

    def __init__(
        self, sight: Edgewise, target: float, warm_up: int, rate: float, multiplier_rate: float, seed: int
    ) -> None:
        self.sight, self.target, self.warm_up = sight, target, warm_up
        device = sight.objective.full.device
        self.alpha = concrete.start(sight.graph.count).detach().to(device).requires_grad_(True)
        self.multipliers = torch.zeros(2, device=device, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.alpha], lr=rate)
        self.ascent = torch.optim.Adam([self.multipliers], lr=multiplier_rate, maximize=True)
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, number: int) -> dict[str, float]:
        with torch.enable_grad():
            gates = concrete.sampled(self.alpha, len(self.sight.task), self.generator)
            lost, pushed, _ = self.sight.slopes(gates)
            sparsity = 1 - concrete.open_share(self.alpha).mean()
            short = sparsity - self.target * min(1.0, number / self.warm_up)
            penalty = self.multipliers[0] * short + self.multipliers[1] * short**2
            found = torch.autograd.grad(
                [gates, penalty], [self.alpha, self.multipliers], [pushed, torch.ones_like(penalty)]
            )
        self.alpha.grad, self.multipliers.grad = found
        self.optimiser.step()
        self.ascent.step()
        return {"loss": lost, "sparsity": float(sparsity.detach()), "short": float(short.detach())}
