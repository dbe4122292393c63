"""The edges of the contract: refusals, empty calls, NaN, cancellation, more queries than keys, half precision."""

from __future__ import annotations

import logging
from dataclasses import fields

import pytest
import torch

from workbench.errors import RequestError
from workbench.kernels import (
    Geometry,
    StatisticsRequest,
    attention_output,
    attention_pattern,
    attention_statistics,
    attention_tile,
    dispatch,
    pooled,
    removal_effects,
)
from workbench.kernels.fused import tuning
from workbench.kernels.fused.launch import fused_removal
from workbench.kernels.removal import add_heavy

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = ("reference", "blocks", "triton")
ROWS = StatisticsRequest(
    output=True, lse=True, max_logit=True, max_prob=True, argmax=True, top_k=2, entropy=True, distance=True,
    spread=True, mean_logit=True, first_logit=True, above=(0.1,), column_sum=True,
)  # fmt: skip


def draw(queries=20, keys=20, heads=2, kv_heads=1, dtype=torch.float32, dim=16, batch=2):
    generator = torch.Generator().manual_seed(3)
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def peaked(gap, keys=32, dim=16):
    """One head whose queries all look at the first key, `gap` logits above the others."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.zeros(1, 1, keys, dim), torch.zeros(1, 1, keys, dim)
    q[..., 0], k[:, :, 0, 0] = 1.0, gap
    v, gradient = (torch.randn(1, 1, keys, dim, generator=generator) for _ in range(2))
    return [x.to(DEVICE) for x in (q, k, v, gradient)]


def true_effects(q, k, v, gradient, window=None):
    """Blocks of 16 of `A |g - D| / (1 - A)`, 1 - A summed over the row's other keys, in float64."""
    keys, group = k.shape[2], q.shape[1] // k.shape[1]
    a, _ = attention_pattern(q, k, Geometry(len(q), q.shape[2], keys, window=window), scale=1.0)
    gains = gradient.double() @ v.double().repeat_interleave(group, 1).transpose(-1, -2)
    rest = a[..., None, :] * (1 - torch.eye(keys, dtype=torch.float64, device=a.device))
    kept = rest.sum(-1)
    mean = (rest * gains[..., None, :]).sum(-1) / kept.masked_fill(kept == 0, 1.0)
    return pooled((a * (gains - mean).abs()).masked_fill(kept == 0, 0.0), 16, "sum")


@pytest.mark.parametrize("gap", [0.0, 2.0, 11.0, 14.0, 17.0, 40.0])
def test_removal_effects_of_sink_heads_keep_their_digits(gap):
    q, k, v, gradient = peaked(gap)
    found = attention_statistics(q, k, v, StatisticsRequest(lse=True, output=True), scale=1.0)
    truth = true_effects(q, k, v, gradient)
    profile, _ = removal_effects(q, k, v, gradient, found.output, found.lse, block=16, scale=1.0)
    torch.testing.assert_close(profile.double(), truth, rtol=1e-4, atol=1e-6)
    geometry = Geometry(1, 32, 32)
    fused, heavy = fused_removal(q, k, v, geometry, 1.0, None, 16, found.lse, gradient, found.output)
    fused = add_heavy(fused, heavy, q, k, v, gradient, found.lse, geometry, 1.0, None, None, 16)
    torch.testing.assert_close(fused.double(), truth, rtol=1e-4, atol=1e-6)


def test_removal_beside_a_learned_sink_leaves_the_sink():
    """One key and a sink: removing the key leaves an output of zero."""
    q, k, v, gradient = peaked(3.0, keys=1)
    sinks = torch.tensor([-8.0], device=DEVICE)
    found = attention_statistics(q, k, v, StatisticsRequest(lse=True, output=True), scale=1.0, sinks=sinks)
    profile, _ = removal_effects(q, k, v, gradient, found.output, found.lse, block=16, scale=1.0, sinks=sinks)
    mass = torch.sigmoid(torch.tensor(11.0, dtype=torch.float64))
    wanted = float(mass) * float((gradient * v).double().sum().abs())
    assert float(profile.sum()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_small_gradients_survive_half_precision(size):
    q, k, v = draw(40, 40, dtype=torch.float16)
    gradient = torch.randn(q.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE) * size
    found = attention_statistics(q, k, v, StatisticsRequest(lse=True, output=True), scale=1.0)
    geometry = Geometry(2, 40, 40)
    fused, heavy = fused_removal(q, k, v, geometry, 1.0, None, 16, found.lse, gradient, found.output)
    fused = add_heavy(fused, heavy, q, k, v, gradient, found.lse, geometry, 1.0, None, None, 16)
    torch.testing.assert_close(fused.double() / size, true_effects(q, k, v, gradient) / size, rtol=4e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e5, 1e-7])
