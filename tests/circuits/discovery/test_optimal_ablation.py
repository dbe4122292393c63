"""Optimal ablation: never above the mean or zero, the closed form where there is one, what repair hides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.circuits.discovery import discover
from workbench.circuits.discovery.objective import divergence
from workbench.dynamics import handwritten_pairs, linear_network, self_repair
from workbench.errors import RequestError
from workbench.models import Head
from workbench.tracing import ablate, patch


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_never_above_zero_or_the_mean(model_named, make_pairs, name: str) -> None:
    model, task = model_named(name), make_pairs()
    found = discover(model, task, "optimal ablation", steps=8)
    there = ~np.isnan(found.nodes)
    assert there.sum() == len(found.graph.writers) - 1
    for how in ("mean", "zero"):
        assert (found.nodes[there] <= found.tensors[how][there] + 1e-9).all()
    assert (found.nodes[there] < np.minimum(found.tensors["mean"], found.tensors["zero"])[there]).mean() > 0.5
    assert (found.nodes[there] >= -1e-6).all()


def test_costs_are_those_of_edited_runs(llama, task) -> None:
    """Zero by the tracer's ablation; the constant by a patch of z."""
    found = discover(llama, task, "optimal ablation", nodes=["L1H2", "L2.mlp"], steps=5)
    rows = torch.arange(len(task))
    full = llama.trace(task.clean, logits="all").logits[rows, task.position]
    place = found.graph.writer("L1H2")
    zero = llama.trace(task.clean, edits=ablate([Head(1, 2)], how="zero"), logits="all").logits[rows, task.position]
    assert found.tensors["zero"][place] == pytest.approx(float(divergence(full, zero).mean()), rel=1e-3, abs=1e-5)
    z = llama.trace(task.clean, sites=["z"]).site("z", 1).clone()
    z[:, :, 2] = torch.as_tensor(found.tensors["constant L1H2"])
    edited = llama.trace(task.clean, edits=[patch("blocks.1.attn.hook_z", z)], logits="all").logits
    cost = divergence(full, edited[rows, task.position])
    assert np.allclose(found.node_per_prompt[:, place], cost, rtol=1e-3, atol=1e-5)
    assert np.isnan(found.nodes[found.graph.writer("L0H0")])


def test_on_a_linear_network_the_metric_falls_by_what_the_best_constant_cannot_carry() -> None:
    """With a quadratic loss of an output linear in the constant, least squares is the best; the KL has no such form.

    Here the loss is the squared change of the metric, so that the closed form holds.
    """
    truth = linear_network()
    clean = truth.clean

    def closeness(logits: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        answers, foils = truth.task.answers[prompts, 0], truth.task.foils[prompts, 0]
        row = torch.arange(len(logits))
        return -((logits[row, answers] - logits[row, foils] - clean[prompts]) ** 2)

    found = discover(
        truth.model, truth.task, "optimal ablation", nodes=["L1H1"], loss="metric", metric=closeness, steps=300
    )
    # The head's write at the last token reaches the logits, directly and through the MLP; elsewhere it is not read.
    zero = (truth.effect("zero", "L1H1")).double()
    z = truth.model.trace(truth.task.clean, sites=["z"]).site("z", 1)[:, -1, 1]
    moved = []
    for unit in torch.eye(z.shape[1]):
        value = truth.model.trace(truth.task.clean, sites=["z"]).site("z", 1).clone()
        value[:, :, 1] = unit
        logits = truth.model.trace(truth.task.clean, edits=[patch("blocks.1.attn.hook_z", value)], logits="all").logits
        moved.append(truth.task.score(logits).double() - clean.double() - zero)
    design = torch.stack(moved, 1)
    best = torch.linalg.lstsq(design, -zero[:, None]).solution
    least = float(((design @ best)[:, 0] + zero).square().mean())
    place = found.graph.writer("L1H1")
    assert found.nodes[place] == pytest.approx(least, rel=0.02, abs=1e-6)
    assert least < 0.9 * found.tensors["zero"][place]


def test_a_backup_without_a_task_costs_nothing() -> None:
    truth = self_repair()
    found = discover(truth.model, truth.task, "optimal ablation", steps=40)
    scores = dict(zip(found.graph.writers, found.nodes, strict=True))
    assert scores["L0H0"] > 1e-3
    assert abs(scores["L1H0"]) < 1e-5


def test_an_interruption_keeps_what_was_learned() -> None:
    truth = handwritten_pairs()

    def stop(done: int, of: int) -> None:
        assert of == 4
        raise KeyboardInterrupt

    found = discover(truth.model, truth.task, "optimal ablation", steps=2, progress=stop)
    assert found.notes[-1] == "interrupted after 2 of 4 parts"
    assert (~np.isnan(found.nodes)).tolist() == [False, True, True, False, False]


def test_what_cannot_be_ablated_is_named(llama, task) -> None:
    with pytest.raises(RequestError, match="embed"):
        discover(llama, task, "optimal ablation", nodes=["embed"])
    with pytest.raises(RequestError, match="L9H9"):
        discover(llama, task, "optimal ablation", nodes=["L9H9"])
