"""What circuits cost, for methods that cut edges: forked runs of all of a task's prompts under masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.discovery.gated import check_ablation
from workbench.circuits.discovery.objective import Ends, Objective
from workbench.circuits.forks import Ablation, Forked, replacement
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Group, Metric, groups, record
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

Array = np.ndarray[Any, np.dtype[np.float64]]


class Edgewise:
    """A task's prompts, group by group, ready to be run under masks `[writer, reader]`; 1 keeps an edge."""

    def __init__(
        self,
        model: Model,
        task: PairTask,
        ablation: Ablation | str,
        loss: str,
        metric: str | Metric | None,
        memory_limit: int | None,
        constants: Float[Tensor, "writer 1 1 d_model"] | None = None,
    ) -> None:
        """`constants` stand in for writes if given, whatever `ablation` says."""
        check_ablation(ablation)
        self.model, self.task, self.graph = model, task, Graph.of(model)
        self.groups: list[tuple[Group, Forked]] = []
        ends = []
        for group in groups(task):
            batch = group.cut(task.clean)
            instead = replacement(model, task, group, ablation) if constants is None else constants
            self.groups.append((group, Forked(model, self.graph, batch, instead)))
            runs = (record(model, one, [], memory_limit).logits for one in (batch, group.cut(task.corrupt)))
            ends.append(Ends(group.prompts, *runs))
        self.objective = Objective.of(task, ends, loss, metric)
        self.work = {"forwards": 2 * len(task), "backwards": 0}

    @property
    def label(self) -> str:
        return self.objective.label

    @property
    def clean(self) -> Array:
        return self.objective.clean.double().cpu().numpy()

    @property
    def corrupt(self) -> Array:
        return self.objective.corrupt.double().cpu().numpy()

    def laid(self, edges: Float[Tensor, "*row edge"]) -> Float[Tensor, "*row writer reader"]:
        """A number an edge (writer by writer) in a mask, 0 where there is no edge."""
        shape = self.graph.exists.shape
        where = torch.as_tensor(np.flatnonzero(self.graph.exists), device=edges.device)
        flat = torch.zeros(*edges.shape[:-1], shape[0] * shape[1], device=edges.device)
        return flat.index_copy(-1, where, edges.float()).view(*edges.shape[:-1], *shape)

    @torch.no_grad()
    def losses(self, masks: Float[Tensor, "mask writer reader"]) -> Float[Tensor, "mask prompt"]:
        """What every mask costs on every prompt, in double precision, on the CPU."""
        found = torch.zeros(len(masks), len(self.task), dtype=torch.float64)
        for group, forked in self.groups:
            for rows in torch.split(torch.arange(len(masks)), forked.runs_at_once()):
                logits = forked.run_many(masks[rows])
                own = self.objective(logits.flatten(0, 1), group.prompts.repeat(len(rows)))
                found[rows[:, None], group.prompts[None]] = own.view(len(rows), -1).double().cpu()
        self.work["forwards"] += found.numel()
        return found

    @torch.enable_grad()
    def slopes(
        self, gates: Float[Tensor, "prompt edge"], *more: Tensor
    ) -> tuple[float, Float[Tensor, "prompt edge"], list[Tensor]]:
        """The mean loss, its gradient by the edges of every prompt, and those by what else the runs depend on."""
        own = gates.detach().requires_grad_(True)
        total, found = 0.0, [torch.zeros_like(one) for one in (own, *more)]
        for group, forked in self.groups:
            logits = forked.run(self.laid(own[group.prompts.to(own.device)])).logits
            lost = self.objective(logits, group.prompts).sum() / len(self.task)
            total += float(lost.detach())
            for one, slope in zip(found, torch.autograd.grad(lost, [own, *more]), strict=True):
                one += slope
        self.work["forwards"] += len(self.task)
        self.work["backwards"] += len(self.task)
        return total, found[0], found[1:]
