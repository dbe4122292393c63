"""A task's prompts made ready for many forked runs: masks in, the metric of every prompt out.

What is outside of a circuit is replaced ("patching": by what it is on the corrupt prompt; positionwise means over the
task's references; zero). The metric with everything kept is `clean`, with nothing kept `baseline`: the two ends of
faithfulness, made once, so that a circuit of all edges has exactly the one and an empty circuit exactly the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.circuits.forks import Ablation, Forked, replacement
from workbench.circuits.graph import Graph
from workbench.circuits.inference import gap_refusal
from workbench.circuits.recorded import Group, Metric, groups, metric_of
from workbench.errors import MemoryRefused
from workbench.models.memory import free_memory, size
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

Array = np.ndarray[Any, np.dtype[np.float64]]
Progress = Callable[[int, int], None]
# Bytes of writes beyond which more runs at once gain nothing.
ROOM = 1 << 29
Masks = Bool[np.ndarray, "circuit writer reader"]


class Trials:
    """Runs circuits of one task, group by group of its prompts.

    `forwards` counts forked runs of single prompts. Raises `MemoryRefused` where what writers write on the prompts
    does not fit.
    """

    def __init__(
        self,
        model: Model,
        task: PairTask,
        *,
        metric: str | Metric | None = None,
        ablation: Ablation | str = "patching",
        memory_limit: int | None = None,
    ) -> None:
        self.model, self.task, self.ablation = model, task, ablation
        self.graph = Graph.of(model)
        self.metric, self._measure = metric_of(task, metric)
        self._room = self._check_memory(memory_limit)
        self.forwards = 0
        self._forked: list[tuple[Group, Forked]] = []
        for group in groups(task):
            clean, own = group.cut(task.clean), replacement(model, task, group, ablation)
            self._forked.append((group, Forked(model, self.graph, clean, own)))
        for _, forked in self._forked:
            forked.check()
        shape = self.graph.exists.shape
        self.clean, self.baseline = self._run(np.stack([np.ones(shape, bool), np.zeros(shape, bool)]), None)

    @property
    def refusal(self) -> str:
        """Why faithfulness is not defined; empty where it is."""
        return gap_refusal(self.clean, self.baseline)

    def forked(self) -> Iterator[tuple[Group, Forked]]:
        """The groups of prompts, ready to run."""
        yield from self._forked

    def score(self, group: Group, logits: Float[Tensor, "*run prompt vocab"]) -> Float[Tensor, "*run prompt"]:
        """The metric of a group's logits; gradients pass."""
        runs = logits.flatten(0, -2)
        prompts = group.prompts.repeat(len(runs) // len(group.prompts))
        return self._measure(runs, prompts).view(logits.shape[:-1])

    def values(self, masks: Masks, progress: Progress | None = None) -> Float[np.ndarray, "circuit prompt"]:
        """The metric of every prompt in every circuit; equal circuits run once, the whole and the empty one never."""
        exists = self.graph.exists
        kept = (np.asarray(masks, bool) & exists)[:, exists]
        found = np.empty((len(kept), len(self.task)))
        sizes = kept.sum(1)
        found[sizes == exists.sum()], found[sizes == 0] = self.clean, self.baseline
        some = np.flatnonzero((sizes > 0) & (sizes < exists.sum()))
        if len(some):
            packed, which = np.unique(np.packbits(kept[some], axis=1), axis=0, return_inverse=True)
            whole = np.zeros((len(packed), *exists.shape), bool)
            whole[:, exists] = np.unpackbits(packed, axis=1, count=kept.shape[1]).astype(bool)
            found[some] = self._run(whole, progress)[which.reshape(-1)]
        return found

    def _run(self, masks: Masks, progress: Progress | None) -> Float[np.ndarray, "circuit prompt"]:
        found, done = np.empty((len(masks), len(self.task))), 0
        for group, forked in self._forked:
            step = forked.runs_at_once(self._room)
            for first in range(0, len(masks), step):
                part = torch.as_tensor(masks[first : first + step], dtype=torch.float32)
                with torch.no_grad():
                    scores = self.score(group, forked.run_many(part.to(self.model.device)))
                found[first : first + len(part), group.prompts.numpy()] = scores.double().cpu().numpy()
                done += len(part) * len(group.prompts)
                if progress is not None:
                    progress(done, found.size)
        self.forwards += found.size
        return found

    def _check_memory(self, limit: int | None) -> int:
        """Bytes for the writes of runs that go together, beside what is held."""
        allowed = free_memory(self.model.device) if limit is None else limit
        if allowed is None:
            return ROOM
        element = torch.finfo(self.model.attachment.dtype).bits // 8
        width = len(self.graph.writers) * self.model.spec.d_model * element
        tokens = [len(group.prompts) * group.tokens for group in groups(self.task)]
        # Replacements and the model's own writes of every group, and those of one run with what it mixes.
        need = (2 * sum(tokens) + 3 * max(tokens)) * width
        if need > allowed:
            raise MemoryRefused(
                f"Forked runs of {len(self.task)} prompts need about {size(need)} beyond the weights, but "
                f"{size(allowed)} are allowed. Take fewer prompts (task.select)."
            )
        # A run holds its writes and a layer's inputs, which are fewer.
        return min(ROOM, (allowed - need) // 2)
