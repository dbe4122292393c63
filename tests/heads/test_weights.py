"""Folded weights against what running models do, for every architecture."""

from __future__ import annotations

import pytest
import torch

import workbench
from workbench.errors import HeadError, RequestError
from workbench.heads.weights import read_weights
from workbench.models import Head
from workbench.models.architectures import ARCHITECTURES
from workbench.models.projections import PROJECTIONS
from workbench.models.testing import TINY


def without_biases(name):
    """A tiny model that its weight matrices describe completely."""
    model = TINY[name]()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.zero_()
    return workbench.load(model)


def unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request):
    model = without_biases(request.param)
    batch = model.batch([[5, 6, 7, 8, 9, 10, 11]])
    trace = model.trace(batch, sites=["resid_pre", "q", "k", "v", "z", "attn_out", "resid_post"], logits="all")
    weights = read_weights(model, offsets=(0, 1, 3, 5))
    return request.param, model, weights, trace


def test_every_architecture_has_its_projections():
    assert set(PROJECTIONS) == set(ARCHITECTURES)


def test_rotations_and_gains_are_exact_up_to_one_positive_factor_a_token(tiny):
    """Logits of one query with two keys have the ratio that the matrices give, once k's own length is put back."""
    _, model, weights, trace = tiny
    layer, head = 1, Head(1, 1)
    x, q, k = (trace.site(site, layer)[0] for site in ("resid_pre", "q", "k"))
    kv = model.spec.kv_head(head)
    found = weights.queries(layer)
    query = unit(x - x.mean(-1, keepdim=True) * centres(model))[5] @ found.query[1]
    keys = unit(x - x.mean(-1, keepdim=True) * centres(model)) @ found.key[1]
    for offset in (1, 3, 5):
        turn = weights.rotations[layer][weights.offsets.index(offset)] if model.spec.rotary else torch.eye(len(query))
        mine = (query @ turn @ keys[5 - offset]) / (query.norm() * keys[5 - offset].norm())
        real = q[5, 1] @ k[5 - offset, kv] / (q[5, 1].norm() * k[5 - offset, kv].norm())
        assert mine.item() == pytest.approx(real.item(), abs=1e-4)


def centres(model):
    path = PROJECTIONS[model.spec.architecture].norm
    return float(path is not None and isinstance(getattr(model.attachment.layers[0].block, path), torch.nn.LayerNorm))


def test_ov_circuit_is_what_a_head_adds(tiny):
    """One token alone: attention is on itself (but for a learned sink), and x W_V W_O over all heads is attn_out."""
    _, model, weights, _ = tiny
    trace = model.trace([[5]], sites=["resid_pre", "attn_out"])
    for layer in range(model.spec.n_layers):
        x = trace.site("resid_pre", layer)[0, 0]
        share = model.trace([[5]], statistics=workbench.statistics.sink_mass())["sink_mass"][0, layer, :, 0]
        heads = range(model.spec.layers[layer].heads)
        mine = sum((1 - share[head]) * (x @ weights.ov(Head(layer, head))) for head in heads)
        real = trace.site("attn_out", layer)[0, 0]
        assert torch.cosine_similarity(mine, real, dim=0).item() == pytest.approx(1.0, abs=1e-4)


def test_unembedding_reads_the_final_residual(tiny):
    """Differences of logits keep their ratios: the final norm's length is one positive factor."""
    name, model, weights, trace = tiny
    mine = trace.site("resid_post", model.spec.n_layers - 1)[0, 4] @ weights.unembedding
    real = trace.logits[0, 4]
    if name == "gemma2":
        real = 20 * torch.atanh((real / 20).double()).float()
    assert torch.cosine_similarity(mine, real, dim=0).item() == pytest.approx(1.0, abs=1e-4)


def test_biases_and_dropped_lengths_are_reported():
    def ignored(name):
        return read_weights(workbench.load(TINY[name]())).ignored

    assert ignored("llama") == ()
    assert {"bias of q_proj", "bias of k_proj", "bias of v_proj"} <= set(ignored("qwen2"))
    assert "bias of c_attn" in ignored("gpt2") and "bias of final norm" in ignored("gpt2")
    assert set(ignored("qwen3")) == {"length of q", "length of k"}
    assert {"length of q", "length of k", "length of the output"} <= set(ignored("olmo2"))


def test_mistakes_are_named():
    model = workbench.load(TINY["llama"]())
    with pytest.raises(RequestError, match="offset=2"):
        read_weights(model, offsets=(1, 3)).qk(Head(0, 0), 2)
    with pytest.raises(RequestError, match="320 positions"):
        read_weights(model, offsets=(400,))
    with pytest.raises(RequestError, match="draws=0"):
        read_weights(model, draws=0)
    weights = read_weights(model)
    with pytest.raises(HeadError, match="L9H0"):
        weights.ov(Head(9, 0))
    with pytest.raises(RequestError, match="Layer 3"):
        weights.layer(3)
