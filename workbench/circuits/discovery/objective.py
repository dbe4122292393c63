"""What discovery keeps low: the divergence from the model, or the metric's negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.circuits.recorded import Metric, metric_of
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask

KL = "kl"


class Ends(NamedTuple):
    """Logits of both runs of some prompts of the task, where they are read."""

    prompts: Int[Tensor, " prompt"]
    clean: Float[Tensor, "prompt vocab"]
    corrupt: Float[Tensor, "prompt vocab"]


@dataclass(eq=False)
class Objective:
    """What is to be kept low: KL(model || changed model) at what is read, or the metric's negative.

    `full` are the model's own logits on the clean prompts of the whole task.
    """

    name: str
    metric: Metric
    metric_name: str
    full: Float[Tensor, "prompt vocab"]
    clean: Float[Tensor, " prompt"]
    corrupt: Float[Tensor, " prompt"]

    @classmethod
    def of(cls, task: PairTask, runs: Sequence[Ends], loss: str, metric: str | Metric | None) -> Objective:
        """`loss` is "kl" or "metric"; `runs` are those of all the task's prompts."""
        if loss not in (KL, "metric"):
            raise RequestError(f"loss={loss!r} is unknown; choose {KL!r} or 'metric' (the task's, or metric=).")
        name, measure = metric_of(task, metric)
        order = torch.argsort(torch.cat([one.prompts for one in runs]))
        clean, corrupt = (torch.cat([getattr(one, which) for one in runs])[order] for which in ("clean", "corrupt"))
        every = torch.arange(len(task))
        scored = (measure(run, every).detach() for run in (clean, corrupt))
        return cls(loss, measure, name, clean.float(), *scored)

    @property
    def label(self) -> str:
        """What scores say they are in."""
        return KL if self.name == KL else self.metric_name

    def __call__(self, logits: Float[Tensor, "row vocab"], prompts: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The loss of rows that belong to these prompts of the task."""
        if self.name != KL:
            return -self.metric(logits, prompts)
        return divergence(self.full[prompts.to(self.full.device)], logits)

    @property
    def of_full(self) -> Float[Tensor, " prompt"]:
        """The loss of the model itself on clean prompts."""
        return torch.zeros_like(self.clean) if self.name == KL else -self.clean


def divergence(full: Float[Tensor, "row vocab"], changed: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """KL(full || changed) in nats."""
    expected = full.float().log_softmax(-1)
    return (expected.exp() * (expected - changed.float().log_softmax(-1))).sum(-1)