def test_features_of_any_size_in_half_precision(size):
    q, k, v = draw(dtype=torch.float16)
    functions = torch.rand(2, 20, 3, generator=torch.Generator().manual_seed(5)).to(DEVICE) * size
    request = StatisticsRequest()
    found, truth = (
        attention_statistics(q, k, v, request, key_features=functions, implementation=how).features / size
        for how in ("triton", "reference")
    )
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


def test_small_masses_off_a_sink_in_half_precision():
    q, k, v, _ = (x.half() for x in peaked(18.0, keys=640))
    functions = torch.ones(1, 640, 2, device=DEVICE)
    functions[:, 0, 0], functions[:, 1:, 1] = 0.0, 0.0
    for given in (functions, functions.bool()):
        found, truth = (
            attention_statistics(
                q[:, :, -1:], k, v, StatisticsRequest(), scale=1.0, key_features=given.float(), implementation=how
            ).features[0, 0, -1]
            for how in ("triton", "reference")
        )
        assert 5e-6 < truth[0] < 2e-5
        # Of each key up to 2^-40 is lost.
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=640 * 2.0**-40)


WRONG = {
    "v shorter than k": lambda q, k, v: ((q, k, v[:, :, :10]), {}),
    "k of one prompt": lambda q, k, v: ((q, k[:1], v), {}),
    "v with more heads": lambda q, k, v: ((q, k, v.repeat(1, 2, 1, 1)), {}),
    "another width of k": lambda q, k, v: ((q[..., :8], k, v), {}),
    "another dtype of v": lambda q, k, v: ((q, k, v.double()), {}),
    "whole numbers": lambda q, k, v: ((q.long(), k.long(), v.long()), {}),
    "heads that do not divide": lambda q, k, v: ((q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1)), {}),
    "no KV heads": lambda q, k, v: ((q, k[:, :0], v[:, :0]), {}),
    "sinks": lambda q, k, v: ((q, k, v), {"sinks": torch.zeros(3)}),
    "key_start": lambda q, k, v: ((q, k, v), {"key_start": torch.zeros(1, dtype=torch.long)}),
    "negative key_start": lambda q, k, v: ((q, k, v), {"key_start": torch.tensor([-1, 0])}),
    "key_end beyond": lambda q, k, v: ((q, k, v), {"key_end": torch.tensor([21, 20])}),
    "key_features": lambda q, k, v: ((q, k, v), {"key_features": torch.zeros(2, 19, 1)}),
    "value_features": lambda q, k, v: ((q, k, v), {"value_features": torch.zeros(2, 2, 20, 1)}),
    "query_keys": lambda q, k, v: ((q, k, v), {"query_keys": torch.zeros(2, 19, 1, dtype=torch.long)}),
    "query_keys of floats": lambda q, k, v: ((q, k, v), {"query_keys": torch.zeros(2, 20, 1)}),
    "query_weights": lambda q, k, v: ((q, k, v), {"query_weights": torch.zeros(2, 1, 19)}),
    "lse": lambda q, k, v: ((q, k, v), {"lse": torch.zeros(2, 2, 19)}),
    "softcap": lambda q, k, v: ((q, k, v), {"softcap": 0.0}),
    "scale": lambda q, k, v: ((q, k, v), {"scale": float("nan")}),
    "a two-sided window": lambda q, k, v: ((q, k, v), {"window": 4, "causal": False}),
    "no such implementation": lambda q, k, v: ((q, k, v), {"implementation": "foo"}),
}


@pytest.mark.usefixtures("unchecked_signatures")
@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_does_not_belong_together_is_refused(wrong, implementation):
    tensors, options = wrong(*draw())
    options = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) and "key_" not in n else x for n, x in options.items()}
    with pytest.raises(RequestError):
        attention_statistics(*tensors, ROWS, **{"implementation": implementation} | options)


