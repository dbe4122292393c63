"""Scores of edges against the forked model's own gradients, exact edges, and their identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.circuits import Forked, Graph, attribute, exact_edges, patch_activations
from workbench.circuits.attribution import METHODS
from workbench.circuits.attribution.plan import plan
from workbench.circuits.attribution.settings import Settings
from workbench.circuits.forks import replacement
from workbench.circuits.recorded import groups, metric_of
from workbench.dynamics import linear, planted
from workbench.dynamics.toy import ToyConfig, ToyModel
from workbench.errors import MemoryRefused, ModelRefused, RequestError
from workbench.models import Batch
from workbench.tasks.pairs import Edge, PairTask
from workbench.tracing import Model, load, patch

ARCHITECTURES = ["gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen3", "phi3", "gpt_oss", "mixtral"]


def by_forks(model: Model, task: PairTask, how: str = "patching") -> np.ndarray:
    """What the forked run's gradient with respect to its mask says: the definition, by another way."""
    graph = Graph.of(model)
    found = np.zeros((len(task), *graph.exists.shape))
    _, measure = metric_of(task, None)
    for group in groups(task):
        batch = group.cut(task.clean)
        forked = Forked(model, graph, batch, replacement(model, task, group, how))
        mask = torch.tensor(graph.exists, dtype=model.attachment.dtype).repeat(len(batch), 1, 1).requires_grad_()
        with torch.enable_grad():
            total = measure(forked.run(mask).logits, group.prompts).sum()
        (gradient,) = torch.autograd.grad(total, mask)
        found[group.prompts] = gradient.numpy()
    found[:, ~graph.exists] = np.nan
    return found


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for single precision's rounding, which depends on what a processor multiplies at once."""
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.nanmax(np.abs(expected)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_of_every_fork(model_named, task, name) -> None:
    model = model_named(name)
    found = attribute(model, task, "eap")
    expected = by_forks(model, task)
    same(found.per_prompt, expected)
    np.testing.assert_allclose(found.edges, expected.mean(0), atol=2e-5)
    assert np.nanmax(np.abs(expected)) > 1e-3


@pytest.mark.parametrize("how", ["mean", "zero"])
def test_other_values_in_place(llama, task, how) -> None:
    found = attribute(llama, task, "eap", ablation="mean-positional" if how == "mean" else how)
    expected = by_forks(llama, task, how)
    np.testing.assert_allclose(found.per_prompt, expected, atol=1e-4 * np.nanmax(np.abs(expected)))


def test_one_mean_over_all_tokens(gpt2, make_pairs) -> None:
    task = make_pairs((5, 8))
    found = attribute(gpt2, task, "eap", ablation="mean")
    # z of all tokens up to the one that is read, of both corrupt prompts.
    kept = [gpt2.trace(task.corrupt, sites=["z"]).site("z", 1)[row, : 5 if row == 0 else 8, 2] for row in range(2)]
    mean = torch.cat(kept).mean(0)
    clean = gpt2.trace(task.clean, sites=["z"]).site("z", 1)[1, :8, 2]
    weight = gpt2.attachment.hf_model.transformer.h[1].attn.c_proj.weight[24:36].detach()
    change = (clean - mean) @ weight
    end = gpt2.trace(task.clean, sites=["resid_post"]).site("resid_post", 2)[1, :8].clone().requires_grad_()
    hf_model = gpt2.attachment.hf_model
    logits = hf_model.lm_head(hf_model.transformer.ln_f(end))[7]
    (gradient,) = torch.autograd.grad(logits[task.answers[1, 0]] - logits[task.foils[1, 0]], end)
    score = float((change * gradient).sum())
    edge = found.graph.place(Edge("L1H2", "logits"))
    np.testing.assert_allclose(found.per_prompt[1][edge], score, rtol=1e-4)


def test_finite_differences_in_double_precision() -> None:
    """Grouped queries: a single key/value head's inputs, against the forked run moved a little.

    A toy, as the norms of Llama are computed in single precision whatever the model's own.
    """
    generator = torch.Generator().manual_seed(3)
    toy = ToyModel(ToyConfig(vocab_size=101, num_hidden_layers=3, num_key_value_heads=2, intermediate_size=96))
    with torch.no_grad():
        for weight in toy.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    model = load(toy.double().eval())
    clean, corrupt = (torch.randint(3, 101, (2, 6), generator=generator) for _ in range(2))
    every = torch.ones_like(clean, dtype=torch.bool)
    task = PairTask(
        "double", "random", 0, "none", Batch(clean, every), Batch(corrupt, every), answers=torch.tensor([[5], [6]]),
        foils=torch.tensor([[7], [8]]), position=torch.tensor([5, 5]),
    )  # fmt: skip
    found = attribute(model, task, "eap")
    graph, (group,) = found.graph, groups(task)
    forked = Forked(model, graph, group.cut(task.clean), replacement(model, task, group, "patching"))
    for edge in (
        Edge("L0H1", "L1KV1", "k"), Edge("embed", "L2KV0", "v"), Edge("L0.mlp", "L2H3", "q"), Edge("L1H2", "L1.mlp")
    ):  # fmt: skip
        place, step = graph.place(edge), 1e-4
        values = []
        for moved in (1 + step, 1 - step):
            mask = torch.tensor(graph.exists, dtype=torch.float64)
            mask[place] = moved
            logits = forked.run(mask).logits.double()
            rows = torch.arange(2)
            values.append((logits[rows, task.answers[:, 0]] - logits[rows, task.foils[:, 0]]).detach().numpy())
        expected = (values[0] - values[1]) / (2 * step)
        # The task's metric is in single precision.
        np.testing.assert_allclose(found.per_prompt[:, place[0], place[1]], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_what_leaves_a_writer_is_its_node(any_tiny, task, direction) -> None:
    edges = attribute(any_tiny, task, "eap", direction=direction)
    nodes = attribute(any_tiny, task, "atp", direction=direction)
    np.testing.assert_allclose(edges.node_per_prompt, nodes.node_per_prompt, atol=2e-5)
    np.testing.assert_allclose(np.nansum(edges.edges, 1), nodes.nodes, atol=2e-5)
    # Stream readers: the MLPs' inputs and the logits are one thing both ways.
    mlps = [place for place, (_, through) in enumerate(edges.graph.readers) if not through]
    np.testing.assert_allclose(edges.inputs[mlps], nodes.inputs[mlps], atol=1e-4)


@pytest.fixture(params=["gpt2", "gpt_neox", "llama", "qwen2"])
def any_tiny(request, model_named) -> Model:
    return model_named(request.param)


def test_integrated_gradients_are_complete(llama, gpt2, task) -> None:
    for model in (llama, gpt2):
        found = attribute(model, task, "eap-ig", steps=100)
        gap = found.clean - found.corrupt
        np.testing.assert_allclose(found.node_per_prompt[:, 0], gap, atol=2e-3 * np.abs(gap).max())
        np.testing.assert_allclose(np.nansum(found.per_prompt[:, 0], 1), found.node_per_prompt[:, 0], atol=1e-5)
        turned = attribute(model, task, "eap-ig", steps=100, direction="denoising")
        np.testing.assert_allclose(turned.edges, found.edges, atol=1e-5)


def test_one_step_from_the_left_is_the_corrupt_end(gpt2, task) -> None:
    left = attribute(gpt2, task, "eap-ig", steps=1, rule="left")
    same(left.edges, attribute(gpt2, task, "eap", direction="denoising").edges)
    ends = attribute(gpt2, task, "eap-clean-corrupted")
    both = [attribute(gpt2, task, "eap", direction=way).edges for way in ("noising", "denoising")]
    same(ends.edges, np.mean(both, 0))


def test_however_many_prompts_and_points_run_together(llama, task) -> None:
    whole = attribute(llama, task, "eap-ig", steps=3)
    one = attribute(llama, task, "eap-ig", steps=3, prompts_at_once=1)
    same(one.per_prompt, whole.per_prompt)
    assert one.work == whole.work
    assert one.work["backwards"] == 3 * len(task) and one.work["forwards"] == 5 * len(task)
    with pytest.raises(MemoryRefused, match="allowed"):
        attribute(llama, task, "eap-ig", memory_limit=10_000)


def test_little_memory_gives_the_same(llama, task) -> None:
    graph, ids = Graph.of(llama), task.clean.ids[:3, :7]
    sizes = [plan(llama, graph, ids, 6, Settings(memory_limit=limit), edges=True, patterns=False)
             for limit in (600_000, 1_200_000, 100_000_000)]  # fmt: skip
    assert sizes[0] < sizes[-1] and sizes[-1] == (3, 6)
    small = attribute(llama, task, "eap-ig", steps=6, memory_limit=700_000)
    same(small.edges, attribute(llama, task, "eap-ig", steps=6).edges)


def test_a_linear_network_is_exact_to_all() -> None:
    truth = linear.linear_network()
    exact = exact_edges(truth.model, truth.task)
    scale = np.nanmax(np.abs(exact.edges))
    assert scale > 1e-3
    for method in METHODS:
        if METHODS[method].of_edges is None:
            continue
        found = attribute(truth.model, truth.task, method, steps=3)
        # Exact edges are differences of metrics in single precision.
        np.testing.assert_allclose(found.edges, exact.edges, atol=1e-5 * max(1.0, scale), err_msg=method)
    told = {edge: one for one in truth.outcomes for edge in one.edges if one.how == "noising"}
    found = attribute(truth.model, truth.task, "eap")
    for edge, outcome in told.items():
        gap = float((truth.clean - outcome.metric).mean())
        np.testing.assert_allclose(found.of(edge), gap, atol=1e-5 * max(1.0, scale), err_msg=str(edge))


def test_edges_of_planted_models() -> None:
    """Cancellation: the head's node is zero, its edges are not."""
    truth = planted.cancellation()
    found = attribute(truth.model, truth.task, "eap")
    assert abs(found.nodes[found.graph.writer("L0H0")]) < 1e-4
    assert found.of(Edge("L0H0", "logits")) == pytest.approx(2.0, abs=1e-4)
    assert found.of(Edge("L0H0", "L1KV0", "v")) == pytest.approx(-2.0, abs=1e-4)
    top = found.table().head(4)
    assert {"L0H0", "L0H1"} <= set(top.source)


def test_every_component_on_its_own_way_is_complete(gpt2, make_pairs) -> None:
    """What leaves a layer's heads, or an MLP, adds up to the effect of patching them."""
    task = make_pairs((6, 6))
    for direction in ("noising", "denoising"):
        found = attribute(gpt2, task, "eap-ig-own", steps=60, direction=direction)
        for site, writers in (("attn_out", lambda places: places.heads), ("mlp_out", lambda places: places.mlp_out)):
            effects = patch_activations(gpt2, task, site, "layer", direction=direction).effect(direction)
            for layer, places in enumerate(found.graph.layers):
                total = found.node_per_prompt[:, writers(places)].sum(1)
                np.testing.assert_allclose(total, effects[layer], atol=2e-3)


def test_a_single_nonlinear_node_is_exact() -> None:
    """The gate's MLP is the only thing that bends: AtP is off by a factor, its own way is right."""
    truth = planted.gate("and")
    wrong = attribute(truth.model, truth.task, "eap")
    mlp = wrong.graph.writer("L0.mlp")
    found = attribute(truth.model, truth.task, "eap-ig-own", steps=4)
    assert found.nodes[mlp] == pytest.approx(1.0, abs=1e-5)
    heads = [found.graph.writer(name) for name in ("L0H0", "L0H1")]
    # Both heads on their way together: the AND is lost half of the way, and each has a half of it.
    assert found.nodes[heads].sum() == pytest.approx(1.0, abs=1e-5)
    assert wrong.nodes[heads].sum() == pytest.approx(2.0, abs=1e-5)


def test_all_ways_together_are_the_mean_over_runs(gpt2, make_pairs) -> None:
    """As published: every run counts for every edge. Runs are made here by editing the model's own pass."""
    task = make_pairs((6,))
    found = attribute(gpt2, task, "eap-ig-activations", steps=1)
    own = attribute(gpt2, task, "eap-ig-own", steps=1)
    components = 1 + 2 * 3
    # The last MLP's edge to the logits: the gradient at the end is that of the unmoved run but in runs that reach it.
    graph, hf_model = found.graph, gpt2.attachment.hf_model
    change = gpt2.trace(task.corrupt, sites=["mlp_out"]).site("mlp_out", 2) - (
        gpt2.trace(task.clean, sites=["mlp_out"]).site("mlp_out", 2)
    )
    total = 0.0
    sites = [("resid_pre", 0)] + [(site, layer) for layer in range(3) for site in ("z", "mlp_out")]
    for site, layer in sites:
        one, two = (gpt2.trace(ids, sites=[site]).site(site, layer) for ids in (task.clean, task.corrupt))
        middle = patch(site, (one + two) / 2, layer=layer)
        end = (
            gpt2.trace(task.clean, sites=["resid_post"], edits=[middle]).site("resid_post", 2).clone().requires_grad_()
        )
        logits = hf_model.lm_head(hf_model.transformer.ln_f(end))[0, -1]
        (gradient,) = torch.autograd.grad(logits[task.answers[0, 0]] - logits[task.foils[0, 0]], end)
        total -= float((change * gradient).sum()) / components
    place = graph.place(Edge("L2.mlp", "logits"))
    np.testing.assert_allclose(found.edges[place], total, rtol=1e-3)
    assert abs(own.edges[place] - total) > 1e-5


def test_the_divergence_is_refused_where_it_has_no_gradient(gpt2, task) -> None:
    with pytest.raises(RequestError, match="gradient there is zero"):
        attribute(gpt2, task, "eap", metric="kl_divergence")
    with pytest.raises(RequestError, match="gradient there is zero"):
        attribute(gpt2, task, "atp", metric="kl_divergence")
    for asked in ({"method": "eap", "direction": "denoising"}, {"method": "eap-ig", "steps": 60}):
        found = attribute(gpt2, task, metric="kl_divergence", **asked)
        assert np.nanmax(np.abs(found.edges)) > 1e-4
    np.testing.assert_allclose(found.clean, 0.0, atol=1e-6)
    np.testing.assert_allclose(found.node_per_prompt[:, 0], -found.corrupt, rtol=2e-2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "eap-gi"}, "eap-ig"),
        ({"direction": "both"}, "noising"),
        ({"ablation": "resample"}, "mean-positional"),
        ({"ablation": "mean"}, "go with"),
        ({"direction": "denoising", "ablation": "zero", "method": "eap"}, "one direction"),
        ({"steps": 0}, "at least 1"),
        ({"positions": True}, "nodes"),
        ({"freeze_ln_scale": "first"}, "final"),
        ({"metric": "nothing"}, "nothing"),
    ],
)
def test_what_cannot_be_is_refused(gpt2, task, unchecked_signatures, asked, message) -> None:
    with pytest.raises(RequestError, match=message):
        attribute(gpt2, task, **asked)


def test_models_whose_heads_do_not_write_are_refused(model_named, task) -> None:
    with pytest.raises(ModelRefused, match="norm before it is added"):
        attribute(model_named("gemma2"), task)


def test_weights_take_gradients_again_afterwards(gpt2, task) -> None:
    attribute(gpt2, task, "eap")
    assert all(weight.requires_grad for weight in gpt2.attachment.hf_model.parameters())
