"""Activation patching against one edited pass a patch, against hooks on the model itself, and its identities."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.circuits import Options, Spot, patch_activations, patch_changes, scan, spot
from workbench.circuits.blocks import LOGIT_ROWS
from workbench.circuits.budget import recorded_bytes, row_bytes
from workbench.circuits.recorded import starting_sites
from workbench.errors import HeadError, MemoryRefused, RequestError
from workbench.models.memory import AllocationMeter

NAIVE = Options(method="naive")
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")


def agree(one, other, tolerance=1e-4):
    for direction in one.values:
        a, b = one.values[direction], other.values[direction]
        assert (np.isnan(a) == np.isnan(b)).all()
        assert np.nanmax(np.abs(a - b)) < tolerance
        # Patches that do nothing would agree as well.
        assert np.nanmax(np.abs(one.effect(direction))) > 0.05


def some_changes(spec):
    """A few spots of every site: single rows, single entries, whole layers, roles."""
    changes = []
    for site in SITES:
        if site == "resid_mid" and spec.parallel:
            continue
        headed = site in ("z", "q", "k", "v", "pattern")
        kv = site in ("k", "v")
        head = (0 if kv else spec.layers[1].heads - 1) if headed else None
        changes += [(Spot(1, site, head, 4),), (Spot(0, site, None, "changed"),), (Spot(2, site, head),)]
    # Before the first different token nothing changes.
    changes.append((Spot(1, "z", None, 0),))
    return [*changes, (Spot(0, "pattern", 1, 5, 2),), (Spot(1, "pattern", None, "end", 4),)]


def test_equals_one_edited_pass_a_patch(any_model, task) -> None:
    changes = some_changes(any_model.spec)
    fast = patch_changes(any_model, task, changes, direction="noising")
    assert fast.route.startswith("from the changed layer")
    agree(fast, patch_changes(any_model, task, changes, direction="noising", options=NAIVE))
    assert fast.work.saved > 2
    assert fast.work.unchanged > 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_sets_of_spots_in_several_layers(model_named, task, name) -> None:
    """Later layers of a lane on its way: the same overwritten values, on top of what the earlier ones did."""
    model = model_named(name)
    changes = [
        (Spot(0, "z", 1, 4), Spot(1, "z", 2), Spot(2, "q", 0)),
        (Spot(0, "mlp_out"), Spot(1, "k", 0, 4), Spot(2, "v", 0, 5)),
        (Spot(0, "attn_out", None, 4), Spot(1, "resid_mid", None, 5), Spot(2, "mlp_out")),
        (Spot(0, "resid_pre", None, 4), Spot(1, "resid_pre", None, 5), Spot(2, "z", 0)),
        (Spot(0, "q", 1, 4), Spot(1, "pattern", 1), Spot(2, "pattern", 0, "end")),
        (Spot(0, "resid_post", None, 4), Spot(2, "mlp_out", None, "end"), Spot(2, "resid_post", None, 4)),
        (Spot(1, "z", 0), Spot(1, "mlp_out", None, 5)),
    ]
    agree(patch_changes(model, task, changes), patch_changes(model, task, changes, options=NAIVE))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("read", [1, 2])
def test_padding_and_reading_before_the_end(llama, make_pairs, side, read) -> None:
    task = make_pairs((6, 9, 6), side=side, read=read)
    for site, by in (("z", "head_position"), ("resid_pre", "position")):
        heads = [1] if by == "head_position" else None
        fast = patch_activations(llama, task, site, by, heads=heads, layers=[0, 2])
        agree(fast, patch_activations(llama, task, site, by, heads=heads, layers=[0, 2], options=NAIVE))


def test_positions_beyond_a_prompt_are_missing_and_not_zero(llama, task) -> None:
    found = patch_changes(llama, task, [(Spot(0, "z", 1, 8),), (Spot(0, "z", 1, 20),)])
    assert np.isnan(found.values["noising"]).tolist() == [[True, False, True], [True] * 3]
    table = found.table()
    assert table.n.tolist() == [1, 0, 1, 0]
    assert table.reason[1] == "no prompt has this place"


def test_chunks_and_prompts_dealt_out_change_nothing(llama, task) -> None:
    whole = patch_activations(llama, task, "z", "head_position")
    small = patch_activations(llama, task, "z", "head_position", options=Options(rows_at_once=11))
    every = patch_activations(llama, task, "z", "head_position", options=Options(skip_unchanged=False))
    agree(whole, small, 1e-5)
    agree(whole, every, 1e-5)
    assert every.work.rows > 1.3 * whole.work.rows
    assert every.work.naive_rows == whole.work.naive_rows


def test_gqa_against_hooks_on_the_model(llama, make_pairs) -> None:
    """k and v of one KV head, before rotation where k is concerned: hooks on the model's own projections."""
    task = make_pairs((8, 8))
    model, layer = llama.attachment.hf_model, 1
    width = llama.spec.layers[layer].head_dim
    attention = llama.attachment.layers[layer].attention
    for site, module in (("k", attention.k_proj), ("v", attention.v_proj)):
        for head in range(2):
            kept: list[torch.Tensor] = []
            handle = module.register_forward_hook(lambda m, a, o, kept=kept: kept.append(o.clone()))
            with torch.no_grad():
                model(task.corrupt.ids, use_cache=False)
            handle.remove()

            def put(m, a, output, value=kept[0], head=head):
                output = output.clone()
                output[:, 5, head * width : (head + 1) * width] = value[:, 5, head * width : (head + 1) * width]
                return output

            handle = module.register_forward_hook(put)
            with torch.no_grad():
                logits = model(task.clean.ids, use_cache=False).logits
            handle.remove()
            found = patch_changes(llama, task, [(Spot(layer, site, head, 5),)], direction="noising")
            expected = task.score(logits).double().numpy()
            assert np.abs(expected - found.clean).max() > 1e-3
            np.testing.assert_allclose(found.values["noising"][0], expected, atol=1e-4)


