"""Edits against what they must equal: changed weights, naive attention, the other prompt, nothing at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workbench.errors import HeadError, RequestError
from workbench.models import Batch, Head
from workbench.models.architectures import locate, output_weight
from workbench.tracing import SITES, Model, ablate, patch, statistics

LENGTHS = (19, 11)
few = pytest.mark.parametrize("subject", ["gpt2", "gpt_neox", "qwen2", "gpt_oss"], indirect=True)
one = pytest.mark.parametrize("subject", ["llama"], indirect=True)


def sites_of(model: Model) -> list[str]:
    return [site for site in SITES if site != "resid_mid" or not model.spec.parallel]


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-4) -> None:
    """To a tolerance that is relative to the largest value."""
    torch.testing.assert_close(found, truth, rtol=0, atol=tolerance * max(1.0, float(truth.abs().max())))


def differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-2 * b.abs().max())


@contextmanager
def head_removed(subject, head: Head) -> Iterator[None]:
    """The untouched copy with this head's rows of W_O set to zero, for a while."""
    layer = subject.model.spec.layers[head.layer]
    weight = output_weight(locate(subject.own)[head.layer], layer)
    with torch.no_grad():
        before = weight[head.head].clone()
        weight[head.head] = 0
        yield
        weight[head.head] = before


@pytest.mark.parametrize("side", ["right", "left"])
def test_zero_is_a_head_without_output_weights(subject, make_batch, side: str) -> None:
    model, batch = subject.model, make_batch(LENGTHS, side)
    real, clean = batch.mask, subject.logits(batch)
    for head in (Head(0, 1), Head(2, model.spec.layers[2].heads - 1)):
        with head_removed(subject, head):
            truth = subject.logits(batch)
        found = model.trace(batch, edits=[ablate([str(head)])], logits="all")
        close(found.logits[real], truth[real])
        assert differ(found.logits[real], clean[real])


