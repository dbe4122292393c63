"""The trained toy, once a session, and naive measurements of attention patterns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from workbench.dynamics import (
    RepeatedSegments,
    ToyModel,
    repeated_segments,
)


@pytest.fixture(scope="session")
def sequences() -> RepeatedSegments:
    return repeated_segments(200, torch.Generator().manual_seed(5))


def patterns(model: ToyModel, ids: Tensor) -> Tensor:
    """Full attention patterns, [layer, prompt, head, query, key]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack(found)


@contextmanager
def zeroed(model: ToyModel, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Zero the z of some heads while the block runs."""
    handles = []
    for layer, head in heads:
        attention = model.blocks[layer].attention
        columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

        def zero(module, args, columns=columns):
            z = args[0].clone()
            z[..., columns] = 0
            return (z,)

        handles.append(attention.output.register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def measure_patterns():
    return patterns


@pytest.fixture
def zero_heads():
    return zeroed
