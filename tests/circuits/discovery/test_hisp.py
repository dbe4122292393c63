"""HISP: sizes of attribution patching where that is exact, and norms of layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.circuits.discovery import discover
from workbench.circuits.discovery.objective import KL
from workbench.dynamics import linear_network
from workbench.errors import RequestError
from workbench.tracing import patch


def test_on_a_linear_network_it_is_the_size_of_attribution() -> None:
    truth = linear_network()
    found = discover(truth.model, truth.task, "hisp", normalise=False)
    known = {e.node: float(e.change.abs().mean()) for e in truth.estimates if e.method == "atp" and e.how == "noising"}
    graph = found.graph
    for place, node in enumerate(graph.writers[1:], 1):
        assert found.nodes[place] == pytest.approx(known[node], abs=1e-5)
    for place, (node, through) in enumerate(graph.readers[:-1]):
        name = f"{node}.{through}" if through in ("k", "v") else node
        expected = 0.0 if through == "q" else known[name]
        assert found.inputs[place] == pytest.approx(expected, abs=1e-5)
    assert np.isnan(found.nodes[0]) and np.isnan(found.inputs[-1])


@pytest.mark.parametrize("ablation", ["patching", "zero", "mean"])
def test_layers_have_norm_one(llama, task, ablation: str) -> None:
    found = discover(llama, task, "hisp", ablation=ablation)
    for places in found.graph.layers:
        inputs = found.inputs[places.q.start : places.mlp.stop]
        nodes = found.nodes[places.heads.start : places.mlp_out.stop]
        assert np.linalg.norm(inputs) == pytest.approx(1, abs=1e-6)
        assert np.linalg.norm(nodes) == pytest.approx(1, abs=1e-6)
    assert found.work["backwards"] == len(task)


def test_slopes_are_those_of_small_patches(llama, task) -> None:
    """A key/value head's v and a query head's z, moved a little toward the corrupt run."""
    found = discover(llama, task, "hisp", normalise=False)
    step, layer = 2e-3, 1
    graph, places = found.graph, found.graph.layers[layer]
    runs = [llama.trace(batch, sites=["z", "v"]) for batch in (task.clean, task.corrupt)]
    for site, head, scores in (("z", 2, found.node_per_prompt), ("v", 1, found.input_per_prompt)):
        clean, corrupt = (run.site(site, layer) for run in runs)
        moved = clean.clone()
        moved[:, :, head] += step * (corrupt - clean)[:, :, head]
        metrics = []
        for value in (moved, clean):
            logits = llama.trace(
                task.clean, edits=[patch(f"blocks.{layer}.attn.hook_{site}", value)], logits="all"
            ).logits
            metrics.append(task.score(logits).double())
        slope = ((metrics[0] - metrics[1]) / step).abs().numpy()
        place = places.heads.start + head if site == "z" else graph.reader(f"L{layer}KV{head}", "v")
        assert np.allclose(scores[:, place], slope, rtol=0.05, atol=5e-3)


def test_kl_is_no_metric_of_hisp(llama, task) -> None:
    with pytest.raises(RequestError, match=KL):
        discover(llama, task, "hisp", metric=KL)
    assert torch.is_grad_enabled()
