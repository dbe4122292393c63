"""Spectra and composition: full matrices by brute force, closed forms, and invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import workbench
from workbench.dynamics import handwritten_induction
from workbench.dynamics.toy import ToyConfig, ToyModel
from workbench.errors import RequestError
from workbench.heads import Settings, detect
from workbench.heads.composition import (
    chance,
    chance_pool,
    composition_scores,
    composition_table,
    pair_products,
    trace_products,
    written,
)
from workbench.heads.spectra import (
    effective_rank,
    eigen_score,
    ov_directions,
    ov_eigenvalues,
    ov_singular_values,
    participation_ratio,
    qk_eigenvalues,
    qk_singular_values,
    qk_symmetry,
)
from workbench.heads.weights import read_weights
from workbench.models import Head
from workbench.models.testing import TINY

ARCHITECTURES = ("gpt2", "llama", "olmo2")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def weights(request):
    return read_weights(workbench.load(TINY[request.param]()), offsets=(1, 4), dtype=torch.float64)


def toy(copies: float):
    """One head whose OV circuit is the identity between embedding and unembedding, times a factor."""
    size = 12
    config = ToyConfig(
        vocab_size=size, hidden_size=size, num_hidden_layers=1, num_attention_heads=1, head_dim=size, layer_norm=False
    )
    model = ToyModel(config)
    with torch.no_grad():
        for matrix in (model.token_embedding, model.unembedding, model.blocks[0].attention.value):
            matrix.weight.copy_(torch.linalg.qr(torch.randn(size, size)).Q)
        inner = model.blocks[0].attention
        # W_E W_V W_O W_U = copies * 1
        forward = model.token_embedding.weight @ inner.value.weight.T
        inner.output.weight.copy_((copies * forward.T @ model.unembedding.weight).T)
        inner.query.weight.copy_(torch.randn(size, size))
        inner.key.weight.copy_(inner.query.weight)
    return workbench.load(model.eval())


def test_eigenvalues_are_those_of_the_vocabulary_sized_matrices(weights):
    for layer in range(weights.spec.n_layers):
        ov, qk = ov_eigenvalues(weights, layer), qk_eigenvalues(weights, layer)
        for head in range(weights.spec.layers[layer].heads):
            full = weights.embedding @ weights.ov(Head(layer, head)) @ weights.unembedding
            assert_spectra(ov[head], full)
            for place, offset in enumerate(weights.offsets):
                full = weights.embedding @ weights.qk(Head(layer, head), offset) @ weights.embedding.T
                assert_spectra(qk[place, head], full)


def assert_spectra(few, full):
    values = torch.linalg.eigvals(full)
    top = values[values.abs().argsort(descending=True)[: len(few)]]
    torch.testing.assert_close(few.abs().sort().values, top.abs().sort().values, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(few.real.sum(), full.trace(), rtol=1e-7, atol=1e-8)
    brute = values.real.sum() / top.abs().sum()
    assert eigen_score(few).item() == pytest.approx(brute.item(), abs=1e-6)


def test_a_copying_head_scores_one_and_its_opposite_minus_one():
    for copies in (1.0, 3.0, -1.0):
        scores = eigen_score(ov_eigenvalues(read_weights(toy(copies), dtype=torch.float64), 0))
        assert scores.item() == pytest.approx(np.sign(copies), abs=1e-5)


def test_a_head_that_matches_its_own_token_scores_one():
    """W_Q = W_K makes W_E W_QK W_E^T positive semidefinite."""
    weights = read_weights(toy(1.0), dtype=torch.float64)
    assert eigen_score(qk_eigenvalues(weights, 0)).item() == pytest.approx(1.0, abs=1e-9)
    assert qk_symmetry(weights, 0).item() == pytest.approx(1.0, abs=1e-9)


def test_scores_do_not_change_with_the_basis_or_the_size_of_a_head():
    plain = TINY["llama"]()
    before = read_weights(workbench.load(plain), dtype=torch.float64)
    scores = [eigen_score(ov_eigenvalues(before, layer)) for layer in range(3)]
    ranks = [effective_rank(ov_singular_values(before, layer)) for layer in range(3)]
    composed = composition_scores(before, "v")
    turned = TINY["llama"]()
    with torch.no_grad():
        for block in turned.model.layers:
            attention, width = block.self_attn, block.self_attn.head_dim
            kv = attention.k_proj.weight.shape[0] // width
            bases = torch.linalg.qr(torch.randn(kv, width, width)).Q
            values = attention.v_proj.weight.reshape(kv, width, -1)
            attention.v_proj.weight.copy_(5 * (bases.transpose(1, 2) @ values).flatten(0, 1))
            outputs = attention.o_proj.weight.T.reshape(kv, -1, width, attention.o_proj.weight.shape[0])
            attention.o_proj.weight.copy_((bases.transpose(1, 2)[:, None] @ outputs).flatten(0, 2).T)
    after = read_weights(workbench.load(turned), dtype=torch.float64)
    for layer in range(3):
        torch.testing.assert_close(eigen_score(ov_eigenvalues(after, layer)), scores[layer], rtol=0, atol=1e-4)
        torch.testing.assert_close(effective_rank(ov_singular_values(after, layer)), ranks[layer], rtol=1e-4, atol=0)
    np.testing.assert_allclose(composition_scores(after, "v"), composed, atol=1e-5)


def test_singular_values_ranks_and_symmetry(weights):
    layer, head = 2, Head(2, 1)
    single = ov_singular_values(weights, layer)[1]
    full = torch.linalg.svdvals(weights.ov(head))[: len(single)]
    torch.testing.assert_close(single, full)
    matrix = weights.qk(head, weights.offsets[-1])
    torch.testing.assert_close(
        qk_singular_values(weights, layer)[-1, 1], torch.linalg.svdvals(matrix)[: len(single)], atol=1e-8, rtol=1e-6
    )
    symmetric, anti = (matrix + matrix.T).norm() ** 2, (matrix - matrix.T).norm() ** 2
    expected = (symmetric - anti) / (symmetric + anti)
    assert qk_symmetry(weights, layer)[-1, 1].item() == pytest.approx(expected.item(), abs=1e-9)
    assert effective_rank(torch.ones(7)).item() == pytest.approx(7.0)
    assert participation_ratio(torch.tensor([1.0, 0.0, 0.0])).item() == pytest.approx(1.0)


def test_directions_name_the_tokens_of_the_full_matrix():
    weights = read_weights(toy(2.0), dtype=torch.float64)
    found = ov_directions(weights, Head(0, 0), directions=3, tokens=2)
    assert found.singular.numpy() == pytest.approx([2.0] * 3, abs=1e-5)
    # An identity between tokens: each direction writes the tokens that it reads.
    assert torch.equal(found.reads, found.writes)
    with pytest.raises(RequestError, match="directions=13"):
        ov_directions(weights, Head(0, 0), directions=13)


def test_composition_is_the_norm_of_the_product(weights):
    """Against the d_model x d_model product of every pair; rotary QK circuits by their root mean square."""
    for composed in ("q", "k", "v"):
        scores = composition_scores(weights, composed)
        for reader in weights.spec.heads():
            circuits = [weights.ov(reader)]
            if composed != "v":
                circuits = [weights.qk(reader, offset) for offset in weights.offsets]
                circuits = [one if composed == "q" else one.T for one in circuits]
            size = sum(one.norm() ** 2 for one in circuits)
            for writer in (Head(0, 1), Head(1, 0)):
                ov = weights.ov(writer)
                product = sum((ov @ one).norm() ** 2 for one in circuits)
                expected = (product / size).sqrt() / ov.norm() if writer.layer < reader.layer else torch.tensor(0.0)
                assert scores[*reader, *writer] == pytest.approx(expected.item(), abs=1e-9)


def test_traces_are_those_of_the_vocabulary_sized_matrices(weights):
    found = trace_products(weights)
    for reader, writer in ((Head(1, 0), Head(0, 2)), (Head(2, 3), Head(1, 1))):
        qk = sum(weights.qk(reader, offset) for offset in weights.offsets) / len(weights.offsets)
        full = weights.embedding @ qk @ weights.ov(writer).T @ weights.embedding.T
        assert found[*reader, *writer] == pytest.approx(full.trace().item(), rel=1e-8)


def test_small_blocks_change_nothing(weights, monkeypatch):
    def summary(layer):
        return written(weights, layer)

    whole = pair_products(weights, summary, summary)
    monkeypatch.setattr("workbench.heads.composition.BLOCK_BYTES", 1)
    np.testing.assert_allclose(pair_products(weights, summary, summary), whole)
    assert (whole[0] == 0).all() and (whole[1, :, 0] > 0).any()


def test_handwritten_model_composes_by_keys_alone():
    """circuits.md 10.5: K = 1/sqrt(V) for V = 9, Q = V = 0."""
    weights = read_weights(workbench.load(handwritten_induction()), dtype=torch.float64)
    found = {side: composition_scores(weights, side)[1, 0, 0, 0] for side in ("q", "k", "v")}
    assert found == {"q": 0.0, "k": pytest.approx(1 / 3, abs=1e-6), "v": 0.0}
    table = composition_table(weights, "k")
    assert len(table) == 1 and table.above_chance[0] == pytest.approx(1 / 3 - chance(weights), abs=1e-6)


def test_unrelated_heads_compose_by_chance():
    """The mean square over random rotations is 1/d_model."""
    weights = read_weights(workbench.load(TINY["llama"]()), offsets=(1, 4))
    pool = np.concatenate([chance_pool(weights, side) for side in ("q", "k", "v")])
    assert np.sqrt((pool**2).mean()) == pytest.approx(chance(weights), rel=0.05)


def test_detectors_on_weights_find_what_was_put_in():
    found = detect(
        toy(1.0), ["ov_copying", "qk_matching", "ov_rank", "k_composition"], settings=Settings(weight_draws=49)
    )
    rows = found.table.set_index("detector")
    assert rows.value["ov_copying"] == pytest.approx(1.0, abs=1e-5) and rows.p["ov_copying"] == pytest.approx(1 / 50)
    assert rows.value["qk_matching"] == pytest.approx(1.0, abs=1e-5) and abs(rows.null["qk_matching"]) < 0.2
    assert rows.value["ov_rank"] == pytest.approx(12.0, abs=1e-3)
    assert rows.value["k_composition"] == pytest.approx(-(12**-0.5)) and rows.p["k_composition"] == 1.0
    assert rows.low.isna().all()


def test_trained_toy_composes_by_the_keys_of_its_previous_token_head(toy_by_training):
    """circuits.md 10.2: K-composition of the previous-token head with all induction heads leads by far."""
    model, previous = toy_by_training
    scores = composition_scores(read_weights(model), "k")[1, :, 0]
    assert (scores.argmax(axis=1) == previous.head).all()
    table = detect(model, ["k_composition", "q_composition"], settings=Settings(weight_draws=49)).table
    by_side = table[table.layer == 1].groupby("detector").value.min()
    assert by_side["k_composition"] > 0.03


@pytest.fixture(scope="module")
def toy_by_training(toy):
    settings = Settings(bos_id=0, repeat_prompts=10, repeat_length=21)
    (previous,) = detect(toy, ["previous_token"], settings=settings).top("previous_token", 1)
    return toy, previous
