"""The trained toy, once a session, and naive measurements of attention patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor

from workbench.dynamics import (
    RepeatedSegments,
    ToyModel,
    repeated_segments,
)
from workbench.dynamics.truth import Edge, GroundTruth, Outcome
from workbench.models import Head
from workbench.tracing.edits import Edit, ablate, patch
from workbench.tracing.model import Model
from workbench.tracing.trace import Trace


@pytest.fixture(scope="session")
def sequences() -> RepeatedSegments:
    return repeated_segments(200, torch.Generator().manual_seed(5))


def patterns(model: ToyModel, ids: Tensor) -> Tensor:
    """Full attention patterns, [layer, prompt, head, query, key]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.stack(found)


@contextmanager
def zeroed(model: ToyModel, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Zero the z of some heads while the block runs."""
    handles = []
    for layer, head in heads:
        attention = model.blocks[layer].attention
        columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

        def zero(module, args, columns=columns):
            z = args[0].clone()
            z[..., columns] = 0
            return (z,)

        handles.append(attention.output.register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def measure_patterns():
    return patterns


@pytest.fixture
def zero_heads():
    return zeroed


@cache
def unedited(truth: GroundTruth, name: str) -> Trace:
    sites = ["q", "k", "v", "z", "result", "mlp_out", "resid_pre", "resid_mid", "resid_post"]
    return truth.model.trace(truth.task.clean if name == "clean" else truth.task.corrupt, sites=sites)


def intervened(truth: GroundTruth, outcome: Outcome) -> Tensor:
    """The metric under an intervention, through `Model.trace` and its edits alone."""
    runs = {"clean": truth.task.clean, "corrupt": truth.task.corrupt}
    base = "corrupt" if outcome.how == "denoising" else "clean"
    other = {"noising": "corrupt", "denoising": "clean", "zero": "clean"}[outcome.how]
    found = {name: unedited(truth, name) for name in (base, other)}

    def new(trace_site: str, layer: int) -> Tensor:
        value = found[other].site(trace_site, layer)
        return torch.zeros_like(value) if outcome.how == "zero" else value

    edits = [edit for node in outcome.nodes for edit in node_edits(node, new)]
    to_logits = torch.zeros(())
    for edge in outcome.edges:
        moved = written(edge.source, new) - written(edge.source, found[base].site)
        if edge.target == "logits":
            to_logits = to_logits + moved
        else:
            edits.append(edge_edit(truth.model, edge, found[base], moved))
    last = truth.model.spec.n_layers - 1
    if any(edge.target == "logits" for edge in outcome.edges):
        run = truth.model.trace(runs[base], edits=edits, sites=["resid_post"]) if edits else found[base]
        end = run.site("resid_post", last)
        edits = [patch("resid_post", end + to_logits, layer=last)]
    logits = truth.model.trace(runs[base], edits=edits, logits=truth.task.position[:, None]).logits
    return truth.task.score(logits[:, 0])


def node_edits(node: str, value: Callable[[str, int], Tensor]) -> list[Edit]:
    layer, kind, index, part = parsed(node)
    if kind == "mlp":
        return [patch("mlp_out", value("mlp_out", layer), layer=layer)]
    if kind == "embed":
        return [patch("resid_pre", value("resid_pre", 0), layer=0)]
    if kind == "H" and not part:
        head = Head(layer, index)
        z = value("z", layer)[:, :, index]
        return [ablate([head], "resample", values={head: z}) if z.any() else ablate([head], "zero")]
    return [patch(site, value(site, layer), layer=layer, heads=[index]) for site in part or "kv"]


def written(node: str, value: Callable[[str, int], Tensor]) -> Tensor:
    layer, kind, index, _ = parsed(node)
    if kind == "embed":
        return value("resid_pre", 0)
    return value("mlp_out", layer) if kind == "mlp" else value("result", layer)[:, :, index]


def edge_edit(model: Model, edge: Edge, base: Trace, moved: Tensor) -> Edit:
    """The input of one reader as if one writer had written something else; nothing between them changes."""
    layer, kind, index, _ = parsed(edge.target)
    block = model.attachment.hf_model.blocks[layer]
    with torch.no_grad():
        if kind == "mlp":
            return patch("mlp_out", block.mlp(base.site("resid_mid", layer) + moved), layer=layer)
        projection = {"q": block.attention.query, "k": block.attention.key, "v": block.attention.value}[edge.through]
        read = base.site(edge.through, layer)
        return patch(edge.through, read + projection(moved).reshape(read.shape), layer=layer, heads=[index])


def parsed(node: str) -> tuple[int, str, int, str]:
    """Layer, kind (H, KV, mlp, embed), index, and the part after the point."""
    if node == "embed":
        return 0, "embed", 0, ""
    found = re.fullmatch(r"L(\d+)(?:\.(mlp)|(H|KV)(\d+)(?:\.([qkv]))?)", node)
    assert found, node
    return int(found[1]), found[2] or found[3], int(found[4] or 0), found[5] or ""


@pytest.fixture
def intervene():
    return intervened
