"""Toys with known circuits, attached."""

from __future__ import annotations

import copy

import pytest

import workbench
from workbench.dynamics import handwritten_induction
from workbench.heads import ProbeSettings, Settings

START = 32


@pytest.fixture(scope="session")
def handwritten():
    """The hand-written model with room for three copies of ten tokens."""
    return workbench.load(handwritten_induction(vocab=START + 1, max_positions=31))


@pytest.fixture(scope="session")
def handwritten_settings() -> Settings:
    return Settings(bos_id=START, repeat_prompts=6, repeat_length=10, repeat_copies=3)


@pytest.fixture(scope="session")
def handwritten_probes() -> ProbeSettings:
    return ProbeSettings(bos_id=START, induction_prompts=6, induction_length=10)


@pytest.fixture(scope="session")
def toy(trained):
    """The trained induction toy: a copy, as it stays attached for the session."""
    model = copy.deepcopy(trained.model)
    model.set_attn_implementation("sdpa")
    return workbench.load(model)


@pytest.fixture(scope="session")
def toy_settings() -> Settings:
    return Settings(bos_id=0, repeat_prompts=20, repeat_length=21, repeat_copies=3)


@pytest.fixture(scope="session")
def toy_probes() -> ProbeSettings:
    return ProbeSettings(bos_id=0, induction_prompts=20, induction_length=30)