@pytest.mark.usefixtures("unchecked_signatures")
def test_tiles_removals_and_pools_refuse_wrong_shapes():
    q, k, v = draw()
    found = attention_statistics(q, k, v, StatisticsRequest(lse=True, output=True))
    with pytest.raises(RequestError, match=r"lse is \[2, 2, 1\]: expected \[2, 2, 20\]"):
        attention_tile(q, k, found.lse[:, :, :1], slice(0, 5), slice(0, 5))
    for gradient, lse in ((v, found.lse), (found.output, found.lse[:1])):
        with pytest.raises(RequestError):
            removal_effects(q, k, v, gradient, found.output, lse, block=16)
    with pytest.raises(RequestError):
        attention_output(q, k, v[:, :, :3], scale=1.0)
    with pytest.raises(RequestError, match="'mean'"):
        pooled(found.lse, 2, "mean")
    assert pooled(-torch.ones(3, 3), 2, "max").max() == -1
    bad = ({"top_k": 2.5}, {"offsets": (-1.5,)}, {"offsets": (float("nan"),)}, {"block": 16.0}, {"diagonal_last": 0.5})
    for options in bad:
        with pytest.raises(RequestError, match="whole number"):
            StatisticsRequest(**options)


@pytest.mark.parametrize("implementation", [*EVERY, "identities", "auto"])
@pytest.mark.parametrize("axis", ["batch", "heads", "queries", "keys"])
def test_empty_calls_give_empty_or_zero_results(axis, implementation):
    sizes = {"batch": 2, "heads": 2, "kv_heads": 1, "queries": 5, "keys": 5} | {axis: 0}
    sizes["kv_heads"] = 0 if axis == "heads" else 1
    q, k, v = draw(**sizes)
    if implementation == "identities" and axis in ("queries", "keys"):
        implementation = "auto"
    found = attention_statistics(q, k, v, ROWS, implementation=implementation)
    assert found.output.shape == (*q.shape[:3], 16) and found.column_sum.shape == (*q.shape[:2], k.shape[2])
    assert (found.output == 0).all() and (found.argmax == -1).all()
    assert attention_output(q, k, v, scale=1.0).shape == found.output.shape
    assert removal_effects(q, k, v, q, q, found.lse, block=16)[0].sum() == 0
    assert attention_tile(q, k, found.lse, slice(0, q.shape[2]), slice(0, k.shape[2])).sum() == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["blocks", "triton"])
def test_more_queries_than_keys(implementation, causal):
    """Without causality every query sees all keys; with it, those before the first key see none."""
    q, k, v = draw(90, 70)
    truth = attention_statistics(q, k, v, ROWS, implementation="reference", causal=causal)
    found = attention_statistics(q, k, v, ROWS, implementation=implementation, causal=causal)
    assert (truth.argmax[:, :, :20] == -1).all() == causal and truth.lse.shape == (2, 2, 90)
    torch.testing.assert_close(truth.column_sum.sum(), torch.tensor(4.0 * (70 if causal else 90), device=DEVICE))
    for field in fields(found):
        got, want = getattr(found, field.name), getattr(truth, field.name)
        if got is not None and field.name not in ("argmax", "top_keys"):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, f=field: f"{f.name}: {m}")
    if causal:
        torch.testing.assert_close(attention_output(q, k, v, scale=0.25), truth.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [20, 3])