def test_q_and_k_are_the_pattern_and_with_v_all_of_z(any_model, task) -> None:
    """Patching q and k from one run is patching the pattern; with v too, it is patching z (whole layers and heads)."""
    spec = any_model.spec
    for layer in range(spec.n_layers):
        group = range(spec.layers[layer].group)
        q, z, pattern = (tuple(Spot(layer, site, head) for head in group) for site in ("q", "z", "pattern"))
        k, v = (Spot(layer, "k", 0),), (Spot(layer, "v", 0),)
        found = patch_changes(any_model, task, [(*q, *k), pattern, (*q, *k, *v), z])
        for values in found.values.values():
            np.testing.assert_allclose(values[0], values[1], atol=1e-4)
            np.testing.assert_allclose(values[2], values[3], atol=1e-4)
        assert np.abs(found.effect("noising")).min(1).max() > 1e-5


def test_patching_everything_gives_the_other_run(any_model, task) -> None:
    spec = any_model.spec
    everything = tuple(Spot(layer, site) for layer in range(spec.n_layers) for site in ("z", "mlp_out"))
    found = patch_changes(any_model, task, [(Spot(0, "resid_pre"),), (Spot(0, "resid_pre"), *everything)])
    for values in found.values["denoising"]:
        np.testing.assert_allclose(values, found.clean, atol=1e-4)
    for values in found.values["noising"]:
        np.testing.assert_allclose(values, found.corrupt, atol=1e-4)
    assert np.abs(found.clean - found.corrupt).min() > 0.01
    gap = found.clean.mean() - found.corrupt.mean()
    np.testing.assert_allclose(found.table().effect / gap, 1.0, atol=1e-3)


def test_nothing_patched_in_where_nothing_can_reach(llama, task) -> None:
    """Before the first different token, and in the last layer before what is read, an effect is zero exactly."""
    changes = [(Spot(1, "z", None, 0),), (Spot(2, "z", None, 4),), (Spot(2, "mlp_out", None, 3),)]
    found = patch_changes(llama, task, changes)
    assert not np.nan_to_num(found.effect("noising")).any()
    assert found.work.rows == 0
    assert found.work.unchanged == found.work.runs == 18
    # Its keys are read by later rows of the same layer.
    assert np.abs(patch_changes(llama, task, [(Spot(2, "k", None, 4),)]).effect("noising")).max() > 1e-3


