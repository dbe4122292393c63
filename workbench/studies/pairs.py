"""Pair tasks for runs: found by name or in a file, read once without any patch, and written down."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.runs import RunWriter, environment
from workbench.studies.survey import Reporter, model_facts
from workbench.tasks.pair_files import SUFFIXES, count_pairs, pairs_from_file
from workbench.tasks.pair_tasks import PAIR_TASKS
from workbench.tasks.pairs import METRICS, PairTask, right
from workbench.tasks.task import NONE
from workbench.tracing import Model

# Pairs of a built-in task, where none are asked for: enough for intervals, few enough for two cores.
PAIRS = 16
# One pair has neither an interval nor a p-value.
FEWEST = 2
BASELINE = "baseline"


def check_task(name: str, metric: str | None = None, pairs: int | None = None) -> None:
    """Refuse a task that is neither built in nor a file of two pairs or more, and a metric that does not exist.

    Needs no model: what only a tokenizer tells of a file is refused by `find_pairs`.
    """
    if metric is not None and metric not in METRICS:
        raise RequestError(f"Metric {metric!r} is unknown; choose from {', '.join(METRICS)}.")
    if name in PAIR_TASKS:
        return
    file = Path(name)
    if file.suffix.lower() in SUFFIXES:
        if not file.is_file():
            raise RequestError(f"There is no file {name}; check the path, or name a built-in task.")
        count = count_pairs(file, metric=metric or "logit_difference")
        if count < FEWEST:
            raise RequestError(
                f"{name} has one pair, of which nothing can be told from chance; write {FEWEST} pairs or more into it, "
                f"one a line ({PAIRS} are the default of built-in tasks)."
            )
        if pairs is not None and pairs > count:
            raise RequestError(f"{name} has {count} pairs, fewer than the {pairs} asked for; leave --pairs out.")
        return
    near = difflib.get_close_matches(name, PAIR_TASKS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RequestError(
        f"Task {name!r} is neither built in ({', '.join(PAIR_TASKS)}) nor a {' or '.join(SUFFIXES)} file.{hint}"
    )


def find_pairs(model: Model, name: str, pairs: int | None = None, seed: int = 0, metric: str | None = None) -> PairTask:
    """The pairs of a built-in task, or those of a file (the first `pairs` of them), for a model's tokenizer."""
    check_task(name, metric, pairs)
    if model.tokenizer is None:
        raise RequestError(f"{model.source.name} has no tokenizer, and tasks are texts; load a model that has one.")
    if name in PAIR_TASKS:
        return PAIR_TASKS[name](model.tokenizer, PAIRS if pairs is None else pairs, seed)
    found = pairs_from_file(name, model.tokenizer, metric=metric or "logit_difference")
    if pairs is None or pairs == len(found):
        return found
    return found.select(range(pairs))


def describe(writer: RunWriter, model: Model, task: PairTask, settings: Mapping[str, Any]) -> None:
    """What the manifest says before anything runs."""
    writer.manifest |= {
        "model": model_facts(model) | {"special_tokens": task.specials},
        "certificate": model.certificate.as_dict(),
        "environment": environment(),
        "settings": dict(settings),
        "prompts": [
            {
                "name": task.name,
                "n": len(task),
                "tokens": int(task.clean.mask.sum()),
                "sha256": task.hash,
                "caption": task.caption,
                "specials": task.specials,
            }
        ],
    }
    about: dict[str, Any] = writer.manifest.setdefault("circuits", {})
    about |= {
        "task": task.name,
        "caption": task.caption,
        "metric": settings.get("metric") or task.metric,
        "n": len(task),
        "templates": len(set(task.groups.tolist())),
        "roles": list(task.roles),
        "dropped": {what: len(words) for what, words in task.dropped.items() if words},
        "known_circuit": None if task.circuit is None else {"model": task.circuit.model, "paper": task.circuit.paper},
    }


def baseline(model: Model, task: PairTask, writer: RunWriter, reporter: Reporter, metric: str | None) -> None:
    """The step that reads every prompt once as it is: texts, metric of both runs, whether the model is right."""
    kept = writer.has(BASELINE)
    reporter.step(BASELINE, f"{len(task)} pairs of {task.name}, unchanged", kept)
    if kept:
        return
    frame = pair_table(model, task, metric)
    writer.table("pairs", frame)
    places = token_table(model, task)
    if places is not None:
        writer.table("positions", places)
    writer.manifest["circuits"] |= {
        "clean": float(frame["clean"].mean()),
        "corrupt": float(frame["corrupt"].mean()),
        "right": float(frame["right"].mean()),
    }
    writer.done(BASELINE)


def pair_table(model: Model, task: PairTask, metric: str | None = None) -> pd.DataFrame:
    """One row a pair: both texts, what counts, the metric of both runs, whether the clean one is answered rightly."""
    logits = [_logits(model, task, batch) for batch in (task.clean, task.corrupt)]
    clean, corrupt = (task.score(one, metric).double().cpu().numpy() for one in logits)
    return pd.DataFrame(
        {
            "prompt": np.arange(len(task)),
            "group": task.groups.numpy(),
            "template": [str(one.get("template", "")) for one in task.info] or [""] * len(task),
            "clean_text": _texts(model, task.clean),
            "corrupt_text": _texts(model, task.corrupt),
            "answer": [_words(model, row) for row in task.answers.tolist()],
            "foil": [_words(model, row) for row in task.foils.tolist()],
            "clean": clean,
            "corrupt": corrupt,
            "right": right(task, logits[0]).cpu().numpy(),
        }
    )


def token_table(model: Model, task: PairTask) -> pd.DataFrame | None:
    """The tokens of the first pair by position, where all pairs have one shape; None where they have several."""
    if len(set(task.groups.tolist())) != 1:
        return None
    start, count = int(task.clean.starts[0]), int(task.clean.lengths[0])
    columns = range(start, start + count)
    roles = {int(where[0]): role for role, where in task.roles.items()}
    # A word that differs from prompt to prompt stands for others; the table says so.
    same = (task.clean.ids == task.clean.ids[:1]).all(0)
    return pd.DataFrame(
        {
            "position": [column - start for column in columns],
            "token": [_words(model, [int(task.clean.ids[0, column])]) for column in columns],
            "corrupt_token": [_words(model, [int(task.corrupt.ids[0, column])]) for column in columns],
            "role": [roles.get(column, "") for column in columns],
            "same": [bool(same[column]) for column in columns],
        }
    )


@torch.no_grad()
def _logits(model: Model, task: PairTask, batch: Batch) -> torch.Tensor:
    found = model.trace(batch, logits=task.position[:, None].cpu()).logits
    assert found is not None
    return found[:, 0]


def _texts(model: Model, batch: Batch) -> list[str]:
    return [_words(model, row[mask].tolist()) for row, mask in zip(batch.ids, batch.mask, strict=True)]


def _words(model: Model, ids: list[int]) -> str:
    return str(model.tokenizer.decode([one for one in ids if one != NONE])) if model.tokenizer is not None else ""
