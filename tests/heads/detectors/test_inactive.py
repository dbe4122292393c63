"""Scores of inactive heads against full matrices; quantiles, flags, and what zeroing flagged heads costs."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

import workbench
from workbench.errors import RequestError
from workbench.heads.detector import Part
from workbench.heads.detectors import DETECTORS
from workbench.heads.detectors.dormancy import dormancy_scatter, inactive_dose, mean_loss, shuffled, zero_flagged
from workbench.heads.detectors.inactive import (
    QUANTILES,
    THIRTEEN,
    Inactivity,
    flagged_shares,
    inactive_heads,
    inactivity,
    inactivity_statistics,
)
from workbench.models import Batch, Head
from workbench.models.architectures import locate, output_weight
from workbench.models.testing import TINY, VOCAB_SIZE
from workbench.tasks import random_tokens
from workbench.tracing import ablate

LENGTHS = (12, 1, 25)
NAMES = ("llama", "mistral", "gpt_oss")


def ids_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@cache
def model_of(name):
    return workbench.load(TINY[name]())


def of_layer(x):
    # In a prompt of one token every entropy is 0, and each like the mean.
    return x / x.mean() if x.mean() > 0 else torch.ones_like(x)


def scores_of_layer(pattern, v, weight, window):
    """The thirteen as the paper writes them, from one layer's full matrices of one prompt alone."""
    n = pattern.shape[-1]
    o = pattern @ v
    seen = min(n, window or n)
    awft = pattern[:, :seen, 0].mean(1)
    aeqd = torch.special.entr(pattern).sum(-1).mean(1)
    ftvvn, avvn = v[:, 0].norm(dim=-1), v.norm(dim=-1).mean(1)
    lthon, ahon = o[:, -1].norm(dim=-1), o.norm(dim=-1).mean(1)
    fhon = torch.einsum("h q d, h d m -> h q m", o, weight).norm(dim=-1).mean(1)
    plain = {"awft": awft, "aeqd": aeqd, "ftvvn": ftvvn, "avvn": avvn, "ahon": ahon, "fhon": fhon}
    normed = {f"{name}_ln": of_layer(x) for name, x in plain.items()}
    return plain | normed | {"lthon": lthon, "lthon_ln": lthon / ahon.mean(), "lthon_hn": lthon / ahon}


