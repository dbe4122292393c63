"""Choices of keys from layer to layer, against float64 patterns and loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.errors import RequestError
from workbench.heads.detector import Part
from workbench.heads.detectors import layers
from workbench.heads.settings import Settings


def needle_like(task):
    """The last three tokens as the answer, and eight tokens as where it stands."""
    starts, ends = task.batch.starts, task.batch.starts + task.batch.lengths
    positions = (ends[:, None] - 4) + torch.arange(3)
    spans = {"answer_in_needle": torch.stack([starts + 20, starts + 28], dim=1)}
    return replace(
        task,
        answer_positions=positions,
        answer_ids=task.batch.ids.gather(1, positions + 1),
        spans=spans,
        answer_keys=None,
    )


@pytest.fixture(scope="module", params=[("llama", "right"), ("gemma2", "left")])
def found(request, tiny, make_task):
    name, side = request.param
    task = needle_like(make_task((90, 61), side=side))
    model, _, patterns = tiny(name, (), task)
    return model, task, patterns


def test_recall_between_layers(found):
    model, task, patterns = found
    k = 6
    table = layers.layer_recall(model, task, k).set_index(["layer", "other", "head"])
    expected, chance = [], []
    for calls in patterns:
        n = calls[0].a.shape[-1]
        rows = range(n - 4, n - 1)
        chance.append(np.mean([k / (row + 1) for row in rows]))
        sets = [[[set(one.a[h, row].topk(k).indices.tolist()) for row in rows] for h in range(4)] for one in calls]
        expected.append(
            [
                [[np.mean([len(x & y) / k for x, y in zip(a[h], b[h], strict=True)]) for h in range(4)] for b in sets]
                for a in sets
            ]
        )
    mean = np.mean(expected, axis=0)
    for a, b, head in np.ndindex(*mean.shape):
        assert table.loc[(a, b, head), "recall"] == pytest.approx(mean[a, b, head])
    assert table.chance.iloc[0] == pytest.approx(np.mean(chance))
    assert (table.recall[[a == b for a, b, _ in table.index]] == 1.0).all()


def test_persistence_is_the_mean_over_other_layers(found):
    model, task, _ = found
    run = layers.run_selections(model, task, (), Settings(selected_keys=6), None)
    scores = layers.PERSISTENCE.score([Part(task, run)])
    table = layers.layer_recall(model, task, 6)
    mean = table[table.layer != table.other].groupby(["layer", "head"]).recall.mean().unstack()
    np.testing.assert_allclose(scores.values.mean(0), mean.to_numpy())
    np.testing.assert_allclose(scores.null.mean(), table.chance.iloc[0])


def test_filter_scores_and_distances(found):
    model, task, patterns = found
    table = layers.filter_layers(model, task, keys=3).set_index(["prompt", "layer"])
    for prompt, calls in enumerate(patterns):
        row = calls[0].a.shape[-1] - 4
        for layer, one in enumerate(calls):
            q, k = one.call.q[0, :, row].double(), one.call.k[0].double()
            summed = [sum(float(q[h] @ k[h // (len(q) // len(k)), j]) for h in range(len(q))) for j in range(row + 1)]
            padded = np.pad(summed, 2)
            pooled = np.array([padded[j : j + 5].mean() for j in range(row + 1)])
            chosen = np.argsort(-pooled)[:3]
            own = table.loc[(prompt, layer)]
            assert own["distance"] == min(max(20 - j, j - 27, 0) for j in chosen)
            assert own.inside == pytest.approx(np.mean([j in chosen for j in range(20, 28)]))
            assert own["keys"] == 3 and 0 < own.chance < 60


def test_the_filter_layer_is_the_first_that_is_near(found):
    model, task, _ = found
    table = layers.filter_layers(model, task, keys=3)
    table["distance"] = table.layer.map({0: 9, 1: 1, 2: 0}) + (table["prompt"] == 1) * 0
    assert layers.filter_layer(table) == 1
    assert layers.filter_layer(table, within=0.0) == 2
    assert layers.filter_layer(table[table.layer == 0]) is None


def test_all_keys_reach_the_needle_and_few_are_the_default(found):
    model, task, _ = found
    everything = layers.filter_layers(model, task, keys=10_000)
    assert (everything.distance == 0).all() and (everything.inside == 1.0).all() and (everything.chance == 0).all()
    assert set(layers.filter_layers(model, task)["keys"]) == {3, 2}


def test_what_cannot_be_ranked_is_refused(found):
    model, task, _ = found
    with pytest.raises(RequestError, match="k = 65"):
        layers.layer_recall(model, task, 65)
    with pytest.raises(RequestError, match="answer_in_needle"):
        layers.filter_layers(model, replace(task, spans={}))
