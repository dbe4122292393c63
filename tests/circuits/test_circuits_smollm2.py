"""A real grouped-query model, where other tools refuse: fast patches, paths and forked edges against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.circuits import Graph, Options, Spot, patch_changes, patch_paths
from workbench.circuits.forks import Forked, replacement
from workbench.circuits.recorded import groups
from workbench.tasks.ioi import ioi


@pytest.fixture(scope="module")
def smollm2():
    from workbench import load

    model = load("smollm2-135m")
    yield model
    model.detach()


@pytest.fixture(scope="module")
def pairs(smollm2):
    return ioi(smollm2.tokenizer, 2, templates=[0], order="ABBA")


def test_fast_patches_are_whole_edited_passes(smollm2, pairs):
    last = int((pairs.position - pairs.clean.starts).min())
    spots = [
        Spot(20, "z", 0), Spot(17, "z", 4, last), Spot(12, "q", 5), Spot(18, "k", 2), Spot(18, "v", 1, "S2"),
        Spot(23, "pattern", 3), Spot(9, "mlp_out", None, "S2"), Spot(19, "resid_pre", None, "S2"), Spot(24, "attn_out"),
    ]  # fmt: skip
    changes = [(spot,) for spot in spots]
    fast = patch_changes(smollm2, pairs, changes)
    naive = patch_changes(smollm2, pairs, changes, options=Options(method="naive"))
    for direction in ("denoising", "noising"):
        assert np.abs(fast.values[direction] - naive.values[direction]).max() < 1e-4, direction
    assert "naive" not in fast.route and fast.work.saved > 1


@pytest.fixture(scope="module")
def forked(smollm2, pairs):
    (group,) = groups(pairs)
    return Forked(smollm2, Graph.of(smollm2), group.cut(pairs.clean), replacement(smollm2, pairs, group, "patching"))


def test_forked_edges_are_strict_paths(smollm2, pairs, forked):
    graph = forked.graph
    edges = {
        ("L17H4", "L20H0", "q"): Spot(20, "q", 0),
        ("L14H3", "L18KV2", "k"): Spot(18, "k", 2),
        ("L8H0", "L17KV1", "v"): Spot(17, "v", 1),
        ("L20H0", "L23.mlp", ""): Spot(23, "mlp_out"),
    }
    for (source, target, through), receiver in edges.items():
        path = patch_paths(smollm2, pairs, [source], [receiver], form="strict", direction="noising")
        mask = torch.from_numpy(graph.exists.astype(np.float32))
        mask[graph.writers.index(source), graph.readers.index((target, through))] = 0.0
        with torch.no_grad():
            scores = pairs.score(forked.run(mask).logits).numpy()
        assert np.abs(scores - path.values["noising"][0]).max() < 2e-4, source


def test_a_circuit_of_all_edges_is_the_model_and_of_none_the_corrupt_run(smollm2, pairs, forked):
    (group,) = groups(pairs)
    assert len(forked.graph.edges) == 70_651
    for share, batch in ((1.0, pairs.clean), (0.0, pairs.corrupt)):
        with torch.no_grad():
            found = forked.run(torch.from_numpy((forked.graph.exists * share).astype(np.float32))).logits
        expected = smollm2.trace(group.cut(batch), logits="last").logits[:, -1]
        assert float((found - expected).abs().max()) < 1e-3
