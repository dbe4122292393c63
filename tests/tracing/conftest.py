"""Each tiny model twice: attached, and an untouched copy with eager attention, whose patterns are the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.models import Batch
from workbench.models.architectures import locate, output_weight
from workbench.models.testing import TINY, VOCAB_SIZE
from workbench.tracing import Model, load


@dataclass(frozen=True)
class Truth:
    """One prompt run alone, without padding: what the model's own code computes, in float64."""

    patterns: list[Tensor]
    z: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Subject:
    """A model under test."""

    name: str
    model: Model
    own: Any

    def __repr__(self) -> str:
        return self.name

    def truth(self, ids: Sequence[int]) -> Truth:
        z: list[Tensor] = []
        hooks = [
            layer.projection.register_forward_pre_hook(lambda module, args: z.append(args[0][0]))
            for layer in locate(self.own)
        ]
        with torch.no_grad():
            output = self.own(torch.tensor([ids]), output_attentions=True, use_cache=False)
        for hook in hooks:
            hook.remove()
        layers = self.model.spec.layers
        return Truth(
            [pattern[0].double() for pattern in output.attentions],
            [x.double().reshape(len(ids), layers[i].heads, -1) for i, x in enumerate(z)],
            output.logits[0],
        )

    def logits(self, batch: Batch) -> Tensor:
        """The untouched model's logits, NaN at padding, each prompt run alone."""
        logits = torch.full((*batch.ids.shape, self.model.spec.vocab_size), float("nan"))
        for row, (ids, mask) in enumerate(zip(batch.ids, batch.mask, strict=True)):
            with torch.no_grad():
                logits[row, mask] = self.own(ids[mask][None], use_cache=False).logits[0]
        return logits

    def output_weight(self, layer: int) -> Tensor:
        return output_weight(locate(self.own)[layer], self.model.spec.layers[layer]).detach()


@cache
def _subject(name: str, dtype: torch.dtype = torch.float32) -> Subject:
    own, watched = (TINY[name]().to(dtype) for _ in range(2))
    own.set_attn_implementation("eager")
    if dtype == torch.float64:
        # The default mixture of experts knows no float64.
        for model in (own, watched):
            model.set_experts_implementation("eager")
    return Subject(name, load(watched), own)


@pytest.fixture(params=list(TINY))
def subject(request: pytest.FixtureRequest) -> Subject:
    """Every tiny model; narrow it with `@pytest.mark.parametrize("subject", [...], indirect=True)`."""
    return _subject(request.param)


@pytest.fixture(params=list(TINY))
def exact(request: pytest.FixtureRequest) -> Subject:
    """The same in float64, so that what the layers before round differently does not blur a comparison."""
    return _subject(request.param, torch.float64)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random token ids other than the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def make_batch() -> Any:
    """`make_batch(lengths, side, seed)`: a padded batch of random prompts."""

    def make(lengths: Sequence[int], side: str = "right", seed: int = 0) -> Batch:
        return Batch.from_ids(prompts(lengths, seed), side=side)

    return make
