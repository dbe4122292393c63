"""A small task of pairs for any tiny model: unequal lengths, padding, and first differences at different tokens."""

from __future__ import annotations

import pytest
import torch

from workbench.models import Batch
from workbench.models.testing import TINY, VOCAB_SIZE
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model, load


def pairs(lengths: tuple[int, ...] = (7, 10, 7), side: str = "right", read: int = 1, seed: int = 0) -> PairTask:
    """Random prompts; the corrupt ones have two other tokens, from column 1, 2 or 3 on; read `read` from the end."""
    generator = torch.Generator().manual_seed(seed)
    clean = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    corrupt = [list(row) for row in clean]
    for number, row in enumerate(corrupt):
        for place in (1 + number % 3, 4):
            row[place] = 3 + (row[place] + 11 * (number + 1)) % (VOCAB_SIZE - 3)
    one, two = Batch.from_ids(clean, side=side), Batch.from_ids(corrupt, side=side)
    count = torch.arange(len(lengths))
    return PairTask(
        "random pairs", "random tokens, two of them replaced", seed, "none", one, two,
        answers=(5 + count)[:, None], foils=(30 + count)[:, None],
        position=one.starts + one.lengths - read,
        roles={"changed": one.starts + 1 + count % 3, "end": one.starts + one.lengths - read},
    )  # fmt: skip


_LOADED: dict[str, Model] = {}


def loaded(name: str) -> Model:
    if name not in _LOADED:
        _LOADED[name] = load(TINY[name]())
    return _LOADED[name]


@pytest.fixture
def task() -> PairTask:
    return pairs()


@pytest.fixture(params=list(TINY))
def any_model(request: pytest.FixtureRequest) -> Model:
    return loaded(request.param)


@pytest.fixture
def llama() -> Model:
    return loaded("llama")


@pytest.fixture
def gpt2() -> Model:
    return loaded("gpt2")


@pytest.fixture
def make_pairs():
    return pairs


@pytest.fixture
def model_named():
    return loaded
