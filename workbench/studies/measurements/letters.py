"""Multiple choice: which heads look at the right label and write it, and how few directions their queries need.

Lieberum et al. 2023 (arXiv 2307.09458) found heads in Chinchilla that attend to the right label and copy it
(`label_heads`), and that a few directions of their queries and keys are enough to tell the options apart
(`compression`). Both are measured on whatever heads a model has; whether it can do the task is `behaviour`'s question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from workbench.circuits import (
    Spot,
    Subspace,
    direct_logit_attribution,
    orthonormal,
    patch_subspaces,
    principal_subspace,
)
from workbench.circuits.inference import mean_effect, q_values, sign_flip_p
from workbench.errors import RequestError
from workbench.heads.detector import Array, Progress
from workbench.models import Batch, Head
from workbench.studies.measurements.base import PROBE_SEED, Bench, Measurement, Tables
from workbench.studies.measurements.pairs import Pairs, Prepared, interval_row, prepare
from workbench.tasks import PairTask
from workbench.tracing import Model


class Labels(Pairs):
    """Multiple-choice pairs; roles LABEL1 to LABEL4."""

    task: str = "mcqa"
    prompts: Annotated[int, Field(ge=4)] = 16


def _labels(bench: Bench, asked: Labels, progress: Progress | None) -> Tables:
    """Each head's attention from the end to the right label less that to the mean other one, and its direct logit.

    `to_labels` is its attention to all labels, `single` the largest share that one place has of it (0.25: even).
    """
    found = prepare(bench, asked)
    task, model = found.task, bench.model
    roles = sorted(role for role in task.roles if role.startswith("LABEL"))
    if len(roles) < 2 or any("right" not in one for one in task.info):
        raise RequestError(f"{task.name} has no labelled options (roles LABEL1 ...); take mcqa.")
    rows, end = torch.arange(len(task)), task.position.cpu()
    places = torch.stack([task.roles[role].cpu() for role in roles], 1)
    right = np.array([int(str(one["right"])) for one in task.info])
    looks: list[Array] = []
    patterns = model.trace(task.clean, sites=["pattern"])
    for layer in range(model.spec.n_layers):
        pattern = patterns.site("pattern", layer)
        looks += list(pattern[rows[:, None], :, end[:, None], places].double().permute(2, 0, 1).numpy())
    attention = np.stack(looks)
    own = attention[:, np.arange(len(task)), right]
    contrast = own - (attention.sum(2) - own) / (len(roles) - 1)
    direct = direct_logit_attribution(model, task, by="head", seed=asked.seed)
    written = direct.table().set_index("node")
    interval, p = mean_effect(contrast, asked.seed), sign_flip_p(contrast, asked.seed)
    heads = model.spec.heads()
    by_place = attention.mean(1)
    table = pd.DataFrame(
        {
            "node": list(map(str, heads)), "layer": [h.layer for h in heads], "head": [h.head for h in heads],
            "value": interval.value, "low": interval.low, "high": interval.high, "p": p, "q": q_values(p),
            "to_labels": by_place.sum(1), "single": by_place.max(1) / by_place.sum(1).clip(1e-12),
            "direct": [written.loc[str(head), "value"] for head in heads],
            "direct_low": [written.loc[str(head), "low"] for head in heads],
            "direct_high": [written.loc[str(head), "high"] for head in heads],
            "n": len(task), "labels": str(asked.options.get("labels", "letters")), "caption": found.caption,
        }
    )  # fmt: skip
    return {"label_heads": table}


class Compression(Pairs):
    """The `k` heads that write most for the answer keep their queries and keys along `ranks` directions alone.

    Directions are the strongest of other prompts; `draws` random subspaces of the same rank stand against them.
    """

    k: Annotated[int, Field(ge=1)] = 5
    ranks: tuple[int, ...] = (0, 1, 2, 3, 4, 8, 16, 32)
    draws: Annotated[int, Field(ge=2)] = 3
    held_out: Annotated[int, Field(ge=4)] = 16


def _compression(bench: Bench, asked: Compression, progress: Progress | None) -> Tables:
    """The share of the metric's gap that is left at each rank of q and k, and how many prompts are still right."""
    model, found = bench.model, prepare(bench, asked)
    direct = direct_logit_attribution(model, found.task, by="head", seed=asked.seed).table()
    heads = [Head.parse(node) for node in direct[direct["kind"] == "head"].sort_values("rank")["node"].head(asked.k)]
    spots = _spots(model, heads)
    tried = prepare(bench, asked.model_copy(update={"prompts": asked.held_out}), seed=PROBE_SEED + asked.seed)
    reference = Batch(
        torch.cat([found.task.clean.ids, found.task.corrupt.ids]),
        torch.cat([found.task.clean.mask, found.task.corrupt.mask]),
    )
    widest = min(model.spec.layers[spot.layer].head_dim for spot in spots)
    ranks = [rank for rank in asked.ranks if rank < widest]
    whole = {spot: principal_subspace(model, reference, spot, max(ranks)) for spot in spots}
    rows: list[dict[str, Any]] = []
    for done, rank in enumerate(ranks, start=1):
        own = {spot: Subspace(one.basis[:, :rank], one.mean) for spot, one in whole.items()}
        values = _kept(model, tried.task, own)
        generators = [torch.Generator().manual_seed(asked.seed * 1000 + draw) for draw in range(asked.draws)]
        drawn = [_kept(model, tried.task, {s: _random(one, rank, g) for s, one in whole.items()}) for g in generators]
        rows += _ranked(tried, rank, values, drawn, asked.seed)
        if progress is not None:
            progress(done, len(ranks))
    names = " ".join(map(str, heads))
    return {"compression": pd.DataFrame(rows).assign(heads=names, task=found.task.name, caption=tried.caption)}


