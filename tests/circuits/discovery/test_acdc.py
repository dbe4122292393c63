"""ACDC against compiled programs, a plain loop in float64, and itself taken up again."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from workbench.circuits.discovery import discover
from workbench.circuits.discovery.acdc import Decisions, acdc
from workbench.circuits.discovery.edgewise import Edgewise
from workbench.circuits.discovery.objective import divergence
from workbench.circuits.graph import Graph
from workbench.dynamics import GroundTruth, ToyModel, compiled, linear_network
from workbench.dynamics.wiring import head_weights, mlp_weights
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask


class Oracle:
    """The linear network under masks of edges, in float64 from its weights; what is cut is corrupt."""

    def __init__(self, model: ToyModel, graph: Graph, task: PairTask) -> None:
        self.model, self.graph, self.task = model, graph, task
        self.config = model.config
        whole = torch.ones(graph.exists.shape, dtype=torch.float64)
        zero = [torch.zeros(()).double()] * len(graph.writers)
        self.corrupt = self.writes(task.corrupt.ids, whole, zero)

    def metric(self, mask: np.ndarray) -> Tensor:
        kept = torch.as_tensor(mask).double()
        found = self.writes(self.task.clean.ids, kept, self.corrupt)
        end = self.read(found, kept, self.corrupt, len(self.graph.readers) - 1)[:, -1]
        logits = end @ self.model.unembedding.weight.detach().double().T
        rows = torch.arange(len(logits))
        return logits[rows, self.task.answers[:, 0]] - logits[rows, self.task.foils[:, 0]]

    def read(self, found: list[Tensor], mask: Tensor, instead: list[Tensor], reader: int) -> Tensor:
        """The input of a reader: what the mask keeps of the writers before it, the rest replaced."""
        before = int(self.graph.exists[:, reader].sum())
        parts = [mask[u, reader] * found[u] + (1 - mask[u, reader]) * instead[u] for u in range(before)]
        return torch.stack(torch.broadcast_tensors(*parts)).sum(0)

    def writes(self, ids: Tensor, mask: Tensor, instead: list[Tensor]) -> list[Tensor]:
        tokens = ids.shape[1]
        start = self.model.token_embedding.weight.detach().double()[ids]
        found = [start + self.model.position_embedding.weight.detach().double()[:tokens]]
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        for layer, places in enumerate(self.graph.layers):
            added = []
            for head in range(heads):
                w, kv = head_weights(self.model, layer, head), head // (heads // groups)
                q, k, v = (
                    self.read(found, mask, instead, place) @ weight.double().T
                    for place, weight in (
                        (places.q.start + head, w.query),
                        (places.k.start + kv, w.key),
                        (places.v.start + kv, w.value),
                    )
                )
                scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
                added.append(scores.softmax(-1) @ v @ w.output.double().T)
            found += added
            mlp = mlp_weights(self.model, layer)
            read = self.read(found, mask, instead, places.mlp.start)
            inner = torch.relu(read @ mlp.inward.weight.detach().double().T + mlp.inward.bias.detach().double())
            found.append(inner @ mlp.outward.weight.detach().double().T + mlp.outward.bias.detach().double())
        return found


def plain_acdc(oracle: Oracle, threshold: float) -> tuple[np.ndarray, dict[tuple[int, int], float]]:
    """Kept edges, and by how much the loss (the metric's negative) rose with each edge that was visited."""
    graph, kept = oracle.graph, oracle.graph.exists.copy()
    loss, changes = -float(oracle.metric(kept).mean()), {}
    for reader in reversed(range(len(graph.readers))):
        after = graph.feeds(reader)
        if after and not kept[list(after)].any():
            kept[:, reader] = False
            continue
        for writer in reversed(np.flatnonzero(kept[:, reader])):
            kept[writer, reader] = False
            new = -float(oracle.metric(kept).mean())
            changes[int(writer), reader] = new - loss
            if new - loss <= threshold + 1e-12:
                loss = new
            else:
                kept[writer, reader] = True
    return kept, changes


@cache
def program(name: str) -> GroundTruth:
    return compiled(name, count=15)


def idle(truth: GroundTruth) -> frozenset[object]:
    """Planted edges that make no difference to any of the prompts."""
    sight = Edgewise(truth.model, truth.task, "zero", "kl", None, None)
    edges = sorted(truth.edges)
    masks = torch.as_tensor(sight.graph.exists).float().repeat(len(edges), 1, 1)
    for mask, edge in zip(masks, edges, strict=True):
        mask[sight.graph.place(edge)] = 0
    cost = sight.losses(masks).amax(1)
    return frozenset(edge for edge, one in zip(edges, cost.tolist(), strict=True) if one < 1e-6)


@pytest.mark.parametrize("order", ["normal", "reverse"])
@pytest.mark.parametrize("name", ["frac_prevs", "reverse"])
def test_compiled_programs_are_recovered_by_zero_ablation(name: str, order: str) -> None:
    truth = program(name)
    found = discover(truth.model, truth.task, "acdc", ablation="zero", order=order, threshold=[1e-4, 1e-3, 1e-2, 0.1])
    needed = truth.edges - idle(truth)
    assert len(truth.edges - needed) <= 1
    scores = {edge: found.of(edge) for edge in found.graph.edges}
    # AUC 1.0: every edge of the program survives higher thresholds than any other.
    assert min(scores[edge] for edge in needed) > max(scores[edge] for edge in scores if edge not in needed)
    assert set(found.circuits[1e-4].nodes) == truth.nodes
    assert set(found.circuits[1e-4].edges) == needed


@pytest.fixture(scope="module")
def linear() -> GroundTruth:
    return linear_network()


def test_at_zero_exactly_the_edges_whose_removal_raises_the_loss_are_kept(linear: GroundTruth) -> None:
    found = acdc(linear.model, linear.task, threshold=0.0, loss="metric")
    oracle = Oracle(linear.model.attachment.hf_model, found.graph, linear.task)
    assert torch.allclose(oracle.metric(found.graph.exists).float(), linear.clean, atol=1e-5)
    kept, changes = plain_acdc(oracle, 0.0)
    assert found.circuit is not None
    assert (found.circuit.kept == kept).all()
    graph = found.graph
    for row in found.log.itertuples():
        place = graph.writer(row.source), graph.reader(row.target, row.through)
        assert row.change == pytest.approx(changes[place], abs=2e-6)
        assert row.cut == (changes[place] <= 1e-12)
    assert 0 < kept.sum() < graph.count
    assert found.tensors["loss"][0] == pytest.approx(-float(oracle.metric(kept).mean()), abs=1e-5)


def test_a_sweep_is_many_single_runs(linear: GroundTruth) -> None:
    thresholds = (1e-3, 0.03, 0.3)
    task = linear.task.select(range(4))
    swept = acdc(linear.model, task, threshold=thresholds, order="normal")
    for one in thresholds:
        single = acdc(linear.model, task, threshold=one, order="normal")
        assert single.circuit is not None
        assert (swept.circuits[one].kept == single.circuit.kept).all()
    survives = np.nan_to_num(swept.edges)
    assert ((survives >= 0.3) == swept.circuits[0.3].kept).all()
    # One mask for the whole model, and at most one for each edge and threshold, beside both runs.
    assert swept.work["forwards"] <= len(task) * (3 + len(thresholds) * swept.graph.count)


def test_parts_that_nothing_reads_are_not_visited(linear: GroundTruth) -> None:
    found = acdc(linear.model, linear.task, threshold=1e6)
    assert set(found.log.target) == {"logits"}
    assert found.circuit is not None
    assert found.circuit.size == 0


def test_without_edges_the_loss_is_that_of_the_corrupt_prompts(llama, task) -> None:
    """Grouped queries, prompts of two lengths."""
    found = acdc(llama, task, threshold=1e6)
    ends = []
    for batch in (task.clean, task.corrupt):
        logits = llama.trace(batch, logits="all").logits
        ends.append(logits[torch.arange(len(task)), task.position])
    assert found.tensors["loss"][0] == pytest.approx(float(divergence(*ends).mean()), rel=1e-4)


def test_an_interrupted_run_is_taken_up_again(linear: GroundTruth) -> None:
    def stop(done: int, of: int) -> None:
        assert of == whole.graph.count
        if done == 30:
            raise KeyboardInterrupt

    task, settings = linear.task.select(range(3)), {"threshold": (0.01, 0.1), "loss": "metric"}
    whole = acdc(linear.model, task, **settings)
    log = Decisions()
    part = acdc(linear.model, task, decisions=log, progress=stop, **settings)
    assert "interrupted" in part.notes[-1]
    rest = acdc(linear.model, task, decisions=log, **settings)
    assert rest.log.equals(whole.log)
    assert np.array_equal(rest.edges, whole.edges, equal_nan=True)
    assert part.work["forwards"] + rest.work["forwards"] <= whole.work["forwards"] + 2 * len(task)
    with pytest.raises(RequestError, match="other settings \\(order\\)"):
        acdc(linear.model, task, decisions=log, order="normal", **settings)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"threshold": -1.0}, "threshold=-1"),
        ({"threshold": ()}, "threshold="),
        ({"order": "random"}, "order='random'"),
        ({"loss": "mse"}, "loss='mse'"),
        ({"ablation": "clean"}, "ablation='clean'"),
        ({"speed": 3}, "no setting 'speed'"),
    ],
)
def test_wrong_settings_are_named(linear: GroundTruth, wrong: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        discover(linear.model, linear.task, "acdc", **wrong)


def test_unknown_methods_are_named(linear: GroundTruth) -> None:
    with pytest.raises(RequestError, match="method='magic'"):
        discover(linear.model, linear.task, "magic")
