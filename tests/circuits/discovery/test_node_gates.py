"""Gates on nodes: subnetwork probing and causal head gating on planted circuits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.circuits.discovery import concrete, discover
from workbench.circuits.discovery.gated import prepare
from workbench.circuits.discovery.probing import subnetwork_probing
from workbench.circuits.forks import replacement
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Recorded
from workbench.dynamics import GroundTruth, handwritten_pairs, negative_head
from workbench.errors import RequestError
from workbench.models.architectures import output_weight


@pytest.fixture(scope="module")
def induction() -> GroundTruth:
    return handwritten_pairs()


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
def test_needed_inputs_stay_open_and_idle_ones_close_over_a_wide_range(induction: GroundTruth, penalty: float) -> None:
    """Replaced by corrupt values, what matters is the previous token's path into the shared keys."""
    found = discover(induction.model, induction.task, "subnetwork probing", penalty=penalty, steps=150, rate=0.1)
    graph = found.graph
    needed = {("L0KV0", "v"), ("L1KV0", "k")}
    for place, reader in enumerate(graph.readers[:-1]):
        gate = found.inputs[place]
        assert gate > 0.9 if reader in needed else gate < 0.1, reader
    assert found.circuit is not None
    assert {(edge.target, edge.through) for edge in found.circuit.edges} == needed | {("logits", "")}
    assert found.nodes[graph.writer("L0H0")] > 0.9


def test_zero_asks_for_more_than_corrupt_values(induction: GroundTruth) -> None:
    """Queries and keys are the same on both prompts; without them nothing works."""
    found = discover(
        induction.model, induction.task, "subnetwork probing", ablation="zero", steps=150, rate=0.1, loss="metric",
        penalty=0.1,
    )  # fmt: skip
    gates = {reader: found.inputs[place] for place, reader in enumerate(found.graph.readers)}
    for reader in (("L0H0", "q"), ("L0KV0", "k"), ("L0KV0", "v"), ("L1H0", "q"), ("L1KV0", "k"), ("L1KV0", "v")):
        assert gates[reader] > 0.9, reader
    assert gates["L0H1", "q"] < 0.1


def test_gates_without_noise_are_the_middle_of_those_with() -> None:
    alpha = torch.linspace(-6, 6, 25)
    drawn = concrete.sampled(alpha, 40_000, torch.Generator().manual_seed(0))
    assert torch.allclose((drawn > 0).float().mean(0), concrete.open_share(alpha), atol=0.01)
    assert torch.allclose(drawn.median(0).values, (torch.sigmoid(alpha * 1.5) * 1.2 - 0.1).clamp(0, 1), atol=0.02)
    assert float(concrete.settled(torch.tensor([0.0]))) == pytest.approx(0.5)


def test_an_interruption_keeps_the_best_gates(induction: GroundTruth) -> None:
    def stop(done: int, of: int) -> None:
        if done == 160:
            raise KeyboardInterrupt

    found = subnetwork_probing(induction.model, induction.task, steps=10_000, rate=0.1, progress=stop)
    assert "interrupted after 160 of 10000" in found.notes[-1]
    assert found.inputs[found.graph.reader("L1KV0", "k")] > 0.9
    assert len(found.log) == 160


def test_a_seed_gives_the_same_gates(llama, task) -> None:
    one, two, other = (subnetwork_probing(llama, task, steps=4, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.inputs, two.inputs, equal_nan=True)
    assert not np.array_equal(one.tensors["alpha"], other.tensors["alpha"])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "gpt_oss"])
def test_gated_runs_are_the_models_own(model_named, make_pairs, name: str) -> None:
    """With nothing changed, from any layer on; and with what the clean run had put in place of itself."""
    model, task = model_named(name), make_pairs()
    logits = model.trace(task.clean, logits="all").logits[torch.arange(len(task)), task.position]

    def twice(run: Recorded, site: str, layer: int) -> torch.Tensor:
        return torch.cat([run.at(site, layer)] * 2)

    for one in prepare(model, task, ("q", "k", "v", "z", "mlp_out"), ablation="patching"):
        for run, same in ((one.clean, True), (one.corrupt, False)):
            rewrites = (
                lambda site, layer, value: value,
                lambda site, layer, value, run=run: twice(run, site, layer) if site in "qkv" else value,
                lambda site, layer, value, run=run: twice(run, site, layer) if site in ("z", "mlp_out") else value,
            )
            for number, rewrite in enumerate(rewrites):
                with torch.no_grad():
                    found = one.run(rewrite, copies=2, first=number % 2)
                expected = logits[one.group.prompts].repeat(2, 1)
                # What the corrupt run had is seen, once it is put in place.
                assert torch.allclose(found, expected, atol=2e-4) == (same or number == 0)


@pytest.mark.parametrize("referenced", [False, True])
@pytest.mark.parametrize("ablation", ["patching", "mean", "zero"])
def test_nodes_and_edges_are_replaced_by_the_same(llama, task, ablation: str, referenced: bool) -> None:
    """z through the output projection is what the forked runs put in place of a head's write."""
    chosen = replace(task, references=task.clean) if referenced else task
    weights = [output_weight(one, spec) for one, spec in zip(llama.attachment.layers, llama.spec.layers, strict=True)]
    for one in prepare(llama, chosen, ("z", "mlp_out"), ablation=ablation):
        expected = replacement(llama, chosen, one.group, ablation)
        for layer, places in enumerate(Graph.of(llama).layers):
            written = torch.einsum("pthc,hcd->hptd", one.instead(ablation, "z", layer), weights[layer].detach())
            assert torch.allclose(written, expected[places.heads].detach().expand_as(written), atol=1e-4)
            mlp = one.instead(ablation, "mlp_out", layer)
            assert torch.allclose(mlp, expected[places.mlp_out.start].expand_as(mlp), atol=1e-4)


def test_head_gating_sorts_heads_into_three_kinds(induction: GroundTruth) -> None:
    found = discover(induction.model, induction.task, "causal head gating", steps=40, masks=2)
    graph = found.graph
    gates = {how: dict(zip(graph.writers, found.tensors[how].mean(0), strict=True)) for how in ("up", "down")}
    for head in ("L0H0", "L1H0", "L1H1"):
        assert gates["up"][head] > 0.9
        assert gates["down"][head] > 0.9
    # The second head of layer 0 does nothing.
    assert gates["up"]["L0H1"] > 0.9
    assert gates["down"]["L0H1"] < 0.1


def test_head_gating_shuts_heads_that_hurt() -> None:
    truth = negative_head()
    found = discover(truth.model, truth.task, "causal head gating", steps=40, masks=2)
    hurts = [node for node, sign in truth.helps.items() if sign < 0 and "H" in node]
    helps = [node for node, sign in truth.helps.items() if sign > 0 and "H" in node]
    assert hurts
    assert helps
    for node in hurts:
        assert found.tensors["up"].mean(0)[found.graph.writer(node)] < 0.1
        assert found.nodes[found.graph.writer(node)] < -0.8
    for node in helps:
        assert found.tensors["down"].mean(0)[found.graph.writer(node)] > 0.9


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        ("subnetwork probing", {"penalty": -1.0}, "penalty=-1"),
        ("subnetwork probing", {"steps": 0}, "steps=0"),
        ("causal head gating", {"masks": 0}, "masks=0"),
    ],
)
def test_wrong_settings_are_named(induction: GroundTruth, method: str, wrong: dict[str, float], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        discover(induction.model, induction.task, method, **wrong)
