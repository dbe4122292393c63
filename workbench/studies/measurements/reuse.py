"""Whether a circuit's heads serve another task: `stages` of path patching, their `overlap`, and an `intervention`.

Merullo et al. 2023 (arXiv 2310.08744) walk a circuit backwards, each stage by the direct path alone:

1. which heads at the last token write the answer (movers), and which write against it (the negative one);
2. which heads change what the movers look for (into their queries);
3. which heads change what those bring along (into their values).

Then they take the heads of one task that stand idle in another one and set by hand where they look at the last token:
half on each wrong answer, as inhibition heads would. Heads are those found here, not those of the paper's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from workbench.circuits import Effects, Spot, patch_changes, patch_paths
from workbench.circuits.blocks import Blocks
from workbench.circuits.inference import sign_flip_p
from workbench.circuits.recorded import Group, Recorded, Source, Values
from workbench.circuits.spots import Change
from workbench.errors import RequestError
from workbench.heads.controls import control_sets
from workbench.heads.detector import Array, Progress
from workbench.models import Head
from workbench.studies.measurements.base import PROBE_SEED, Bench, Measurement, Parameters, Tables
from workbench.studies.measurements.pairs import Options, Prepared, check_task, interval_row, prepared
from workbench.tasks import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

Places = np.ndarray[Any, np.dtype[np.int64]]
STAGES = ("logits", "queries", "values")
RESAMPLES = 999


class Reuse(Parameters):
    """The first task's circuit against the second's; `yardsticks` are further tasks to compare with.

    The first task is walked on other prompts as well, which says what overlap one may hope for. `top` heads of each
    stage are compared, and the next stage goes into them. `inhibitors` heads of the first task's second stage, with
    its most negative writer, are set by hand in the second task's prompts; `draws` random sets of as many heads.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=2, max_length=2)] = ("ioi", "colored_objects")
    yardsticks: tuple[str, ...] = ("greater_than",)
    settings: dict[str, Options] = Field(default_factory=dict)
    prompts: Annotated[int, Field(ge=4)] = 8
    top: Annotated[int, Field(ge=1)] = 5
    inhibitors: Annotated[int, Field(ge=1)] = 3
    repaired: Annotated[int, Field(ge=4)] = 24
    draws: Annotated[int, Field(ge=2)] = 10
    answered: tuple[str, ...] = ("colored_objects",)

    @model_validator(mode="after")
    def _known(self) -> Reuse:
        for name in (*self.tasks, *self.yardsticks):
            check_task(name, self.settings.get(name, {}))
        return self


def _reuse(bench: Bench, asked: Reuse, progress: Progress | None) -> Tables:
    first, second = asked.tasks
    walks: dict[str, Walk] = {}
    again = f"{first}, other prompts"
    runs = [(first, asked.seed), (again, PROBE_SEED + asked.seed), (second, asked.seed)]
    runs += [(name, asked.seed) for name in asked.yardsticks]
    for done, (label, seed) in enumerate(runs):
        name = label.partition(",")[0]
        options = asked.settings.get(name, {})
        found = prepared(bench, name, asked.prompts, options, name in asked.answered, seed)
        walks[label] = Walk(bench.model, found, asked.top)
        if progress is not None:
            progress(done + 1, len(runs) + 1)
    overlaps = [row for other in walks if other != first for row in _overlaps(walks, first, other, asked)]
    tables = {
        "stages": pd.concat([walk.table().assign(task=label) for label, walk in walks.items()], ignore_index=True),
        "overlap": pd.DataFrame(overlaps),
        "intervention": _intervention(bench, asked, walks[first]),
    }
    if progress is not None:
        progress(len(runs) + 1, len(runs) + 1)
    return tables


