"""Attribution of nodes against planted models, whose estimates were worked out by hand, and against brute force."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.circuits import Scores, attribute, patch_activations
from workbench.circuits.attribution.nodes import single_keys
from workbench.dynamics import induction_pairs, linear, planted
from workbench.dynamics.copying import copying, negative_head
from workbench.dynamics.truth import Estimate, GroundTruth
from workbench.errors import RequestError
from workbench.models import AttentionCall

METHOD = {
    "atp": ("atp", False),
    "qk fix": ("atp-qk", False),
    "qk fix, norm frozen": ("atp-qk", True),
}
PLANTED = {
    "and": lambda: planted.gate("and"),
    "or": lambda: planted.gate("or"),
    "self_repair": planted.self_repair,
    "cancellation": planted.cancellation,
    "negative": negative_head,
    "query": lambda: copying(corrupt="query"),
    "key": lambda: copying(corrupt="key"),
    "value": lambda: copying(corrupt="value"),
    "query, norm": lambda: copying(corrupt="query", final_norm=True),
    "key, norm": lambda: copying(corrupt="key", final_norm=True),
    "induction": induction_pairs.handwritten_pairs,
    "linear": linear.linear_network,
}


def scored(found: Scores, node: str) -> np.ndarray:
    """A node's score on every prompt: a writer, an input, or a KV head as its k and its v together."""
    graph = found.graph
    if node in graph.writers:
        return found.node_per_prompt[:, graph.writer(node)]
    name, _, through = node.partition(".")
    parts = (through,) if through else ("k", "v")
    return sum(found.input_per_prompt[:, graph.reader(name, part)] for part in parts)


@pytest.mark.parametrize("name", PLANTED)
def test_every_estimate_that_was_worked_out(name) -> None:
    truth: GroundTruth = PLANTED[name]()
    runs: dict[tuple[str, bool, str], Scores] = {}
    assert truth.estimates
    for one in truth.estimates:
        method, frozen = METHOD[one.method]
        key = (method, frozen, one.how)
        if key not in runs:
            runs[key] = attribute(
                truth.model, truth.task, method, freeze_ln_scale=frozen,
                direction="denoising" if one.how == "denoising" else "noising",
                ablation="zero" if one.how == "zero" else "patching",
            )  # fmt: skip
        found = scored(runs[key], one.node) * (1 if one.how == "denoising" else -1)
        scale = max(1.0, float(one.change.abs().max()))
        np.testing.assert_allclose(found, one.change.numpy(), atol=2e-4 * scale, err_msg=str((one.method, one.node)))


def test_two_saturations_stand_one_behind_the_other() -> None:
    """Softmax and final norm: neither correction alone comes as near to the truth as both."""
    truth = copying(corrupt="key", final_norm=True)
    exact = {one.nodes[0]: one for one in truth.outcomes if one.how == "noising" and len(one.nodes) == 1}
    node = "L0KV0.k"
    true = float((truth.clean - exact[node].metric).mean())
    errors = {}
    for name, (method, frozen) in {"atp": ("atp", False), "norm": ("atp", True), "qk": ("atp-qk", False),
                                   "both": ("atp-qk", True)}.items():  # fmt: skip
        found = attribute(truth.model, truth.task, method, freeze_ln_scale=frozen)
        errors[name] = abs(float(scored(found, node).mean()) - true) / true
    assert errors["atp"] == pytest.approx(1.0, abs=1e-3) and errors["norm"] == pytest.approx(1.0, abs=1e-3)
    assert errors["both"] < errors["qk"] < 1


def test_the_hand_written_induction_is_exact_under_the_qk_fix() -> None:
    truth = induction_pairs.handwritten_pairs()
    for direction in ("noising", "denoising"):
        found = attribute(truth.model, truth.task, "atp-qk", direction=direction, positions=True)
        effect = truth.effect(direction, "L1KV0.k").abs().mean()
        assert float(scored(found, "L1KV0.k").mean()) == pytest.approx(float(effect), abs=1e-3)
        # All of it at one token, whose predecessor was replaced.
        place = found.graph.reader("L1KV0", "k")
        by_token = found.positions["inputs"][:, place]
        assert bool((np.abs(by_token).argmax(1) == 1 + induction_pairs.ASKED).all())
        np.testing.assert_allclose(by_token.sum(1), scored(found, "L1KV0.k"), atol=1e-3)
    plain = attribute(truth.model, truth.task, "atp")
    assert abs(float(scored(plain, "L1KV0.k").mean())) < 1e-4


