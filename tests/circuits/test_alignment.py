"""Learned subspaces against closed forms on planted heads, whole patches, and what patching says of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.circuits import (
    LearnedSubspace,
    Spot,
    Subspace,
    learn_subspace,
    patch_changes,
    patch_subspaces,
    random_subspace,
)
from workbench.dynamics import copying, gate
from workbench.errors import HeadError, RequestError


def patched(model, task, spot: Spot, space: Subspace, direction="denoising"):
    """The metric of every prompt under an exchange within the subspace."""
    found = patch_subspaces(model, task, [(spot,)], {replace(spot, position=None): space}, direction=direction)
    return found.values[direction][0]


def whole(model, task, spot: Spot, direction="denoising"):
    return patch_changes(model, task, [(spot,)], direction=direction).values[direction][0]


@pytest.mark.parametrize(
    ("spot", "values", "corrupt", "share"),
    [
        (Spot(0, "z", 0, 3), 2, "query", 1.0),
        (Spot(0, "z", 0, 3), 3, "query", 1.0),
        # With a linear readout u and a difference D, the best of all directions gives (|u||D| + u.D) / 2, which is more
        # than the whole u.D where D is not along u; here they are 45 degrees apart.
        (Spot(0, "resid_post", None, 3), 2, "value", (1 + 2**0.5) / 2),
    ],
    ids=["z, rank 1", "z, rank 2", "stream, rank 1"],
)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_a_planted_effect_lies_in_as_many_directions_as_its_differences(
    spot, values, corrupt, share, direction
) -> None:
    """Two values differ along one direction, three along two; learned on half of the pairs, measured on the others."""
    known = copying(values=values, corrupt=corrupt)
    trained, held_out = (known.task.select(range(first, 12, 2)) for first in (0, 1))
    found = learn_subspace(known.model, trained, spot, values - 1, direction=direction, steps=150)
    sign = 1 if direction == "denoising" else -1
    full = whole(known.model, held_out, spot, direction)
    start = (known.corrupt if direction == "denoising" else known.clean).numpy()[1::2]
    assert sign * (full - start).mean() > 1
    learned = patched(known.model, held_out, spot, found, direction)
    np.testing.assert_allclose(learned, start + share * (full - start), atol=0.02)
    controls = [random_subspace(known.model, spot, values - 1, seed) for seed in range(10)]
    shares = [
        (patched(known.model, held_out, spot, one, direction) - start).mean() / (full - start).mean()
        for one in controls
    ]
    # By chance, rank / dimension of it.
    assert np.mean(shares) < 0.6 and max(shares) < 0.95


def test_too_few_directions_are_the_strongest_of_the_differences() -> None:
    """The planted head is linear: P restores d'Pd of each pair's difference d, so the best are the leading ones."""
    known, spot = copying(values=5), Spot(0, "z", 0, 3)
    clean, corrupt = (
        known.model.trace(batch, sites=["z"]).site("z", 0)[:, 3, 0] for batch in (known.task.clean, known.task.corrupt)
    )
    strength = torch.linalg.eigvalsh((clean - corrupt).T @ (clean - corrupt) / len(clean)).flip(0)
    for rank in (1, 2):
        found = learn_subspace(known.model, known.task, spot, rank, steps=120)
        effect = patched(known.model, known.task, spot, found) - known.corrupt.numpy()
        np.testing.assert_allclose(effect.mean(), float(strength[:rank].sum()), rtol=0.01)


@pytest.mark.parametrize(
    "spot",
    [
        Spot(0, "resid_pre", None, "changed"),
        Spot(1, "resid_mid", None, 4),
        Spot(2, "resid_post", None, "end"),
        Spot(1, "attn_out", None, "end"),
        Spot(0, "mlp_out", None, 4),
        Spot(1, "z", 4, "end"),
    ],
    ids=lambda spot: spot.site,
)
def test_grouped_queries_learn_and_patching_says_the_same(llama, task, spot) -> None:
    """Prompts of unequal lengths, of which one is too short for some places."""
    for direction, sign in (("denoising", -1), ("noising", 1)):
        found = learn_subspace(llama, task, spot, 2, steps=8, direction=direction)
        assert isinstance(found, LearnedSubspace) and len(found.losses) == 9 and not found.note
        assert min(found.losses) < found.losses[0] - 1e-3
        value = np.nanmean(patched(llama, task, spot, found, direction))
        np.testing.assert_allclose(sign * value, min(found.losses), atol=1e-4)


def test_all_directions_are_the_whole_site(any_model, task) -> None:
    model, spot = any_model, Spot(1, "z", 1, "end")
    dim = model.spec.layers[1].head_dim
    found = learn_subspace(model, task, spot, dim, steps=1)
    np.testing.assert_allclose(patched(model, task, spot, found), whole(model, task, spot), atol=1e-4)
    np.testing.assert_allclose(found.losses, -whole(model, task, spot).mean(), atol=1e-4)


def test_places_that_some_prompts_lack_or_cannot_read_are_left_as_they_are(llama, task) -> None:
    """Column 8 exists in the second prompt alone; what is constant there counts as it is."""
    found = learn_subspace(llama, task, Spot(1, "resid_pre", None, 8), steps=5)
    values = patched(llama, task, Spot(1, "resid_pre", None, 8), found)
    assert np.isnan(values).tolist() == [True, False, True]
    np.testing.assert_allclose(-values[1], min(found.losses), atol=1e-4)


def test_small_steps_go_down_every_time_and_weights_stay_without_gradients(llama, task) -> None:
    spot = Spot(1, "resid_pre", None, "changed")
    found, again, other = (learn_subspace(llama, task, spot, 1, steps=4, rate=1e-3, seed=seed) for seed in (0, 0, 1))
    assert list(found.losses) == sorted(found.losses, reverse=True)
    assert again.losses == pytest.approx(found.losses, abs=1e-5)
    assert other.losses[0] != pytest.approx(found.losses[0], abs=1e-4)
    weights = list(llama.attachment.hf_model.parameters())
    assert all(one.grad is None and one.requires_grad for one in weights)


def test_an_interruption_keeps_what_was_learned(llama, task) -> None:
    def stop(done: int, steps: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    found = learn_subspace(llama, task, Spot(1, "z", 0, "end"), steps=50, progress=stop)
    assert "interrupted" in found.note and 3 <= len(found.losses) <= 5


@pytest.mark.parametrize(
    ("spot", "options", "error"),
    [
        (Spot(1, "pattern", 0, "end"), {}, "pattern of L1H0 cannot be learned"),
        (Spot(1, "k", 0, "end"), {}, "k of L1KV0 cannot be learned; choose from attn_out"),
        (Spot(1, "z", None, "end"), {}, "name one: 'L1H0'"),
        (Spot(1, "z", 0), {}, "name one position, or a role"),
        (Spot(1, "z", 0, "nowhere"), {}, "no role 'nowhere'"),
        (Spot(1, "z", 0, "end"), {"rank": 9}, "ranks from 1 to 8"),
        (Spot(1, "z", 0, "end"), {"rank": 0}, "ranks from 1 to 8"),
        (Spot(1, "z", 0, "end"), {"rate": 0.0}, "rate=0.0"),
        (Spot(1, "z", 0, "end"), {"steps": 0}, "steps=0"),
        (Spot(1, "z", 0, "end"), {"direction": "both"}, "direction='both'"),
        (Spot(1, "z", 0, "end"), {"metric": "charm"}, "charm"),
        (Spot(1, "z", 0, 0), {}, "moves no prompt"),
        (Spot(2, "resid_post", None, 4), {}, "moves no prompt"),
    ],
)
def test_refusals(llama, task, spot, options, error) -> None:
    with pytest.raises(RequestError, match=error):
        learn_subspace(llama, task, spot, **options)


def test_heads_that_do_not_exist_and_random_patterns_are_refused(llama, task) -> None:
    with pytest.raises(HeadError, match="L1H6 does not exist"):
        learn_subspace(llama, task, Spot(1, "z", 6, "end"))
    with pytest.raises(RequestError, match="no vector"):
        random_subspace(llama, Spot(1, "pattern", 0), 1)
    with pytest.raises(RequestError, match="ranks from 1 to 8"):
        random_subspace(llama, Spot(1, "q", 0), 9)


def test_random_subspaces_are_orthonormal_and_theirs_alone() -> None:
    known = gate("and")
    one, same, other = (random_subspace(known.model, Spot(0, "resid_post"), 2, seed).basis for seed in (0, 0, 1))
    torch.testing.assert_close(one.T @ one, torch.eye(2))
    assert torch.equal(one, same) and not torch.allclose(one, other)
