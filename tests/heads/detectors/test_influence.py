"""Influence of single weights on the loss, against automatic differentiation through explicit patterns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.errors import RequestError
from workbench.heads.detector import Part
from workbench.heads.detectors import influence
from workbench.heads.settings import Settings


def effects_by_autograd(model, ids, rows):
    """|E| of every layer `[head, query, key]`, from the gradient of the loss by each pattern."""
    kept = []

    def watch(call):
        a = call.pattern(torch.float32)
        a = a if a.requires_grad else a.requires_grad_()
        kept.append(a)
        return a @ call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], dim=1)

    with model.attachment.observe(watch):
        logits = model.attachment.hf_model(ids[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[rows], ids[rows + 1])
        gradients = torch.autograd.grad(loss, kept)
    found = []
    for a, g in zip(kept, gradients, strict=True):
        a, g = a.detach().double()[0], g.double()[0]
        gain = a * (g - (a * g).sum(-1, keepdim=True))
        e = torch.where(1 - a > 1e-6, -gain / (1 - a), 0.0)
        found.append(e.abs() * torch.ones_like(a).tril())
    return found


@pytest.fixture(scope="module", params=[("llama", "right"), ("gemma2", "left")])
def subject(request, tiny, make_task):
    name, side = request.param
    task = make_task((70, 49), side=side)
    ends = task.batch.starts + task.batch.lengths
    positions = (ends[:, None] - 6) + torch.arange(5)
    task = replace(task, answer_positions=positions, answer_ids=task.batch.ids.gather(1, positions + 1))
    model, _, _ = tiny(name, (), task)
    by_hand = []
    for prompt in range(2):
        ids = task.batch.ids[prompt][task.batch.mask[prompt]]
        by_hand.append(effects_by_autograd(model, ids, torch.arange(len(ids) - 6, len(ids) - 1)))
    return model, task, by_hand


def blocks(e: torch.Tensor, size: int = 16) -> torch.Tensor:
    count = -(-e.shape[-1] // size)
    whole = torch.nn.functional.pad(e, (0, count * size - e.shape[-1]) * 2)
    return whole.reshape(len(e), count, size, count, size).sum((2, 4))


def test_block_sums_are_those_of_the_explicit_gradient(subject):
    model, task, by_hand = subject
    found = influence.influence(model, task)
    assert found.block == 16 and found.tokens == [70, 49]
    for prompt, layers in enumerate(by_hand):
        for layer, e in enumerate(layers):
            expected = blocks(e)
            torch.testing.assert_close(
                found.maps[prompt][layer].double(), expected, rtol=2e-3, atol=1e-4 * float(expected.max())
            )


def test_far_influence_and_its_null(subject):
    model, task, by_hand = subject
    run = influence.run_influence(model, task, (), Settings(), None)
    scores = influence.FAR_INFLUENCE.score([Part(task, run)])
    for prompt, layers in enumerate(by_hand):
        n = layers[0].shape[-1]
        count = -(-n // 16)
        near = int(np.ceil(count / 4))
        i, j = torch.arange(n)[:, None] // 16, torch.arange(n)[None] // 16
        outside = (j > 0) & (i - j >= near)
        seen = torch.ones(n, n).tril()
        np.testing.assert_allclose(scores.null[prompt], float((seen * outside).sum() / seen.sum()))
        for layer, e in enumerate(layers):
            expected = (e * outside).sum((1, 2)) / e.sum((1, 2))
            np.testing.assert_allclose(scores.values[prompt, layer], expected, rtol=5e-3, atol=1e-5)


def test_the_profile_by_distance_adds_up(subject):
    model, task, by_hand = subject
    table = influence.influence_profile(influence.influence(model, task))
    assert np.allclose(table.groupby(["layer", "head"]).influence.sum(), 1.0)
    shares = []
    for layers in by_hand:
        e = blocks(layers[1])[2]
        shares.append((float(e.diagonal(-1)[1:].sum() / e.sum()), float(e[1:, 0].sum() / e.sum())))
    own = table.query("layer == 1 and head == 2").set_index("block_distance").influence
    assert own[1] == pytest.approx(np.mean([one for one, _ in shares]), rel=5e-3)
    assert own[-1] == pytest.approx(np.mean([one for _, one in shares]), rel=5e-3)


def test_the_model_is_left_as_it_was(subject):
    model, task, _ = subject
    influence.influence(model, task)
    assert all(parameter.grad is None for parameter in model.attachment.hf_model.parameters())


def test_long_prompts_are_refused(subject, monkeypatch):
    model, task, _ = subject
    monkeypatch.setattr(influence, "LONGEST", 60)
    with pytest.raises(RequestError, match="70 tokens"):
        influence.influence(model, task)
