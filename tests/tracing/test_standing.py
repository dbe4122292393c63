"""A model under standing edits is the model with the same edits given at each call."""

from __future__ import annotations

import pytest
import torch

import workbench
from workbench import statistics
from workbench.errors import HeadError, RequestError
from workbench.models import Head
from workbench.models.testing import TINY
from workbench.tracing import ablate
from workbench.tracing.standing import edited

IDS = [[3, 5, 7, 11, 2, 9, 4, 8], [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.fixture(scope="module")
def model():
    return workbench.load(TINY["llama"]())


def test_traces_and_continuations_run_under_the_edits(model):
    removed = ablate(["L0H1", "L1H2"], "zero")
    standing = edited(model, removed)
    wanted = [statistics.entropy()]
    given = model.trace(IDS, statistics=wanted, edits=removed, loss=True)
    found = standing.trace(IDS, statistics=wanted, loss=True)
    torch.testing.assert_close(found["entropy"], given["entropy"], rtol=0, atol=0)
    torch.testing.assert_close(found.loss, given.loss, rtol=0, atol=0)
    assert not torch.equal(found["entropy"], model.trace(IDS, statistics=wanted)["entropy"])
    assert torch.equal(standing.generate(IDS, 4).ids, model.generate(IDS, 4, edits=removed).ids)
    # More edits come on top.
    both = model.trace(IDS, edits=[removed, ablate(["L1H0"], "uniform")], loss=True).loss
    torch.testing.assert_close(standing.trace(IDS, edits=ablate(["L1H0"], "uniform"), loss=True).loss, both)
    assert standing.removed == {"heads": ["L0H1", "L1H2"], "how": "zero"}


def test_values_that_are_at_hand_stand_for_every_prompt(model):
    values = model.head_outputs(model.batch(IDS), [Head(0, 1)], mean=True)
    removed = ablate([Head(0, 1)], "mean", values=values)
    torch.testing.assert_close(
        edited(model, removed).trace(IDS, loss=True).loss, model.trace(IDS, edits=removed, loss=True).loss
    )


def test_edits_that_need_the_prompt_at_hand_are_refused(model):
    batch = model.batch(IDS)
    for edit in (
        ablate(["L0H1"], "mean", reference=batch),
        ablate(["L0H1"], "resample", reference=batch),
        ablate(["L0H1"], "frozen_zero"),
        ablate(["L0H1"], positions=torch.ones(2, 8, dtype=torch.bool)),
    ):
        with pytest.raises(RequestError, match="stand for all prompts"):
            edited(model, edit)
    with pytest.raises(HeadError):
        edited(model, ablate(["L9H9"]))
