"""Sites against each other and against the model's own patterns; logits and losses against the untouched model's."""

from __future__ import annotations

import re
from math import prod

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench.errors import HeadError, MemoryRefused, RequestError
from workbench.models.architectures import describe, locate
from workbench.models.testing import TINY
from workbench.tracing import SHAPES, SITES, Model
from workbench.tracing.plan import PATTERN_LIMIT_BYTES
from workbench.tracing.sites import HOOKS, parse_site, site_shape

LENGTHS = (21, 1, 9)
one = pytest.mark.parametrize("subject", ["llama"], indirect=True)


def sites_of(model: Model) -> list[str]:
    return [site for site in SITES if site != "resid_mid" or not model.spec.parallel]


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    """To a tolerance that is relative to the largest value."""
    torch.testing.assert_close(found, truth, rtol=0, atol=tolerance * max(1.0, float(truth.abs().max())))


@pytest.mark.parametrize("side", ["right", "left"])
def test_sites_have_their_shapes_and_add_up(subject, make_batch, side: str) -> None:
    model, batch = subject.model, make_batch(LENGTHS, side)
    trace, spec, real = model.trace(batch, sites=sites_of(model)), model.spec, batch.mask
    assert len(trace.sites) == spec.n_layers * len(sites_of(model))
    for (site, layer), value in trace.sites.items():
        assert value.shape == site_shape(site, spec, layer, *batch.ids.shape), site
        assert value.ndim == len(SHAPES[site].split())
        assert value.dtype == torch.float32
    for layer, shape in enumerate(spec.layers):
        at = {site: trace.site(site, layer) for site in sites_of(model)}
        pattern, v = at["pattern"], at["v"].transpose(1, 2).repeat_interleave(shape.group, dim=1)
        close((pattern @ v).transpose(1, 2)[real], at["z"][real])
        close(torch.einsum("b t h d, h d m -> b t h m", at["z"], subject.output_weight(layer)), at["result"])
        total = at["resid_pre"] + at["attn_out"]
        if not spec.parallel:
            close(total, at["resid_mid"])
        close(total + at["mlp_out"], at["resid_post"])
        if layer + 1 < spec.n_layers:
            assert torch.equal(at["resid_post"], trace.site("resid_pre", layer + 1))


@pytest.mark.parametrize("side", ["right", "left"])
def test_patterns_and_outputs_are_the_models_own(exact, make_batch, side: str) -> None:
    model, batch = exact.model, make_batch(LENGTHS, side)
    trace = model.trace(batch, sites=["pattern", "z"])
    for row, (start, length) in enumerate(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)):
        real = slice(start, start + length)
        truth = exact.truth(batch.ids[row, real].tolist())
        for layer in range(model.spec.n_layers):
            whole = trace.site("pattern", layer)[row]
            assert whole.dtype == torch.float32
            close(whole[:, real, real].double(), truth.patterns[layer])
            assert not whole[:, ~batch.mask[row]].any() and not whole[:, :, ~batch.mask[row]].any()
            close(trace.site("z", layer)[row, real], truth.z[layer])


