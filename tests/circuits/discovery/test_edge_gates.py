"""Gates on edges: edge pruning on a compiled program, UGS on planted circuits, gradients by differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.circuits.discovery import discover, ugs
from workbench.circuits.discovery.edgewise import Edgewise
from workbench.dynamics import GroundTruth, compiled, handwritten_pairs, linear_network
from workbench.errors import RequestError


def test_edge_pruning_finds_a_compiled_program_from_three_seeds() -> None:
    truth = compiled("frac_prevs", count=30)
    task = truth.task.select(range(16))
    found = [
        discover(
            truth.model, task, "edge pruning", ablation="zero", target=1 - len(truth.edges) / 23, steps=150,
            rate=0.2, multiplier_rate=0.2, seed=seed,
        )
        for seed in range(3)
    ]  # fmt: skip
    assert found[0].graph.count == 23
    for one in found:
        assert one.circuit is not None
        assert set(one.circuit.edges) == truth.edges
        assert one.tensors["loss"].mean() < 1e-3
        # The target was met by training, and not by the threshold alone.
        assert one.log.sparsity.iloc[-1] == pytest.approx(1 - len(truth.edges) / 23, abs=0.05)
        # Two edges whose loss costs 1e-4 may be shut and still rank above the idle ones.
        gates = np.nan_to_num(one.edges)
        assert (gates[one.circuit.kept] > 0.9).sum() >= 3
        assert gates[~one.circuit.kept].max() < 0.1
    circuits = [set(one.circuit.edges) for one in found if one.circuit is not None]
    assert all(len(a & b) > 0.9 * len(a | b) for a in circuits for b in circuits)


def test_what_is_kept_can_be_said() -> None:
    truth = compiled("frac_prevs", count=4)
    few = discover(truth.model, truth.task, "edge pruning", ablation="zero", keep=3, steps=3)
    assert few.circuit is not None
    assert few.circuit.size == 3
    ranked = np.where(few.graph.exists, few.tensors["alpha"], -np.inf)
    assert ranked[few.circuit.kept].min() >= ranked[~few.circuit.kept].max()
    over = discover(truth.model, truth.task, "edge pruning", ablation="zero", target=1.05, steps=3)
    assert over.circuit is not None
    assert (over.circuit.kept == (np.nan_to_num(over.edges) >= 0.5)).all()


def test_ugs_keeps_what_is_needed_and_nothing_else() -> None:
    truth = handwritten_pairs()
    found = discover(truth.model, truth.task.select(range(12)), "ugs", penalty=0.05, steps=500, rate=0.1)
    assert found.circuit is not None
    assert set(found.circuit.edges) == truth.edges
    for edge in found.graph.edges:
        assert found.of(edge) > 0.9 if edge in truth.edges else found.of(edge) < 0.1, str(edge)
    assert found.tensors["loss"].mean() < 0.01
    assert found.tensors["constants"].shape == (len(found.graph.writers), truth.model.spec.d_model)


def test_ugs_without_a_penalty_keeps_everything() -> None:
    truth = linear_network()
    found = discover(truth.model, truth.task, "ugs", penalty=0.0, ablation="patching", steps=150, rate=0.15)
    assert found.circuit is not None
    assert found.circuit.size == found.graph.count
    for edge in found.graph.edges:
        # Edges that make no difference stay where they began.
        assert found.of(edge) > 0.95 if edge in truth.edges else found.of(edge) == pytest.approx(0.731, abs=1e-3)
    assert found.tensors["loss"].mean() == pytest.approx(0, abs=1e-6)


def test_mixing_coefficients_are_uniform_in_a_window_around_p() -> None:
    theta = torch.tensor([-2.0, 0.0, 1.5], requires_grad=True)
    drawn = ugs.sampled(theta, 50_000, torch.Generator().manual_seed(0))
    p = torch.sigmoid(theta).detach()
    window = p * (1 - p)
    inside = (drawn > 0) & (drawn < 1)
    assert torch.allclose(inside.float().mean(0), window, atol=0.01)
    assert torch.allclose(drawn.mean(0), p, atol=0.01)
    (slope,) = torch.autograd.grad(drawn.sum(), theta)
    # d alpha / d theta is p (1 - p) / w = 1 inside of the window, and 0 outside.
    assert torch.allclose(slope, inside.sum(0).float(), rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_slopes_are_those_of_differences(model_named, make_pairs, name: str) -> None:
    """Prompts of two lengths, grouped queries: two edges and a constant, moved by hand."""
    model, task = model_named(name), make_pairs()
    constants = torch.randn(
        len(Edgewise(model, task, "zero", "kl", None, None).graph.writers), 1, 1, model.spec.d_model
    )
    constants.mul_(0.1).requires_grad_(True)
    sight = Edgewise(model, task, "mean", "metric", None, None, constants)
    generator = torch.Generator().manual_seed(1)
    edges = torch.rand(len(task), sight.graph.count, generator=generator)
    total, slopes, (by_constant,) = sight.slopes(edges, constants)
    step = 5e-3
    for place in (3, sight.graph.count - 2):
        for prompt in range(2):
            ends = []
            for sign in (1, -1):
                moved = edges.clone()
                moved[prompt, place] += sign * step
                ends.append(sight.slopes(moved, constants)[0])
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(slopes[prompt, place]), rel=0.05, abs=2e-3)
    row = by_constant[2, 0, 0]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            constants[2, 0, 0] += sign * step * row / row.norm()
            ends.append(sight.slopes(edges, constants)[0])
            constants[2, 0, 0] -= sign * step * row / row.norm()
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(row.norm()), rel=0.05)
    assert np.isfinite(total)


@pytest.fixture(scope="module")
def program() -> GroundTruth:
    return compiled("frac_prevs", count=4)


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        ("edge pruning", {"target": 0.0}, "target=0"),
        ("edge pruning", {"keep": 0}, "keep=0"),
        ("edge pruning", {"keep": 1000}, "keep=1000"),
        ("edge pruning", {"warm_up": 0.0}, "warm_up=0"),
        ("ugs", {"penalty": -1.0}, "penalty=-1"),
        ("ugs", {"ablation": "clean"}, "ablation='clean'"),
    ],
)
def test_wrong_settings_are_named(program: GroundTruth, method: str, wrong: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        discover(program.model, program.task, method, **wrong)
