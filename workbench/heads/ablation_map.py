"""What each head does alone: every head ablated by itself, and a probe's metric measured without it.

1. One clean run gives the metric and the residual stream that enters each layer.
2. For a layer, the prompts are repeated once a head along the batch; each repetition has one head ablated, and all
   start from the cached stream at that layer, so that no layer before it runs again.
3. The effect of a head is the metric without it less the metric with it, per prompt.

Exact: each entry is what an ablation of that head alone gives (tested). Costs about half a forward pass a head. Heads
that stand in for one another hide here (a set's effect is `workbench.heads.verify`), and self-repair makes the rest
smaller than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Array, Progress
from workbench.heads.probes import Probe
from workbench.models import Batch, Head
from workbench.tasks import Task
from workbench.tracing import Edit, Model, ablate, patch
from workbench.tracing.edits import Ablation, How
from workbench.tracing.rotation import mean_queries

# Forms whose values, if any, are known before the layer runs.
MAPPED: tuple[How, ...] = ("zero", "mean", "resample", "uniform", "to_sink", "q_mean", "streaming")
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class AblationMap:
    """`baseline[metric]` is `[prompt]`, `effects[metric]` `[prompt, layer, head]` (NaN where there is no such head)."""

    how: How
    baseline: Mapping[str, Float[np.ndarray, " prompt"]]
    effects: Mapping[str, Float[np.ndarray, "prompt layer head"]]


def ablation_maps(
    model: Model,
    probe: Probe,
    hows: Sequence[How] = ("zero",),
    *,
    reference: Batch | None = None,
    tokens_at_once: int | None = None,
    progress: Progress | None = None,
) -> dict[How, AblationMap]:
    """The effect of ablating each head alone on every metric of a probe that reads one pass (not `needle`).

    `mean` and `q_mean` take their values from `reference` prompts, the probe's own by default. `resample` takes what
    stands in the same column of the probe's next prompt (from its start again where that one is shorter).
    """
    for how in hows:
        if how not in MAPPED:
            raise RequestError(f"how={how!r} has no map of single heads; choose from {', '.join(MAPPED)}.")
    if probe.decodes:
        raise RequestError(f"The probe {probe.name!r} decodes, so that heads cannot share a pass; use 'answer'.")
    if "resample" in hows and min(len(task) for task in probe.tasks) < 2:
        raise RequestError("Resampling takes a head's output on another prompt; give the probe at least two prompts.")
    mapper = _Mapper(model, probe, tokens_at_once or TOKENS_AT_ONCE.get(model.device.type, 2048))
    given = probe.tasks[0].batch if reference is None else reference
    values = {how: _reference_values(model, how, given) for how in hows}
    heads = len(model.spec.heads())
    parts: dict[How, list[tuple[dict[str, Array], dict[str, Array]]]] = {how: [] for how in hows}
    total, done = heads * len(hows) * len(probe.tasks), 0
    for task in probe.tasks:
        mapper.begin(task)
        for how in hows:
            effects = {metric.name: _empty(model, len(task)) for metric in probe.metrics}
            for chunk, found in mapper.run(how, values[how]):
                for name, array in found.items():
                    for at, head in enumerate(chunk):
                        effects[name][:, head.layer, head.head] = array[at] - mapper.baseline[name]
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            parts[how].append((mapper.baseline, effects))
    return {how: _joined(how, probe, found) for how, found in parts.items()}


def _joined(how: How, probe: Probe, parts: Sequence[tuple[dict[str, Array], dict[str, Array]]]) -> AblationMap:
    """All tasks' prompts one after the other; metrics that a task does not have are left out of it."""
    names = [metric.name for metric in probe.metrics]
    return AblationMap(
        how,
        {name: np.concatenate([base[name] for base, _ in parts if name in base]) for name in names},
        {name: np.concatenate([effect[name] for base, effect in parts if name in base]) for name in names},
    )


def _empty(model: Model, prompts: int) -> Array:
    spec = model.spec
    return np.full((prompts, spec.n_layers, max(layer.heads for layer in spec.layers)), np.nan)


