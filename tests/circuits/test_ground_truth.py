"""Patches of models whose circuits were worked out before they ran: gates, self-repair, cancellation."""

from __future__ import annotations

import re

import numpy as np
import pytest

from workbench.circuits import Spot, patch_changes, patch_paths, spot
from workbench.dynamics import planted

MODELS = {
    "and": lambda: planted.gate("and"),
    "or": lambda: planted.gate("or"),
    "self_repair": planted.self_repair,
    "cancellation": planted.cancellation,
}


@pytest.fixture(scope="module", params=list(MODELS))
def truth(request):
    return MODELS[request.param]()


def spots(node: str) -> tuple[Spot, ...]:
    """A node of the ground truth: a KV head is its k and its v."""
    if node == "embed":
        return (Spot(0, "resid_pre"),)
    name, _, site = node.partition(".") if "KV" in node or re.search(r"H\d+\.", node) else (node, "", "")
    if "KV" in name:
        return tuple(spot(name, one) for one in ((site,) if site else ("k", "v")))
    return (spot(name, site or None),)


def test_every_outcome_of_nodes(truth) -> None:
    count = 0
    for one in truth.outcomes:
        if one.how == "zero" or one.edges or "embed" in one.nodes:
            continue
        change = tuple(place for node in one.nodes for place in spots(node))
        found = patch_changes(truth.model, truth.task, [change], direction=one.how)
        np.testing.assert_allclose(found.values[one.how][0], one.metric.numpy(), atol=1e-4)
        count += 1
    assert count > 3


def test_every_outcome_of_single_edges(truth) -> None:
    for one in truth.outcomes:
        if one.how == "zero" or len(one.edges) != 1 or one.nodes:
            continue
        (edge,) = one.edges
        receivers = "logits" if edge.target == "logits" else spots(f"{edge.target}.{edge.through}".rstrip("."))
        found = patch_paths(truth.model, truth.task, [edge.source], receivers, form="strict", direction=one.how)
        np.testing.assert_allclose(found.values[one.how][0], one.metric.numpy(), atol=1e-4)


def test_gates_show_in_one_direction_each() -> None:
    """An AND's parts are necessary, an OR's sufficient (Heimersheim and Nanda)."""
    for kind, needed, enough in (("and", 1.0, 0.0), ("or", 0.0, 1.0)):
        truth = planted.gate(kind)
        heads = sorted(node for node in truth.nodes if re.fullmatch(r"L0H\d+", node))
        found = patch_changes(truth.model, truth.task, [(spot(head),) for head in heads]).table()
        assert len(heads) == 2
        share = found.groupby("direction").recovery
        np.testing.assert_allclose(share.min()["noising"], needed, atol=1e-3)
        np.testing.assert_allclose(share.max()["denoising"], enough, atol=1e-3)
