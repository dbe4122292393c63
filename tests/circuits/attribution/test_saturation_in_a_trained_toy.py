"""Why first-order estimates fail in a trained model, and what repairs them: the measured tables on our own toy.

The published figures are of two seeds trained for 6,000 steps, whose softmax is saturated: there AtP of the keys is off
by all of the effect. The toy here stops when its accuracy has held (725 steps); its softmax still moves, but its norms
hide effects already: what is asserted of keys is the document's tolerance (the QK fix with frozen norms within 0.2 of
the exact effect; here 0.05) and that the fix alone is further off, of layer 0 that its scores come back with the norms
frozen. The integration errors are those of the document.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from workbench.circuits import attribute, patch_activations, patch_paths, spot
from workbench.dynamics import induction_pairs
from workbench.tracing import load


@pytest.fixture(scope="module")
def setting(trained):
    model = load(trained.model)
    yield model, induction_pairs.repeat_pairs(30)
    model.attachment.detach()


def shares(found, what: str) -> np.ndarray:
    """Mean scores of a layer's heads, or of the keys of its KV heads, as shares of the gap."""
    gap = found.clean.mean() - found.corrupt.mean()
    names = found.graph.readers if what.endswith(".k") else found.graph.writers
    layer = what.split(".")[0]
    if what.endswith(".k"):
        places = [place for place, (node, through) in enumerate(names) if node.startswith(layer) and through == "k"]
        return found.inputs[places] / gap
    return found.nodes[[place for place, node in enumerate(names) if node.startswith(f"{layer}H")]] / gap


def exact(model, task, site: str, layer: int, direction: str) -> np.ndarray:
    effects = patch_activations(model, task, site, "head", direction=direction)
    gap = (effects.clean - effects.corrupt).mean()
    return effects.grid(direction, ("layer", "head"))[layer] / gap


def test_keys_of_the_induction_heads(setting) -> None:
    """Table 10.3: noising, gradient at the clean prompts."""
    model, task = setting
    truth = exact(model, task, "k", 1, "noising")
    assert truth.sum() > 0.5
    found = {}
    for name, frozen in (("live", False), ("frozen", "final")):
        found[name] = shares(attribute(model, task, "atp-qk", freeze_ln_scale=frozen), "L1.k")
    np.testing.assert_allclose(found["frozen"], truth, atol=0.2)
    errors = {name: np.abs(value - truth).mean() for name, value in found.items()}
    assert errors["frozen"] < 0.5 * errors["live"]


def test_saturated_keys(trained) -> None:
    """Table 10.3 as published: queries of the second layer six times as long saturate the softmax as training would.

    Two saturations stand one behind the other: neither the QK fix nor the frozen norm alone finds the effect.
    """
    sharp = copy.deepcopy(trained.model)
    # The model is attached by other tests of this module, and its copy believes to be.
    sharp.set_attn_implementation("sdpa")
    with torch.no_grad():
        sharp.blocks[1].attention.query.weight.mul_(6.0)
    model, task = load(sharp), induction_pairs.repeat_pairs(16)
    truth = exact(model, task, "k", 1, "noising")
    assert truth.sum() > 0.8
    found = {}
    for name, (method, frozen) in {
        "atp": ("atp", False), "norm": ("atp", "final"), "qk": ("atp-qk", False), "both": ("atp-qk", "final"),
    }.items():  # fmt: skip
        found[name] = shares(attribute(model, task, method, freeze_ln_scale=frozen), "L1.k")
    np.testing.assert_allclose(found["both"], truth, atol=0.1)
    assert np.abs(found["qk"]).max() < 0.1
    errors = {name: np.abs(value - truth).mean() for name, value in found.items()}
    assert errors["both"] < 0.25 * min(errors["atp"], errors["norm"], errors["qk"])


def test_nodes_of_both_layers(setting) -> None:
    """Table 10.2: attribution ranks the previous-token head first, but gives it little of its effect.

    At the clean prompts all norms stand in the way; with their scales as given most of the effect is there.
    """
    model, task = setting
    truth = {way: exact(model, task, "z", 0, way) for way in ("noising", "denoising")}
    best = int(truth["noising"].argmax())
    assert truth["noising"][best] > 0.7 and truth["denoising"].argmax() == best
    found = shares(attribute(model, task, "atp", direction="denoising"), "L0")
    assert found.argmax() == best and found[best] > 0.2
    live, frozen = (shares(attribute(model, task, "atp", freeze_ln_scale=one), "L0") for one in (False, True))
    assert live[best] < 0.5 * truth["noising"][best]
    assert abs(frozen[best] - truth["noising"][best]) < 0.2
    np.testing.assert_allclose(frozen, truth["noising"], atol=0.2)


def test_the_edge_into_the_keys_is_found_on_the_way(setting) -> None:
    """EAP at the clean prompts sees a third of the path that carries everything; integrated gradients more of it."""
    model, task = setting
    receivers = [spot(f"L1KV{head}", "k") for head in range(4)]
    effects = patch_paths(model, task, [f"L0H{head}" for head in range(4)], receivers, direction="noising")
    gap = (effects.clean - effects.corrupt).mean()
    paths = effects.effect("noising").mean(1) / gap
    best = int(paths.argmax())
    assert paths[best] > 0.7 and np.delete(np.abs(paths), best).max() < 0.5 * paths[best]
    into = {}
    for name, asked in {"eap": {"method": "eap"}, "ig": {"method": "eap-ig", "steps": 30}}.items():
        found = attribute(model, task, **asked)
        keys = [place for place, one in enumerate(found.graph.readers) if one[0].startswith("L1") and one[1] == "k"]
        heads = [found.graph.writer(f"L0H{head}") for head in range(4)]
        into[name] = found.edges[np.ix_(heads, keys)].sum(1) / gap
    assert into["eap"].argmax() == into["ig"].argmax() == best
    # Half of the path's effect, and a third.
    assert into["eap"][best] < 0.5 * paths[best]
    errors = {name: np.abs(value - paths).mean() for name, value in into.items()}
    assert errors["ig"] < 0.75 * errors["eap"]


def test_completeness_with_the_documented_errors(setting) -> None:
    """|sum of input edges - gap| over the gap: 5 steps 0.005 by midpoints and 0.021 from the left, 30 steps 0.0003."""
    model, task = setting
    task = task.select(range(20))
    errors = {}
    for steps, rule in ((1, "midpoint"), (5, "midpoint"), (5, "left"), (30, "midpoint")):
        found = attribute(model, task, "eap-ig", steps=steps, rule=rule)
        gap = found.clean.mean() - found.corrupt.mean()
        errors[steps, rule] = abs(found.nodes[0] - gap) / gap
    assert errors[5, "midpoint"] < 0.01
    assert errors[5, "midpoint"] < errors[5, "left"] < 0.1
    assert errors[30, "midpoint"] < 0.002
    assert errors[1, "midpoint"] > 5 * errors[5, "midpoint"]
