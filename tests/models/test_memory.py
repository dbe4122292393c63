"""Predicted peaks against those that torch's profiler sees, and refusals before anything is allocated."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from workbench.errors import MemoryRefused
from workbench.models import Batch
from workbench.models.memory import AllocationMeter, Prediction, free_memory, size
from workbench.models.testing import TINY
from workbench.tracing import SITES, Model, Statistic, Trace, load, patch, statistics

# The issue asks for 0.2.
TOLERANCE = 0.1


def measured_peak(run: Callable[[], object]) -> int:
    """Most bytes allocated at once while `run` runs, as the allocator itself reports it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def make_batch(lengths: Sequence[int], side: str = "right", vocabulary: int = 101) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return Batch.from_ids(rows, side=side)


def everything(batch: Batch) -> list[Statistic | tuple[Statistic, ...]]:
    return [
        statistics.lse(), statistics.entropy(), statistics.max_prob(), statistics.argmax(), statistics.top_k(4),
        statistics.first(1), statistics.recent(16), statistics.offset(-1), statistics.mass("span", batch.ids % 3 == 0),
        statistics.mass("weights", torch.rand(*batch.ids.shape, 2)), statistics.at_keys("self", batch.ids * 0),
        statistics.distance(), statistics.sink_mass(), statistics.column_mean(), statistics.column_last(16),
        statistics.column_max(), statistics.value_norm(), statistics.output_norm(), statistics.result_norm(),
    ]  # fmt: skip


def check(model: Model, batch: Batch, **options: Any) -> Prediction:
    traces: list[Trace] = []
    model.predict_memory(batch)
    peak = measured_peak(lambda: traces.append(model.trace(batch, **options)))
    prediction = traces[0].prediction
    assert abs(prediction.peak / peak - 1) < TOLERANCE, f"{prediction}, measured {size(peak)} ({sorted(options)})"
    return prediction


@pytest.mark.parametrize("name", TINY)
def test_predictions_are_what_the_profiler_measures(name: str) -> None:
    model, batch = load(TINY[name]()), make_batch((256, 256, 256, 256))
    sites = [site for site in SITES if site not in ("pattern", "result", "resid_mid")]
    plain = check(model, batch)
    assert plain.stored == 0
    traced = check(model, batch, statistics=everything(batch))
    assert traced.stored > 0 and traced.peak > plain.peak
    kept = check(model, batch, sites=sites)
    assert kept.stored >= 3 * 8 * 1024 * 4 * model.spec.d_model / 4
    # A vocabulary that makes logits matter.
    wide, batch = load(TINY[name](vocab_size=1501)), make_batch((256, 256, 256, 256), vocabulary=1501)
    whole = check(wide, batch, logits="all")
    assert whole.stored == 1024 * 1501 * 4 and whole.peak > 2 * whole.stored
    assert check(wide, batch, loss=True).stored == 0


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_predictions_of_ragged_batches(name: str, side: str) -> None:
    model, batch = load(TINY[name]()), make_batch((256, 200, 77, 10), side)
    check(model, batch)
    check(model, batch, statistics=everything(batch))
    check(model, batch, sites=["z", "resid_post"], logits="last", loss=True)


@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_predictions_of_batches_in_pieces(name: str) -> None:
    model, batch = load(TINY[name]()), make_batch((100, 256, 250, 40))
    for options in ({"statistics": everything(batch)}, {"sites": ["q", "z", "mlp_out"]}, {"logits": "all"}):
        in_pieces = check(model, batch, tokens_at_once=256, **options)
        assert in_pieces.peak < check(model, batch, **options).peak


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_predictions_of_what_is_large(name: str) -> None:
    model, batch = load(TINY[name]()), make_batch((256, 256))
    patterns = check(model, batch, sites=["pattern"])
    assert patterns.stored == sum(2 * layer.heads * 256 * 256 * 4 for layer in model.spec.layers)
    check(model, batch, sites=["result"])
    check(model, batch, sites=["resid_mid"])
    value = model.trace(batch, sites=["result", "pattern"])
    check(model, batch, edits=[patch("result", value.site("result", 1) * 2, layer=1)])
    check(model, batch, edits=[patch("pattern", value.site("pattern", 1) * 2, layer=1)])


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_predictions_in_bfloat16(name: str) -> None:
    model, batch = load(TINY[name]().to(torch.bfloat16)), make_batch((256, 256, 256, 256))
    check(model, batch)
    check(model, batch, statistics=everything(batch))
    check(model, batch, sites=["q", "z", "resid_post"], logits="all", loss=True)


def test_predictions_grow_with_tokens_and_not_with_their_square() -> None:
    model = load(TINY["llama"]())
    peaks = [
        model.predict_memory(batch, statistics=everything(batch)).peak
        for batch in map(make_batch, ((4096,), (8192,), (16384,)))
    ]
    assert 1.8 < (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) < 2.2


def test_a_trace_over_the_limit_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = load(TINY["llama"]()), make_batch((64, 64))
    prediction = model.predict_memory(batch, statistics=[statistics.entropy()])
    monkeypatch.setattr(model.attachment.hf_model, "forward", None)
    with pytest.raises(MemoryRefused) as caught:
        model.trace(batch, statistics=[statistics.entropy()], memory_limit=prediction.peak - 1)
    message = str(caught.value)
    assert f"needs about {size(prediction.peak)} beyond the weights" in message
    assert f"({size(prediction.stored)} are results" in message
    assert f"but {size(prediction.peak - 1)} are allowed" in message
    assert "tokens_at_once (now 128 tokens)" in message
    monkeypatch.undo()
    trace = model.trace(batch, statistics=[statistics.entropy()], memory_limit=prediction.peak)
    assert trace.prediction == prediction
    assert str(prediction) == f"predicted peak {size(prediction.peak)} beyond the weights, 9 KiB of results"


def test_what_the_machine_has_free_is_the_limit_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = load(TINY["llama"]()), make_batch((8,))
    monkeypatch.setattr("workbench.tracing.model.free_memory", lambda device: 1000)
    with pytest.raises(MemoryRefused, match="but 0.977 KiB are allowed"):
        model.trace(batch)
    model.trace(batch, memory_limit=10**9)
    monkeypatch.setattr("workbench.tracing.model.free_memory", lambda device: None)
    model.trace(batch)


def test_the_probes_fit_models_with_few_positions() -> None:
    for positions in (1, 2, 3):
        model = load(TINY["gpt2"](n_positions=positions))
        assert model.predict_memory([[5] * positions]).peak > 0


def test_the_meter_sees_what_is_alive() -> None:
    known = torch.ones(1000)
    with AllocationMeter([known]) as meter:
        a = known * 2
        view = a[:500].view(5, 100)
        assert (meter.current, meter.peak) == (4000, 4000)
        b = (a + known).sum()
        assert meter.peak == 8004
        assert meter.current == 4004
        del a
        assert meter.current == 4004
        del view, b
        assert meter.current == 0
        known.mul_(2)
        assert (meter.current, meter.peak) == (0, 8004)


def test_sizes_read_well() -> None:
    counts = (0, 999, 1000, 1023 * 1024, 1536, 2**20, 3.25 * 2**30, 2**40, 5 * 2**50)
    written = ["0 B", "999 B", "0.977 KiB", "0.999 MiB", "1.5 KiB", "1 MiB", "3.25 GiB", "1 TiB", "5.12e+03 TiB"]
    assert [size(count) for count in counts] == written


def test_free_memory_is_what_the_system_says() -> None:
    found = free_memory(torch.device("cpu"))
    assert found is None or 2**20 < found < 2**50