@pytest.mark.parametrize("implementation", [*EVERY, "identities"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_in_is_nan_out(where, value, implementation, queries):
    q, k, v = draw(queries, 70 if queries == 3 else 20)
    if implementation == "identities" and queries == 3:
        pytest.skip("identities need a query per key")
    row = queries - 2
    (q if where == "query" else k)[1, 0, row - queries, :] = value
    hit = torch.zeros(2, 2, queries, dtype=torch.bool, device=DEVICE)
    hit[1, 0 if where == "query" else slice(None), row : row + 1 if where == "query" else None] = True
    found = attention_statistics(q, k, v, ROWS, implementation=implementation)
    if where == "key" and value == float("inf"):
        # For some queries that key is minus infinity or NaN (inf - inf), never a log-sum-exp of its own.
        assert found.lse[hit].isnan().any() and not found.lse.isinf().any()
        hit = found.lse.isnan()
    for name in ("lse", "output", "max_prob", "entropy", "distance", "above", "top_mass", "mean_logit"):
        if implementation == "identities" and name == "entropy" and where == "key":
            # There keys stand as values, and a value's NaN may reach every row.
            assert found.entropy[hit].isnan().all()
            continue
        bad = getattr(found, name).isnan()
        bad = bad if bad.ndim == 3 else bad.any(-1)
        assert torch.equal(bad & hit, hit), name
        if where == "query" or value != value:
            assert torch.equal(bad, hit), name
    assert (found.argmax[hit] == -1).all() and (found.argmax[~found.lse.isnan()] >= 0).all()


@pytest.mark.parametrize("implementation", [*EVERY, "identities"])
def test_nan_in_padding_reaches_no_real_row(implementation):
    q, k, v = draw()
    clean = {"key_start": torch.tensor([0, 4]), "key_end": torch.tensor([20, 17])}
    extras = {"key_features": torch.rand(2, 20, 2).to(DEVICE), "query_weights": torch.rand(2, 1, 20).to(DEVICE)}
    truth = attention_statistics(q, k, v, ROWS, implementation="reference", **clean, **extras)
    for x in (q, k, v):
        x[1, :, :4] = x[1, :, 17:] = float("nan")
    extras["key_features"][1, :4] = extras["query_weights"][1, :, 17:] = float("nan")
    found = attention_statistics(q, k, v, ROWS, implementation=implementation, **clean, **extras)
    for field in fields(found):
        got, want = getattr(found, field.name), getattr(truth, field.name)
        if got is not None and field.name not in ("argmax", "top_keys"):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, f=field: f"{f.name}: {m}")
    torch.testing.assert_close(attention_output(q, k, v, scale=0.25, **clean), truth.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", [300, 2050])
def test_chunked_prefill_takes_no_square_mask(monkeypatch, keys):
    """Rows go in blocks whose mask is bounded, and gradients are those of the full pattern."""
    sizes = []
    whole = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(dispatch, "MASK", 1 << 14)

    def spy(*args, attn_mask=None, **options):
        sizes.append(attn_mask.numel())
        return whole(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(dispatch, "scaled_dot_product_attention", spy)
    q, k, v = (x.cpu() for x in draw(100, keys))
    q.requires_grad_(), k.requires_grad_()
    pattern, _ = attention_pattern(q, k, Geometry(2, 100, keys), scale=0.25)
    truth = pattern @ v.double().repeat_interleave(2, 1)
    found = attention_output(q, k, v, scale=0.25)
    assert len(sizes) > 1 and max(sizes) <= 1 << 14
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    wanted, got = (torch.autograd.grad(x.square().sum(), (q, k)) for x in (truth, found))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", EVERY)
def test_small_sink_masses_do_not_cancel(implementation):
    q, k, v = draw()
    sinks = torch.tensor([-19.0, -30.0], device=DEVICE)
    found = attention_statistics(
        q, k, v, StatisticsRequest(sink_mass=True, lse=True), sinks=sinks, implementation=implementation
    )
    truth = torch.exp(sinks.double()[:, None] - found.lse.double())
    assert 0 < truth.min() < 1e-12
    torch.testing.assert_close(found.sink_mass.double(), truth, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("implementation", ["blocks", "triton"])
def test_far_numbers_do_not_wrap(implementation):
    q, k, v = draw()
    request = StatisticsRequest(
        first=(2**31 - 1, 2**40), recent=(2**40,), offsets=(-(2**40), 0), column_last=(2**40,), diagonal_last=2**40
    )
    keys = torch.tensor([2**32 + 5, 25, -7, 5], device=DEVICE).expand(2, 20, 4)
    bounds = {"key_start": torch.tensor([5, 0]), "query_keys": keys}
    truth = attention_statistics(q, k, v, request, implementation="reference", **bounds)
    found = attention_statistics(q, k, v, request, implementation=implementation, **bounds)
    assert (truth.at_keys[..., :3] == 0).all() and (truth.at_keys[..., 3] > 0).any()
    for name in ("first", "recent", "offsets", "at_keys", "column_last", "diagonal_last"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=1e-5, atol=1e-5)


def test_untuned_tiles_are_said_once_for_each_device_and_kernel(caplog):
    tuning._lookup.cache_clear(), tuning._warn.cache_clear()
    with caplog.at_level(logging.WARNING, logger="workbench"):
        for width in (64, 128):
            for kernel in ("rows", "rows only", "columns", "blocks", "band"):
                tuning._lookup((8, 0), kernel, width, 2)
        tuning._lookup((9, 0), "rows only", 64, 2)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4 and all("8.0" in one for one in said)
    tuning._lookup.cache_clear(), tuning._warn.cache_clear()
