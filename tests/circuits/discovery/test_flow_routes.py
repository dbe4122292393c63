"""Information flow routes: sums, an identity, parts against whole matrices in float64, and the full graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from workbench.circuits.discovery import discover
from workbench.circuits.discovery.flow import LEAST, proximity
from workbench.circuits.forks import writes
from workbench.circuits.recorded import groups
from workbench.dynamics import handwritten_pairs
from workbench.errors import RequestError
from workbench.models.architectures import output_weight
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model


def naive(model: Model, task: PairTask, prompt: int, layer: int) -> tuple[Tensor, Tensor | None]:
    """All parts of attention `[token, 1 + head * token (+ 1)]`, and of the MLP, in float64 from whole matrices."""
    one = task.clean.select([prompt])
    trace = model.trace(one, sites=["resid_pre", "pattern", "v", "attn_out", "mlp_out", "resid_post"])
    own = one.mask[0]

    def site(name: str) -> Tensor:
        return trace.site(name, layer)[0].double()

    before, after = site("resid_pre")[own], site("resid_post")[own]
    pattern, v = site("pattern")[:, own][:, :, own], site("v")[own]
    weight = output_weight(model.attachment.layers[layer], model.spec.layers[layer]).detach().double()
    values = v.repeat_interleave(weight.shape[0] // v.shape[1], 1)
    moved = torch.einsum("hqk,khc,hcd->qhkd", pattern, values, weight).flatten(1, 2)
    middle, mlp = before + site("attn_out")[own], site("mlp_out")[own]
    parallel = model.spec.parallel
    parts = torch.cat([before[:, None], *([mlp[:, None]] if parallel else []), moved], 1)
    return normal(parts, after if parallel else middle), None if parallel else normal(
        torch.stack([middle, mlp], 1), after
    )


def normal(parts: Tensor, whole: Tensor) -> Tensor:
    near = (whole.abs().sum(-1)[:, None] - (whole[:, None] - parts).abs().sum(-1)).clamp(min=LEAST)
    # What lies in the future counts for next to nothing here, and for nothing in the routes.
    return near / near.sum(1, keepdim=True)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "mistral"])
def test_contributions_are_those_of_whole_matrices(model_named, make_pairs, name: str) -> None:
    """Grouped queries, biases, parallel blocks, a window: every kept part of prompt 1 (ten tokens)."""
    model, task = model_named(name), make_pairs()
    found = discover(model, task, "information flow routes", threshold=0.0, edges=False)
    log = found.log[found.log.prompt == 1]
    tokens = int(task.position[1] - task.clean.starts[1]) + 1
    for layer in range(model.spec.n_layers):
        attention, mlp = naive(model, task, 1, layer)
        first = 2 if model.spec.parallel else 1
        heads = attention[:, first:].view(len(attention), -1, len(attention))
        rows = log[log.layer == layer]
        for row in rows[rows.kind == "head"].itertuples():
            assert row.contribution == pytest.approx(float(heads[row.query, row.head, row.key]), abs=2e-4)
        for row in rows[rows.kind == "mlp"].itertuples():
            expected = attention[row.query, 1] if mlp is None else mlp[row.query, 1]
            assert row.contribution == pytest.approx(float(expected), abs=2e-4)
        # A row of the graph, at a block and a token, sums to one.
        sums = rows[rows.kind == "head"].groupby("query").contribution.sum()
        assert ((sums > 0) & (sums < 1)).all()
    last = log[log.layer == model.spec.n_layers - 1]
    assert set(last[last.kind == "head"]["query"]) == {tokens - 1}


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_flow_is_kept_in_whole_without_a_threshold(model_named, make_pairs, name: str) -> None:
    model, task = model_named(name), make_pairs()
    found = discover(model, task, "information flow routes", threshold=0.0)
    assert found.node_per_prompt is not None
    assert np.allclose(found.node_per_prompt[:, 0], 1, atol=1e-9)
    blocks = found.log.groupby(["prompt", "layer", "block", "query"]).contribution.sum()
    assert np.allclose(blocks, 1, atol=1e-9)
    # The full graph: before the last layer every token up to the last is reached, from every token before it.
    for group in groups(task):
        for prompt in group.prompts.tolist():
            for layer in range(model.spec.n_layers):
                rows = found.log[(found.log.prompt == prompt) & (found.log.layer == layer) & (found.log.kind == "head")]
                reached = 1 if layer == model.spec.n_layers - 1 else group.tokens
                pairs = group.tokens if reached == 1 else group.tokens * (group.tokens + 1) // 2
                assert len(rows) == pairs * model.spec.layers[layer].heads


def test_thresholds_cut_parts_and_renormalising_makes_up_for_it(llama, task) -> None:
    whole, cut, again = (
        discover(llama, task, "information flow routes", edges=False, **settings)
        for settings in ({"threshold": 0.0}, {"threshold": 0.05}, {"threshold": 0.05, "renormalise": True})
    )
    assert cut.log.contribution.min() >= 0.05
    assert len(cut.log) < len(whole.log)
    kept = cut.log.merge(whole.log, on=["prompt", "layer", "block", "kind", "head", "query", "key"])
    assert np.allclose(kept.contribution_x, kept.contribution_y)
    assert len(kept) == len(cut.log)
    assert (cut.nodes[0] < 1) and again.nodes[0] == pytest.approx(1, abs=1e-9)


def test_the_whole_is_its_own_part() -> None:
    whole = torch.randn(3, 8, dtype=torch.float64)
    parts = torch.stack([whole, torch.zeros_like(whole), -whole], 1)
    near = proximity(parts, whole)
    assert torch.allclose(near[:, 0], whole.abs().sum(-1))
    assert torch.allclose(near[:, 1:], torch.tensor(LEAST, dtype=torch.float64))
    assert torch.allclose((near / near.sum(1, keepdim=True))[:, 0], torch.ones(3, dtype=torch.float64), atol=1e-4)


def test_a_head_that_alone_writes_is_all() -> None:
    """The induction heads write what the logits read, 6 to 4; the stream holds their token's own marks beside it."""
    truth = handwritten_pairs((6.0, 4.0))
    found = discover(truth.model, truth.task, "information flow routes", threshold=0.01)
    # |y| = 12: 6 + 4 by the heads, and the token and its position by the embedding, and one by layer 0.
    scores = dict(zip(found.graph.writers, found.nodes, strict=True))
    assert scores["L1H0"] == pytest.approx(6 / 13, abs=1e-4)
    assert scores["L1H1"] == pytest.approx(4 / 13, abs=1e-4)
    assert scores["L0H1"] == 0
    heads = found.log[(found.log.kind == "head") & (found.log.layer == 1)]
    # They bring it from the token after the earlier occurrence, and nowhere else.
    assert set(heads.key) == {4}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_edges_are_shares_of_what_readers_read(model_named, make_pairs, name: str) -> None:
    model, task = model_named(name), make_pairs((6, 6))
    found = discover(model, task, "information flow routes")
    graph = found.graph
    assert (np.isnan(found.edges) == ~graph.exists).all()
    assert np.allclose(np.nansum(found.edges, 0), 1, atol=1e-5)
    group = next(iter(groups(task)))
    every = writes(model, group.cut(task.clean)).double()
    stream = model.trace(task.clean, sites=["resid_pre", "resid_post"])
    for layer in range(model.spec.n_layers):
        place = graph.layers[layer].k.start
        whole, before = stream.site("resid_pre", layer).double(), graph.layers[layer].heads.start
        near = proximity(every[:before].permute(1, 2, 0, 3), whole)
        shares = (near / near.sum(-1, keepdim=True)).mean((0, 1))
        assert np.allclose(found.edges[:before, place], shares, atol=1e-4)
    near = proximity(
        every[:, :, -1].transpose(0, 1), stream.site("resid_post", model.spec.n_layers - 1)[:, -1].double()
    )
    assert np.allclose(found.edges[:, -1], (near / near.sum(-1, keepdim=True)).mean(0), atol=1e-4)


def test_a_threshold_is_a_share(llama, task) -> None:
    with pytest.raises(RequestError, match="threshold="):
        discover(llama, task, "information flow routes", threshold=1.5)