def test_scans_and_tables(llama, task) -> None:
    spec = llama.spec
    assert len(scan(spec, "z", "head_position", 10)) == 3 * 6 * 10
    assert len(scan(spec, "v", "head", 10)) == 3 * 2
    assert len(scan(spec, "pattern", "key", 10, heads=[0])) == 3 * 55
    found = patch_activations(llama, task, "z", "head_position", direction="noising")
    grid = found.grid("noising", ("layer", "head", "position"))
    assert grid.shape == (3, 6, 10)
    table = found.table()
    row = table[(table.layer == 1) & (table["head"] == 2) & (table.position == "4")].iloc[0]
    assert row.node == "L1H2"
    np.testing.assert_allclose(row.effect, grid[1, 2, 4])
    long = found.per_prompt()
    own = long[(long.node == "L1H2") & (long.position == "4")]
    np.testing.assert_allclose(row.effect, own.effect.mean())
    assert len(long) == len(table) * len(task)
    # A random model's gap may be of either sign, so that shares are left out, with the reason.
    gap = found.clean - found.corrupt
    assert table.recovery.isna().all() and table.reason.str.contains("not told from 0").all() and found.refusal
    sure = replace(found, clean=found.clean + 10.0)
    row = sure.table().set_index(["layer", "head", "position"]).loc[1, 2, "4"]
    np.testing.assert_allclose(row.recovery, (own.effect.mean() + 10.0) / (gap.mean() + 10.0))


def test_memory_is_refused_before_anything_is_allocated(llama, task) -> None:
    with pytest.raises(MemoryRefused, match="recorded runs"):
        patch_activations(llama, task, "z", "head", options=Options(memory_limit=200_000))


def test_wrong_spots_are_named(llama, gpt2, model_named, task) -> None:
    with pytest.raises(HeadError, match="L0KV2 does not exist: key/value heads of layer 0 run from 0 to 1"):
        patch_changes(llama, task, [(Spot(0, "k", 2),)])
    with pytest.raises(RequestError, match="the residual stream has no heads"):
        patch_activations(llama, task, "mlp_out", "head")
    with pytest.raises(RequestError, match="no role 'nobody'; roles are changed, end"):
        patch_changes(llama, task, [(Spot(0, "z", 0, "nobody"),)])
    with pytest.raises(RequestError, match="resid_mid does not exist"):
        patch_activations(model_named("gpt_neox"), task, "resid_mid")
    with pytest.raises(RequestError, match="name its KV head"):
        spot("L0H1", "k")
    assert spot("L3KV1", "v", 2) == Spot(3, "v", 1, 2)
    assert spot("L3.mlp").node == "L3.mlp"
    with pytest.raises(RequestError, match="by='key' scans entries of patterns"):
        patch_activations(gpt2, task, "z", "key")


def test_falls_back_on_whole_passes_where_blocks_do_not_run_alone(llama, task, monkeypatch) -> None:
    changes = [(Spot(1, "z", 2, 4),)]
    fast = patch_changes(llama, task, changes)
    monkeypatch.setattr("workbench.circuits.engine.near", lambda found, expected: False)
    slow = patch_changes(llama, task, changes)
    assert slow.route == (
        "one whole edited pass a change: layer 0, run on its own, does not give what it gave within the model"
    )
    assert slow.work.saved == 1
    agree(fast, slow)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_rows_take_no_more_than_predicted(model_named, make_pairs, name) -> None:
    """Storage alive while lanes run, at most what the preflight counts for so many rows."""
    model, task, limit = model_named(name), make_pairs((40, 40)), 3000
    hf_model = model.attachment.hf_model
    meter = AllocationMeter([*hf_model.parameters(), *hf_model.buffers()])
    # Once before, so that what is measured once a model is not counted.
    for rows in (500, limit):
        with meter if rows == limit else nullcontext():
            patch_activations(
                model, task, "z", "head_position", layers=[0], options=Options(rows_at_once=rows), direction="noising"
            )
    held = recorded_bytes(model, starting_sites(model), 2, 40) * 2
    logits = LOGIT_ROWS * model.spec.vocab_size * 3 * 4
    predicted = held + logits + limit * row_bytes(model, 40)
    assert predicted / 20 < meter.peak <= predicted


def test_hook_names_of_transformer_lens_are_sites(llama, task) -> None:
    for name, site in (("attn.hook_z", "z"), ("hook_resid_pre", "resid_pre"), ("attn.o.hook_in", "z")):
        found = patch_activations(llama, task, name, "layer", direction="denoising")
        truth = patch_activations(llama, task, site, "layer", direction="denoising")
        assert found.changes == truth.changes
        np.testing.assert_array_equal(found.values["denoising"], truth.values["denoising"])
    with pytest.raises(RequestError, match=r"choose site='z', layers=\[1\]"):
        patch_activations(llama, task, "blocks.1.attn.hook_z", "layer")
    with pytest.raises(RequestError, match=r"'hook_zz' cannot be patched; .* The nearest name is 'attn.hook_z'"):
        patch_activations(llama, task, "hook_zz", "layer")
    with pytest.raises(RequestError, match="before rotation"):
        patch_activations(llama, task, "attn.hook_q", "layer")
