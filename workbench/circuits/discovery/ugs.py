"""UGS: each edge's probability of being kept, learned by sampling how much of it is let through.

Uniform gradient sampling (Li & Janson 2024, arXiv 2409.09951): an edge with p = sigma(theta) carries
alpha a(x) + (1 - alpha) a*, where  alpha = 1 - clip((u - p) / w + 1/2, 0, 1),  w = p (1 - p),  u uniform, so that
alpha lies strictly between 0 and 1 in a window around p alone, and gradients reach theta through p there.  Minimised
is  loss + lambda sum p.  With `ablation="optimal"` the constants a*, one vector a writer, are learned along with it
from the means on; other replacements stay what they are.

Published settings: AdamW with betas (.9, .995), gradients clipped at 5, theta from 1, rates by lambda (see `RATES`),
a fifth of that for corrupt replacements, 0.002 for constants.  The paper's penalty on whole nodes is not here.
"""

from __future__ import annotations

import time
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.discovery import concrete
from workbench.circuits.discovery.edgewise import Edgewise
from workbench.circuits.discovery.found import Found, Progress, chosen, course
from workbench.circuits.forks import replacement
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Metric, groups
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

How = Literal["patching", "mean", "zero", "optimal"]
# lambda up to -> rate of theta; more than the last: LAST_RATE.
RATES = ((1e-4, 0.15), (5e-4, 0.1))
LAST_RATE, CONSTANT_RATE = 0.05, 2e-3
BETAS, CLIP, START = (0.9, 0.995), 5.0, 1.0


def ugs(
    model: Model,
    task: PairTask,
    *,
    penalty: float = 1e-3,
    steps: int = 500,
    rate: float | None = None,
    constant_rate: float = CONSTANT_RATE,
    loss: Literal["kl", "metric"] | str = "kl",
    metric: str | Metric | None = None,
    ablation: How | str = "optimal",
    seed: int = 0,
    progress: Progress | None = None,
    memory_limit: int | None = None,
) -> Found:
    """Probabilities of edges; the circuit keeps those of at least 0.5.

    `penalty` is lambda, in units of the loss an edge. `rate` is the published one unless given. `tensors` holds
    "theta", "loss" of the circuit by prompt, and "constants" `[writer, d_model]` where they are learned.
    """
    if penalty < 0 or constant_rate <= 0 or (rate is not None and rate <= 0):
        raise RequestError(f"penalty={penalty}, rate={rate}, constant_rate={constant_rate}: not negative, and above 0.")
    if ablation not in get_args(How):
        raise RequestError(f"ablation={ablation!r} is unknown; choose from {', '.join(get_args(How))}.")
    began = time.perf_counter()
    constants = _means(model, task) if ablation == "optimal" else None
    sight = Edgewise(model, task, "mean" if ablation == "optimal" else ablation, loss, metric, memory_limit, constants)
    chance = _Chances(
        sight, penalty, _rate(penalty, ablation) if rate is None else rate, constants, constant_rate, seed
    )
    rows, note = concrete.train(steps, chance.step, progress)
    graph = sight.graph
    theta = chance.theta.detach()
    p, order = (sight.laid(one).double().cpu().numpy() for one in (torch.sigmoid(theta), theta))
    kept = (p >= concrete.OPEN) & graph.exists
    cost = sight.losses(torch.as_tensor(kept, dtype=torch.float32)[None])[0]
    tensors = {"theta": np.where(graph.exists, order, np.nan), "loss": cost.numpy()}
    if constants is not None:
        tensors["constants"] = constants.detach()[:, 0, 0].cpu().numpy()
    return Found(
        graph, "ugs", task.name, sight.label, len(task), seed,
        edges=np.where(graph.exists, p, np.nan), ablation=ablation,
        notes=tuple(filter(None, ["probabilities, without sign", note])), work=sight.work,
        seconds=time.perf_counter() - began, clean=sight.clean, corrupt=sight.corrupt,
        circuit=chosen(graph, kept, "ugs", task), log=course(rows), tensors=tensors,
    )  # fmt: skip


def _rate(penalty: float, ablation: str) -> float:
    found = next((rate for most, rate in RATES if penalty <= most), LAST_RATE)
    return found / 5 if ablation == "patching" else found


def _means(model: Model, task: PairTask) -> Float[Tensor, "writer 1 1 d_model"]:
    """Each writer's mean over prompts and tokens of what means are taken over."""
    total, count = torch.zeros(len(Graph.of(model).writers), 1, 1, model.spec.d_model, device=model.device), 0
    for group in groups(task):
        found = replacement(model, task, group, "mean").expand(-1, len(group.prompts), group.tokens, -1)
        total = total + found.float().sum((1, 2), keepdim=True)
        count += len(group.prompts) * group.tokens
    return (total / count).to(model.attachment.dtype).requires_grad_(True)


def sampled(theta: Float[Tensor, " edge"], rows: int, generator: torch.Generator) -> Float[Tensor, "row edge"]:
    """Mixing coefficients drawn for each row."""
    p = torch.sigmoid(theta)
    u = torch.rand(rows, len(theta), generator=generator).to(theta)
    window = (p * (1 - p)).detach()
    return 1 - ((u - p) / window + 0.5).clamp(0, 1)


class _Chances:
    """One theta an edge, in the order in which the graph's edges lie in its matrix."""

    def __init__(
        self,
        sight: Edgewise,
        penalty: float,
        rate: float,
        constants: Tensor | None,
        constant_rate: float,
        seed: int,
    ) -> None:
        self.sight, self.penalty = sight, penalty
        device = sight.objective.full.device
        self.theta = torch.full((sight.graph.count,), START, device=device, requires_grad=True)
        self.constants = [] if constants is None else [constants]
        learned = [{"params": [self.theta], "lr": rate}, {"params": self.constants, "lr": constant_rate}]
        self.optimiser = torch.optim.AdamW(learned[: 1 + len(self.constants)], betas=BETAS, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, number: int) -> dict[str, float]:
        with torch.enable_grad():
            alpha = sampled(self.theta, len(self.sight.task), self.generator)
            lost, pushed, slopes = self.sight.slopes(alpha, *self.constants)
            total = torch.sigmoid(self.theta).sum()
            (self.theta.grad,) = torch.autograd.grad(
                [alpha, self.penalty * total], [self.theta], [pushed, torch.ones_like(total)]
            )
        for one, slope in zip(self.constants, slopes, strict=True):
            one.grad = slope
        torch.nn.utils.clip_grad_norm_([self.theta, *self.constants], CLIP)
        self.optimiser.step()
        return {"loss": lost, "edges": float(total.detach())}