@cache
def truth(name):
    own = TINY[name]()
    own.set_attn_implementation("eager")
    model, found = model_of(name), []
    for ids in ids_of():
        with torch.no_grad():
            patterns = own(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
        trace = model.trace([ids], sites=["v"])
        layers = []
        for index, (layer, pattern) in enumerate(zip(model.spec.layers, patterns, strict=True)):
            v = trace.site("v", index)[0].double().transpose(0, 1).repeat_interleave(layer.group, dim=0)
            weight = output_weight(locate(own)[index], layer).detach().double()
            layers.append(scores_of_layer(pattern[0].double(), v, weight, layer.window))
        found.append(layers)
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_full_matrices(name, side):
    trace = model_of(name).trace(Batch.from_ids(ids_of(), side=side), statistics=inactivity_statistics())
    names = [*THIRTEEN, "fhon", "fhon_ln"]
    assert len(THIRTEEN) == 13 and set(names) == set(truth(name)[0][0])
    for score in inactivity([trace], names):
        want = np.stack([np.stack([layer[score.name].numpy() for layer in prompt]) for prompt in truth(name)])
        np.testing.assert_allclose(score.values, want, rtol=5e-4, atol=1e-5, err_msg=score.name)
        assert score.inactive == ("above" if score.name.startswith("awft") else "below")


@pytest.mark.parametrize("name", THIRTEEN)
def test_detector_is_the_score_beside_its_layer_mean(name):
    batch = random_tokens(VOCAB_SIZE, prompts=3, length=9, bos_id=1)
    detector = DETECTORS[name]
    trace = model_of("llama").trace(batch.batch, statistics=detector.statistics(batch))
    found = detector.score([Part(batch, trace)])
    np.testing.assert_array_equal(found.values, inactivity([trace], [name])[0].values)
    np.testing.assert_allclose(found.null, np.repeat(found.values.mean(2, keepdims=True), 6, axis=2))
    if name.endswith("_ln") and name != "lthon_ln":
        np.testing.assert_allclose(found.null, 1.0)
    assert detector.better == ("higher" if name.startswith("awft") else "lower")


def test_quantiles_are_pooled_over_inputs_and_heads():
    """201 different values: exactly 5 % of the way lie 10 of them, on either side."""
    values = torch.randperm(201, generator=torch.Generator().manual_seed(0)).double().numpy().reshape(3, 67, 1)
    below, above = Inactivity("ahon", values, "below"), Inactivity("awft", values, "above")
    assert (below.threshold(0.05), above.threshold(0.05)) == (10.0, 190.0)
    assert sorted(values[inactive_heads(below, 0.05)]) == list(range(10))
    assert sorted(values[inactive_heads(above, 0.05)]) == list(range(191, 201))
    assert not inactive_heads(below, 0.0).any() and not inactive_heads(above, 0.0).any()
    with pytest.raises(RequestError, match=r"5 % is 0\.05"):
        below.threshold(5.0)


def test_thresholds_and_shares_are_monotone_and_heads_that_do_not_exist_are_not_flagged():
    values = np.random.default_rng(0).normal(size=(5, 4, 3))
    values[:, 2, 1:] = np.nan
    scores = [Inactivity("ahon", values, "below"), Inactivity("awft", values, "above")]
    table = flagged_shares(scores)
    for score in scores:
        rows = table[table.score == score.name]
        sign = 1 if score.inactive == "below" else -1
        assert (np.diff(rows.threshold) * sign >= 0).all() and (np.diff(rows.share) > 0).all()
        assert (rows.always <= rows.share).all() and (rows.share <= rows.ever).all()
        np.testing.assert_allclose(rows.share, rows["quantile"], atol=1 / 50)
        sets = [inactive_heads(score, quantile) for quantile in QUANTILES]
        assert all((small <= large).all() for small, large in pairwise(sets))
        assert not inactive_heads(score, 1.0)[:, 2, 1:].any()


def test_unknown_score_is_refused():
    with pytest.raises(RequestError, match="No inactive-head score 'honor'"):
        inactivity([], ["honor"])


def small():
    return random_tokens(VOCAB_SIZE, prompts=4, length=10, bos_id=1)


def test_flagged_heads_are_zeroed_on_their_own_inputs_only():
    model, batch = model_of("llama"), small().batch
    flags = np.zeros((4, 3, 6), dtype=bool)
    flags[1, 0, 2] = flags[1, 2, 5] = flags[3, 0, 2] = True
    loss, intact = mean_loss(model, batch, zero_flagged(flags, batch)), mean_loss(model, batch)
    np.testing.assert_allclose(loss[[0, 2]], intact[[0, 2]], atol=1e-5)
    alone = mean_loss(model, batch, [ablate([Head(0, 2), Head(2, 5)], "zero")])
    assert loss[1] == pytest.approx(alone[1], abs=1e-5) and abs(loss[1] - intact[1]) > 1e-4
    assert loss[3] == pytest.approx(mean_loss(model, batch, [ablate([Head(0, 2)], "zero")])[3], abs=1e-5)
    with pytest.raises(RequestError, match="Flags of 3 inputs"):
        zero_flagged(flags[:3], batch)


@pytest.mark.parametrize("same_layers", [True, False])
def test_controls_have_as_many_heads_of_each_input(same_layers):
    rng = np.random.default_rng(1)
    there = np.ones((4, 5, 6), dtype=bool)
    there[:, 3, 2:] = False
    flags = (rng.random((4, 5, 6)) < 0.4) & there
    drawn = shuffled(flags, there, rng, same_layers=same_layers)
    assert not (drawn & ~there).any() and (drawn != flags).any()
    axis = 2 if same_layers else (1, 2)
    assert (drawn.sum(axis) == flags.sum(axis)).all()


def test_scatter_has_share_and_rise_of_each_head_and_text():
    model, task = model_of("llama"), small()
    table = dormancy_scatter(model, {"random": task}, [Head(1, 4), Head(0, 0)])
    assert len(table) == 8 and set(table.domain) == {"random"}
    trace = model.trace(task.batch, sites=["pattern"], loss=True)
    row = table[(table.layer == 1) & (table["head"] == 4)].set_index("prompt")
    np.testing.assert_allclose(row.first_share, trace.site("pattern", 1)[:, 4, 1:, 0].mean(1), rtol=1e-4)
    without = model.trace(task.batch, edits=[ablate([Head(1, 4)], "zero")], loss=True).loss.mean(1)
    np.testing.assert_allclose(row.loss, trace.loss.mean(1), rtol=1e-5)
    np.testing.assert_allclose(row.loss_increase, without - trace.loss.mean(1), atol=1e-5)
    with pytest.raises(RequestError, match="No heads"):
        dormancy_scatter(model, {"random": task}, [])


def test_dose_begins_at_nothing_and_ends_with_everything():
    model, batch = model_of("llama"), small().batch
    trace = model.trace(batch, statistics=inactivity_statistics())
    score = inactivity([trace], ["ahon_ln"])[0]
    table = inactive_dose(model, batch, score, (0.0, 0.5), draws=2).set_index("quantile")
    assert table.share[0.0] == 0 and table.increase[0.0] == 0 == table.control_increase[0.0]
    flags = inactive_heads(score, 0.5)
    rise = mean_loss(model, batch, zero_flagged(flags, batch)) - mean_loss(model, batch)
    assert table.share[0.5] == pytest.approx(0.5) and table.increase[0.5] == pytest.approx(rise.mean(), abs=1e-6)
    assert table.control_low[0.5] <= table.control_increase[0.5] <= table.control_high[0.5]
    with pytest.raises(RequestError, match="draws = 0"):
        inactive_dose(model, batch, score, draws=0)
