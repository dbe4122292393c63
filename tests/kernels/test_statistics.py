"""Every implementation against the float64 oracle: ragged lengths, grouped heads, padding, windows, caps, sinks."""

from __future__ import annotations

from dataclasses import fields

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from workbench.errors import RequestError
from workbench.kernels import (
    AttentionStatistics,
    Geometry,
    StatisticsRequest,
    attention_output,
    attention_pattern,
    attention_statistics,
    blocks,
    identities,
)

EVERYTHING = StatisticsRequest(
    output=True, lse=True, max_logit=True, max_prob=True, argmax=True, top_k=5, entropy=True, distance=True,
    spread=True, mean_logit=True, first_logit=True, first=(1, 4), recent=(1, 16), offsets=(0, -1, -7, -63),
    above=(0.1, 0.01), sink_mass=True, column_sum=True, column_max=True, column_last=(3, 64, 7), column_above=(0.2,),
    block=16, diagonal=True, diagonal_last=9,
)  # fmt: skip
LINEAR = StatisticsRequest(
    output=True, lse=True, entropy=True, distance=True, first=(1, 4), offsets=(0, -1, -7), sink_mass=True
)
LENGTHS = (1, 2, 63, 64, 65, 257)
GROUPS = {"1:1": (2, 2), "1:3": (3, 1), "1:8": (8, 1)}


def make(length, heads=3, kv_heads=1, batch=2, dim=16, queries=None, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries or length, dim, generator=generator) * spread
    k = torch.randn(batch, kv_heads, length, dim, generator=generator) * spread
    v = torch.randn(batch, kv_heads, length, dim + 4, generator=generator)
    features = (torch.rand(batch, length, 6, generator=generator) < 0.3).float()
    slots = torch.randint(-1, length, (batch, queries or length, 3), generator=generator)
    return q, k, v, features, slots


def compare(found: AttentionStatistics, truth: AttentionStatistics, tolerance: float = 1e-5) -> None:
    """Every field: same presence, no NaN, and equal to `tolerance`, relative above one and absolute below."""
    for field in fields(AttentionStatistics):
        got, want = getattr(found, field.name), getattr(truth, field.name)
        assert (got is None) == (want is None), field.name
        if got is None or field.name in ("argmax", "top_keys"):
            continue
        assert not got.isnan().any(), field.name
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m, f=field: f"{f.name}: {m}")


def check_keys(found: AttentionStatistics, pattern: torch.Tensor) -> None:
    """The keys that were named carry the masses that were reported (rounding may break ties either way)."""
    for keys, mass in ((found.argmax[..., None], found.max_prob[..., None]), (found.top_keys, found.top_mass)):
        assert ((keys == -1) == (mass == 0)).all()
        at_keys = torch.gather(pattern, 3, keys.clamp(min=0)).float() * (keys >= 0)
        torch.testing.assert_close(at_keys, mass, rtol=1e-5, atol=1e-5)
    ranks = found.top_keys.sort(-1).values
    assert ((ranks[..., 1:] != ranks[..., :-1]) | (ranks[..., 1:] == -1)).all()


def check(
    length, *, request=EVERYTHING, implementation="blocks", batch=2, queries=None, start=None, end=None, **options
):
    heads, kv_heads = options.pop("heads", (3, 1))
    q, k, v, features, slots = make(length, heads, kv_heads, batch, queries=queries, seed=length)
    arguments = {"key_features": features, "query_keys": slots, "key_start": start, "key_end": end} | options
    arguments["value_features"] = torch.randn(batch, kv_heads, length, 2)
    # More weightings than a head is wide.
    arguments["query_weights"] = torch.rand(batch, 20, q.shape[2])
    truth = attention_statistics(q, k, v, request, implementation="reference", **arguments)
    found = attention_statistics(q, k, v, request, implementation=implementation, **arguments)
    compare(found, truth)
    if request is EVERYTHING:
        geometry = Geometry(batch, q.shape[2], length, window=options.pop("window", None), start=start, end=end)
        check_keys(found, attention_pattern(q, k, geometry, scale=q.shape[-1] ** -0.5, **options)[0])
    return found


