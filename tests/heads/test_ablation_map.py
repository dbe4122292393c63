"""Maps of single-head ablations against ablations one by one, and gates on a circuit that is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import workbench
from workbench.dynamics import handwritten_induction
from workbench.dynamics.toy import ToyConfig, ToyModel
from workbench.errors import RequestError
from workbench.heads import (
    GateSettings,
    ProbeSettings,
    Settings,
    ablation_maps,
    build_probe,
    detect,
    fit_gates,
    involved,
    matched_heads,
    verify,
)
from workbench.heads.ablation_map import MAPPED, repeated
from workbench.heads.detectors.causal import others
from workbench.heads.verification import other_prompts
from workbench.models import Batch, Head
from workbench.models.testing import TINY
from workbench.tasks import repeated_tokens
from workbench.tracing import ablate

START = 32


@pytest.fixture(scope="module")
def tiny():
    return workbench.load(TINY["llama"]())


@pytest.fixture(scope="module")
def probe(tiny):
    return build_probe("induction", tiny, ProbeSettings(induction_prompts=3, induction_length=6))


@pytest.fixture(scope="module")
def planted():
    """L0H1 (of three heads) finds the previous token, L1H0 copies; L1H2 adds a wrong token; the rest is inert."""
    small = handwritten_induction(vocab=START + 1, max_positions=31)
    config = ToyConfig(**{**small.config.to_dict(), "num_attention_heads": 3, "num_key_value_heads": 3})
    model = ToyModel(config)
    width = config.head_dim
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name in ("token_embedding", "position_embedding", "unembedding"):
            getattr(model, name).weight.copy_(getattr(small, name).weight)
        for block, from_block, head in ((0, small.blocks[0], 1), (1, small.blocks[1], 0)):
            there: nn.Module = model.blocks[block].attention
            rows = slice(head * width, (head + 1) * width)
            for name in ("query", "key", "value"):
                getattr(there, name).weight[rows] = getattr(from_block.attention, name).weight
            there.output.weight[:, rows] = from_block.attention.output.weight
        # Uniform attention whose write speaks for token 0 at every position.
        harmful = slice(2 * width, 3 * width)
        model.blocks[1].attention.value.weight[harmful][0, : START + 1] = 1.0
        model.blocks[1].attention.output.weight[2 * (START + 1), 2 * width] = 60.0
    return workbench.load(model.eval())


def test_every_entry_is_what_one_ablation_gives(tiny, probe):
    """In all forms, each head in a naive run of its own, from the first layer on."""
    reference = Batch.from_ids([[5, 9, 33, 7, 8], [40, 41, 3]])
    maps = ablation_maps(tiny, probe, MAPPED, reference=reference)
    task = probe.tasks[0]
    clean = probe.measure(tiny)
    for how in MAPPED:
        for head in (Head(0, 1), Head(1, 0), Head(1, 5), Head(2, 3)):
            given = other_prompts(task.batch) if how == "resample" else reference
            found = probe.measure(tiny, [ablate([head], how, reference=given)])
            for name, values in maps[how].effects.items():
                np.testing.assert_allclose(
                    values[:, head.layer, head.head], found[name] - clean[name], atol=2e-5, err_msg=f"{how} {head}"
                )
    assert maps["zero"].effects["induction_loss"].shape == (3, 3, 6)


def test_few_heads_at_once_and_prompts_of_several_lengths(tiny):
    probe = build_probe("induction", tiny, ProbeSettings(induction_prompts=4, induction_length=6))
    task = repeated_tokens(101, 4, 8, 2, seed=3, bos=False, periods=(4, 8))
    uneven = type(probe)("uneven", (task, probe.tasks[0]), probe.metrics, probe.run)
    whole = ablation_maps(tiny, uneven, ["zero", "resample"])
    cut = ablation_maps(tiny, uneven, ["zero", "resample"], tokens_at_once=100)
    for how in whole:
        a, b = (found[how].effects["induction_loss"] for found in (whole, cut))
        assert a.shape == (8, 3, 6)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_repeated_prompts_are_the_same_task(tiny, probe):
    task = repeated(probe.tasks[0], 3)
    once, thrice = (probe.run(tiny, one, ())["induction_loss"] for one in (probe.tasks[0], task))
    np.testing.assert_allclose(thrice, np.tile(once, 3), atol=1e-5)


def test_the_null_is_the_other_heads_of_the_layer():
    values = np.array([[[1.0, 2.0, 6.0], [5.0, np.nan, np.nan]]])
    np.testing.assert_allclose(others(values), [[[4.0, 3.5, 1.5], [3.0, np.nan, np.nan]]])


def test_maps_find_the_planted_heads(planted):
    settings = Settings(bos_id=START, causal_prompts=6, causal_length=10)
    scores = detect(planted, ["ablation_zero", "ablation_mean", "ablation_resample"], settings=settings)
    for name in ("ablation_zero", "ablation_mean", "ablation_resample"):
        assert set(scores.top(name, 2)) == {Head(0, 1), Head(1, 0)}
    zero = scores.table[scores.table.detector == "ablation_zero"].set_index(["layer", "head"])
    assert zero.value[0, 1] > 2 and zero.value[1, 0] > 2 and zero.p[0, 1] <= 1 / 64 + 1e-9
    assert zero.value[1, 2] < -0.01, "without the head that does harm the loss is lower"
    assert zero.value[[(0, 0), (0, 2), (1, 1)]].abs().max() < 1e-5


def test_gates_tell_needed_harmful_and_inert_heads(planted):
    """circuits.md 9.7: both pushes from the definition."""
    probe = build_probe("induction", planted, ProbeSettings(bos_id=START, induction_prompts=4, induction_length=10))
    gates = fit_gates(planted, probe.tasks[0], GateSettings(steps=40, masks=3))
    assert gates.down[:, 1, 0].min() > 0.9
    # Its match scores are saturated, so that a part of this head's write suffices; it is never let go.
    assert gates.down[:, 0, 1].min() > 0.05
    for layer, head in ((0, 0), (0, 2), (1, 1)):
        assert gates.up[:, layer, head].min() > 0.9 and gates.down[:, layer, head].max() < 0.02
        assert gates.role(layer, head) == "irrelevant"
    assert gates.role(1, 0) == "facilitating"
    assert gates.up[:, 1, 2].max() < 0.1 and gates.role(1, 2) == "interfering"
    assert gates.losses["free"][-1] < gates.losses["free"][0]


def test_gates_are_the_three_scores_of_detectors(planted):
    settings = Settings(bos_id=START, causal_prompts=3, causal_length=8, gating_steps=25, gating_masks=2)
    names = ["gate_facilitating", "gate_interfering", "gate_irrelevant"]
    scores = detect(planted, names, settings=settings)
    assert scores.top("gate_facilitating", 1) == [Head(1, 0)]
    assert (scores.table["n"] == 2).all() and scores.table["value"].between(0, 1).all()


def test_what_cannot_be_mapped_is_refused(tiny, probe):
    with pytest.raises(RequestError, match="how='frozen_zero' has no map"):
        ablation_maps(tiny, probe, ["frozen_zero"])
    single = build_probe("induction", tiny, ProbeSettings(induction_prompts=1, induction_length=6))
    with pytest.raises(RequestError, match="at least two prompts"):
        ablation_maps(tiny, single, ["resample"])
    with pytest.raises(RequestError, match="steps=0"):
        fit_gates(tiny, probe.tasks[0], GateSettings(steps=0))


def test_doses_singles_and_one_family_of_q(toy, toy_probes):
    """Four interchangeable induction heads (circuits.md 10.2): nothing alone, everything together."""
    probe = build_probe("induction", toy, toy_probes)
    heads = [f"L1H{head}" for head in range(4)]
    found = verify(toy, heads, probe=probe, how="zero", dose=[1, 2], single=True)
    accuracy = found.table[found.table.metric == "copy_accuracy"].set_index("k")
    assert sorted(accuracy.index) == [1, 2, 4]
    assert accuracy.heads[2] == "L1H0 L1H1" and accuracy.effect[4] < -0.8 and abs(accuracy.effect[1]) < 0.05
    alone = found.single[found.single.metric == "copy_accuracy"]
    assert alone.heads.tolist() == heads and alone.effect.abs().max() < 0.05
    assert len(found.single_draws) == 4 * 2 * 10
    p = np.concatenate([found.table.p, found.single.p])
    q = np.concatenate([found.table.q, found.single.q])
    from workbench.heads.inference import q_values

    np.testing.assert_allclose(q, q_values(p))
    with pytest.raises(RequestError, match="dose 5: sets hold 1 to 4"):
        verify(toy, heads, probe=probe, how="zero", dose=[5])


def test_controls_keep_out_what_the_detector_scores_high(toy, toy_settings):
    scores = detect(toy, ["induction"], settings=toy_settings)
    named = involved(scores, "induction", quantile=0.5)
    assert {Head(1, head) for head in range(4)} <= named
    for seed in range(20):
        drawn = matched_heads(toy.spec, [Head(1, 0)], np.random.default_rng(seed), sets=10, excluded=named)
        assert not set(drawn) & named
    with pytest.raises(RequestError, match="Only 0 heads are left"):
        matched_heads(toy.spec, [Head(1, 0)], np.random.default_rng(0), excluded=toy.spec.heads())


def test_resampling_takes_another_prompt():
    batch = Batch.from_ids([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]])
    assert other_prompts(batch).ids.tolist() == [[6, 7, 6, 7, 6], [8, 9, 10, 8, 9], [1, 2, 3, 4, 5]]
    with pytest.raises(RequestError, match="at least two prompts"):
        other_prompts(batch.select([0]))
