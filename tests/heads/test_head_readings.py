"""Readings of OV and QK circuits in tokens against full matrices in float64, and a head that copies by construction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import workbench
from workbench.dynamics.toy import ToyConfig, ToyModel
from workbench.errors import RequestError
from workbench.heads.readings import circuit_directions, summary, token_readings
from workbench.heads.weights import read_weights
from workbench.models import Head
from workbench.models.testing import TINY


# Learned positions; rotation with grouped queries; gains on q and k.
@pytest.fixture(scope="module", params=("gpt2", "llama", "qwen3"))
def weights(request):
    return read_weights(workbench.load(TINY[request.param]()), offsets=(1, 4), dtype=torch.float64, draws=19)


def full_matrix(weights, head, circuit):
    """Token by token, the whole vocabulary squared."""
    found = weights.layer(head.layer)
    shared = head.head // weights.spec.layers[head.layer].group
    if circuit == "ov":
        inner = found.value[shared] @ found.output[head.head]
        return weights.embedding @ inner @ weights.unembedding
    return weights.embedding @ (found.query[head.head] @ found.key[shared].T) @ weights.embedding.T


@pytest.mark.parametrize("circuit", ["ov", "qk"])
def test_tokens_are_those_of_the_full_matrix(weights, circuit):
    head, ids = Head(1, 3), [5, 0, 17]
    rows = full_matrix(weights, head, circuit)[ids]
    for row, own, read in zip(rows, ids, token_readings(weights, head, circuit, ids, tokens=4), strict=True):
        assert read.raised.tolist() == row.topk(4).indices.tolist()
        assert read.lowered.tolist() == row.topk(4, largest=False).indices.tolist()
        standard = (row - row.mean()) / row.std()
        torch.testing.assert_close(read.raised_by, standard[read.raised])
        assert read.own_place == 1 + int((row > row[own]).sum())
        assert 0 < read.own_p <= 1


@pytest.mark.parametrize("circuit", ["ov", "qk"])
def test_directions_are_singular_vectors_read_in_the_vocabulary(weights, circuit):
    head = Head(1, 2)
    found = circuit_directions(weights, 1, circuit, directions=2, tokens=3)[head.head]
    first = weights.ov(head) if circuit == "ov" else weights.qk(head)
    left, singular, right = np.linalg.svd(first.numpy(), full_matrices=False)
    np.testing.assert_allclose(found.share.numpy(), (singular**2 / (singular**2).sum())[:2], rtol=1e-8)
    out = weights.unembedding if circuit == "ov" else weights.embedding.T
    for at in range(2):
        read = weights.embedding.numpy() @ left[:, at]
        write = right[at] @ out.numpy()
        ends = [(set(np.argsort(-sign * read)[:3]), set(np.argsort(-sign * write)[:3])) for sign in (1, -1)]
        own = [(set(found.reads[at, s].tolist()), set(found.writes[at, s].tolist())) for s in (0, 1)]
        # The sign of a pair of singular vectors is free, but both ends turn together.
        assert own in (ends, ends[::-1])


def test_scores_are_those_of_the_full_matrix(weights):
    head = Head(0, 1)
    rows = {(row["circuit"], row["measure"]): row for row in summary(weights, head)}
    for circuit in ("ov", "qk"):
        values = torch.linalg.eigvals(full_matrix(weights, head, circuit))
        expected = values.real.sum() / values.abs().sum()
        row = rows[circuit, "eigenvalues"]
        assert row["value"] == pytest.approx(float(expected), abs=1e-6)
        assert -1 <= row["null_low"] < row["null_high"] <= 1 and 0.05 <= row["p"] <= 1
        assert rows[circuit, "rank"]["value"] <= weights.spec.layers[0].head_dim + 1e-6


def test_a_head_that_copies_raises_each_token_most_and_random_ones_do_not():
    size = 64
    config = ToyConfig(
        vocab_size=size, hidden_size=size, num_hidden_layers=1, num_attention_heads=1, head_dim=size, layer_norm=False
    )
    model = ToyModel(config)
    with torch.no_grad():
        for matrix in (model.token_embedding, model.unembedding, model.blocks[0].attention.value):
            matrix.weight.copy_(torch.linalg.qr(torch.randn(size, size)).Q)
        inner = model.blocks[0].attention
        inner.output.weight.copy_(
            ((model.token_embedding.weight @ inner.value.weight.T).T @ model.unembedding.weight).T
        )
    weights = read_weights(workbench.load(model), dtype=torch.float64, draws=39)
    for one, read in zip((3, 40), token_readings(weights, Head(0, 0), "ov", [3, 40]), strict=True):
        assert read.raised[0] == one and read.own_place == 1 and read.own_p <= 0.15
    copying = next(row for row in summary(weights, Head(0, 0)) if row["measure"] == "eigenvalues")
    assert copying["value"] == pytest.approx(1) and copying["p"] == pytest.approx(1 / 40)


def test_what_cannot_be_read_is_refused(weights):
    with pytest.raises(RequestError, match="0 tokens"):
        token_readings(weights, Head(0, 0), "ov", [])
    with pytest.raises(RequestError, match="Token id 99999"):
        token_readings(weights, Head(0, 0), "ov", [99999])
    with pytest.raises(RequestError, match="circuit='vo'"):
        circuit_directions(weights, 0, "vo")
    with pytest.raises(RequestError, match="directions=0"):
        circuit_directions(weights, 0, "ov", directions=0)
