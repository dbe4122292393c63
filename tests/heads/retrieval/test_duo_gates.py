"""Gates: the mixture against explicit patterns, and training on a model whose needs are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.errors import RequestError
from workbench.heads import Settings, detect
from workbench.heads.detectors.gates import Gates, _Gated, schedule, streaming_mask, train_gates
from workbench.heads.repeats import random_repeats
from workbench.tasks import Task


def test_streaming_mask_by_hand():
    seen = streaming_mask(6, 1, 2, None, torch.device("cpu"))
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 2, 3],
        [0, 3, 4],
        [0, 4, 5],
    ]
    windowed = streaming_mask(6, 1, 2, 3, torch.device("cpu"))
    assert windowed[5].nonzero().flatten().tolist() == [4, 5]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_gates_mix_full_and_renormalised_attention(name, twin, random_task):
    subject = twin(name)
    ids = random_task([33], answers=0).batch.ids
    layers = subject.model.spec.layers
    gates = [torch.rand(layer.kv_heads, dtype=torch.float64) for layer in layers]
    mixed, seen = {}, {}
    gated = _Gated(gates, 3, 5)

    def observe(call):
        seen[call.layer] = call
        mixed[call.layer] = gated(call)
        return call.output()

    with torch.no_grad(), subject.model.attachment.observe(observe):
        subject.model.attachment.hf_model(ids, use_cache=False)
    for layer, call in seen.items():
        full = call.pattern(torch.float64)[0]
        kept = streaming_mask(33, 3, 5, call.window, ids.device)
        streaming = full * kept / (full * kept).sum(-1, keepdim=True)
        group = layers[layer].group
        values = call.v[0].repeat_interleave(group, dim=0)
        share = gates[layer].repeat_interleave(group)[:, None, None]
        expected = share * (full @ values) + (1 - share) * (streaming @ values)
        torch.testing.assert_close(mixed[layer][0], expected, atol=1e-6, rtol=1e-4)


def repeated(model, **spans) -> Task:
    task = random_repeats(model, 4, 10, 2, 3, 32)
    return Task(**{**task.__dict__, "spans": {**task.spans, "labels": task.spans["repeats"]}})


def test_the_head_that_needs_the_distance_keeps_its_gate_and_the_local_one_loses_it(handwritten):
    """By hand: L0H0 looks one token back, L1H0 ten; of 4 recent tokens the first needs no more."""
    task = repeated(handwritten)
    before = {name: x.clone() for name, x in handwritten.attachment.hf_model.named_parameters()}
    wanted = {name: x.requires_grad for name, x in handwritten.attachment.hf_model.named_parameters()}
    gates = train_gates(handwritten, task, steps=80, sinks=1, recent=4)
    previous, induction = (float(one[0]) for one in gates.values)
    assert previous < 0.1 and induction > 0.9
    # While the first gate closes, nothing is lost: its head does not look further.
    assert gates.loss[0] == 0.0 and gates.penalty[0] == 1.0 and gates.penalty[-1] < 0.6
    for name, x in handwritten.attachment.hf_model.named_parameters():
        assert torch.equal(x, before[name]) and x.requires_grad == wanted[name] and x.grad is None


def test_a_wide_enough_window_leaves_only_the_penalty(twin, random_task):
    """With all keys but one recent, gates move by the penalty alone: every one by the same."""
    subject = twin("llama")
    task = random_task([30], answers=0, labels=[[4, 9]])
    gates = train_gates(subject.model, task, steps=10, sinks=1, recent=20)
    assert max(gates.loss) < 1e-20
    values = torch.cat(gates.values)
    expected = 1 - sum(0.02 * schedule(step, 10) for step in range(10))
    torch.testing.assert_close(values, torch.full_like(values, expected), atol=1e-3, rtol=0)


def test_schedule_rises_over_a_fifth_and_falls_over_the_last_to_a_tenth():
    factors = [schedule(step, 50) for step in range(50)]
    assert factors[0] == 0.1 and factors[9] == factors[40] == 1.0 and factors[-1] == 0.1
    assert np.all(np.diff(factors[:10]) > 0) and np.all(np.diff(factors[40:]) < 0)


def test_gates_are_repeated_for_query_heads_of_each_layer():
    gates = Gates((torch.tensor([0.5, 1.0]), torch.tensor([0.25])), (0.0,), (1.0,), (2, 1))
    np.testing.assert_array_equal(gates.per_query_head(), [[0.5, 0.5, 1.0, 1.0], [0.25, np.nan, np.nan, np.nan]])


def test_what_cannot_be_trained_is_refused(twin, random_task):
    task = random_task([30], answers=0, labels=[[20, 30]])
    with pytest.raises(RequestError, match="soft-capped"):
        train_gates(twin("gemma2").model, task, steps=2, sinks=1, recent=4)
    with pytest.raises(RequestError, match="fit into 4 sinks and 32"):
        train_gates(twin("llama").model, task, steps=2, sinks=4, recent=32)
    with pytest.raises(RequestError, match="steps=0"):
        train_gates(twin("llama").model, task, steps=0, sinks=4, recent=8)
    long = random_task([4200], answers=0, labels=[[20, 30]])
    with pytest.raises(RequestError, match="4096 tokens"):
        train_gates(twin("llama").model, long, steps=1, sinks=4, recent=8)


def test_runs_from_text_to_table(reader):
    settings = Settings(gate_prompts=2, gate_length=300, gate_steps=4)
    table = detect(reader, ["duo_gate"], settings=settings).table
    assert len(table) == 12 and table.value.between(0, 1).all() and (table.value < 1).any()
    assert table.groupby(["layer", table["head"] // 3]).value.nunique().eq(1).all()
    assert table.p.isna().all() and (table.n == 1).all()
