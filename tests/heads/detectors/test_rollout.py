"""Rollout against products by hand; flow against cuts, a linear programme and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import workbench
from workbench.errors import RequestError
from workbench.heads.detectors import rollout
from workbench.models.testing import TINY, VOCAB_SIZE


@pytest.fixture(scope="module")
def model():
    return workbench.load(TINY["llama"]())


IDS = torch.randint(3, VOCAB_SIZE, (12,), generator=torch.Generator().manual_seed(1)).tolist()


def matrices(model) -> list[np.ndarray]:
    """0.5 (mean of heads + identity), from float64 patterns."""
    kept = []

    def keep(call):
        kept.append(call.pattern(torch.float64)[0].mean(0).numpy())
        return call.output()

    with torch.no_grad(), model.attachment.observe(keep):
        model.attachment.hf_model(torch.tensor([IDS]), use_cache=False)
    return [0.5 * a + 0.5 * np.eye(len(a)) for a in kept]


def test_rollout_is_the_product_of_the_layers(model):
    one, two, three = matrices(model)
    table = rollout.rollout(model, IDS)
    for layer, product in enumerate((one, two @ one, three @ two @ one)):
        own = table[table.layer == layer]
        np.testing.assert_allclose(own.share, product[-1], atol=1e-6)
        assert own.share.sum() == pytest.approx(1.0)
        rest = product[-1, 1:] / product[-1, 1:].sum()
        np.testing.assert_allclose(own.share_without_first, [0.0, *rest], atol=1e-6)
    earlier = rollout.rollout(model, IDS, row=4).query("layer == 2")
    np.testing.assert_allclose(earlier.share, (three @ two @ one)[4, :5], atol=1e-6)


def programme(layers: list[np.ndarray], row: int, token: int) -> float:
    """The maximum flow as a linear programme over edges."""
    n, edges = len(layers[0]), []
    for level, matrix in enumerate(layers):
        edges += [((level + 1, i), (level, j), matrix[i, j]) for i in range(n) for j in range(i + 1)]
    source, sink = (len(layers), row), (0, token)
    inner = [(level, i) for level in range(len(layers) + 1) for i in range(n) if (level, i) not in (source, sink)]
    balance = np.zeros((len(inner), len(edges)))
    for e, (tail, head, _) in enumerate(edges):
        if tail in inner:
            balance[inner.index(tail), e] = 1
        if head in inner:
            balance[inner.index(head), e] = -1
    gain = np.array([-1.0 if tail == source else 0.0 for tail, _, _ in edges])
    found = linprog(gain, A_eq=balance, b_eq=np.zeros(len(inner)), bounds=[(0, cap) for *_, cap in edges])
    return -found.fun


def test_flow_is_that_of_a_linear_programme(model):
    layers = matrices(model)
    table = rollout.flow(model, IDS)
    expected = [programme(layers, 11, token) for token in range(12)]
    np.testing.assert_allclose(table.flow, expected, atol=1e-5)
    np.testing.assert_allclose(table.share, np.array(expected) / sum(expected), atol=1e-5)
    assert table.share_without_first.sum() == pytest.approx(1.0) and table.share_without_first.iloc[0] == 0.0


def test_flow_through_one_layer_is_its_row(model):
    first = matrices(model)[0]
    table = rollout.flow(model, IDS, row=7, layers=(0,))
    np.testing.assert_allclose(table.flow, first[7, :8], atol=1e-6)


def test_flow_is_bounded_by_its_narrowest_layer():
    """Two layers of three positions: a closed form."""
    one = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.1, 0.2, 0.7]], dtype=torch.float64)
    two = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.3, 0.3, 0.4]], dtype=torch.float64)
    found = rollout.flows_from(torch.stack([one, two]), 2)
    # To token 0: min(.3, 1) + min(.3, .25) + min(.4, .1), and so on.
    np.testing.assert_allclose(found, [0.3 + 0.25 + 0.1, 0.3 + 0.2, 0.4], atol=1e-6)


def test_what_cannot_be_done_is_refused(model):
    with pytest.raises(RequestError, match="300 tokens"):
        rollout.flow(model, [5] * 300)
    with pytest.raises(RequestError, match="Row 12"):
        rollout.rollout(model, IDS, row=12)
    with pytest.raises(RequestError, match="Layer 3"):
        rollout.flow(model, IDS, layers=(3,))
