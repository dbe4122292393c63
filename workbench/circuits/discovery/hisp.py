"""Head importance scores for pruning: how fast the metric falls as a part begins to be replaced.

A mask xi = 1 on each query head's q, each key/value head's k and v, and each MLP's output, and on each head's z
(Michel, Levy & Neubig 2019, arXiv 1905.10650, mask heads; Conmy et al. 2023, arXiv 2304.14997, split them).  A part's
score is the mean over prompts of |dm/dxi| = |(a - replacement) . dm/da|, over the L2 norm of its layer's scores. It is
without sign, and has the gradient's blind spots: a saturated softmax scores 0.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from workbench.circuits.discovery.found import Found, Progress
from workbench.circuits.discovery.gated import Prepared, frozen, has_mlp, prepare
from workbench.circuits.discovery.objective import Objective
from workbench.circuits.forks import Ablation
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Metric
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

SITES: tuple[Site, ...] = ("q", "k", "v", "z", "mlp_out")


def hisp(
    model: Model,
    task: PairTask,
    *,
    metric: str | Metric | None = None,
    ablation: Ablation | str = "patching",
    normalise: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    memory_limit: int | None = None,
) -> Found:
    """Scores of inputs (q, k, v and MLPs) and of nodes (heads by their z, and MLPs); no edges, no circuit.

    Inputs of a layer are normalised together, and so are its nodes. `normalise=False` leaves the magnitudes of
    attribution patching. Costs one forward and one backward beside the runs that give the replacement.
    """
    began = time.perf_counter()
    graph = Graph.of(model)
    prepared = prepare(model, task, SITES, ablation=ablation, memory_limit=memory_limit)
    objective = Objective.of(task, [one.ends for one in prepared], "metric", metric)
    nodes = np.full((len(task), len(graph.writers)), np.nan)
    inputs = np.full((len(task), len(graph.readers)), np.nan)
    done = 0
    with frozen(model.attachment.hf_model):
        for one in prepared:
            slopes = _slopes(model, one, objective, ablation)
            rows = one.group.prompts.numpy()
            for layer, places in enumerate(graph.layers):
                nodes[rows, places.heads] = slopes["z", layer]
                for site, where in zip(SITES[:3], (places.q, places.k, places.v), strict=True):
                    inputs[rows, where] = slopes[site, layer]
                if has_mlp(model, layer):
                    nodes[rows, places.mlp_out] = inputs[rows, places.mlp] = slopes["mlp_out", layer]
            done += len(rows)
            if progress is not None:
                progress(done, len(task))
    if normalise:
        for places in graph.layers:
            inside = slice(places.q.start, places.mlp.stop)
            inputs[:, inside] /= _size(inputs[:, inside])
            own = slice(places.heads.start, places.mlp_out.stop)
            nodes[:, own] /= _size(nodes[:, own])
    return Found(
        graph, "hisp", task.name, objective.label, len(task), seed,
        nodes=nodes.mean(0), inputs=inputs.mean(0), node_per_prompt=nodes, input_per_prompt=inputs,
        notes=("without sign: the size of the slope of the metric",), ablation=ablation,
        work={"forwards": (2 if ablation == "zero" else 3) * len(task), "backwards": len(task)},
        seconds=time.perf_counter() - began,
        clean=objective.clean.double().cpu().numpy(), corrupt=objective.corrupt.double().cpu().numpy(),
    )  # fmt: skip


def _size(scores: np.ndarray) -> float:
    """L2 norm of the mean scores; 1 where all are 0."""
    size = float(np.sqrt((scores.mean(0) ** 2).sum()))
    return size if size > 0 else 1.0


def _slopes(model: Model, one: Prepared, objective: Objective, ablation: str) -> dict[tuple[Site, int], np.ndarray]:
    """|dm/dxi| `[prompt, head]` (`[prompt, 1]` of MLPs) of every site and layer."""
    masks: dict[tuple[Site, int], Tensor] = {}

    def rewrite(site: Site, layer: int, value: Tensor) -> Tensor:
        instead = one.instead(ablation, site, layer).to(value)
        mask = torch.ones(len(value), *value.shape[2:-1] or (1,), device=value.device, requires_grad=True)
        masks[site, layer] = mask
        wide = mask[:, None, :, None] if value.ndim == 4 else mask[:, None]
        return instead + wide * (value - instead)

    measured = -objective(one.run(rewrite), one.group.prompts)
    keys = list(masks)
    found = torch.autograd.grad(measured.sum(), [masks[key] for key in keys])
    return {key: slope.abs().double().cpu().numpy() for key, slope in zip(keys, found, strict=True)}
