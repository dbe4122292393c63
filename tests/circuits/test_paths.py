"""Path patching, knockout, mediation and subspaces against runs of the model with hooks of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.circuits import (
    Spot,
    Subspace,
    attention_edges,
    knock_out,
    mediation,
    orthonormal,
    patch_changes,
    patch_paths,
    patch_subspaces,
    principal_subspace,
    written_subspace,
)
from workbench.errors import RequestError
from workbench.models.testing import TINY
from workbench.tracing import patch


def score(model, task, edits):
    logits = model.trace(task.clean, edits=edits, logits=task.position[:, None]).logits
    return task.score(logits[:, 0]).double().numpy()


def wang(model, task, sender, receivers):
    """The definition: one run with everything frozen but MLPs, receivers' inputs recorded, one run with them put in."""
    spec = model.spec
    own, other = (model.trace(batch, sites=["z", "mlp_out"]) for batch in (task.clean, task.corrupt))
    frozen = [patch("z", own.site("z", layer), layer=layer) for layer in range(spec.n_layers)]
    if sender.site == "z":
        frozen.append(patch("z", other.site("z", sender.layer), layer=sender.layer, heads=[sender.head]))
    else:
        frozen.append(patch("mlp_out", other.site("mlp_out", sender.layer), layer=sender.layer))
    if receivers == "logits":
        return score(model, task, frozen)
    found = model.trace(task.clean, sites=sorted({one.site for one in receivers}), edits=frozen)
    return score(
        model, task, [patch(r.site, found.site(r.site, r.layer), layer=r.layer, heads=[r.head]) for r in receivers]
    )


def test_wang_form_is_its_definition(any_model, task) -> None:
    model = any_model
    last = model.spec.layers[2].heads - 1
    for receivers in ("logits", (Spot(2, "q", last), Spot(1, "q", 0), Spot(2, "v", 0), Spot(1, "k", 0))):
        found = patch_paths(model, task, ["L0H1", "L1.mlp"], receivers, form="wang", direction="noising")
        reached = receivers if receivers == "logits" else [one for one in receivers if one.layer == 2]
        expected = [wang(model, task, Spot(0, "z", 1), receivers), wang(model, task, Spot(1, "mlp_out"), reached)]
        np.testing.assert_allclose(found.values["noising"], expected, atol=1e-4)
        assert np.abs(found.effect("noising")).max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_strict_form_moves_one_edge(model_named, task, name) -> None:
    """The sender's difference is added to the receiver's input: by hand, and what follows from it."""
    model = model_named(name)
    own, other = (
        model.trace(batch, sites=["resid_pre", "z", "attn_out", "mlp_out"]) for batch in (task.clean, task.corrupt)
    )
    difference = other.site("mlp_out", 0) - own.site("mlp_out", 0)
    moved = model.trace(
        task.clean, sites=["q", "mlp_out"], edits=patch("resid_pre", own.site("resid_pre", 2) + difference, layer=2)
    )
    expected = score(model, task, patch("q", moved.site("q", 2), layer=2, heads=[1]))
    found = patch_paths(model, task, ["L0.mlp"], [Spot(2, "q", 1)], form="strict", direction="noising")
    np.testing.assert_allclose(found.values["noising"][0], expected, atol=1e-4)
    z = own.site("z", 0).clone()
    z[:, :, 1] = other.site("z", 0)[:, :, 1]
    head = model.trace(task.clean, sites=["attn_out"], edits=patch("z", z, layer=0)).site("attn_out", 0)
    final = model.trace(task.clean, sites=["resid_post"]).site("resid_post", 2) + head - own.site("attn_out", 0)
    expected = score(model, task, patch("resid_post", final, layer=2))
    found = patch_paths(model, task, ["L0H1"], form="strict", direction="noising")
    np.testing.assert_allclose(found.values["noising"][0], expected, atol=1e-4)


def test_paths_that_do_not_exist_do_nothing(llama, task) -> None:
    found = patch_paths(llama, task, ["L2H0", "embed"], [Spot(1, "q", 0), Spot(2, "v", 1)], form="strict", apart=True)
    np.testing.assert_allclose(found.effect("noising")[:2], 0, atol=1e-5)
    assert np.abs(found.effect("noising")[2:]).min(1).max() > 0
    with pytest.raises(RequestError, match="receives nothing"):
        patch_paths(llama, task, ["L0H1"], [Spot(1, "z", 0)])


def test_all_senders_at_once_are_the_whole_difference(llama, task) -> None:
    """Strict paths into the last stream add up to it: patched as one, the other run's logits."""
    parts = ["embed", *(f"L{layer}.{part}" for layer in range(3) for part in ("attn", "mlp"))]
    found = patch_paths(llama, task, parts, form="strict", direction="denoising")
    assert np.abs(found.effect("denoising")).min(1).max() > 1e-3
    whole = patch_changes(llama, task, [(Spot(2, "resid_post"),)], direction="denoising")
    np.testing.assert_allclose(whole.values["denoising"][0], whole.clean, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "mistral"])
def test_knockout_renormalises(model_named, task, name) -> None:
    """One head: its row without the key, by hand; with sinks, the sink takes part."""
    model = model_named(name)
    row, key = 6, 4
    pattern = model.trace(task.clean, sites=["pattern"]).site("pattern", 1).double().clone()
    kept = pattern[:, 2, row].clone()
    removed = kept[:, key].clone()
    kept[:, key] = 0
    pattern[:, 2, row] = kept / (1 - removed)[:, None]
    expected = score(model, task, patch("pattern", pattern.float(), layer=1, heads=[2]))
    found = knock_out(model, task, [attention_edges(["L1H2"], row, [key])])
    np.testing.assert_allclose(found.values["noising"][0], expected, atol=1e-4)
    assert np.abs(found.effect("noising")).max() > 1e-5