def test_a_layer_without_heads_leaves_the_bias(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((7, 7))
    outputs: list[Tensor] = []
    projection = model.attachment.layers[1].projection
    hook = projection.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.trace(batch, edits=[ablate([head for head in model.spec.heads() if head.layer == 1])])
    hook.remove()
    bias = torch.zeros(model.spec.d_model) if projection.bias is None else projection.bias.detach()
    assert torch.equal(outputs[-1], bias.expand_as(outputs[-1]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_uniform_and_to_sink_are_what_naive_patterns_give(subject, make_batch, side: str) -> None:
    model, batch = subject.model, make_batch(LENGTHS, side)
    layers = model.spec.layers
    edits = [
        ablate([Head(layer, head) for layer in range(len(layers))], how)
        for head, how in ((1, "uniform"), (layers[0].heads - 1, "to_sink"))
    ]
    found, clean = (model.trace(batch, edits=changes, sites=["z", "v"]) for changes in (edits, []))
    for layer, shape in enumerate(layers):
        last = shape.heads - 1
        for row, (start, length) in enumerate(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)):
            real = slice(start, start + length)
            distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
            visible = (distance >= 0) & (distance < (shape.window or length))
            z, v = found.site("z", layer)[row, real], found.site("v", layer)[row, real]
            close(z[:, 1], (visible / visible.sum(-1, keepdim=True)) @ v[:, 1 // shape.group], 1e-5)
            assert torch.equal(z[:, last], v[visible.to(torch.uint8).argmax(-1), last // shape.group])
            if layer == 0:
                others = [head for head in range(last) if head != 1]
                close(z[:, others], clean.site("z", 0)[row, real][:, others], 1e-5)


def test_uniform_is_a_query_of_zero_unless_there_is_a_learned_sink(subject, make_batch) -> None:
    model, batch = subject.model, make_batch(LENGTHS)
    zero = patch("q", torch.zeros(model.spec.layers[1].head_dim), layer=1, heads=[2])
    silent = model.trace(batch, edits=[zero], sites=["z"], logits="all")
    uniform = model.trace(batch, edits=[ablate(["L1H2"], "uniform")], sites=["z"], logits="all")
    if model.spec.layers[1].sinks:
        assert differ(silent.site("z", 1)[batch.mask], uniform.site("z", 1)[batch.mask])
    else:
        close(silent.logits[batch.mask], uniform.logits[batch.mask])


@few
def test_mean_and_resample_take_reference_prompts(subject, make_batch) -> None:
    model, batch, reference = subject.model, make_batch(LENGTHS), make_batch((25, 19, 30), seed=3)
    head = Head(1, 2)
    theirs = model.trace(reference, sites=["z"]).site("z", 1)[:, :, 2]
    mean = model.trace(batch, edits=[ablate([head], "mean", reference=reference)], sites=["z"]).site("z", 1)
    expected = theirs[reference.mask].mean(0)
    close(mean[:, :, 2][batch.mask], expected.expand(int(batch.mask.sum()), -1), 1e-5)
    by_value = ablate([head], "mean", values={head: expected})
    close(model.trace(batch, edits=[by_value], sites=["z"]).site("z", 1), mean, 1e-5)

    moved = model.trace(batch, edits=[ablate([head], "resample", reference=reference)], sites=["z"]).site("z", 1)
    close(moved[:, :, 2][batch.mask], theirs[:2, : batch.ids.shape[1]][batch.mask], 1e-5)
    # One reference prompt serves all prompts, however they are cut into pieces.
    single = reference.select([2])
    for budget in (None, 12):
        edit = ablate([head], "resample", reference=single)
        moved = model.trace(batch, edits=[edit], sites=["z"], tokens_at_once=budget).site("z", 1)
        truth = theirs[2, : batch.ids.shape[1]].expand(2, -1, -1)
        close(moved[:, :, 2][batch.mask], truth[batch.mask], 1e-5)


@few
def test_positions_limit_an_ablation(subject, make_batch) -> None:
    model, batch = subject.model, make_batch(LENGTHS)
    positions = torch.zeros_like(batch.mask)
    positions[0, 4:9] = positions[1, 2] = True
    clean = model.trace(batch, sites=["z"], logits="all")
    reference = make_batch((19, 19), seed=4)
    for how in ("zero", "uniform", "to_sink", "mean", "resample"):
        edit = ablate(["L1H0", "L1H3"], how, positions=positions, reference=reference)
        found = model.trace(batch, edits=[edit], sites=["z"], logits="all", tokens_at_once=20)
        changed = ((found.site("z", 1) - clean.site("z", 1)).abs().amax(-1) > 1e-4)[batch.mask]
        assert changed[positions[batch.mask]][:, [0, 3]].any(0).all()
        assert not changed[:, [1, 2]].any()
        assert not changed[~positions[batch.mask]].any()
        early = torch.arange(batch.ids.shape[1]) < torch.tensor([[4], [2]])
        close(found.logits[early & batch.mask], clean.logits[early & batch.mask])
        assert differ(found.logits[0, 4:], clean.logits[0, 4:])


@few
def test_statistics_see_the_edits_of_earlier_layers(subject, make_batch) -> None:
    model, batch, head = subject.model, make_batch((20,)), Head(0, 1)
    wanted = [statistics.entropy(), statistics.output_norm()]
    clean, found = (model.trace(batch, statistics=wanted, edits=edits) for edits in ([], [ablate([head])]))
    for name in ("entropy", "output_norm"):
        close(found[name][:, 0], clean[name][:, 0], 1e-5)
    assert differ(found["entropy"][:, 1], clean["entropy"][:, 1])
    with head_removed(subject, head):
        patterns = subject.truth(batch.ids[0].tolist()).patterns
    truth = torch.stack([torch.special.entr(pattern).sum(-1) for pattern in patterns[1:]])
    close(found["entropy"][0, 1:].double(), truth)


def test_a_site_patched_with_its_own_value_changes_nothing(subject, make_batch) -> None:
    model, batch = subject.model, make_batch(LENGTHS)
    own = model.trace(batch, sites=sites_of(model), logits="all")
    for site in sites_of(model):
        found = model.trace(batch, edits=[patch(site, own.site(site, 1), layer=1)], logits="all")
        close(found.logits[batch.mask], own.logits[batch.mask], 1e-5)


def test_patches_from_another_prompt(subject, make_batch) -> None:
    model, batch, other = subject.model, make_batch((15,)), make_batch((15,), seed=1)
    sites = sites_of(model)
    here, there = (model.trace(x, sites=sites, logits="all") for x in (batch, other))

    def run(*names: str, layer: int = 1) -> Tensor:
        edits = [patch(name, there.site(name, layer), layer=layer) for name in names]
        return model.trace(batch, edits=edits, logits="all").logits

    moved = {name: run(name) for name in ("q", "k", "v", "pattern", "z", "result")}
    for name, logits in moved.items():
        assert differ(logits, here.logits), name
    close(run("q", "k"), moved["pattern"])
    close(run("q", "k", "v"), moved["z"])
    close(run("pattern", "v"), moved["z"])
    close(moved["result"], moved["z"])
    assert differ(moved["q"], moved["pattern"])

    last = model.spec.n_layers - 1
    close(run("resid_pre", layer=0), there.logits)
    close(run("resid_post", layer=last), there.logits)
    close(run("resid_pre", layer=last), there.logits)
    if not model.spec.parallel:
        close(run("resid_mid", layer=last), there.logits)
        assert differ(run("attn_out", layer=last), there.logits)


def test_patches_move_what_is_added_to_the_residual(subject, make_batch) -> None:
    model, batch, other = subject.model, make_batch((9, 15)), make_batch((15, 15), seed=1)
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_post", "result"]
    here, there = (model.trace(x, sites=sites) for x in (batch, other))
    found = model.trace(batch, edits=[patch("attn_out", there.site("attn_out", 1), layer=1)], sites=sites)
    close(found.site("attn_out", 1)[batch.mask], there.site("attn_out", 1)[batch.mask], 1e-6)
    close(
        found.site("resid_post", 1),
        found.site("resid_pre", 1) + found.site("attn_out", 1) + found.site("mlp_out", 1),
        1e-5,
    )
    close(found.site("resid_pre", 1), here.site("resid_pre", 1), 1e-5)

    found = model.trace(batch, edits=[patch("mlp_out", there.site("mlp_out", 1), layer=1)], sites=sites)
    total = here.site("resid_pre", 1) + here.site("attn_out", 1) + there.site("mlp_out", 1)
    close(found.site("resid_post", 1)[batch.mask], total[batch.mask], 1e-5)

    # A patched result shows as it was patched.
    found = model.trace(batch, edits=[patch("result", there.site("result", 1), layer=1, heads=[2])], sites=sites)
    close(found.site("result", 1)[:, :, 2][batch.mask], there.site("result", 1)[:, :, 2][batch.mask], 1e-6)
    close(found.site("result", 1)[:, :, 1], here.site("result", 1)[:, :, 1], 1e-5)


@few
def test_heads_and_positions_limit_a_patch(subject, make_batch) -> None:
    model, batch, other = subject.model, make_batch((12, 8)), make_batch((12, 12), seed=1)
    positions = torch.zeros_like(batch.mask)
    positions[0, 3:7] = positions[1, 5] = True
    sites = ["q", "k", "v", "z", "pattern"]
    here, there = (model.trace(x, sites=sites) for x in (batch, other))
    for site in sites:
        heads = [0] if site in ("k", "v") else [3, 1]
        value = there.site(site, 1)
        axis = 1 if site == "pattern" else 2
        for given in (value, value.index_select(axis, torch.tensor(heads))):
            edit = patch(site, given, layer=1, heads=heads, positions=positions)
            found = model.trace(batch, edits=[edit], sites=sites, tokens_at_once=12).site(site, 1)
            chosen = torch.zeros(found.shape[:3] if axis == 2 else found.shape[:2], dtype=torch.bool)
            if axis == 2:
                chosen[:, :, heads] = True
                chosen &= positions[:, :, None]
            else:
                chosen[:, heads] = True
                chosen = chosen[:, :, None] & positions[:, None, :]
            real = batch.mask[:, :, None].expand_as(chosen) if axis == 2 else batch.mask[:, None].expand_as(chosen)
            close(found[chosen], value[chosen], 1e-6)
            close(found[real & ~chosen], here.site(site, 1)[real & ~chosen], 1e-5)


@one
def test_values_for_all_prompts_and_tokens_are_spread(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((6, 9, 4))
    generator = torch.Generator().manual_seed(0)
    shape = (3, 9, 6, 8)
    for leading in ((), (6,), (9, 1), (9, 6), (1, 9, 6), (3, 1, 1), (3, 9, 6)):
        value = torch.randn(*leading, 8, generator=generator)
        for budget in (None, 9):
            found = model.trace(batch, edits=[patch("z", value, layer=1)], sites=["z"], tokens_at_once=budget)
            assert torch.equal(found.site("z", 1)[batch.mask], value.expand(shape)[batch.mask])
    pattern = torch.full((9, 9), 0.25).tril()
    for budget in (None, 9):
        found = model.trace(batch, edits=[patch("pattern", pattern, layer=1)], sites=["pattern"], tokens_at_once=budget)
        for row, length in enumerate((6, 9, 4)):
            assert (found.site("pattern", 1)[row, :, :length, :length] == pattern[:length, :length]).all()


@one
def test_edits_apply_in_their_order_of_places(subject, make_batch) -> None:
    """q, k and v before the pattern, then ablations, then z: a patch of z has the last word."""
    model, batch = subject.model, make_batch((9,))
    value = torch.randn(8, generator=torch.Generator().manual_seed(0))
    edits = [patch("z", value, layer=1, heads=[2]), ablate(["L1H2", "L1H3"])]
    z = model.trace(batch, edits=edits, sites=["z"]).site("z", 1)
    assert torch.equal(z[0, :, 2], value.expand(9, -1))
    assert not z[0, :, 3].any() and z[0, :, 4].any()


@one
def test_wrong_heads_and_sites_are_named(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((8, 5))
    z = torch.zeros(8)
    for head, message in (("L3H0", "L3H0 does not exist: layers run from 0 to 2"), ("L1H6", "L1H6 .* from 0 to 5")):
        with pytest.raises(HeadError, match=message):
            model.trace(batch, edits=[ablate([head])])
        with pytest.raises(HeadError, match=message):
            model.generate(batch, 2, edits=[ablate([head])])
    with pytest.raises(HeadError, match="'L1' names no head"):
        ablate(["L1"])
    with pytest.raises(HeadError, match="values has none for L1H2"):
        model.trace(batch, edits=[ablate(["L1H1", "L1H2"], "mean", values={Head(1, 1): z})])
    with pytest.raises(HeadError, match=r"patch\(z\)' of layer 3: layers run from 0 to 2"):
        model.trace(batch, edits=[patch("z", z, layer=3)])
    with pytest.raises(HeadError, match=r"patch\('v', layer=1\): head 2 does not exist; they run from 0 to 1"):
        model.trace(batch, edits=[patch("v", z, layer=1, heads=[2])])
    with pytest.raises(RequestError, match=r"patch\('resid_pre', heads=\[0\]\): the residual has no heads"):
        model.trace(batch, edits=[patch("resid_pre", torch.zeros(48), layer=1, heads=[0])])
    with pytest.raises(RequestError, match="'hook_zz' is no site"):
        patch("hook_zz", z, layer=1)
    with pytest.raises(RequestError, match=r"patch\('z'\) needs a layer"):
        patch("z", z)
    with pytest.raises(RequestError, match=r"patch\('blocks.1.attn.hook_z', layer=2\) names two layers"):
        patch("blocks.1.attn.hook_z", z, layer=2)
    with pytest.raises(RequestError, match="is q before rotation"):
        model.trace(batch, edits=[patch("blocks.1.attn.hook_q", z)])


@one
def test_wrong_shapes_and_references_are_named(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((8, 5))
    with pytest.raises(RequestError, match=r"patch\('z', layer=1\) has shape \(2, 7, 6, 8\), .* \(2, 8, 6, 8\)"):
        model.trace(batch, edits=[patch("z", torch.zeros(2, 7, 6, 8), layer=1)])
    with pytest.raises(RequestError, match=r"patch\('k', layer=1\) has shape \(2, 8, 3, 8\), .* \(2, 8, 1, 8\)"):
        model.trace(batch, edits=[patch("k", torch.zeros(2, 8, 3, 8), layer=1, heads=[1])])
    with pytest.raises(RequestError, match=r"patch\('pattern', layer=1\) has shape \(7, 7\), .* \(2, 6, 8, 8\)"):
        model.trace(batch, edits=[patch("pattern", torch.zeros(7, 7), layer=1)])
    with pytest.raises(RequestError, match=r"positions of shape \(1, 8\) for a batch of \(2, 8\)"):
        model.trace(batch, edits=[ablate(["L1H1"], positions=torch.ones(1, 8, dtype=torch.bool))])
    with pytest.raises(RequestError, match=r"positions of shape \(2, 7\) for a batch of \(2, 8\)"):
        model.trace(batch, edits=[patch("z", torch.zeros(8), layer=1, positions=torch.ones(2, 7, dtype=torch.bool))])
    for shape in ((9,), (7, 8), (1, 2, 8), (3, 8, 9)):
        edit = ablate(["L1H1"], "mean", values={Head(1, 1): torch.zeros(shape)})
        with pytest.raises(RequestError, match=rf"the value for L1H1 has shape \({', '.join(map(str, shape))}"):
            model.trace(batch, edits=[edit])
    for how in ("mean", "resample"):
        with pytest.raises(RequestError, match=f"how='{how}'.* needs reference prompts"):
            ablate(["L1H1"], how)


@one
@pytest.mark.parametrize(
    ("lengths", "side"), [((8, 4), "right"), ((7, 7), "right"), ((9, 8, 8), "left"), ((8, 5), "left"), ((7,), "right")]
)
def test_resampling_needs_a_reference_wherever_there_are_tokens(subject, make_batch, lengths, side: str) -> None:
    edit = ablate(["L1H1"], "resample", reference=make_batch(lengths, side, seed=2))
    with pytest.raises(RequestError, match=f"{len(lengths)} reference prompts of up to {max(lengths)} tokens"):
        subject.model.trace(make_batch((8, 5)), edits=[edit])


@one
def test_a_trace_leaves_nothing_behind(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((8, 5))
    clean = model.trace(batch, logits="all").logits
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.attachment.hf_model.modules()]
    value = torch.zeros(6, 8)
    model.trace(batch, edits=[ablate(["L0H1"]), patch("result", torch.zeros(48), layer=1), patch("z", value, layer=2)])
    bad = replace(batch, ids=batch.ids.clone())
    with pytest.raises(RequestError):
        model.trace(bad, edits=[patch("z", torch.zeros(3), layer=0)])

    def interrupted(*count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.trace(batch, edits=[ablate(["L0H1"])], sites=["resid_post"], progress=interrupted)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.attachment.hf_model.modules()]
    assert torch.equal(model.trace(Batch(batch.ids, batch.mask), logits="all").logits, clean)
