"""RelP's rules: values stay, relevance is conserved where nothing but them is at work, gates get a half each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.circuits import attribute
from workbench.circuits.attribution.passes import run
from workbench.circuits.attribution.rules import backward_rules
from workbench.errors import ModelRefused
from workbench.models.testing import TINY
from workbench.tracing import load

NAMES = ["gpt2", "gpt_neox", "opt", "llama", "qwen3", "phi3"]


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_model(model_named, task, name) -> None:
    model = model_named(name)
    ids = task.clean.ids[:, :7]
    with torch.no_grad():
        plain = model.attachment.hf_model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    for relevance, freeze in ((True, "none"), (False, "all"), (False, "final")):
        with backward_rules(model, freeze, relevance) as attend:
            logits = run(model, ids, attend).logits
        torch.testing.assert_close(logits.detach(), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2"])
def test_relevance_is_conserved_without_biases(name) -> None:
    """With scales, patterns and gates as given the model is linear: input times gradient is the logit."""
    hf_model = TINY[name]()
    with torch.no_grad():
        for label, weight in hf_model.named_parameters():
            if label.endswith("bias"):
                weight.zero_()
    model = load(hf_model)
    ids = torch.arange(3, 11)[None]
    with backward_rules(model, "none", relevance=True) as attend:
        one = run(model, ids, attend)
    (gradient,) = torch.autograd.grad(one.logits[0, 7], one.streams[0])
    assert float((gradient * one.streams[0]).detach().sum()) == pytest.approx(
        float(one.logits[0, 7].detach()), rel=1e-4
    )
    with backward_rules(model, "none") as attend:
        one = run(model, ids, attend)
    (gradient,) = torch.autograd.grad(one.logits[0, 7], one.streams[0])
    assert float((gradient * one.streams[0]).detach().sum()) != pytest.approx(
        float(one.logits[0, 7].detach()), rel=1e-2
    )


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_each_factor_of_a_gate_gets_a_half(model_named, name) -> None:
    """By hand, on one MLP: z = down(act(gate) * up), with act(g) as g times a constant."""
    model = model_named(name)
    mlp = model.attachment.layers[0].mlp
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, 48, generator=generator, requires_grad=True)
    back = torch.randn(1, 2, 48, generator=generator)
    with backward_rules(model, "none", relevance=True):
        (found,) = torch.autograd.grad(mlp(hidden), hidden, back)
    if name == "llama":
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    else:
        gate, up = mlp.gate_up_proj.weight.chunk(2)
    inner = back @ mlp.down_proj.weight
    one, two = hidden @ gate.T, hidden @ up.T
    expected = ((inner * two * one.sigmoid()) @ gate + (inner * one * one.sigmoid()) @ up) / 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_edges_and_nodes_agree(llama, task) -> None:
    nodes, edges = attribute(llama, task, "relp"), attribute(llama, task, "relp-edges")
    np.testing.assert_allclose(edges.node_per_prompt, nodes.node_per_prompt, atol=2e-5)
    plain = attribute(llama, task, "atp")
    assert np.abs(plain.nodes - nodes.nodes).max() > 1e-2


def test_frozen_norms_in_edges(llama, gpt2, task) -> None:
    for model in (llama, gpt2):
        for freeze in ("final", True):
            edges = attribute(model, task, "eap", freeze_ln_scale=freeze)
            nodes = attribute(model, task, "atp", freeze_ln_scale=freeze)
            np.testing.assert_allclose(edges.node_per_prompt, nodes.node_per_prompt, atol=2e-5)


def test_mixtures_of_experts_have_no_rules(model_named, task) -> None:
    with pytest.raises(ModelRefused, match="mixtral"):
        attribute(model_named("mixtral"), task, "relp")