def test_results_sum_to_the_output_of_the_projection(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((12, 12))
    outputs: list[Tensor] = []
    hooks = [
        modules.projection.register_forward_hook(lambda module, args, output: outputs.append(output))
        for modules in locate(subject.own)
    ]
    with torch.no_grad():
        subject.own(batch.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    trace = model.trace(batch, sites=["result"])
    for layer, (output, modules) in enumerate(zip(outputs, locate(subject.own), strict=True)):
        bias = modules.projection.bias
        total = trace.site("result", layer).sum(2) + (0 if bias is None else bias.detach())
        close(total, output.reshape(total.shape))


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_losses_are_the_untouched_models(subject, make_batch, side: str) -> None:
    model, batch = subject.model, make_batch(LENGTHS, side)
    truth, real = subject.logits(batch), batch.mask
    everything = model.trace(batch, logits="all", loss=True)
    close(everything.logits[real], truth[real])
    assert everything.logits.shape == truth.shape

    last = model.trace(batch, logits="last")
    ends = (batch.starts + batch.lengths - 1)[:, None]
    assert last.logit_positions.tolist() == ends.tolist()
    close(last.logits[:, 0], truth[torch.arange(3), ends[:, 0]])

    positions = torch.stack([batch.starts + 0, ends[:, 0], batch.starts + batch.lengths // 2], dim=1)
    chosen = model.trace(batch, logits=positions)
    assert chosen.logits.shape == (3, 3, model.spec.vocab_size)
    close(chosen.logits, torch.stack([truth[row, columns] for row, columns in enumerate(positions)]))

    expected = cross_entropy(truth[:, :-1].transpose(1, 2), batch.ids[:, 1:], reduction="none")
    expected = expected.masked_fill(~(real[:, 1:] & real[:, :-1]), float("nan"))
    assert everything.loss.shape == (3, batch.ids.shape[1] - 1)
    torch.testing.assert_close(everything.loss, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@one
def test_losses_of_single_tokens_and_of_many_rows(subject, make_batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject.model
    assert model.trace([[5], [6]], loss=True).loss.shape == (2, 0)
    batch = make_batch((21, 9))
    whole = model.trace(batch, loss=True).loss
    monkeypatch.setattr("workbench.tracing.trace.LOSS_ROWS", 8)
    torch.testing.assert_close(model.trace(batch, loss=True).loss, whole, equal_nan=True)


@one
def test_logits_take_only_the_rows_that_are_wanted(subject, make_batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = subject.model, []
    original = model.attachment.hf_model.forward

    def forward(*args, **options):
        kept.append(options["logits_to_keep"].tolist())
        return original(*args, **options)

    monkeypatch.setattr(model.attachment.hf_model, "forward", forward)
    batch = make_batch((6, 4, 5))
    model.predict_memory(batch)
    kept.clear()
    model.trace(batch)
    model.trace(batch, logits="last", tokens_at_once=10)
    model.trace(batch, logits="all", tokens_at_once=10)
    model.trace(batch, logits=torch.tensor([[2, 0], [0, 2], [2, 2]]))
    assert kept == [[5], [5], [3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 2]]


def test_hook_names_of_transformer_lens(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((6,))
    trace = model.trace(batch, sites=["blocks.1.attn.hook_z", "blocks.2.hook_resid_post", "blocks.0.attn.hook_rot_q"])
    assert sorted(trace.sites) == [("q", 0), ("resid_post", 2), ("z", 1)]
    assert trace.site("blocks.1.attn.hook_z") is trace.site("z", 1)
    assert trace.site("blocks.0.attn.hook_rot_q") is trace.site("q", 0)
    for name in ("q", "k"):
        if model.spec.rotary:
            with pytest.raises(RequestError, match=f"'blocks.0.attn.hook_{name}' is {name} before rotation"):
                model.trace(batch, sites=[f"blocks.0.attn.hook_{name}"])
        else:
            assert model.trace(batch, sites=[f"blocks.0.attn.hook_{name}"]).sites.keys() == {(name, 0)}


@one
def test_every_hook_name_is_its_site(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((6,))
    names = {name: site for name, site in HOOKS.items() if not (site in ("q", "k") and "rot" not in name)}
    trace = model.trace(batch, sites=[f"blocks.1.{name}" for name in names])
    assert trace.sites.keys() == {(site, 1) for site in HOOKS.values()}
    for name, site in names.items():
        assert trace.site(f"blocks.1.{name}") is trace.site(site, 1)
        # With and without the block, and with or without `attn.`, as TransformerLens takes them.
        if name not in ("hook_in", "hook_out"):
            assert parse_site(name, model.spec) == (site, None)
        if name.startswith("attn.hook") and name != "attn.hook_out":
            assert parse_site(name.removeprefix("attn."), model.spec) == (site, None)
    assert parse_site("blocks.0.attn.hook_resid_pre") == ("resid_pre", 0)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("blocks.2.attn.hook_zz", "blocks.2.attn.hook_z"),
        ("hook_patern", "attn.hook_pattern"),
        ("blocks.1.hook_resid_mdi", "blocks.1.hook_resid_mid"),
        ("blocks.0.attn.o.hook_im", "blocks.0.attn.o.hook_in"),
        ("resid_prev", "resid_pre"),
    ],
)
def test_unknown_names_say_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(RequestError, match=f"is no site; .* The nearest name is '{re.escape(nearest)}'"):
        parse_site(text)


def test_outputs_before_a_norm_are_refused() -> None:
    spec = describe(TINY["gemma2"]())
    with pytest.raises(RequestError, match=r"'attn.hook_out' is what goes into a norm in gemma2; .* is hook_attn_out"):
        parse_site("attn.hook_out", spec)
    assert parse_site("attn.hook_out", describe(TINY["qwen3"]())) == ("attn_out", None)


def test_resid_mid_is_refused_where_there_is_none(subject, make_batch) -> None:
    if subject.model.spec.parallel:
        with pytest.raises(RequestError, match="resid_mid does not exist"):
            subject.model.trace(make_batch((6,)), sites=["resid_mid"])
    else:
        assert subject.model.trace(make_batch((6,)), sites=["resid_mid"]).site("resid_mid", 0).any()


@one
def test_wrong_requests_are_named(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((8, 5))
    for text in ("zz", "blocks.1.attn.hook_scores", "blocks.x.attn.hook_z", "hook_in", "blocks.1.z"):
        with pytest.raises(RequestError, match=f"{re.escape(text)}' is no site; sites are q, k, v, pattern"):
            model.trace(batch, sites=[text])
    with pytest.raises(HeadError, match=r"'blocks.3.attn.hook_z' of layer 3: layers run from 0 to 2"):
        model.trace(batch, sites=["blocks.3.attn.hook_z"])
    trace = model.trace(batch, sites=["blocks.1.attn.hook_z"])
    for asked in (("z", 0), ("z", None), ("v", 1)):
        with pytest.raises(RequestError, match="was not captured; this trace holds z of layer 1"):
            trace.site(*asked)
    for positions, wrong in ((torch.tensor([[0], [8]]), "8"), (torch.tensor([[-1], [2]]), "-1")):
        with pytest.raises(RequestError, match=f"logits: position {wrong} is outside the batch of 8 columns"):
            model.trace(batch, logits=positions)
    with pytest.raises(RequestError, match=r"positions of shape \(1, 2\) for 2 prompts"):
        model.trace(batch, logits=torch.tensor([[0, 1]]))
    assert parse_site("z") == ("z", None)


@one
def test_large_patterns_are_refused_with_the_memory_they_take(subject, make_batch, monkeypatch) -> None:
    batch = make_batch((300,))
    need = prod((3, 6, 300, 300, 4))
    monkeypatch.setattr("workbench.tracing.plan.PATTERN_LIMIT_BYTES", need - 1)
    with pytest.raises(MemoryRefused, match=r"The pattern of 3 layers over 300 tokens takes 6.18 MiB; 6.18 MiB are"):
        subject.model.trace(batch, sites=["pattern"])
    assert subject.model.trace(batch, sites=["blocks.1.attn.hook_pattern"]).site("pattern", 1).shape == (1, 6, 300, 300)
    assert PATTERN_LIMIT_BYTES == 2**30