def test_knockout_of_many_layers_is_a_mask_on_the_model(model_named, make_pairs) -> None:
    """All heads of all layers: the model's own attention with those entries of its mask at minus infinity."""
    task, model = make_pairs((8, 8)), model_named("llama")
    found = knock_out(model, task, [attention_edges(range(3), "end", ["changed", 0])])
    mask = torch.full((2, 1, 8, 8), 0.0).masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf"))
    mask[:, :, 7, 0] = float("-inf")
    mask[torch.arange(2), :, 7, task.roles["changed"]] = float("-inf")
    eager = TINY["llama"]()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        logits = eager(task.clean.ids, attention_mask=mask, use_cache=False).logits
    np.testing.assert_allclose(found.values["noising"][0], task.score(logits).double().numpy(), atol=1e-4)


def test_mediation_reads_both_directions(llama, task) -> None:
    effects = patch_changes(llama, task, [(Spot(0, "z", 1),), (Spot(0, "resid_pre"),)])
    table = mediation(effects)
    np.testing.assert_allclose(table.total, (effects.corrupt - effects.clean).mean())
    np.testing.assert_allclose(table.indirect, (effects.values["noising"] - effects.clean).mean(1))
    np.testing.assert_allclose(table.direct, (effects.values["denoising"] - effects.clean).mean(1))
    # The whole input mediates everything.
    np.testing.assert_allclose(table.direct[1], 0, atol=1e-4)
    np.testing.assert_allclose(table.indirect[1], table.total[1], atol=1e-4)
    share = mediation(effects, base="corrupt", relative=True)
    np.testing.assert_allclose(share.total, ((effects.clean - effects.corrupt) / effects.corrupt).mean())
    with pytest.raises(RequestError, match="both directions"):
        mediation(patch_changes(llama, task, [(Spot(0, "z", 1),)], direction="noising"))


def test_subspaces_add_up_and_full_ones_are_whole_patches(llama, task) -> None:
    places = [Spot(1, "z", 2), Spot(0, "q", 1), Spot(1, "mlp_out")]
    changes = [(one,) for one in places]
    whole = patch_changes(llama, task, changes)
    every = {one: orthonormal(torch.randn(n, n)) for one, n in zip(places, (8, 8, 48), strict=True)}
    none = {one: Subspace(space.basis[:, :0]) for one, space in every.items()}
    for spaces, how in ((every, "exchange"), (none, "complement")):
        found = patch_subspaces(llama, task, changes, spaces, how=how)
        np.testing.assert_allclose(found.values["noising"], whole.values["noising"], atol=1e-4)
    # By hand: part of z.
    space = {places[0]: orthonormal(torch.randn(8, 3))}
    own, other = (llama.trace(batch, sites=["z"]).site("z", 1)[:, :, 2] for batch in (task.clean, task.corrupt))
    value = own + (other - own) @ space[places[0]].basis @ space[places[0]].basis.T
    expected = score(llama, task, patch("z", value[:, :, None], layer=1, heads=[2]))
    found = patch_subspaces(llama, task, changes[:1], space, direction="noising")
    np.testing.assert_allclose(found.values["noising"][0], expected, atol=1e-4)


def test_what_a_head_writes_lies_in_its_subspace(gpt2, task) -> None:
    """Exchanging attn_out within one head's written subspace holds all of that head's own change."""
    space = written_subspace(gpt2, 1, 2)
    assert space.basis.shape == (48, 12)
    own, other = (
        gpt2.trace(batch, sites=["result"]).site("result", 1)[:, :, 2] for batch in (task.clean, task.corrupt)
    )
    torch.testing.assert_close(space.part(other - own), other - own, atol=1e-5, rtol=1e-4)


def test_low_rank_keys(llama, task) -> None:
    """Full rank changes nothing; a low rank in two layers acts on what the first one left."""
    places = [Spot(0, "k", 1), Spot(2, "q", 3)]
    spaces = {one: principal_subspace(llama, task.clean, one, 8) for one in places}
    found = patch_subspaces(llama, task, [(one,) for one in places], spaces, how="low_rank", direction="noising")
    np.testing.assert_allclose(found.effect("noising"), 0, atol=1e-4)
    spaces = {one: principal_subspace(llama, task.clean, one, 2) for one in places}
    found = patch_subspaces(llama, task, [tuple(places)], spaces, how="low_rank", direction="noising")

    def lowered(value, space):
        return space.mean + space.part(value - space.mean)

    key = lowered(llama.trace(task.clean, sites=["k"]).site("k", 0)[:, :, 1], spaces[places[0]])
    first = patch("k", key[:, :, None], layer=0, heads=[1])
    query = lowered(llama.trace(task.clean, sites=["q"], edits=first).site("q", 2)[:, :, 3], spaces[places[1]])
    expected = score(llama, task, [first, patch("q", query[:, :, None], layer=2, heads=[3])])
    np.testing.assert_allclose(found.values["noising"][0], expected, atol=1e-4)
    assert np.abs(found.effect("noising")).max() > 1e-3
    with pytest.raises(RequestError, match="not orthonormal"):
        Subspace(torch.ones(4, 2))