def test_dropping_a_layer_shows_what_cancels() -> None:
    truth = planted.cancellation()
    plain = attribute(truth.model, truth.task, "atp")
    dropped = attribute(truth.model, truth.task, "atp-drop")
    node = plain.graph.writer("L0H0")
    assert abs(plain.nodes[node]) < 1e-4
    # Two layers: without the second, the direct effect is left.
    assert dropped.nodes[node] == pytest.approx(2.0, abs=1e-4)
    later = dropped.graph.writer("L1H0")
    assert dropped.nodes[later] == pytest.approx(2.0, abs=1e-4)
    assert dropped.work["backwards"] == 2 * len(truth.task)
    assert "sizes" in dropped.notes[0] and bool((dropped.node_per_prompt >= 0).all())


def test_one_layer_has_nothing_to_drop() -> None:
    truth = planted.gate("and")
    with pytest.raises(RequestError, match="needs two"):
        attribute(truth.model, truth.task, "atp-drop")


def test_drops_against_a_model_without_the_layer(gpt2, task) -> None:
    """Leaving a layer out of the gradient, by detaching what it adds."""
    found = attribute(gpt2, task, "atp-drop", direction="denoising")
    z, other = (gpt2.trace(ids, sites=["z"]) for ids in (task.corrupt, task.clean))
    model, total = gpt2.attachment.hf_model, 0.0
    row = 0
    ids = task.corrupt.ids[row : row + 1, :7]
    kept: list[torch.Tensor] = []
    for layer in range(3):
        kept.clear()
        dropped, second = model.transformer.h[layer], model.transformer.h[1].attn.c_proj
        handles = [
            module.register_forward_hook(lambda module, args, output: output.detach())
            for module in (dropped.attn.c_proj, dropped.mlp.c_proj)
        ]
        handles.append(second.register_forward_pre_hook(lambda module, args: kept.append(args[0])))
        logits = model(ids, use_cache=False).logits[0, -1]
        metric = logits[task.answers[row, 0]] - logits[task.foils[row, 0]]
        (gradient,) = torch.autograd.grad(metric, kept[0], allow_unused=True)
        for handle in handles:
            handle.remove()
        if gradient is None:
            continue
        change = other.site("z", 1)[row, :7, 2] - z.site("z", 1)[row, :7, 2]
        total += abs(float((change * gradient.reshape(7, 4, 12)[:, 2]).sum()))
    np.testing.assert_allclose(found.node_per_prompt[row, found.graph.writer("L1H2")], total / 2, rtol=1e-3)