def _reference_values(model: Model, how: How, reference: Batch) -> Mapping[Head, Tensor] | None:
    if how == "mean":
        return model.head_outputs(reference, model.spec.heads(), mean=True)
    return mean_queries(model, reference, model.spec.heads()) if how == "q_mean" else None


class _Mapper:
    """One task at a time: its clean run, then layer by layer the heads of a form."""

    def __init__(self, model: Model, probe: Probe, tokens: int) -> None:
        self.model, self.probe, self.tokens = model, probe, tokens
        self.baseline: dict[str, Array] = {}

    def begin(self, task: Task) -> None:
        """Run the prompts clean: the metric, the stream that enters each layer, and each head's output."""
        self.task = task
        self.baseline = dict(self.probe.run(self.model, task, ()))
        found = self.model.trace(task.batch, sites=["resid_pre", "z"])
        layers = range(self.model.spec.n_layers)
        self._stream = [found.site("resid_pre", layer) for layer in layers]
        self._next = [_of_next_prompt(found.site("z", layer), task.batch) for layer in layers]

    def run(
        self, how: How, values: Mapping[Head, Tensor] | None
    ) -> Iterator[tuple[list[Head], dict[str, Float[np.ndarray, "head prompt"]]]]:
        """Heads of one layer at a time, as many as fit, and each metric without them."""
        prompts, columns = self.task.batch.ids.shape
        size = max(1, self.tokens // (prompts * columns))
        for layer in self.model.spec.layers:
            heads = [Head(layer.index, head) for head in range(layer.heads)]
            for at in range(0, len(heads), size):
                chunk = heads[at : at + size]
                edits: list[Edit] = [
                    patch("resid_pre", self._spread(self._stream[layer.index], chunk), layer=layer.index)
                ]
                edits += [self._edit(head, row, chunk, how, values) for row, head in enumerate(chunk)]
                found = self.probe.run(self.model, repeated(self.task, len(chunk)), edits)
                yield chunk, {name: value.reshape(len(chunk), prompts) for name, value in found.items()}

    def _edit(
        self, head: Head, row: int, chunk: Sequence[Head], how: How, values: Mapping[Head, Tensor] | None
    ) -> Ablation:
        """The head ablated in its own repetition of the prompts alone."""
        prompts, columns = self.task.batch.ids.shape
        own = torch.zeros(len(chunk), prompts, columns, dtype=torch.bool)
        own[row] = True
        given: Mapping[Head, Tensor] | None = None if values is None else {head: values[head]}
        if how == "resample":
            given = {head: self._spread(self._next[head.layer][:, :, head.head], chunk)}
        return ablate([head], how, positions=own.flatten(0, 1), values=given)

    @staticmethod
    def _spread(value: Tensor, chunk: Sequence[Head]) -> Tensor:
        return value.repeat(len(chunk), *[1] * (value.ndim - 1))


def _of_next_prompt(z: Float[Tensor, "prompt token head dim"], batch: Batch) -> Float[Tensor, "prompt token head dim"]:
    """z of the next prompt (of the first, for the last) in each column, wrapped to its real tokens."""
    others = torch.arange(1, len(batch) + 1) % len(batch)
    start, length = batch.starts[others].cpu(), batch.lengths[others].cpu()
    place = batch.positions.cpu() % length[:, None] + start[:, None]
    return z[others[:, None], place]


def repeated(task: Task, times: int) -> Task:
    """The task's prompts, so many times one after the other, with what metrics of one pass read."""
    rows = list(range(len(task))) * times
    return replace(
        task,
        batch=task.batch.select(rows),
        answer_ids=task.answer_ids[rows],
        answer_positions=task.answer_positions[rows],
        spans={name: value[rows] for name, value in task.spans.items()},
        keys={},
        answer_keys=None if task.answer_keys is None else task.answer_keys[rows],
        decoding=None,
        answers=task.answers * times,
        info=task.info * times,
    )


def worse(metric_better: str) -> Callable[[Array], Array]:
    """Signs an effect so that higher is worse."""
    return (lambda effect: effect) if metric_better == "lower" else (lambda effect: -effect)
