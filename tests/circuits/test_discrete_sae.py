"""Discrete autoencoder codes: counts against sets, synthetic circuits, shuffled labels, a planted model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from workbench.circuits import Graph, discrete_sae
from workbench.circuits.codes import (
    SILENT,
    Autoencoder,
    AutoencoderSettings,
    codes_of,
    curve,
    edge_scores,
    heads_in_pairs,
    node_scores,
    train_autoencoder,
)
from workbench.circuits.discrete_sae import DiscreteCircuit, identify, mean_outputs
from workbench.dynamics.copying import copying
from workbench.errors import RequestError
from workbench.models import Batch, Head
from workbench.tasks.pairs import Edge

CIRCUIT, BACKGROUND = 3, 40
QUICK = AutoencoderSettings(features=200, epochs=300)


def synthetic(seed: int = 0, prompts: int = 250, width: int = 32):
    """Circuit heads write one of five directions in positives and of five others in negatives; the rest any of ten."""
    rng = np.random.default_rng(seed)
    heads = CIRCUIT + BACKGROUND
    directions = rng.normal(size=(heads, 10, width))
    positive = np.arange(2 * prompts) < prompts
    pick = rng.integers(10, size=(2 * prompts, heads))
    pick[:, :CIRCUIT] = rng.integers(5, size=(2 * prompts, CIRCUIT)) + np.where(positive, 0, 5)[:, None]
    outputs = directions[np.arange(heads), pick] + 0.05 * rng.normal(size=(2 * prompts, heads, width))
    return torch.tensor(outputs, dtype=torch.float32), positive


@pytest.fixture(scope="module")
def found():
    outputs, positive = synthetic()
    layers = [0] * 2 + [1] + [0] * 20 + [1] * 20
    return identify(outputs, positive, layers, QUICK, trainings=3), positive


def test_synthetic_circuits_are_found(found) -> None:
    (_, _, nodes, edges), _ = found
    true = np.arange(CIRCUIT + BACKGROUND) < CIRCUIT
    for scores, pairs in zip(nodes, edges, strict=True):
        assert curve(scores, true).area > 0.95
        assert curve(heads_in_pairs(pairs), true).area > 0.8
    # A pair has codes of its own where either head has.
    either = true[:, None] | true
    assert np.nanmean(np.where(either, edges.mean(0), np.nan)) > 2 * np.nanmean(np.where(either, np.nan, edges.mean(0)))


def test_shuffled_labels_find_nothing(found) -> None:
    (codes, *_), positive = found
    true = np.arange(CIRCUIT + BACKGROUND) < CIRCUIT
    rng = np.random.default_rng(1)
    areas = [curve(node_scores(one, rng.permutation(positive)), true).area for one in codes for _ in range(10)]
    assert abs(np.mean(areas) - 0.5) < 0.15


def test_counts_are_those_of_sets() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 6, size=(30, 8))
    positive = rng.random(30) < 0.4
    layers = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    for normalise in (False, True):
        nodes, edges = node_scores(codes, positive, normalise), edge_scores(codes, positive, layers, normalise)
        for one in range(8):
            own, other = set(codes[positive, one]), set(codes[~positive, one])
            assert nodes[one] == pytest.approx(len(own - other) / (len(own | other) if normalise else 1))
        for one, two in itertools.product(range(8), repeat=2):
            if layers[two] <= layers[one]:
                assert np.isnan(edges[one, two])
                continue
            own, other = ({(int(row[one]), int(row[two])) for row in codes[side]} for side in (positive, ~positive))
            assert edges[one, two] == pytest.approx(len(own - other) / (len(own | other) if normalise else 1))


def test_curves_of_pairs_are_of_edges_between_heads() -> None:
    edges = np.full((1, 4, 4), np.nan)
    edges[0, :2, 2:] = [[3.0, 1.0], [2.0, 0.0]]
    heads = tuple(Head(layer, head) for layer in range(2) for head in range(2))
    codes = np.zeros((1, 2, 4), dtype=np.int64)
    found = DiscreteCircuit(
        "pairs", heads, codes, np.array([True, False]), np.zeros((1, 4)), edges, AutoencoderSettings(), 0,
        kv_heads=("L0KV0", "L0KV0", "L1KV0", "L1KV0"),
    )  # fmt: skip
    # Edges into queries and keys of one head are one pair; those that are not between heads are none.
    first = Edge("L0H0", "L1H0", "q")
    assert found.curves([first, Edge("embed", "L1H0", "q")], "edge")[0].area == 1
    assert found.curves([Edge("L0H1", "L1H0", "q")], "edge")[0].area == pytest.approx(2 / 3)
    # The group's two heads, second and fourth of four.
    assert found.curves([Edge("L0H1", "L1KV0", "k")], "edge")[0].area == pytest.approx(1 / 4)
    assert found.curves(["L1H0"], "pairs")[0].area == pytest.approx(5 / 6)
    table = found.edges(2)
    assert list(table.source) == ["L0H0", "L0H1"] and list(table.target) == ["L1H0", "L1H0"]


def test_pairs_that_tie_count_in_part() -> None:
    edges = np.full((4, 4), np.nan)
    edges[0, 2], edges[0, 3], edges[1, 2], edges[1, 3] = 5.0, 1.0, 1.0, 1.0
    np.testing.assert_allclose(heads_in_pairs(edges, 0.25), [1, 0, 1, 0])
    np.testing.assert_allclose(heads_in_pairs(edges, 0.5), [1 + 1 / 3, 2 / 3, 1 + 1 / 3, 2 / 3])
    np.testing.assert_allclose(heads_in_pairs(edges, 1.0), [2, 2, 2, 2])


def test_curves() -> None:
    rng = np.random.default_rng(3)
    scores, true = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.3
    found = curve(scores, true)
    assert found.area == pytest.approx(roc_auc_score(true, scores))
    harmonic = []
    for threshold in range(5):
        hits, kept = (scores >= threshold)[true].mean(), (scores < threshold)[~true].mean()
        harmonic.append(2 * hits * kept / (hits + kept))
    assert found.best == pytest.approx(max(harmonic))
    assert found.best_threshold == np.argmax(harmonic)
    with pytest.raises(RequestError, match="needs both kinds"):
        curve(scores, np.zeros(60, dtype=bool))


def test_autoencoder_keeps_unit_rows_and_learns() -> None:
    outputs, _ = synthetic(prompts=4)
    rows = outputs.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    fresh = Autoencoder(32, 50, generator)
    model = train_autoencoder(rows, AutoencoderSettings(features=50, epochs=200), torch.Generator().manual_seed(0))
    for weight in (model.encoder, model.decoder):
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))
    with torch.no_grad():
        losses = [float((one(rows)[1] - rows).square().mean()) for one in (fresh, model)]
    assert losses[1] < 0.7 * losses[0]
    again = train_autoencoder(rows, AutoencoderSettings(features=50, epochs=200), torch.Generator().manual_seed(0))
    assert torch.equal(again.encoder, model.encoder)


def test_rows_without_an_active_feature_are_silent() -> None:
    model = Autoencoder(4, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.bias.fill_(-10.0)
    assert (codes_of(model, torch.randn(2, 5, 4)) == SILENT).all()


def test_mean_outputs_are_means_of_results(any_model, make_pairs) -> None:
    task = make_pairs(side="left")
    outputs = mean_outputs(any_model, task.clean)
    trace = any_model.trace(task.clean, sites=["result"])
    at = 0
    for layer, shape in enumerate(any_model.spec.layers):
        for prompt in range(3):
            real = task.clean.mask[prompt]
            expected = trace.site("result", layer)[prompt][real].mean(0)
            torch.testing.assert_close(outputs[prompt, at : at + shape.heads], expected, atol=1e-5, rtol=1e-4)
        at += shape.heads


@pytest.fixture(scope="module")
def planted():
    """Two heads copy the value that is asked for, two do nothing; on negatives nothing is asked."""
    truth = copying((1.0, 0.8, 0.0, 0.0), kv_heads=4)
    silenced = truth.task.clean.ids.clone()
    silenced[:, -1] = silenced[:, 0]
    return truth, Batch(silenced, truth.task.clean.mask)


def test_a_model_end_to_end(planted) -> None:
    truth, negatives = planted
    settings = AutoencoderSettings(features=40, epochs=100)
    found = discrete_sae(truth.model, truth.task, negatives=negatives, settings=settings, trainings=2)
    assert found.codes.shape == (2, 24, 4)
    assert found.notes[0] == "negatives: prompts given"
    assert [one.area for one in found.curves(["L0H0", "L0H1"])] == [1.0, 1.0]
    table = found.nodes()
    np.testing.assert_allclose(table.probability.sum(), 1)
    expected = [node_scores(codes, found.positive) for codes in found.codes]
    np.testing.assert_array_equal(found.node_scores, expected)
    assert len(found.edges()) == 0
    graph = Graph.of(truth.model)
    scores = found.scores(graph)
    assert scores.nodes[graph.writer(str(found.heads[0]))] == found.node_scores[:, 0].mean()
    assert np.isnan(scores.nodes[0])
    again = discrete_sae(truth.model, truth.task, negatives=negatives, settings=settings, trainings=2)
    np.testing.assert_array_equal(again.codes, found.codes)


def test_refusals(planted) -> None:
    truth, _ = planted
    with pytest.raises(RequestError, match="has no reference prompts"):
        discrete_sae(truth.model, truth.task, negatives="references")
    with pytest.raises(RequestError, match="12 positive prompts, but 20 of the 40"):
        discrete_sae(truth.model, truth.task, settings=AutoencoderSettings(examples=40))
    with pytest.raises(RequestError, match="trainings=0"):
        discrete_sae(truth.model, truth.task, trainings=0)
    with pytest.raises(RequestError, match="needs at least two features"):
        AutoencoderSettings(features=1)
    quick = AutoencoderSettings(features=10, epochs=1, examples=4)
    found = discrete_sae(truth.model, truth.task, settings=quick, trainings=1)
    assert found.notes[0] == "negatives: corrupt"
    with pytest.raises(RequestError, match="L9H9 is no head"):
        found.curves(["L9H9"])
    with pytest.raises(RequestError, match="needs both kinds"):
        found.curves([Edge("L0H0", "logits")], "edge")
