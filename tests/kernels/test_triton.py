"""The Triton kernels against the float64 oracle: in the interpreter without a GPU, compiled where there is one.

The interpreter has no bfloat16 products; half precision is tested there in float16.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from workbench.errors import RequestError
from workbench.kernels import AttentionStatistics, StatisticsRequest, attention_statistics

# The interpreter's own: it turns one-element arrays into numbers, and computes masked entries like all others.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
EVERYTHING = StatisticsRequest(
    output=True, lse=True, max_logit=True, max_prob=True, argmax=True, top_k=5, entropy=True, distance=True,
    spread=True, mean_logit=True, first_logit=True, first=(1, 4), recent=(1, 16), offsets=(0, -1, -7, -63),
    above=(0.1, 0.01), sink_mass=True, column_sum=True, column_max=True, column_last=(3, 64, 7), column_above=(0.2,),
    block=16, diagonal=True, diagonal_last=9,
)  # fmt: skip
ROWS = StatisticsRequest(
    output=True, lse=True, max_logit=True, max_prob=True, argmax=True, entropy=True, distance=True, spread=True,
    mean_logit=True, sink_mass=True,
)  # fmt: skip
# Counts and first queries jump where an entry is at a threshold.
KEYS = ("argmax", "top_keys", "above", "column_above")


def draw(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    q, k, v = normal(batch, heads, queries, dim), normal(batch, kv_heads, keys, dim), normal(batch, kv_heads, keys, dim)
    extras = {
        "key_features": (torch.rand(batch, keys, 5, generator=generator) < 0.3).float().to(DEVICE),
        "value_features": torch.randn(batch, kv_heads, keys, 2, generator=generator).to(DEVICE),
        "query_keys": torch.randint(-1, keys, (batch, queries, 3), generator=generator).to(DEVICE),
        "query_weights": torch.rand(batch, 2, queries, generator=generator).to(DEVICE),
    }
    return (q, k, v), extras


def check(
    keys: int,
    *,
    queries: int | None = None,
    heads: tuple[int, int] = (3, 1),
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    request: StatisticsRequest = EVERYTHING,
    extras: bool = True,
    seed: int = 0,
    **options: Any,
) -> AttentionStatistics:
    tensors, functions = draw(2, *heads, queries or keys, keys, dim, dtype, seed)
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    options |= functions if extras else {}
    truth = attention_statistics(*tensors, request, implementation="reference", **options)
    found = attention_statistics(*tensors, request, implementation="triton", **options)
    # What the output loses to half-precision products is the size of one rounding of the values.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for field in fields(AttentionStatistics):
        got, want = getattr(found, field.name), getattr(truth, field.name)
        assert (got is None) == (want is None), field.name
        if got is None or field.name in KEYS:
            continue
        assert got.shape == want.shape, field.name
        error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want).clamp(min=1.0)
        assert error < tolerance, f"{field.name}: {error:.2e}"
        if dtype == torch.float32:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, f=field: f"{f.name}: {m}")
    check_keys(tensors, found, tolerance, options)
    return found


def check_keys(tensors: Any, found: AttentionStatistics, tolerance: float, options: dict[str, Any]) -> None:
    """Keys that were named carry the masses that were reported: looked up by the oracle."""
    named = [x for x in (found.argmax, found.top_keys) if x is not None]
    if not named:
        return
    columns = torch.cat([x if x.ndim == 4 else x[..., None] for x in named], dim=-1)
    bare = {n: x for n, x in options.items() if n in ("window", "softcap", "sinks", "causal", "key_start", "key_end")}
    assert found.max_prob is not None
    for head in range(columns.shape[1]):
        truth = attention_statistics(
            *tensors, StatisticsRequest(), implementation="reference", query_keys=columns[:, head].contiguous(), **bare
        )
        assert truth.at_keys is not None
        masses = truth.at_keys[:, head]
        torch.testing.assert_close(masses[..., 0], found.max_prob[:, head], rtol=tolerance, atol=tolerance)
        if found.top_mass is not None:
            torch.testing.assert_close(masses[..., 1:], found.top_mass[:, head], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keys", [1, 2, 65, 130])
@pytest.mark.usefixtures("poisoned_memory")
def test_ragged_lengths(keys: int) -> None:
    check(keys, heads=(4, 2))


def test_padding_on_both_sides() -> None:
    found = check(70, key_start=torch.tensor([0, 13]), key_end=torch.tensor([70, 60]))
    outside = torch.tensor([i < 13 or i >= 60 for i in range(70)])
    assert found.output is not None and found.column_sum is not None and found.argmax is not None
    assert (found.output[1][:, outside] == 0).all() and (found.column_sum[1][:, outside] == 0).all()
    assert (found.argmax[1][:, outside] == -1).all()


def test_windows_caps_and_learned_sinks() -> None:
    check(100, window=16)
    check(70, softcap=1.5, sinks=torch.tensor([0.5, -3.0, 6.0]))
    check(70, softcap=2.0, window=20, sinks=torch.tensor([0.5, -3.0, 6.0]), key_start=torch.tensor([0, 30]))


@pytest.mark.parametrize("queries", [1, 5, 100])
def test_fewer_queries_than_keys(queries: int) -> None:
    """Few rows are packed by KV head, and their keys split among programs."""
    check(300, queries=queries, request=EVERYTHING if queries < 6 else ROWS)
    check(300, queries=queries, request=ROWS, window=150, sinks=torch.tensor([0.5, -3.0, 6.0]), extras=False)


@pytest.mark.parametrize("keys", [70, 130])
def test_half_precision(keys: int) -> None:
    check(keys, dtype=HALF, dim=32)


@pytest.mark.parametrize("spread", [0.0, 30.0], ids=["uniform", "one-hot"])
def test_structured_inputs(spread: float) -> None:
    (q, k, v), _ = draw(1, 2, 1, 70, 70, 16, torch.float32)
    truth = attention_statistics(q * spread, k * spread, v, ROWS, implementation="reference")
    found = attention_statistics(q * spread, k * spread, v, ROWS, implementation="triton")
    for name in ("output", "max_prob", "distance", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), rtol=2e-4, atol=2e-4)
    assert all(
        torch.isfinite(getattr(found, f.name)).all() for f in fields(found) if getattr(found, f.name) is not None
    )


def test_a_known_log_sum_exp_spares_the_row_pass() -> None:
    (q, k, v), _ = draw(1, 4, 2, 70, 70, 16, torch.float32)
    lse = attention_statistics(q, k, v, StatisticsRequest(lse=True), implementation="triton").lse
    request = StatisticsRequest(column_sum=True, block=32)
    truth = attention_statistics(q, k, v, request, implementation="reference")
    found = attention_statistics(q, k, v, request, implementation="triton", lse=lse)
    torch.testing.assert_close(found.column_sum, truth.column_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.block_max, truth.block_max, rtol=1e-5, atol=1e-5)
    # It is used, and not computed again: a shifted one scales what follows from it.
    shifted = attention_statistics(q, k, v, request, implementation="triton", lse=lse + 1.0)
    torch.testing.assert_close(shifted.column_sum, truth.column_sum * torch.exp(torch.tensor(-1.0)).to(DEVICE))


@settings(max_examples=6 if DEVICE == "cuda" else 5, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    keys = data.draw(st.integers(1, 150))
    queries = data.draw(st.integers(1, keys))
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, keys), st.integers(0, keys)))) for _ in range(2)]
    start, end = (torch.tensor([b[i] for b in bounds]) for i in (0, 1))
    window = data.draw(st.none() | st.integers(1, 160))
    sinks = torch.linspace(-2, 4, kv_heads * group) if data.draw(st.booleans()) else None
    check(keys, queries=queries, heads=(kv_heads * group, kv_heads), dim=data.draw(st.sampled_from([12, 16])),
          key_start=start, key_end=end, window=window, sinks=sinks, extras=False,
          softcap=data.draw(st.none() | st.floats(0.5, 30)))  # fmt: skip


def test_what_the_kernels_do_not_take_is_refused() -> None:
    (q, k, v), _ = draw(1, 1, 1, 4, 4, 300, torch.float32)
    with pytest.raises(RequestError, match="take up to 256"):
        attention_statistics(q, k, v, ROWS, implementation="triton")
    with pytest.raises(RequestError, match="Blocks of 100"):
        StatisticsRequest(block=100)
    with pytest.raises(RequestError, match="between 0 and 1"):
        StatisticsRequest(above=(1.5,))
    with pytest.raises(RequestError, match="causal"):
        attention_statistics(q, k, v, StatisticsRequest(diagonal=True), causal=False)


@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability()[0] != 9, reason="Hopper's kernels need its tensor cores"
)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "causal"),
    [
        *((1000, 1000, 128, True), (1000, 1000, 64, True), (128, 128, 128, True), (257, 513, 128, False)),
        *((70, 2000, 128, True), (300, 300, 64, False), (1, 1, 64, False)),
    ],
)
def test_the_hopper_kernels_compute_what_the_reference_computes(monkeypatch, queries, keys, dim, causal):
    from workbench.kernels.fused import hopper_pass

    taken = []
    takes = hopper_pass.takes
    monkeypatch.setattr(hopper_pass, "takes", lambda *call: taken.append(takes(*call)) or taken[-1])
    plain = dict.fromkeys(("distance", "spread", "mean_logit"), False)
    for changed in ({}, {"argmax": False}, {"output": False}):
        check(
            keys, queries=queries, heads=(4, 2), dim=dim, dtype=HALF, causal=causal,
            request=replace(ROWS | StatisticsRequest(column_sum=True, column_max=True), **plain, **changed),
        )  # fmt: skip
    assert taken and all(taken)


@pytest.mark.skipif(DEVICE == "cpu", reason="deterministic on a device is what is asked")
def test_two_runs_give_the_same_bits():
    (q, k, v), _ = draw(2, 4, 2, 700, 700, 64, HALF)
    request = StatisticsRequest(output=True, lse=True, entropy=True, argmax=True, column_sum=True, column_max=True)
    first, second = (attention_statistics(q, k, v, request, implementation="triton") for _ in range(2))
    for name in ("output", "lse", "entropy", "argmax", "column_sum", "column_max"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
