"""Scores of every node or edge of a model from a few passes, by the method that is named."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.attribution.baselines import Baselines
from workbench.circuits.attribution.methods import METHODS, Method
from workbench.circuits.attribution.passes import constant_weights
from workbench.circuits.attribution.plan import plan
from workbench.circuits.attribution.rules import backward_rules
from workbench.circuits.attribution.settings import Ablation, Freeze, Progress, Rule, Settings
from workbench.circuits.attribution.work import Chunk, Job, Target, chunks, divergence, plain_target
from workbench.circuits.effects import Direction
from workbench.circuits.graph import Graph, Scores
from workbench.circuits.recorded import Group, Metric, groups, metric_of
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

DIVERGENCE = "kl_divergence"


def attribute(
    model: Model,
    task: PairTask,
    method: str = "eap-ig",
    *,
    metric: str | Metric | None = None,
    direction: Direction = "noising",
    ablation: Ablation = "patching",
    freeze_ln_scale: bool | Freeze = False,
    steps: int = 5,
    rule: Rule = "midpoint",
    positions: bool = False,
    prompts_at_once: int | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """First-order estimates of what each node or edge does; positive helps, whatever the direction.

    `metric` is one of the task's, one's own function of logits and prompts, or "kl_divergence" (from the clean run;
    refused where gradients are taken at the clean prompts alone, where it has none). `freeze_ln_scale` takes the
    scale of norms as given in the backward pass: all of them (True), or the "final" one. Raises `ModelRefused` for
    models in which single heads do not write to the stream, `MemoryRefused` where one prompt does not fit.
    """
    if method not in METHODS:
        raise RequestError(f"method={method!r} is not known; choose from {', '.join(METHODS)}.")
    freeze: Freeze = freeze_ln_scale if isinstance(freeze_ln_scale, str) else "all" if freeze_ln_scale else "none"
    settings = Settings(direction, ablation, freeze, steps, rule, positions, prompts_at_once, memory_limit, seed)
    chosen, graph = METHODS[method], Graph.of(model)
    name, target = _target(task, metric, chosen, direction)
    settings.check(edges=chosen.of_edges is not None, on_the_way=chosen.points in ("inputs", "ends"))
    started = time.perf_counter()
    with constant_weights(model), backward_rules(model, freeze, chosen.relevance) as attend:
        baselines = Baselines(model, task, ablation)
        job = Job(model, task, graph, target, settings, baselines, attend, freeze == "all" or chosen.relevance)
        found = _Found(len(task), graph, positions)
        done = 0
        for group, chunk, points in _chunks(job, chosen):
            found.keep(group, chunk, chosen, points)
            done += len(chunk.prompts)
            if progress is not None:
                progress(done, len(task))
    job.work["forwards"] += baselines.forwards
    exact = graph.count if chosen.of_edges is not None else len(graph.writers) + len(graph.readers)
    return found.scores(
        Scores(
            graph, method, task.name, name, len(task), seed, notes=tuple(_notes(task, chosen, settings)),
            work=job.work | {"exact": len(task) * (exact + 2)}, seconds=time.perf_counter() - started,
            direction=direction, ablation=ablation,
        )
    )  # fmt: skip


def _target(task: PairTask, metric: str | Metric | None, method: Method, direction: Direction) -> tuple[str, Target]:
    if metric != DIVERGENCE:
        name, measure = metric_of(task, metric)
        return name, plain_target(measure)
    if method.points == "base" and direction == "noising":
        raise RequestError(
            "metric='kl_divergence': the divergence from the clean run is smallest at the clean run, so that its "
            "gradient there is zero, and with it every score. Use a metric of the task, direction='denoising' (then "
            "gradients are those at the corrupt prompts), or 'eap-ig', whose points leave the clean run."
        )
    return DIVERGENCE, divergence


def _chunks(job: Job, method: Method) -> Iterator[tuple[Group, Chunk, int]]:
    for group in groups(job.task):
        size = plan(
            job.model, job.graph, group.cut(job.task.clean).ids, method.count(job.settings), job.settings,
            edges=method.of_edges is not None, patterns=method.patterns or method.relevance,
        )  # fmt: skip
        for chunk in chunks(job, group, size.prompts):
            yield group, chunk, size.points


def _notes(task: PairTask, method: Method, settings: Settings) -> Iterator[str]:
    if not method.signed:
        yield "scores are sizes: they say nothing of whether a part helps"
    if settings.freeze != "none":
        yield f"scale of norms taken as given in the backward pass: {settings.freeze}"
    if settings.ablation.startswith("mean") and task.references is None:
        yield "the task has no reference prompts: means are those of its corrupt prompts"
    if method.points in ("inputs", "components"):
        yield f"{settings.steps} steps, {settings.rule} rule"


@dataclass(eq=False)
class _Found:
    """Scores of prompts in the task's order."""

    count: int
    graph: Graph
    by_token: bool
    edges: list[Tensor] = field(default_factory=list)
    nodes: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    tokens: dict[str, list[Tensor]] = field(default_factory=lambda: {"nodes": [], "inputs": []})
    prompts: list[Tensor] = field(default_factory=list)
    metrics: list[Tensor] = field(default_factory=list)

    def keep(self, group: Group, chunk: Chunk, method: Method, points: int) -> None:
        sign = chunk.sign if method.signed else 1.0
        self.prompts.append(chunk.prompts)
        self.metrics.append(torch.stack(chunk.metrics, 1))
        if method.of_edges is not None:
            scores = sign * method.of_edges(chunk, points)
            self.nodes.append(scores.sum(2).double().cpu())
            self.inputs.append(scores.sum(1).double().cpu())
            self.edges.append(scores.cpu())
            return
        assert method.of_nodes is not None
        found = method.of_nodes(chunk)
        self.nodes.append(sign * found.all_writers.double().cpu())
        self.inputs.append(sign * found.all_readers.double().cpu())
        if self.by_token:
            self.tokens["nodes"].append(sign * found.writers.cpu())
            self.tokens["inputs"].append(sign * found.readers.cpu())

    def scores(self, blank: Scores) -> Scores:
        """Everything laid out by prompt."""
        order = torch.cat(self.prompts).argsort()
        nodes, inputs = (torch.cat(parts)[order].numpy() for parts in (self.nodes, self.inputs))
        metrics = torch.cat(self.metrics)[order].numpy()
        edges = None
        if self.edges:
            edges = torch.cat(self.edges)[order].double().numpy()
            edges[:, ~self.graph.exists] = np.nan
        tokens = {name: _laid_out(parts)[order.numpy()] for name, parts in self.tokens.items() if parts}
        return replace(
            blank,
            edges=None if edges is None else edges.mean(0),
            nodes=nodes.mean(0), inputs=inputs.mean(0), node_per_prompt=nodes, input_per_prompt=inputs,
            per_prompt=None if edges is None else edges.astype(np.float32),
            clean=metrics[:, 0], corrupt=metrics[:, 1], positions=tokens,
        )  # fmt: skip


def _laid_out(parts: list[Tensor]) -> Float[np.ndarray, "prompt part token"]:
    """Padded with NaN to the longest."""
    longest = max(part.shape[-1] for part in parts)
    padded = [torch.nn.functional.pad(part, (0, longest - part.shape[-1]), value=torch.nan) for part in parts]
    return torch.cat(padded).double().numpy()
