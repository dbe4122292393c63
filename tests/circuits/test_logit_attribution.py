"""Logit attribution against the definition, the model's own logits, and path patches of models without a norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.circuits import Graph, ask, direct_logit_attribution, patch_paths, source_attribution
from workbench.dynamics import planted
from workbench.dynamics.copying import negative_head
from workbench.dynamics.induction_pairs import handwritten_pairs
from workbench.dynamics.linear import linear_network
from workbench.errors import HeadError, RequestError
from workbench.models.testing import VOCAB_SIZE


def own(model, task, of):
    """The model's logits at what is read, uncapped, in double precision."""
    logits = model.trace(task.clean, logits=task.position[:, None]).logits[:, 0].double()
    cap = getattr(model.attachment.hf_model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else torch.atanh(logits / cap) * cap
    answer, foil = (logits.gather(1, ids)[:, 0].numpy() for ids in (task.answers, task.foils))
    return {"answer": answer, "foil": foil, "difference": answer - foil}[of]


@pytest.mark.parametrize(("by", "side"), [("head", "left"), ("component", "right")])
def test_parts_add_up_to_the_logit_in_every_architecture(any_model, make_pairs, by, side) -> None:
    task = make_pairs(side=side, read=2)
    for of in ("difference", "answer", "foil"):
        found = direct_logit_attribution(any_model, task, by=by, of=of)
        expected = own(any_model, task, of)
        np.testing.assert_allclose(found.values.sum(1) + found.constant, expected, atol=1e-4)
        assert found.error < 1e-4
        assert np.abs(found.values).max() > 0.1
    shape = any_model.spec.layers[0]
    heads = [node for node in found.nodes if "H" in node]
    assert len(heads) == (3 * shape.heads if by == "head" else 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_each_part_is_its_definition(model_named, task, name) -> None:
    """(w - mean w) / sigma * gain . W_U, with the stream's own sigma."""
    model = model_named(name)
    trace = model.trace(task.clean, sites=["result", "mlp_out", "resid_pre", "resid_post"])
    rows, columns = torch.arange(3), task.position
    hf = model.attachment.hf_model
    norm = {"llama": lambda: hf.model.norm, "gpt2": lambda: hf.transformer.ln_f}.get(
        name, lambda: hf.model.decoder.final_layer_norm
    )()
    stream = trace.site("resid_post", 2)[rows, columns].double()
    centred = name != "llama"
    stream = stream - stream.mean(-1, keepdim=True) if centred else stream
    sigma = (stream.square().mean(-1) + (norm.eps if centred else norm.variance_epsilon)).sqrt()
    unembedding = hf.lm_head.weight.detach().double()
    direction = (unembedding[task.answers[:, 0]] - unembedding[task.foils[:, 0]]) * norm.weight.detach().double()

    def value(part):
        part = part[rows, columns].double()
        part = part - part.mean(-1, keepdim=True) if centred else part
        return ((part * direction).sum(-1) / sigma).numpy()

    found = direct_logit_attribution(model, task)
    at = {node: found.values[:, number] for number, node in enumerate(found.nodes)}
    for layer in range(3):
        for head in range(model.spec.layers[layer].heads):
            expected = value(trace.site("result", layer)[:, :, head])
            np.testing.assert_allclose(at[f"L{layer}H{head}"], expected, atol=1e-5)
        np.testing.assert_allclose(at[f"L{layer}.mlp"], value(trace.site("mlp_out", layer)), atol=1e-5)
    np.testing.assert_allclose(found.scale, 1 / sigma.numpy(), rtol=1e-5)
    entering = at["embed"] + at.get("positions", 0)
    np.testing.assert_allclose(entering, value(trace.site("resid_pre", 0)), atol=1e-5)
    assert ("positions" in at) == (name != "llama")


def test_components_are_sums_of_heads_and_bias(any_model, task) -> None:
    heads = direct_logit_attribution(any_model, task)
    layers = direct_logit_attribution(any_model, task, by="component")
    summed = heads.table().query("kind in ('head', 'bias')").groupby("layer").value.sum()
    np.testing.assert_allclose(layers.table().query("kind == 'attn'").value, summed, atol=1e-4)


@pytest.mark.parametrize("make", [linear_network, negative_head])
def test_without_a_norm_a_change_of_attribution_is_the_direct_effect(make) -> None:
    truth = make()
    clean, corrupt = (direct_logit_attribution(truth.model, truth.task, run=run) for run in ("clean", "corrupt"))
    assert clean.notes == () and (clean.scale == 1).all()
    nodes = [node for node in clean.nodes if "H" in node or node.endswith("mlp")]
    assert nodes
    found = patch_paths(truth.model, truth.task, nodes, form="strict", direction="noising")
    which = [clean.nodes.index(node) for node in nodes]
    expected = (clean.values - corrupt.values)[:, which].T
    np.testing.assert_allclose(found.effect("noising"), expected, atol=1e-4)
    np.testing.assert_allclose(clean.values.sum(1) + clean.constant, truth.clean, atol=1e-5)


def test_a_negative_head_is_negative() -> None:
    truth = negative_head()
    table = direct_logit_attribution(truth.model, truth.task).table().set_index("node")
    against = [node for node, sign in truth.helps.items() if sign < 0 and "H" in node]
    assert against and (table.loc[against].value < -0.1).all()
    assert table.loc[against].p.max() < 0.05


def test_tables_hold_means_with_intervals(llama, task) -> None:
    found = direct_logit_attribution(llama, task)
    table = found.table()
    np.testing.assert_allclose(table.value, found.values.mean(0))
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    np.testing.assert_allclose(table.share.sum(), 1)
    assert table.set_index("rank").value.sort_index(ascending=True).is_monotonic_decreasing
    long = found.per_prompt()
    assert len(long) == found.values.size
    np.testing.assert_allclose(long.groupby("node").value.mean()[table.node], table.value)


def test_scores_on_the_graph(gpt2, task) -> None:
    found = direct_logit_attribution(gpt2, task)
    graph = Graph.of(gpt2)
    scores = found.scores(graph)
    at = {node: found.values[:, number] for number, node in enumerate(found.nodes)}
    np.testing.assert_allclose(scores.node_per_prompt[:, 0], at["embed"] + at["positions"])
    np.testing.assert_allclose(scores.nodes[graph.writer("L2H3")], at["L2H3"].mean())
    assert len(scores.table("nodes")) == len(graph.writers)
    with pytest.raises(RequestError, match=r"L0\.attn"):
        direct_logit_attribution(gpt2, task, by="component").scores(graph)


def test_prompts_of_ones_own(llama) -> None:
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    found = direct_logit_attribution(llama, ask(llama, prompts, [3, 4]))
    logits = llama.trace(prompts, logits="last").logits[:, 0]
    np.testing.assert_allclose(found.logits, logits[[0, 1], [3, 4]], atol=1e-5)
    assert found.of == "answer" and found.run == "asked"


def test_caps_are_said(model_named, task) -> None:
    assert any("before the model caps them at 20" in note for note in _notes(model_named("gemma2"), task))
    assert not any("cap" in note for note in _notes(model_named("gemma3"), task))


def _notes(model, task):
    return direct_logit_attribution(model, task).notes


def test_refusals(llama, task) -> None:
    alone = ask(llama, [[5, 6]], [3])
    with pytest.raises(RequestError, match="without a foil"):
        direct_logit_attribution(llama, alone, of="difference")
    with pytest.raises(RequestError, match="are one run"):
        direct_logit_attribution(llama, alone, run="corrupt")
    with pytest.raises(RequestError, match="2 answers for 1 prompts"):
        ask(llama, [[5, 6]], [3, 4])
    with pytest.raises(RequestError, match="without a tokenizer"):
        ask(llama, [[5, 6]], [" Mary"])
    with pytest.raises(RequestError, match=f"outside the vocabulary of {VOCAB_SIZE}"):
        ask(llama, [[5, 6]], [VOCAB_SIZE])
    with pytest.raises(HeadError, match="L3H0 does not exist"):
        source_attribution(llama, task, ["L3H0"])
    with pytest.raises(RequestError, match="no query head"):
        source_attribution(llama, task, ["L0KV0"])


def test_sources_add_up_to_their_head(any_model, make_pairs) -> None:
    task = make_pairs(side="left")
    whole = direct_logit_attribution(any_model, task)
    found = source_attribution(any_model, task)
    values = np.nansum(found.values, axis=2)
    for number, head in enumerate(found.heads):
        np.testing.assert_allclose(values[:, number], whole.values[:, whole.nodes.index(str(head))], atol=1e-5)
    lengths = task.clean.lengths.numpy()
    assert (np.isnan(found.values[:, 0]).sum(1) == found.values.shape[2] - lengths).all()
    assert ((found.tokens >= 0).sum(1) == lengths).all()


def test_sources_are_pattern_times_what_the_token_would_write(llama, task) -> None:
    whole = direct_logit_attribution(llama, task, of="answer")
    found = source_attribution(llama, task, ["L2H4", "L1H0"], of="answer")
    trace = llama.trace(task.clean, sites=["pattern", "v", "resid_post"])
    hf = llama.attachment.hf_model
    direction = hf.lm_head.weight[task.answers[:, 0]] * hf.model.norm.weight
    for number, head in enumerate(found.heads):
        weight = hf.model.layers[head.layer].self_attn.o_proj.weight.T.reshape(6, 8, 48)[head.head]
        for prompt in range(3):
            row = trace.site("pattern", head.layer)[prompt, head.head, task.position[prompt]]
            written = trace.site("v", head.layer)[prompt, :, head.head // 3] @ weight @ direction[prompt]
            length = int(task.clean.lengths[prompt])
            expected = (row * written).detach()[:length] * whole.scale[prompt]
            np.testing.assert_allclose(found.values[prompt, number, :length], expected, atol=1e-5)


def test_induction_heads_take_the_answer_from_the_token_after_the_match() -> None:
    truth = handwritten_pairs()
    heads = sorted(node for node in truth.nodes if node.startswith("L1H"))
    found = source_attribution(truth.model, truth.task, heads)
    best = found.values.argmax(2)
    for number in range(len(heads)):
        taken = found.tokens[np.arange(len(best)), best[:, number]]
        np.testing.assert_array_equal(taken, truth.task.answers[:, 0])
    assert (found.values.max(2) > 0.9 * found.values.sum(2)).all()


def test_roles_of_sources(llama, task) -> None:
    found = source_attribution(llama, task, ["L2H4"])
    table = found.table().set_index("source")
    assert list(table.index) == ["changed", "end", "elsewhere"]
    np.testing.assert_allclose(table.value.sum(), np.nansum(found.values, axis=2).mean(), atol=1e-9)
    place = task.roles["changed"] - task.clean.starts
    np.testing.assert_allclose(table.value["changed"], found.values[np.arange(3), 0, place].mean())


def test_gates_write_nothing_directly() -> None:
    """An AND's heads act through the MLP alone."""
    truth = planted.gate("and")
    table = direct_logit_attribution(truth.model, truth.task).table().set_index("node")
    heads = [node for node in truth.nodes if node.startswith("L0H")]
    np.testing.assert_allclose(table.loc[heads].value, 0, atol=1e-6)
    assert table.value["L0.mlp"] > 0
