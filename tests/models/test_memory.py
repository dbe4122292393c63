"""Predicted peaks against those that torch's profiler sees, and refusals before anything is allocated."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from operator import itemgetter
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from workbench.errors import MemoryRefused
from workbench.models import Batch
from workbench.models.memory import AllocationMeter, Prediction, free_memory, size
from workbench.models.testing import TINY
from workbench.tracing import SITES, Model, Site, Statistic, load, patch, statistics
from workbench.tracing.sites import site_shape

# The issue asks for 0.2.
TOLERANCE = 0.05


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The profiler sees what its own thread allocates, and no workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured_peaks(runs: Sequence[Callable[[], object]]) -> list[int]:
    """Most bytes allocated at once beyond what was held before, run by run, as the allocator itself reports it."""
    # Nothing older is to be freed on the way.
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for index, run in enumerate(runs):
            with record_function(f"run {index}"):
                run()
    gc.enable()
    assert profiler.profiler is not None
    runs_seen, changes = [], []
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith("run "):
            runs_seen.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    peaks = []
    for start, end in sorted(runs_seen):
        inside = [change for time, change in sorted(changes, key=itemgetter(0)) if start <= time <= end]
        peaks.append(max(accumulate(inside)))
    assert len(peaks) == len(runs)
    return peaks


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
        statistics.column_above(0.1), statistics.column_weighted("half", batch.ids % 2 == 0), statistics.diagonal(),
        statistics.diagonal_last(8), statistics.block_sum(16), statistics.block_max(16), statistics.value_mass("value"),
    ]  # fmt: skip


def check(model: Model, batch: Batch, *runs: dict[str, Any]) -> list[Prediction]:
    """Predictions of traces with these options, each of them close to what is measured."""
    predictions: list[Prediction] = []

    def trace(options: dict[str, Any]) -> None:
        predictions.append(model.trace(batch, **options).prediction)

    # The first prediction runs probes, which are no part of a trace.
    model.predict_memory(batch)
    peaks = measured_peaks([partial(trace, options) for options in runs])
    for options, prediction, peak in zip(runs, predictions, peaks, strict=True):
        error = prediction.peak / peak - 1
        assert abs(error) < TOLERANCE, f"{prediction} at {prediction.place}, measured {size(peak)}: {sorted(options)}"
    return predictions


@pytest.mark.parametrize("name", TINY)
def test_predictions_are_what_the_profiler_measures(name: str) -> None:
    # The vocabulary makes logits matter.
    model, batch = load(TINY[name](vocab_size=1501)), make_batch((256, 256, 256, 256), vocabulary=1501)
    sites = [site for site in SITES if site not in ("pattern", "result", "resid_mid")]
    plain, traced, kept, last, whole, loss = check(
        model, batch, {}, {"statistics": everything(batch)}, {"sites": sites}, {"logits": "last"}, {"logits": "all"},
        {"loss": True},
    )  # fmt: skip
    assert plain.stored == loss.stored == 0
    assert traced.peak > traced.stored > 0
    assert kept.stored == sum(kept_bytes(model, site, batch) for site in sites)
    assert last.stored == 4 * 1501 * 4 and whole.stored == 1024 * 1501 * 4 and whole.peak > 2 * whole.stored


def kept_bytes(model: Model, site: Site, batch: Batch) -> int:
    spec = model.spec
    return sum(4 * prod(site_shape(site, spec, layer, *batch.ids.shape)) for layer in range(spec.n_layers))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_predictions_of_ragged_batches(name: str, side: str) -> None:
    model, batch = load(TINY[name]()), make_batch((256, 200, 77, 10), side)
    both = {"sites": ["z", "resid_post"], "logits": "last", "loss": True}
    check(model, batch, {}, {"statistics": everything(batch)}, both)


@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_predictions_of_batches_in_pieces(name: str) -> None:
    model, batch = load(TINY[name]()), make_batch((100, 256, 250, 40))
    runs = [{"statistics": everything(batch)}, {"sites": ["q", "z", "mlp_out"]}, {"logits": "all"}]
    whole, in_pieces = (
        check(model, batch, *[{**run, "tokens_at_once": budget} for run in runs]) for budget in (None, 256)
    )
    assert all(piece.peak < one.peak for piece, one in zip(in_pieces, whole, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_predictions_of_what_is_large(name: str) -> None:
    model, batch = load(TINY[name]()), make_batch((256, 256))
    value = model.trace(batch, sites=["blocks.1.attn.hook_result", "blocks.1.attn.hook_pattern"])
    edits = [patch(site, value.site(site, 1) * 2, layer=1) for site in ("result", "pattern")]
    runs = [{"sites": [site]} for site in ("pattern", "result", "resid_mid")] + [{"edits": [edit]} for edit in edits]
    for site, found in zip(("pattern", "result", "resid_mid"), check(model, batch, *runs), strict=False):
        assert found.stored == kept_bytes(model, site, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_where_weights_are_larger_than_prompts(dtype: torch.dtype) -> None:
    """Norms of results need a factor of W_O, whatever the length of the prompt."""
    model, batch = load(TINY["gpt2"](n_embd=256).to(dtype)), make_batch((16,))
    with_norms, without = check(
        model, batch, {"statistics": [statistics.result_norm()]}, {"statistics": [statistics.lse()]}
    )
    assert with_norms.peak > 1.3 * without.peak


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_predictions_in_bfloat16(name: str) -> None:
    model, batch = load(TINY[name]().to(torch.bfloat16)), make_batch((256, 256, 256, 256))
    both = {"sites": ["q", "z", "resid_post"], "logits": "all", "loss": True}
    check(model, batch, {}, {"statistics": everything(batch)}, both)


def test_predictions_grow_with_tokens_and_not_with_their_square() -> None:
    """But for block maps, which have an entry for each pair of blocks."""
    model = load(TINY["llama"]())
    peaks = [
        model.predict_memory(batch, statistics=[s for s in everything(batch) if getattr(s, "axis", "") != "block"]).peak
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
    with pytest.raises(MemoryRefused, match=r"but 0\.977 KiB are allowed"):
        model.trace(batch)
    model.trace(batch, memory_limit=10**9)
    monkeypatch.setattr("workbench.tracing.model.free_memory", lambda device: None)
    model.trace(batch)


def test_the_probes_fit_models_with_few_positions() -> None:
    for positions in (2, 3):
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
