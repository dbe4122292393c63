"""A trace in chunks against the same trace in one pass, and its memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.errors import MemoryRefused, RequestError
from workbench.models import Batch, Head
from workbench.models.memory import AllocationMeter
from workbench.models.testing import TINY
from workbench.tracing import SITES, Model, Trace, ablate, load, patch, statistics
from workbench.tracing.edits import HOWS
from workbench.tracing.sites import site_shape

LENGTHS = (1, 2, 37, 64, 33)
SAME = [site for site in SITES if site != "pattern"]
few = pytest.mark.parametrize("subject", ["gpt2", "mistral", "gemma2", "gpt_oss"], indirect=True)


def everything(batch: Batch) -> list[Any]:
    """The statistics that the tests of plain traces read."""
    path = Path(__file__).with_name("test_statistics.py")
    spec = importlib.util.spec_from_file_location("chunked_statistics", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: list[Any] = module.everything(batch)
    return found


def close(found: Tensor, expected: Tensor, what: str) -> None:
    if not expected.is_floating_point():
        assert torch.equal(found, expected), what
        return
    scale = float(expected.nan_to_num().abs().max())
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=2e-5 * max(scale, 1.0), equal_nan=True, msg=lambda told: f"{what}: {told}"
    )


def same(found: Trace, expected: Trace) -> None:
    """Everything that both hold; where two keys tie within rounding, either may be named."""
    assert list(found.values) == list(expected.values)
    for name, value in expected.values.items():
        if expected.statistics[name].integer:
            assert (found[name] == value).float().mean() > 0.99, name
            assert torch.equal(found[name] < 0, value < 0), name
        else:
            close(found[name], value, name)
    mask = expected.batch.mask
    for key, value in expected.sites.items():
        close(found.sites[key][mask], value[mask], str(key))
    if expected.logits is not None and expected.logit_positions is not None:
        assert found.logits is not None
        real = torch.gather(mask, 1, expected.logit_positions)
        close(found.logits[real], expected.logits[real], "logits")
    if expected.loss is not None:
        assert found.loss is not None
        close(found.loss, expected.loss, "loss")


def sites_of(model: Model) -> list[str]:
    return [site for site in SAME if not (site == "resid_mid" and model.spec.parallel)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_everything_is_the_same(subject, make_batch, side) -> None:
    """Every statistic, site, logit and loss of every tiny model."""
    model, batch = subject.model, make_batch(LENGTHS, side)
    asked = {"statistics": everything(batch), "sites": sites_of(model), "logits": "all", "loss": True}
    same(model.trace(batch, **asked, chunk=16), model.trace(batch, **asked))


@few
@pytest.mark.parametrize("chunk", [1, 63])
def test_chunks_of_any_size(subject, make_batch, chunk) -> None:
    batch = make_batch((64, 30), "left")
    asked: dict[str, Any] = {
        "statistics": [
            statistics.entropy(), statistics.column_mean(), statistics.column_last(7), statistics.column_last(40),
            statistics.diagonal_last(9), statistics.column_above(0.1), statistics.argmax(),
        ],
        "logits": "last",
    }  # fmt: skip
    same(subject.model.trace(batch, **asked, chunk=chunk), subject.model.trace(batch, **asked))


@few
def test_chosen_logits_fall_into_their_chunks(subject, make_batch) -> None:
    batch = make_batch((20, 33), "left")
    wanted = torch.tensor([[32, 13, 13], [0, 15, 32]])
    found, expected = (subject.model.trace(batch, logits=wanted, **how) for how in ({"chunk": 8}, {}))
    close(found.logits, expected.logits, "logits")
    assert torch.equal(found.logit_positions, wanted)


@pytest.mark.parametrize("subject", ["gpt2", "mistral"], indirect=True)
@pytest.mark.parametrize("how", HOWS)
def test_ablations(subject, make_batch, how) -> None:
    model, batch = subject.model, make_batch((40, 25), "left")
    reference = make_batch((40, 40), "left", seed=3) if how in ("mean", "resample", "q_mean") else None
    asked: dict[str, Any] = {"statistics": [statistics.entropy(), statistics.column_sum()], "loss": True}
    plain = model.trace(batch, **asked)
    for positions in (None, batch.ids % 2 == 0):
        edit = ablate([Head(0, 1), Head(1, 0)], how, positions=positions, reference=reference, sinks=2, recent=6)
        expected = model.trace(batch, edits=edit, **asked)
        same(model.trace(batch, edits=edit, **asked, chunk=16), expected)
        assert float((expected.loss - plain.loss).nan_to_num().abs().max()) > 1e-5


@pytest.mark.parametrize("subject", ["gpt2", "mistral"], indirect=True)
@pytest.mark.parametrize("site", SAME)
def test_patches(subject, make_batch, site) -> None:
    model, batch = subject.model, make_batch((40, 25), "right")
    value = torch.randn(site_shape(site, model.spec, 1, *batch.ids.shape), generator=torch.Generator().manual_seed(1))
    for positions in (None, batch.ids % 3 == 0):
        edit = patch(site, value, layer=1, positions=positions)
        asked: dict[str, Any] = {"statistics": [statistics.entropy(), statistics.column_sum()], "logits": "all"}
        same(model.trace(batch, edits=edit, **asked, chunk=16), model.trace(batch, edits=edit, **asked))


def test_what_cannot_be_done_in_chunks_is_refused() -> None:
    model = load(TINY["llama"]())
    for asked, told in (
        ({"chunk": 0}, "1 token or more"),
        ({"chunk": 8, "sites": ["pattern"]}, "explicit patterns"),
        ({"chunk": 24, "statistics": statistics.block_sum(16)}, "choose 32"),
    ):
        with pytest.raises(RequestError, match=told):
            model.trace([[5] * 40], **asked)
    with pytest.raises(MemoryRefused, match="chunk=4096"):
        model.trace([[5] * 5000], statistics=statistics.entropy(), memory_limit=1000)
    with pytest.raises(MemoryRefused, match=r"lower chunk \(now 64\)"):
        model.trace([[5] * 5000], statistics=statistics.entropy(), memory_limit=1000, chunk=64)


def test_progress_counts_chunks_and_prompts() -> None:
    model, seen = load(TINY["llama"]()), []
    model.trace([[5] * 40, [6] * 3], chunk=16, tokens_at_once=16, progress=lambda *told: seen.append(told))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("wanted", ["rows", "columns", "nothing"])
def test_the_forecast_holds_and_is_smaller(name, wanted) -> None:
    """Storage that operators return, against the prediction; blocks' own buffers are not among it."""
    model = load(TINY[name]())
    tokens, chunk = (1024, 64) if name != "gpt2" else (120, 16)
    chosen = {
        "rows": [statistics.entropy(), statistics.top_k(4), statistics.result_norm()],
        "columns": [statistics.column_sum(), statistics.column_max(), statistics.diagonal(), statistics.block_sum(16)],
        "nothing": [],
    }[wanted]
    prompt = [torch.randint(3, 60, (tokens,)).tolist()]
    predicted = model.predict_memory(prompt, statistics=chosen, logits="last", chunk=chunk)
    whole = model.predict_memory(prompt, statistics=chosen, logits="last")
    hf = model.attachment.hf_model
    meter = AllocationMeter([*hf.parameters(), *hf.buffers()])
    with meter:
        model.trace(prompt, statistics=chosen, logits="last", chunk=chunk)
    assert meter.peak <= 1.05 * predicted.peak
    assert meter.peak >= 0.4 * predicted.peak
    if name == "llama":
        assert predicted.peak < whole.peak
