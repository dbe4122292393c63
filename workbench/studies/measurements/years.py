"""Greater-than: `year_sites` that carry the year to the end, by which way (`year_routes`), and what is written there.

Hanna et al. 2023 (arXiv 2305.00586): heads at the last token read the year, and MLPs after them turn it into an upper
triangle: every later year up, every earlier one down. `year_triangle` shows what MLPs and heads write on each
continuation by its distance from the year.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from workbench.circuits import Spot, direct_logit_attribution, patch_activations, patch_paths
from workbench.circuits.inference import mean_effect, recovery
from workbench.errors import RequestError
from workbench.heads.controls import control_sets
from workbench.heads.detector import Array, Progress
from workbench.models import Head
from workbench.studies.measurements.base import Bench, Measurement, Tables
from workbench.studies.measurements.pairs import Pairs, prepare
from workbench.tasks import PairTask
from workbench.tracing import Model


class Years(Pairs):
    """Pairs of years; the `readers` heads and `mlps` with the largest effects, `draws` random sets of heads."""

    task: str = "greater_than"
    prompts: Annotated[int, Field(ge=4)] = 10
    readers: Annotated[int, Field(ge=1)] = 6
    mlps: Annotated[int, Field(ge=1)] = 4
    draws: Annotated[int, Field(ge=2)] = 5


def _years(bench: Bench, asked: Years, progress: Progress | None) -> Tables:
    if asked.task != "greater_than":
        raise RequestError(f"task = {asked.task!r}: year_circuit is about greater_than.")
    found = prepare(bench, asked)
    sites = _sites(bench.model, found.task)
    if progress is not None:
        progress(1, 3)
    best = sites.sort_values("effect", ascending=False)
    readers = [Head.parse(node) for node in best.loc[best["part"] == "head", "node"].head(asked.readers)]
    mlps = [int(layer) for layer in best.loc[best["part"] == "mlp", "layer"].head(asked.mlps)]
    routes = _routes(bench.model, found.task, readers, asked)
    if progress is not None:
        progress(2, 3)
    triangle = _triangle(bench.model, found.task, mlps, readers, asked.seed)
    tables = {"year_sites": sites, "year_routes": routes, "year_triangle": triangle}
    return {name: table.assign(caption=found.caption) for name, table in tables.items()}


def _sites(model: Model, task: PairTask) -> pd.DataFrame:
    """Noising every head's z and every MLP at the last token, and MLPs at the year."""
    parts = [
        ("head", patch_activations(model, task, "z", "head_position", positions=["END"], direction="noising")),
        ("mlp", patch_activations(model, task, "mlp_out", "position", positions=["END"], direction="noising")),
    ]
    columns = ["node", "layer", "head", "effect", "recovery", "low", "high", "p", "q", "n"]
    return pd.concat([one.table()[columns].assign(part=name) for name, one in parts], ignore_index=True)


def _routes(model: Model, task: PairTask, readers: list[Head], asked: Years) -> pd.DataFrame:
    """The readers' direct effect on the logits, and that through the inputs of all later MLPs at the last token.

    Heads are sent one by one, and their effects added; random sets of as many heads likewise.
    """
    rng = np.random.default_rng(asked.seed)
    sets = [tuple(readers), *control_sets(model.spec, readers, asked.draws, rng, ())]
    heads = sorted({head for one in sets for head in one})
    ends = [Spot(layer, "mlp_out", None, "END") for layer in range(min(h.layer for h in heads), model.spec.n_layers)]
    rows = []
    ways: tuple[tuple[str, Sequence[Spot] | Literal["logits"]], ...] = (
        ("to the logits", "logits"), ("through MLPs", ends),
    )  # fmt: skip
    for route, receivers in ways:
        effects = patch_paths(
            model,
            task,
            list(map(str, heads)),
            receivers,
            form="strict",
            at="END",
            direction="noising",
        )
        own = effects.effect("noising")
        summed: Array = np.stack([own[[heads.index(head) for head in one]].sum(0) for one in sets])
        shares = recovery(summed, effects.clean, effects.corrupt, asked.seed)
        rows.append(
            {
                "route": route, "heads": " ".join(map(str, readers)), "value": float(shares.value[0]),
                "low": float(shares.low[0]), "high": float(shares.high[0]), "n": len(task),
                "control": float(shares.value[1:].mean()), "control_low": float(shares.value[1:].min()),
                "control_high": float(shares.value[1:].max()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _triangle(model: Model, task: PairTask, mlps: list[int], readers: list[Head], seed: int) -> pd.DataFrame:
    """What parts write on each continuation less what they write on the mean one, by its distance from the year's.

    A distance is of the continuation (a digit, or two) from the year's own; `control_*` is the range of all MLPs that
    are not among those named. `rank` is 0 for the readers and then by the MLP's effect. Differences of logits, by
    direct attribution with the norm's scale held.
    """
    values, numbers = _written(model, task)
    years = np.array([int(str(one["year"])[2:]) for one in task.info])
    own = years // 10 if task.info[0]["form"] == "digits" else years
    nodes, table = values[0].nodes, np.stack([one.values for one in values], 2)
    table = table - table.mean(2, keepdims=True)
    chosen = {"the readers": [str(head) for head in readers]} | {f"L{layer}.mlp": [f"L{layer}.mlp"] for layer in mlps}
    rest = [node for node in nodes if node.endswith(".mlp") and node not in chosen]
    distances = np.array(numbers)[None] - own[:, None]
    rows: list[dict[str, Any]] = []
    for rank, (name, members) in enumerate(chosen.items()):
        part = table[:, [nodes.index(node) for node in members]].sum(1)
        for distance in range(-5, 6):
            there = distances == distance
            prompts = np.flatnonzero(there.any(1))
            if len(prompts) < 2:
                continue
            at = there[prompts].argmax(1)
            found = mean_effect(part[prompts, at][None], seed)
            drawn = [table[prompts, nodes.index(node), at].mean() for node in rest]
            rows.append(
                {
                    "part": name, "rank": rank, "distance": distance, "value": float(found.value[0]),
                    "low": float(found.low[0]), "high": float(found.high[0]), "control_low": float(min(drawn)),
                    "control_high": float(max(drawn)),
                    "n": len(prompts),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _written(model: Model, task: PairTask) -> tuple[list[Any], list[int]]:
    """Direct attribution to each continuation's logit, and which number it is."""
    ids: dict[int, int] = {}
    for row in range(len(task)):
        for one in (*task.answers[row].tolist(), *task.foils[row].tolist()):
            if one >= 0 and model.tokenizer is not None:
                ids.setdefault(int(model.tokenizer.decode([one])), one)
    found = []
    for _, one in sorted(ids.items()):
        answers = task.answers.new_full((len(task), 1), one)
        alone = replace(task, answers=answers, foils=answers.new_full(answers.shape, -1), metric="log_probability")
        found.append(direct_logit_attribution(model, alone, by="head", of="answer"))
    return found, sorted(ids)


YEARS = (
    Measurement(
        "year_circuit", 1, "how a later year is told", Years, _years,
        ("year_sites", "year_routes", "year_triangle"), ("year_sites",),
    ),
)  # fmt: skip
