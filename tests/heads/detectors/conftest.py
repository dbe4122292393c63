"""Tiny models of several architectures on random tokens, and their patterns in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import workbench
from workbench.heads.detector import Part
from workbench.models import Batch
from workbench.models.testing import TINY, VOCAB_SIZE
from workbench.tasks import Task


def tiny_task(lengths: tuple[int, ...] = (90, 61), seed: int = 3, side: str = "right") -> Task:
    """Random tokens under padding, with classes of tokens by their ids."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    batch = Batch.from_ids(rows, side=side)
    column = torch.arange(batch.ids.shape[1])
    first = column == batch.starts[:, None]
    marks = {"start": first}
    for turn, name in enumerate(("punctuation", "newline", "digits")):
        marks[name] = (batch.ids % 7 == turn) & ~first & batch.mask
    last = (batch.starts + batch.lengths - 2)[:, None]
    return Task(
        name="tiny",
        caption="Random tokens.",
        seed=seed,
        batch=batch,
        specials="none",
        answer_ids=batch.ids.gather(1, last + 1),
        answer_positions=last,
        marks=marks,
    )


def patterns(model: workbench.Model, batch: Batch) -> list[list[torch.Tensor]]:
    """[prompt][layer] -> float64 `[head, query, key]` over the prompt's real tokens, q, k and v beside them."""
    found = []
    for ids, mask in zip(batch.ids, batch.mask, strict=True):
        calls = []

        def keep(call, calls=calls):
            one = SimpleNamespace(a=call.pattern(torch.float64)[0], call=call)
            calls.append(one)
            return call.output()

        with torch.no_grad(), model.attachment.observe(keep):
            model.attachment.hf_model(ids[mask][None], use_cache=False)
        found.append(calls)
    return found


@pytest.fixture(scope="session")
def make_task():
    return tiny_task


@pytest.fixture(scope="session")
def tiny():
    """A function: name of an architecture -> (model, part of the detectors, float64 patterns)."""
    cache = {}

    def get(name: str, detectors: tuple, task: Task | None = None, side: str = "right"):
        if name not in cache:
            cache[name] = workbench.load(TINY[name]())
        model, task = cache[name], task or tiny_task(side=side)
        wanted = {one.name: one for detector in detectors for one in detector.statistics(task)}
        trace = model.trace(task.batch, statistics=list(wanted.values()))
        return model, Part(task, trace), patterns(model, task.batch)

    return get