@pytest.mark.parametrize("heads", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("implementation", ["blocks", "identities"])
def test_ragged_lengths_and_grouped_heads(length, heads, implementation):
    check(length, heads=heads, implementation=implementation)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("implementation", ["blocks", "identities"])
def test_padding(length, side, implementation):
    """The padded prompt's real rows equal the oracle's, and its padding rows and columns are zero."""
    pad = length // 3
    start = torch.tensor([0, pad if side != "right" else 0])
    end = torch.tensor([length, length - pad // 2 if side != "left" else length])
    found = check(length, start=start, end=end, implementation=implementation)
    outside = (torch.arange(length) < start[1]) | (torch.arange(length) >= end[1])
    assert (found.output[1][:, outside] == 0).all() and (found.column_sum[1][:, outside] == 0).all()
    assert (found.column_weighted[1][..., outside] == 0).all()
    assert (found.argmax[1][:, outside] == -1).all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [1, 2, 16, 64, 100])
def test_windows(length, window):
    check(length, window=window)
    check(length, window=window, end=torch.tensor([length, max(1, length // 2)]))


@pytest.mark.parametrize("length", LENGTHS)
def test_soft_cap_and_learned_sinks(length):
    check(length, softcap=1.5)
    check(length, sinks=torch.tensor([0.5, -3.0, 6.0]))
    check(length, sinks=torch.tensor([0.5, -3.0, 6.0]), softcap=2.0, window=16, start=torch.tensor([0, length // 4]))


@pytest.mark.parametrize("queries", [1, 5, 64])
def test_fewer_queries_than_keys_are_right_aligned(queries):
    check(130, queries=queries)
    check(130, queries=queries, window=20, start=torch.tensor([0, 30]))


def test_small_tiles_change_nothing(monkeypatch):
    monkeypatch.setitem(blocks.TILE_ELEMENTS, "cpu", 1 << 12)
    for length in (65, 257):
        check(length, heads=(8, 2), batch=3)
        check(length, heads=(8, 2), batch=3, window=40, end=torch.tensor([length, length, length - 1]))


@pytest.mark.parametrize("spread", [0.0, 30.0], ids=["uniform", "one-hot"])
def test_structured_inputs(spread):
    """Identical logits and saturated ones; ties make the choice of a key arbitrary, not its probability."""
    q, k, v, features, _slots = make(130, spread=spread)
    truth = attention_statistics(q, k, v, EVERYTHING, implementation="reference", key_features=features)
    found = attention_statistics(q, k, v, EVERYTHING, implementation="blocks", key_features=features)
    for name in ("output", "max_prob", "top_mass", "distance", "column_sum", "column_max", "features", "first"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=2e-4, atol=2e-4)
    if spread == 0.0:
        torch.testing.assert_close(found.entropy, torch.log(torch.arange(1.0, 131.0)).expand_as(found.entropy))
        chosen = torch.gather(found.column_sum * 0 + 1, 2, found.argmax)
        assert chosen.all() and (found.argmax <= torch.arange(130)).all()


def test_huge_logits_stay_finite():
    q, k, v, _features, _slots = make(70)
    found = attention_statistics(q * 1e4, k * 1e4, v, EVERYTHING, implementation="blocks", sinks=torch.zeros(3))
    for field in fields(found):
        value = getattr(found, field.name)
        assert value is None or torch.isfinite(value).all(), field.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_accumulate_in_float32(dtype):
    q, k, v, _features, _slots = (x.to(dtype) if x.is_floating_point() else x for x in make(200))
    truth = attention_statistics(q.double(), k.double(), v.double(), EVERYTHING, implementation="reference")
    compare(attention_statistics(q, k, v, EVERYTHING, implementation="blocks"), truth, 1e-5)


REACHED = StatisticsRequest(
    output=True, lse=True, entropy=True, distance=True, mean_logit=True, first_logit=True, first=(1, 40, 4),
    recent=(3, 16), offsets=(0, -1, -7), sink_mass=True, column_sum=True, column_last=(3, 64),
)  # fmt: skip


def refuse_blocks(*args, **options):
    raise AssertionError("blocks were asked")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads", GROUPS.values(), ids=GROUPS)
def test_identities_reach_all_that_is_linear_alone(length, heads, monkeypatch):
    monkeypatch.setattr(identities, "blocked_statistics", refuse_blocks)
    check(length, heads=heads, request=REACHED, implementation="identities")
    check(length, heads=heads, request=REACHED, implementation="identities", start=torch.tensor([length // 3, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identities_leave_the_remainder_to_blocks(dtype, monkeypatch):
    """Blocks are asked for exactly what identities do not reach, and bands of both come back in their order."""
    asked = []

    def spy(*args, **options):
        asked.append((args[3], {name for name, value in options.items() if value is not None}))
        return blocks.blocked_statistics(*args, **options)

    monkeypatch.setattr(identities, "blocked_statistics", spy)
    q, k, v, features, slots = (x.to(dtype) if x.is_floating_point() else x for x in make(90))
    request = StatisticsRequest(lse=True, first=(40, 2), recent=(30, 4, 17, 1), column_sum=True, max_prob=True)
    arguments = {"key_features": features, "query_keys": slots}
    truth = attention_statistics(q, k, v, request, implementation="reference", **arguments)
    # The CPU's own operator sums bfloat16 logits a little more coarsely than blocks do.
    tolerance = 1e-5 if dtype == torch.float32 else 5e-4
    compare(attention_statistics(q, k, v, request, implementation="identities", **arguments), truth, tolerance)
    left, given = asked[0]
    if dtype == torch.float32:
        assert left == StatisticsRequest(recent=(30, 17), max_prob=True) and given == {"scale"}
    else:
        assert left == StatisticsRequest(first=(40,), recent=(30, 17), max_prob=True, column_sum=True)
        assert given == {"scale", "key_features"}


def test_short_distances_keep_their_digits_at_far_positions():
    """Heads that attend to the previous token, two thousand tokens on."""
    k = torch.nn.functional.normalize(torch.randn(1, 1, 2048, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    q, request = k.roll(1, dims=2) * 40, StatisticsRequest(distance=True)
    truth = attention_statistics(q, k, k, request, implementation="reference", scale=1.0).distance
    found = attention_statistics(q, k, k, request, implementation="identities", scale=1.0).distance
    assert truth[..., 1000:].median() < 2
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


def test_top_k_beyond_the_visible_keys_is_padded():
    q, k, v, _, _ = make(3)
    found = attention_statistics(q, k, v, StatisticsRequest(top_k=5), implementation="blocks")
    assert (found.top_keys[:, :, 0, 1:] == -1).all() and (found.top_mass[:, :, 0, 1:] == 0).all()
    torch.testing.assert_close(found.top_mass.sum(-1), torch.ones(2, 3, 3))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    """Hypothesis draws a shape, a padding and a variant; blocks equal the oracle."""
    length = data.draw(st.integers(1, 200))
    queries = data.draw(st.integers(1, length))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length)))) for _ in range(2)]
    start, end = (torch.tensor([b[i] for b in bounds]) for i in (0, 1))
    window = data.draw(st.none() | st.integers(1, 220))
    sinks = torch.linspace(-2, 4, kv_heads * group) if data.draw(st.booleans()) else None
    softcap = data.draw(st.none() | st.floats(0.5, 30))
    check(length, queries=queries, heads=(kv_heads * group, kv_heads), start=start, end=end, window=window,
          sinks=sinks, softcap=softcap)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 2.0}, {"sinks": True}], ids=str)
def test_attention_output_equals_the_reference_and_differentiates(options):
    q, k, v, _, _ = make(40)
    if options.get("sinks"):
        options = {"sinks": torch.tensor([0.1, 2.0, -1.0])}
    start, end = torch.tensor([0, 5]), torch.tensor([40, 38])
    truth = attention_statistics(q, k, v, StatisticsRequest(output=True), implementation="reference", scale=0.3,
                                 key_start=start, key_end=end, **options).output  # fmt: skip
    arguments = dict(scale=0.3, key_start=start, key_end=end, **options)
    torch.testing.assert_close(attention_output(q, k, v, **arguments), truth, rtol=1e-5, atol=1e-5)
    q.requires_grad_()
    output = attention_output(q, k, v, **arguments)
    torch.testing.assert_close(output, truth, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    if "sinks" in options:
        sinks = options["sinks"].requires_grad_()
        attention_output(q.detach(), k, v, **{**arguments, "sinks": sinks}).sum().backward()
        assert (sinks.grad != 0).all()
    assert torch.isfinite(q.grad).all() and (q.grad[0].abs().sum(-1)[:, 1:] > 0).all()


def test_visible_count_equals_the_mask():
    geometry = Geometry(2, 30, 50, True, 7, torch.tensor([0, 22]), torch.tensor([50, 41]))
    assert torch.equal(geometry.visible_count(), geometry.visible().sum(1))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="no CUDA device here; run on one before a release"
            ),
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [12, 64])
def test_what_is_chosen_by_itself_is_exact(device, dtype, dim):
    """Whatever "auto" takes for a device and dtype keeps float32 accuracy (widths that fused kernels dislike too)."""
    q, k, v, _, _ = (x.to(device, dtype) if x.is_floating_point() else x for x in make(300, 4, 2, dim=dim))
    for request in (EVERYTHING, LINEAR, StatisticsRequest(lse=True, first=(1, 8), offsets=(-1,))):
        truth = attention_statistics(q, k, v[..., :dim], request, implementation="reference")
        found = attention_statistics(q, k, v[..., :dim], request)
        for field in fields(found):
            got, want = getattr(found, field.name), getattr(truth, field.name)
            if want is None or field.name in ("argmax", "top_keys", "above", "column_above"):
                continue
            # The output's products are in the inputs' own precision, as any attention's are.
            rounded = dtype == torch.bfloat16 and field.name == "output"
            tolerance = 2e-3 if rounded else 1e-4
            assert (got - want).norm() < tolerance * want.norm().clamp(min=1.0), field.name
            if not rounded:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_requests_merge_and_refuse():
    union = StatisticsRequest(lse=True, first=(1,), top_k=2) | StatisticsRequest(entropy=True, first=(4, 1), top_k=5)
    assert union == StatisticsRequest(lse=True, entropy=True, first=(1, 4), top_k=5)
    with pytest.raises(RequestError, match="looks ahead"):
        StatisticsRequest(offsets=(1,))
    with pytest.raises(RequestError, match="top_k = 65"):
        StatisticsRequest(top_k=65)
    q, k, v, _, _ = make(8)
    for options in ({"window": 3}, {"softcap": 2.0}, {"sinks": torch.zeros(3)}, {"causal": False}):
        with pytest.raises(RequestError, match="implementation='blocks'"):
            attention_statistics(q, k, v, LINEAR, implementation="identities", **options)
    with pytest.raises(RequestError, match="not a multiple"):
        attention_statistics(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), LINEAR)