def _spots(model: Model, heads: list[Head]) -> tuple[Spot, ...]:
    group = {layer.index: layer.group for layer in model.spec.layers}
    queries = [Spot(head.layer, "q", head.head) for head in heads]
    keys = [Spot(head.layer, "k", head.head // group[head.layer]) for head in heads]
    return tuple(dict.fromkeys([*queries, *keys]))


def _random(like: Subspace, rank: int, generator: torch.Generator) -> Subspace:
    directions = torch.randn(like.basis.shape[0], rank, generator=generator)
    return Subspace(orthonormal(directions).basis if rank else directions, like.mean)


def _kept(model: Model, task: PairTask, subspaces: dict[Spot, Subspace]) -> Array:
    found = patch_subspaces(model, task, [tuple(subspaces)], subspaces, how="low_rank", direction="noising")
    values: Array = found.values["noising"][0]
    return values


def _ranked(found: Prepared, rank: int, values: Array, drawn: list[Array], seed: int) -> list[dict[str, Any]]:
    clean, nothing = (found.task.score(one).double().numpy() for one in (found.clean, found.corrupt))
    gap = float(clean.mean() - nothing.mean())
    rows = []

    def share(of: Array) -> Array:
        left: Array = np.asarray((of - clean) / gap + 1, dtype=np.float64)
        return left

    def right(of: Array) -> Array:
        return (of > 0).astype(np.float64)

    measures: dict[str, Callable[[Array], Array]] = {"share of the metric": share, "right": right}
    for measure, of in measures.items():
        random = [float(of(one).mean()) for one in drawn]
        rows.append(
            {
                "rank": rank, "measure": measure, **interval_row(of(values), seed), "whole": float(of(clean).mean()),
                "control": float(np.mean(random)), "control_low": min(random), "control_high": max(random),
            }
        )  # fmt: skip
    return rows


LETTERS = (
    Measurement(
        "label_heads", 1, "heads that look at the right label", Labels, _labels, ("label_heads",), ("label_heads",)
    ),
    Measurement("compression", 1, "queries and keys of few directions", Compression, _compression, ("compression",)),
)