class Walk:
    """The three stages on one task: effects of all heads by the direct path, noising at the last token first."""

    def __init__(self, model: Model, found: Prepared, top: int) -> None:
        self.caption, self.top = found.caption, top
        self.heads = model.spec.heads()
        self.effects: dict[str, Array] = {}
        self._parts: dict[str, Effects] = {}
        self._walk(model, found.task)

    def _walk(self, model: Model, task: PairTask) -> None:
        self._stage("logits", patch_paths(
            model, task, [str(head) for head in self.heads], "logits", form="strict", at="END", direction="noising",
        ))  # fmt: skip
        movers = [Spot(head.layer, "q", head.head, "END") for head in self.best("logits")]
        self._into(model, task, "queries", movers, "END")
        shape = {layer.index: layer for layer in model.spec.layers}
        brought = [Spot(head.layer, "v", head.head // shape[head.layer].group) for head in self.best("queries")]
        self._into(model, task, "values", list(dict.fromkeys(brought)), None)

    def _into(self, model: Model, task: PairTask, stage: str, receivers: list[Spot], at: str | None) -> None:
        senders = [head for head in self.heads if head.layer < max(one.layer for one in receivers)]
        if not senders:
            raise RequestError(
                f"The heads that {stage} are read from stand in layer 0; this model has no earlier ones."
            )
        self._stage(stage, patch_paths(
            model, task, list(map(str, senders)), receivers, form="strict", at=at, direction="noising"
        ))  # fmt: skip

    def _stage(self, stage: str, effects: Effects) -> None:
        self._parts[stage] = effects
        all_heads = np.zeros((len(self.heads), len(effects.clean)))
        place = {str(head): at for at, head in enumerate(self.heads)}
        rows = [place[label.split(" ")[0]] for label in effects.labels]
        all_heads[rows] = effects.effect("noising")
        self.effects[stage] = all_heads

    def best(self, stage: str, prompts: Places | None = None) -> list[Head]:
        """The heads with the largest mean effect, best first; of some prompts where they are named."""
        values = self.effects[stage] if prompts is None else self.effects[stage][:, prompts]
        return [self.heads[at] for at in np.argsort(-values.mean(1), kind="stable")[: self.top]]

    @property
    def against(self) -> Head:
        """The head that writes most against the answer."""
        return self.heads[int(self.effects["logits"].mean(1).argmin())]

    def table(self) -> pd.DataFrame:
        parts = []
        for stage in STAGES:
            found = self._parts[stage].table()
            found["node"] = found["node"].str.partition(" ->")[0]
            order = found["effect"].rank(ascending=False, method="first").astype(int)
            into = "logits" if stage == "logits" else self._parts[stage].labels[0].partition(" -> ")[2]
            parts.append(found[["node", "effect", "recovery", "low", "high", "p", "q", "n"]].assign(
                stage=stage, into=into, rank=order, caption=self.caption
            ))  # fmt: skip
        return pd.concat(parts, ignore_index=True)


def _overlaps(walks: dict[str, Walk], one: str, other: str, asked: Reuse) -> list[dict[str, Any]]:
    """Shared top heads at every stage, with intervals over prompts of both tasks."""
    a, b, rng, rows = walks[one], walks[other], np.random.default_rng(asked.seed), []
    for stage in STAGES:
        drawn = []
        for _ in range(RESAMPLES):
            picks = [rng.integers(walk.effects[stage].shape[1], size=walk.effects[stage].shape[1]) for walk in (a, b)]
            drawn.append(len(set(a.best(stage, picks[0])) & set(b.best(stage, picks[1]))) / asked.top)
        shared = [str(head) for head in a.best(stage) if head in b.best(stage)]
        low, high = np.percentile(drawn, [2.5, 97.5])
        rows.append(
            {
                "stage": stage, "task": other, "against": one, "shared": " ".join(shared), "k": asked.top,
                "value": len(shared) / asked.top, "low": float(low), "high": float(high),
                "chance": asked.top / len(a.heads), "n": a.effects[stage].shape[1],
                "caption": f"{a.caption} {b.caption}",
            }
        )  # fmt: skip
    return rows


def _intervention(bench: Bench, asked: Reuse, walk: Walk) -> pd.DataFrame:
    """The first task's inhibitors and negative head made to look at the wrong answers of the second task."""
    name, model = asked.tasks[1], bench.model
    found = prepared(bench, name, asked.repaired, asked.settings.get(name, {}), False, PROBE_SEED + asked.seed)
    inhibitors = [head for head in walk.best("queries") if head != walk.against][: asked.inhibitors]
    sets = {"both": [*inhibitors, walk.against], "inhibitors": inhibitors, "negative": [walk.against]}
    rng = np.random.default_rng(asked.seed)
    controls = {label: control_sets(model.spec, heads, asked.draws, rng, sets["both"]) for label, heads in sets.items()}
    every: list[Sequence[Head]] = [one for label in sets for one in (sets[label], *controls[label])]
    margins = overwrite_rows(model, found.task, every, wrong_places(found.task))
    own = found.task.score(found.clean, "logit_margin").double().numpy()
    rows = []
    for at, label in enumerate(sets):
        block = margins[at * (1 + asked.draws) : (at + 1) * (1 + asked.draws)]
        for measure, before, after in (("correct", own > 0, block > 0), ("margin", own, block)):
            changed = after.astype(float) - before.astype(float)
            drawn = changed[1:].mean(1)
            rows.append(
                {
                    "set": label, "heads": " ".join(map(str, sets[label])), "measure": measure,
                    "before": float(before.mean()), "after": float(after[0].mean()),
                    **interval_row(changed[0], asked.seed), "p": float(sign_flip_p(changed[:1], asked.seed)[0]),
                    "control": float(drawn.mean()), "control_low": float(drawn.min()),
                    "control_high": float(drawn.max()), "caption": found.caption,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def wrong_places(task: PairTask) -> Float[Tensor, "prompt token"]:
    """Weights of one row of attention: even over the tokens that say a wrong answer, found by roles C1, C2 ..."""
    listed = [role for role in task.roles if role[0] == "C" and role[1:].isdigit()]
    if len(listed) < 2:
        raise RequestError(f"{task.name} marks no listed answers (roles C1, C2 ...); take colored_objects.")
    weights = torch.zeros(task.clean.ids.shape)
    for row, about in enumerate(task.info):
        for place, role in enumerate(listed):
            if place != about["asked"]:
                weights[row, task.roles[role][row]] = 1 / (len(listed) - 1)
    return weights


def overwrite_rows(
    model: Model, task: PairTask, sets: Sequence[Sequence[Head]], weights: Float[Tensor, "prompt token"]
) -> Float[np.ndarray, "set prompt"]:
    """The margin of the answer over the best foil where heads attend, at the last token, with the given weights."""
    changes: list[Change] = [tuple(Spot(h.layer, "pattern", h.head, "END") for h in heads) for heads in sets]
    effects = patch_changes(
        model, task, changes, labels=[" ".join(map(str, heads)) for heads in sets], direction="noising",
        metric="logit_margin", source=_Row(task, weights),
    )  # fmt: skip
    values: Array = effects.values["noising"]
    return values


class _Row(Source):
    """Puts one row of attention in place, the same for every head."""

    def __init__(self, task: PairTask, weights: Float[Tensor, "prompt token"]) -> None:
        self.task, self.weights = task, weights

    def values(self, group: Group, blocks: Blocks, base: Recorded, other: Recorded) -> Values:
        columns = group.starts[:, None] + torch.arange(group.tokens)
        return _Looking(self.weights[group.prompts[:, None], columns], blocks)


class _Looking(Values):
    def __init__(self, rows: Float[Tensor, "prompt token"], blocks: Blocks) -> None:
        self.rows, self.spec = rows, blocks.attachment.spec
        self.same_before: Tensor = torch.zeros(len(rows), dtype=torch.long)

    def at(self, change: int, site: Site, layer: int) -> Float[Tensor, "prompt head query key"]:
        prompts, tokens = self.rows.shape
        return self.rows[:, None, None].expand(prompts, self.spec.layers[layer].heads, tokens, tokens)


REUSE = (
    Measurement(
        "component_reuse", 1, "one circuit's heads in another task", Reuse, _reuse,
        ("stages", "overlap", "intervention"), ("stages",),
    ),
)  # fmt: skip
