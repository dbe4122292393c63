"""Pairs for the trained toy, and the published outcomes on them."""

from __future__ import annotations

import pytest
import torch

from workbench import load
from workbench.dynamics import repeat_pairs
from workbench.errors import RequestError
from workbench.models import Head
from workbench.tasks.pairs import right
from workbench.tracing.edits import ablate, patch


def test_only_the_earlier_occurrence_differs():
    task = repeat_pairs(40, seed=3)
    assert task.changed.sum(1).tolist() == [1] * 40
    rows = torch.arange(40)
    earlier, last = task.roles["earlier"], task.roles["END"]
    assert task.changed[rows, earlier].all()
    assert (task.clean.ids[rows, earlier] == task.clean.ids[rows, last]).all()
    assert (task.clean.ids[rows, task.roles["answer"]] == task.answers[:, 0]).all()
    for clean, corrupt, foil in zip(task.clean.ids, task.corrupt.ids, task.foils[:, 0], strict=True):
        assert foil in clean
        assert set(corrupt.tolist()) - set(clean.tolist())


@pytest.mark.parametrize(("count", "periods"), [(0, (10, 28)), (5, (2, 9)), (5, (10, 33)), (5, (10, 64))])
def test_impossible_pairs_are_refused(count, periods):
    with pytest.raises(RequestError, match="count="):
        repeat_pairs(count, periods=periods)


@pytest.fixture
def attached(trained):
    model = load(trained.model)
    yield model
    model.detach()


def test_the_previous_token_head_works_through_keys(attached):
    task = repeat_pairs()
    sites = ["z", "q", "k", "v", "result", "resid_pre"]
    clean, corrupt = (attached.trace(b, sites=sites) for b in (task.clean, task.corrupt))

    def score(*edits) -> torch.Tensor:
        logits = attached.trace(task.clean, edits=edits, logits=task.position[:, None]).logits[:, 0]
        if not edits:
            assert right(task, logits).float().mean() > 0.9
        return task.score(logits).mean()

    gone = attached.trace(task.corrupt, logits=task.position[:, None]).logits[:, 0]
    whole = score()
    gap = whole - task.score(gone).mean()
    block = attached.attachment.hf_model.blocks[1]
    shares = {}
    for site, projection in (("q", block.attention.query), ("k", block.attention.key), ("v", block.attention.value)):
        for head in range(4):
            moved = corrupt.site("result", 0)[:, :, head] - clean.site("result", 0)[:, :, head]
            with torch.no_grad():
                value = projection(block.norm(clean.site("resid_pre", 1) + moved))
            value = value.reshape(clean.site(site, 1).shape)
            shares[site, head] = float((score(patch(site, value, layer=1)) - whole) / gap)
    carrier = min(range(4), key=lambda head: shares["k", head])
    z = {f"L0H{head}": corrupt.site("z", 0)[:, :, head] for head in range(4)}
    attended = attached.trace(task.clean, sites=["blocks.0.attn.hook_pattern"]).site("pattern", 0)
    query = torch.arange(1, 18)
    assert carrier == int(attended[:, :, query, query - 1].mean((0, 2)).argmax())
    assert shares["k", carrier] < -0.5
    assert all(abs(shares["q", head]) < 0.05 for head in range(4))
    full = [
        float((score(ablate([Head(0, h)], "resample", values={Head(0, h): z[f"L0H{h}"]})) - whole) / gap)
        for h in range(4)
    ]
    assert full.index(min(full)) == carrier
    assert full[carrier] == pytest.approx(shares["k", carrier], abs=0.15)
    for head in range(4):
        one = Head(1, head)
        value = corrupt.site("z", 1)[:, :, head]
        assert float((score(ablate([one], "resample", values={one: value})) - whole) / gap) < -0.05