def test_both_corrections_together() -> None:
    """AtP*: what the QK fix finds survives that layers are left out, and sizes add up."""
    truth = induction_pairs.handwritten_pairs()
    found = attribute(truth.model, truth.task, "atp-star")
    assert float(scored(found, "L1KV0.k").mean()) == pytest.approx(10.0, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_oss", "gemma2", "mistral"])
def test_one_key_alone_against_whole_rows(model_named, task, name) -> None:
    """The closed form under grouped queries, windows, soft caps and sinks, for large and small changes."""
    calls: list[AttentionCall] = []
    model = model_named(name)

    def keep(call: AttentionCall) -> torch.Tensor:
        calls.append(call)
        return call.output()

    with torch.no_grad(), model.attachment.observe(keep):
        model.attachment.hf_model(task.clean.ids[:, :7], use_cache=False)
    call = calls[1]
    generator = torch.Generator().manual_seed(0)
    call = replace(call, sinks=None if call.sinks is None else call.sinks.detach())
    for size in (0.3, 30.0):
        put = call.k + size * torch.randn(call.k.shape, generator=generator)
        pattern = call.pattern(torch.float64)
        weight = torch.randn(pattern.shape, generator=generator, dtype=torch.float64)
        found = single_keys(call, put, pattern, weight)
        group = call.q.shape[1] // call.k.shape[1]
        for key in range(pattern.shape[-1]):
            moved = call.k.clone()
            moved[:, :, key] = put[:, :, key]
            row = ((replace(call, k=moved).pattern(torch.float64) - pattern) * weight).sum((2, 3))
            np.testing.assert_allclose(found[:, :, key], row, atol=1e-5 * float(weight.abs().max()))
        assert found.shape[1] == group * call.k.shape[1]


def test_a_saturated_key_keeps_its_digits() -> None:
    """One key has all but 1e-26 of a row and loses it: what is left to the others must not come from 1 - p."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 60.0, 1.0])[None, None, :, None]
    q = q.expand(1, 1, 3, 1)
    call = AttentionCall(0, q, k, torch.zeros_like(k), 1.0)
    put = torch.tensor([0.0, 0.0, 1.0])[None, None, :, None]
    pattern = call.pattern(torch.float64)
    weight = torch.zeros_like(pattern)
    weight[..., 2, :] = torch.tensor([5.0, 7.0, 11.0])
    found = single_keys(call, put, pattern, weight)[0, 0, 1]
    share = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).softmax(0)
    expected = (share * torch.tensor([5.0, 7.0, 11.0], dtype=torch.float64)).sum() - 7.0
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_linear_networks_are_exact_at_every_node() -> None:
    truth = linear.linear_network()
    for method, frozen in (("atp", False), ("atp", True), ("atp-qk", False), ("relp", False)):
        for direction in ("noising", "denoising"):
            found = attribute(truth.model, truth.task, method, direction=direction, freeze_ln_scale=frozen)
            for site, nodes in (("z", "H"), ("mlp_out", ".mlp")):
                by = "head" if site == "z" else "layer"
                exact = patch_activations(truth.model, truth.task, site, by, direction=direction)
                writers = [place for place, one in enumerate(found.graph.writers) if nodes in one]
                np.testing.assert_allclose(
                    found.node_per_prompt[:, writers].T, exact.effect(direction), atol=1e-5, err_msg=method
                )


def test_scores_by_token_add_up(llama, task) -> None:
    for method in ("atp", "atp-qk"):
        found = attribute(llama, task, method, positions=True)
        nodes, inputs = found.positions["nodes"], found.positions["inputs"]
        # Prompts of 7, 10 and 7 tokens, all read at the last.
        assert nodes.shape == (3, len(found.graph.writers), 10)
        assert bool(np.isnan(nodes[0, :, 7:]).all()) and not np.isnan(nodes[1]).any()
        np.testing.assert_allclose(np.nansum(nodes, 2), found.node_per_prompt, atol=1e-5)
        # Keys share a softmax, so that theirs add up to first order alone.
        queries = [place for place, (_, through) in enumerate(found.graph.readers) if through in "qv"]
        np.testing.assert_allclose(np.nansum(inputs, 2)[:, queries], found.input_per_prompt[:, queries], atol=1e-5)
    # Before the first token that differs nothing changes, and embeddings change nowhere else.
    embed = nodes[:, 0]
    for row in range(3):
        changed = set(task.changed[row].nonzero().flatten().tolist())
        assert set(np.flatnonzero(np.abs(np.nan_to_num(embed[row])) > 0)) <= changed


def test_small_changes_are_right_in_every_architecture(model_named, make_pairs) -> None:
    """The first order is exact where changes are small: a corrupt prompt whose embedding differs a little."""
    for name in ("gpt2", "gpt_neox", "llama", "qwen3", "phi3", "opt"):
        model, task = model_named(name), make_pairs((6,))
        embedding = model.attachment.hf_model.get_input_embeddings().weight
        before = embedding.detach().clone()
        with torch.no_grad():
            for one, two in zip(task.clean.ids[0], task.corrupt.ids[0], strict=True):
                embedding[two] = before[one] + 0.002 * (before[two] - before[one])
        try:
            found = attribute(model, task, "atp")
            exact = patch_activations(model, task, "z", "head", direction="noising").effect("noising")
        finally:
            with torch.no_grad():
                embedding.copy_(before)
        heads = [place for place, one in enumerate(found.graph.writers) if re.fullmatch(r"L\d+H\d+", one)]
        np.testing.assert_allclose(found.node_per_prompt[0, heads], exact[:, 0], atol=0.05 * np.abs(exact).max())


def test_estimates_have_their_names() -> None:
    """Every kind of estimate that a ground truth can tell is one that is compared here."""
    kinds = {one.method for make in PLANTED.values() for one in make().estimates}
    assert kinds == set(METHOD) and Estimate.__annotations__["method"]
