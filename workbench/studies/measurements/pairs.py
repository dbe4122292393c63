"""Clean and corrupt prompts in a study: which task, how many pairs, which of them; `behaviour` on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Progress
from workbench.heads.inference import bootstrap_mean
from workbench.studies.measurements.base import Bench, Measurement, Parameters, Tables
from workbench.tasks import NONE, PAIR_TASKS, PairTask
from workbench.tasks.pairs import right
from workbench.tracing import Model

Options = dict[str, str | int | bool | tuple[int, ...]]
# Pairs drawn for each one that is kept, where only those that the model answers are.
DRAWN = 3


class Pairs(Parameters):
    """A task's pairs; `options` are the task's own settings.

    With `answered` only pairs are kept that the model gets right: the clean answer above every foil, and the corrupt
    prompt turning the metric's sign. Circuits are looked for where there is a behaviour to explain.
    """

    task: str = "ioi"
    prompts: Annotated[int, Field(ge=2)] = 8
    options: Options = Field(default_factory=dict)
    answered: bool = False

    @model_validator(mode="after")
    def _known(self) -> Pairs:
        check_task(self.task, self.options)
        return self


def check_task(name: str, options: Options) -> None:
    """Refuse a task, or settings of it, that do not exist."""
    if name not in PAIR_TASKS:
        raise RequestError(f"Task {name!r} is unknown; choose from {', '.join(PAIR_TASKS)}.")
    parameters = signature(PAIR_TASKS[name]).parameters.items()
    known = [key for key, one in parameters if one.kind is Parameter.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise RequestError(f"Task {name!r} has no setting {key!r}; there are {', '.join(known)}.")


def build(name: str, tokenizer: Any, prompts: int, seed: int, options: Options) -> PairTask:
    """A task with settings of its own."""
    builder: Callable[..., PairTask] = PAIR_TASKS[name]
    return builder(tokenizer, prompts, seed, **options)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Pairs with the logits of both runs at the position that is read; `drawn` is how many were looked at."""

    task: PairTask
    clean: Float[Tensor, "prompt vocab"]
    corrupt: Float[Tensor, "prompt vocab"]
    drawn: int
    answered: int

    @property
    def caption(self) -> str:
        """Which pairs these are, in a sentence."""
        chosen = (
            f", {len(self.task)} of {self.answered} answered among {self.drawn}" if self.drawn > len(self.task) else ""
        )
        return f"{len(self.task)} pairs of {self.task.name}{chosen}."


def prepare(bench: Bench, asked: Pairs, *, seed: int | None = None) -> Prepared:
    """The pairs that a cell asks for, run once; `seed` draws others than the cell's own."""
    return prepared(
        bench, asked.task, asked.prompts, asked.options, asked.answered, asked.seed if seed is None else seed
    )


def prepared(bench: Bench, name: str, prompts: int, options: Options, answered: bool, seed: int) -> Prepared:
    """Pairs of a named task; refused where the model answers fewer than two of those drawn."""
    model = bench.model
    if model.tokenizer is None:
        raise RequestError(f"{name} is text and needs a tokenizer; load the model with one.")
    drawn = prompts * DRAWN if answered else prompts
    task = build(name, model.tokenizer, drawn, seed, options)
    clean, corrupt = (read(model, task, side) for side in ("clean", "corrupt"))
    good = torch.ones(drawn, dtype=torch.bool)
    if answered:
        good = right(task, clean) & (task.score(clean) > 0) & (task.score(corrupt) < 0)
    rows = good.nonzero().flatten().tolist()
    if len(rows) < 2:
        raise RequestError(
            f"The model answers {len(rows)} of {drawn} pairs of {name}: there is no behaviour to explain. Take another "
            "task or larger model, or answered = false to look at all pairs."
        )
    kept = rows[:prompts]
    task = task.select(kept)
    bench.note_pairs(task)
    return Prepared(task, clean[kept], corrupt[kept], drawn, len(rows))


def read(model: Model, task: PairTask, side: str) -> Float[Tensor, "prompt vocab"]:
    """Logits of the clean or the corrupt prompts where the task reads them."""
    batch = task.clean if side == "clean" else task.corrupt
    logits = model.trace(batch, logits=task.position[:, None].cpu()).logits
    assert logits is not None
    return logits[:, 0].float().cpu()


def interval_row(values: Float[np.ndarray, " prompt"], seed: int) -> dict[str, Any]:
    """Mean over prompts with its bootstrap interval: value, low, high, n."""
    found = bootstrap_mean(values[:, None].astype(float), seed)
    return {
        "value": float(found.value[0]), "low": float(found.low[0]), "high": float(found.high[0]), "n": len(values),
    }  # fmt: skip


def _behaviour(bench: Bench, asked: Pairs, progress: Progress | None) -> Tables:
    """How well the model does a task, with the chance of guessing among answers and foils.

    `correct`: the answer above every foil; `first`: the most likely of all tokens; `clean`, `corrupt`: the metric.
    """
    found = prepare(bench, asked)
    task = found.task
    first = (found.clean.argmax(-1)[:, None] == task.answers.cpu()).any(1)
    count = (task.answers != NONE).sum(1) + (task.foils != NONE).sum(1)
    measures = {
        "correct": right(task, found.clean),
        "first": first,
        "clean": task.score(found.clean),
        "corrupt": task.score(found.corrupt),
    }
    rows = [
        {
            "task": task.name, "variant": _variant(asked), "measure": name,
            **interval_row(values.double().cpu().numpy(), asked.seed),
            "chance": float(((task.answers != NONE).sum(1) / count).mean()) if name == "correct" else np.nan,
            "metric": task.metric, "caption": found.caption,
        }
        for name, values in measures.items()
    ]  # fmt: skip
    return {"behaviour": pd.DataFrame(rows)}


def _variant(asked: Pairs) -> str:
    return " ".join(f"{name}={value}" for name, value in asked.options.items()) or "default"


BEHAVIOUR = (Measurement("behaviour", 1, "how well a task is done", Pairs, _behaviour, ("behaviour",)),)
