"""Forked runs: everything kept is the model, nothing kept the corrupt run, one edge what strict paths say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.circuits import Spot, patch_paths
from workbench.circuits.forks import Forked, replacement, writes
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import groups
from workbench.dynamics import planted
from workbench.errors import ModelRefused, RequestError
from workbench.models.testing import TINY
from workbench.tracing import load, patch

NORMED = {"gemma2", "gemma3", "olmo2"}
FORKED = [name for name in TINY if name not in NORMED]


def last(model, batch):
    return model.trace(batch, logits="last").logits[:, -1]


def forked(model, task, how="patching"):
    graph = Graph.of(model)
    for group in groups(task):
        yield group, graph, Forked(model, graph, group.cut(task.clean), replacement(model, task, group, how))


def some_mask(graph, seed=0, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(graph.exists.shape, generator=generator) < share).float()


@pytest.mark.parametrize("name", FORKED)
def test_everything_is_the_model_and_nothing_the_corrupt_run(model_named, task, name) -> None:
    model = model_named(name)
    for group, graph, forks in forked(model, task):
        forks.check()
        for value, batch in ((1.0, task.clean), (0.0, task.corrupt)):
            mask = torch.full(graph.exists.shape, value)
            expected = last(model, group.cut(batch))
            torch.testing.assert_close(forks.run(mask).logits, expected, atol=1e-4, rtol=1e-4)
            # The same with gradients on, where every reader has its own rows and every layer runs.
            soft = mask.clone().requires_grad_()
            found = forks.run(soft).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            (slope,) = torch.autograd.grad(found.square().sum(), soft)
            assert torch.isfinite(slope).all()
            assert (slope[~torch.as_tensor(graph.exists)] == 0).all()


@pytest.mark.parametrize("name", NORMED)
def test_models_without_edges_are_refused(model_named, name) -> None:
    with pytest.raises(ModelRefused, match="passes a norm"):
        Graph.of(model_named(name))


@pytest.mark.parametrize("name", FORKED)
def test_one_edge_is_a_strict_path(model_named, task, name) -> None:
    model = model_named(name)
    heads = model.spec.layers[2]
    edges = [
        ("embed", (Spot(0, "q", 1), ("L0H1", "q"))),
        ("L0H1", (Spot(2, "q", heads.heads - 1), (f"L2H{heads.heads - 1}", "q"))),
        ("L0.mlp", (Spot(1, "k", heads.kv_heads - 1), (f"L1KV{heads.kv_heads - 1}", "k"))),
        ("L1H2", (Spot(2, "v", 0), ("L2KV0", "v"))),
        ("L0H3", (Spot(1, "mlp_out"), ("L1.mlp", ""))),
        ("L2H0", ("logits", ("logits", ""))),
    ]
    for sender, (receiver, reader) in edges:
        ends = receiver if isinstance(receiver, str) else [receiver]
        expected = patch_paths(model, task, [sender], ends, form="strict", direction="noising").values["noising"][0]
        scores = np.zeros(len(task))
        for group, graph, forks in forked(model, task):
            mask = torch.ones(graph.exists.shape)
            mask[graph.writer(sender), graph.reader(*reader)] = 0.0
            logits = forks.run_many(torch.stack([mask, torch.ones_like(mask)]))
            torch.testing.assert_close(logits[1], last(model, group.cut(task.clean)), atol=1e-4, rtol=1e-4)
            rows = torch.arange(len(group.prompts))
            answers = task.answers[group.prompts, 0], task.foils[group.prompts, 0]
            scores[group.prompts.numpy()] = (logits[0][rows, answers[0]] - logits[0][rows, answers[1]]).double().numpy()
        np.testing.assert_allclose(scores, expected, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_all_ways_of_running_masks_agree(model_named, task, name) -> None:
    model = model_named(name)
    for _, graph, forks in forked(model, task):
        masks = torch.stack([some_mask(graph, seed) for seed in range(forks.prompts)])
        together = forks.run_many(masks)
        apart = forks.run(masks)
        for number, mask in enumerate(masks):
            one = forks.run(mask, keep=True)
            torch.testing.assert_close(together[number], one.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(apart.logits[number], one.logits[number], atol=1e-4, rtol=1e-4)
            soft = forks.run(mask.clone().requires_grad_(), keep=True)
            torch.testing.assert_close(soft.logits, one.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(soft.writes, one.writes, atol=1e-4, rtol=1e-4)
        kept = forks.run(torch.ones_like(masks), keep=True)
        torch.testing.assert_close(kept.writes, forks.own, atol=1e-4, rtol=1e-4)


def test_by_hand_what_a_reader_reads(llama, task) -> None:
    """A random mask, its inputs summed up and put into the model's own run, layer by layer."""
    for group, graph, forks in forked(llama, task):
        mask, batch = some_mask(graph, 3), group.cut(task.clean)
        found = forks.run(mask, keep=True)
        old = forks.replacement
        mixed = torch.einsum("wr,wptd->rptd", mask * torch.as_tensor(graph.exists), found.writes - old)
        mixed += torch.einsum("wr,wptd->rptd", torch.as_tensor(graph.exists).float(), old)
        for layer, places in enumerate(graph.layers):
            edits = []
            for site, part in (("q", places.q), ("k", places.k), ("v", places.v)):
                for head, reader in enumerate(range(part.start, part.stop)):
                    moved = llama.trace(batch, sites=[site], edits=patch("resid_pre", mixed[reader], layer=layer))
                    edits.append(patch(site, moved.site(site, layer), layer=layer, heads=[head]))
            z = llama.trace(batch, sites=["result"], edits=edits).site("result", layer)
            torch.testing.assert_close(z.permute(2, 0, 1, 3), found.writes[places.heads], atol=1e-4, rtol=1e-4)
            middle = patch("resid_mid", mixed[places.mlp.start], layer=layer)
            mlp = llama.trace(batch, sites=["mlp_out"], edits=middle).site("mlp_out", layer)
            torch.testing.assert_close(mlp, found.writes[places.mlp_out.start], atol=1e-4, rtol=1e-4)
        end = llama.trace(batch, logits="last", edits=patch("resid_post", mixed[-1], layer=2)).logits[:, -1]
        torch.testing.assert_close(found.logits, end, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mistral"])
def test_slopes_are_finite_differences(task, name) -> None:
    model = load(TINY[name]().double())
    # Norms and rotations of these are made in single precision whatever the weights are.
    width = 1e-5 if name.startswith("gpt") else 1e-3
    generator = torch.Generator().manual_seed(1)
    for group, graph, forks in forked(model, task):
        mask = torch.rand(graph.exists.shape, generator=generator, dtype=torch.float64)
        old = forks.replacement.clone().requires_grad_()
        soft = Forked(model, graph, group.cut(task.clean), old)
        gates = mask.clone().requires_grad_()
        slopes = torch.autograd.grad(soft.run(gates).logits[:, 7].sum(), [gates, old])
        for value, slope, at in ((mask, slopes[0], None), (forks.replacement, slopes[1], 1)):
            way = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            ends = []
            for step in (width, -width):
                moved = value + step * way
                run = forks.run(moved) if at is None else Forked(model, graph, forks.batch, moved).run(mask)
                ends.append(run.logits[:, 7].sum())
            expected = (ends[0] - ends[1]) / (2 * width)
            torch.testing.assert_close((slope * way).sum(), expected, rtol=10 * width, atol=1e-7)
        assert all(weight.grad is None for weight in model.attachment.hf_model.parameters())
        break


def test_what_stands_in(llama, task) -> None:
    (first, *_) = groups(task)
    assert replacement(llama, task, first, "zero").shape == (22, 1, 1, 48)
    corrupt = replacement(llama, task, first, "patching")
    torch.testing.assert_close(corrupt, writes(llama, first.cut(task.corrupt)))
    torch.testing.assert_close(replacement(llama, task, first, "clean"), writes(llama, first.cut(task.clean)))
    # The roles of these prompts stand at different columns, so that each is a group of its own.
    torch.testing.assert_close(replacement(llama, task, first, "mean"), corrupt)
    with pytest.raises(RequestError, match="ablation='noise'"):
        replacement(llama, task, first, "noise")


def test_means_are_over_prompts_of_one_template() -> None:
    truth = planted.cancellation()
    (group,) = groups(truth.task)
    found = replacement(truth.model, truth.task, group, "mean")
    every = writes(truth.model, group.cut(truth.task.corrupt))
    torch.testing.assert_close(found, every.mean(1, keepdim=True).expand_as(every))


def test_refusals(llama, task) -> None:
    (_, graph, forks), *_ = forked(llama, task)
    with pytest.raises(RequestError, match="22 writers and 34 readers"):
        forks.run(torch.ones(3, 4))
    with pytest.raises(RequestError, match="masks for"):
        forks.run(torch.ones(9, *graph.exists.shape))
    with pytest.raises(RequestError, match="without padding"):
        Forked(llama, graph, task.clean, forks.replacement)
    with pytest.raises(RequestError, match="replacement has shape"):
        Forked(llama, graph, forks.batch, forks.replacement[:5])
