"""Statistics through the model, against the same read off the model's own eager attention patterns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import workbench
from workbench.errors import RequestError
from workbench.models import Batch
from workbench.models.testing import TINY
from workbench.tracing import Statistic, statistics

LENGTHS = (1, 2, 37, 64)
SIDES = ("right", "left")
few = pytest.mark.parametrize("subject", ["gpt2", "mistral", "gemma2", "gpt_oss"], indirect=True)


def given(batch: Batch) -> dict[str, Tensor]:
    """Labels of keys: a mask, three columns of weights, one key and two keys a query (some unseen, some none)."""
    shape, generator = batch.ids.shape, torch.Generator().manual_seed(5)
    return {
        "mask": batch.ids % 3 == 0,
        "weights": torch.rand(*shape, 3, generator=generator),
        "key": torch.randint(-1, shape[1], shape, generator=generator),
        "keys": torch.randint(-1, shape[1], (*shape, 2), generator=generator),
        "span": batch.ids % 4 == 1,
        "emphasis": torch.rand(*shape, 2, generator=generator),
    }


def directions(head_dims: list[tuple[int, int]]) -> list[Tensor]:
    """One direction for each head of each layer."""
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(heads, dim, generator=generator) for heads, dim in head_dims]


def largest(values: Tensor) -> Tensor:
    return values.abs().amax(-1)


def everything(batch: Batch) -> list[Statistic | tuple[Statistic, ...]]:
    labels = given(batch)
    return [
        statistics.lse(), statistics.entropy(), statistics.max_prob(), statistics.argmax(), statistics.top_k(4),
        statistics.first(1), statistics.first(4), statistics.recent(5), statistics.recent(16), statistics.offset(0),
        statistics.offset(-1), statistics.offset(-9), statistics.mass("mask", labels["mask"]),
        statistics.mass("weights", labels["weights"]), statistics.at_keys("key", labels["key"]),
        statistics.at_keys("keys", labels["keys"]), statistics.distance(), statistics.sink_mass(),
        statistics.column_sum(), statistics.column_mean(), statistics.column_last(3), statistics.column_last(50),
        statistics.spread(), statistics.above(0.1), statistics.max_logit(), statistics.mean_logit(),
        statistics.first_logit(), statistics.column_max(), statistics.value_norm(), statistics.output_norm(),
        statistics.result_norm(), statistics.column_above(0.15), statistics.column_weighted("span", labels["span"]),
        statistics.column_weighted("emphasis", labels["emphasis"]), statistics.diagonal(), statistics.diagonal_last(6),
        statistics.block_sum(16), statistics.block_max(16), statistics.value_mass("value_mass"),
        statistics.value_mass("largest", largest),
    ]  # fmt: skip


def naive(a: Tensor, window: int | None, labels: dict[str, Tensor], start: int) -> dict[str, Tensor]:
    """Everything that follows from one prompt's pattern `[head, query, key]`; `labels` are those of its columns."""
    n = a.shape[-1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    distance = i - j
    visible = (distance >= 0) & (distance < (window or n))

    def at(keys: Tensor) -> Tensor:
        inside = (keys >= start) & (keys < start + n)
        chosen = torch.gather(a, 2, (keys - start).clamp(0, n - 1).expand(len(a), -1, -1))
        return (chosen * inside).sum(-1)

    return {
        "entropy": torch.special.entr(a).sum(-1),
        "max_prob": a.amax(-1),
        "first_1": a[..., :1].sum(-1),
        "first_4": a[..., :4].sum(-1),
        "recent_5": (a * (distance < 5)).sum(-1),
        "recent_16": (a * (distance < 16)).sum(-1),
        "offset_0": (a * (distance == 0)).sum(-1),
        "offset_-1": (a * (distance == 1)).sum(-1),
        "offset_-9": (a * (distance == 9)).sum(-1),
        "mask": a @ labels["mask"].double(),
        "weights": a @ labels["weights"].double(),
        "key": at(labels["key"][:, None]),
        "keys": at(labels["keys"]),
        "distance": (a * distance).sum(-1),
        "spread": deviation(a, distance.double()),
        "above_0.1": (a > 0.1).double().sum(-1),
        "sink_mass": 1 - a.sum(-1),
        "column_sum": a.sum(1),
        "column_mean": a.sum(1) / visible.sum(0),
        "column_last_3": a[:, -3:].sum(1),
        "column_last_50": a[:, -50:].sum(1),
        "column_max": a.amax(1),
        "span": labels["span"].double() @ a,
        "emphasis": torch.einsum("h i j, i c -> h j c", a, labels["emphasis"].double()),
    }


def pooled(a: Tensor) -> dict[str, Tensor]:
    """Sums along diagonals and over blocks of one prompt's pattern, explicit loops."""
    n, b = a.shape[-1], 16
    blocks = range(0, n, b)
    parts = [[a[:, i : i + b, j : j + b] for j in blocks] for i in blocks]
    return {
        "diagonal": torch.stack([a.diagonal(-d, 1, 2).sum(-1) for d in range(n)], dim=-1),
        "diagonal_last_6": torch.stack(
            [sum((a[:, i, i - d] for i in range(max(d, n - 6), n)), a[:, 0, 0] * 0) for d in range(n)], dim=-1
        ),
        "block_sum_16": torch.stack([torch.stack([x.sum((1, 2)) for x in row], -1) for row in parts], 1),
        "block_max_16": torch.stack([torch.stack([x.amax((1, 2)) for x in row], -1) for row in parts], 1),
    }


def deviation(a: Tensor, distance: Tensor) -> Tensor:
    """Standard deviation of the distance under each row, renormalised."""
    share = a / a.sum(-1, keepdim=True)
    mean = (share * distance).sum(-1, keepdim=True)
    return (share * (distance - mean) ** 2).sum(-1).sqrt()


def logits(a: Tensor, lse: Tensor, window: int | None) -> dict[str, Tensor]:
    """Maximum, mean and first of the visible logits: an entry's logarithm is its logit less the log-sum-exp."""
    n = a.shape[-1]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    visible = (distance >= 0) & (distance < (window or n))
    whole = torch.where(visible, a.log() + lse[..., None], 0.0)
    first = (torch.arange(n) - (window or n) + 1).clamp(min=0)
    return {
        "max_logit": whole.masked_fill(~visible, float("-inf")).amax(-1),
        "mean_logit": whole.sum(-1) / visible.sum(-1),
        "first_logit": torch.gather(whole, 2, first.expand(len(a), n)[..., None])[..., 0],
    }


def same(found: Tensor, truth: Tensor, name: str) -> None:
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("side", SIDES)
def test_every_statistic_is_that_of_the_eager_pattern(exact, make_batch, side: str) -> None:
    batch, spec = make_batch(LENGTHS, side), exact.model.spec
    along = directions([(shape.heads, shape.head_dim) for shape in spec.layers])
    wanted = [*everything(batch), statistics.value_mass("along", along)]
    trace = exact.model.trace(batch, statistics=wanted, sites=["q", "k", "v"])
    unread = set(trace.values)
    for row, (start, length) in enumerate(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)):
        real = slice(start, start + length)
        truth = exact.truth(batch.ids[row, real].tolist())
        for layer, a in enumerate(truth.patterns):
            shape = spec.layers[layer]
            labels = {name: value[row, real] for name, value in given(batch).items()}
            lse = trace["lse"][row, layer, : shape.heads, real].double()
            expected = naive(a, shape.window, labels, start) | logits(a, lse, shape.window)
            z, w = truth.z[layer], exact.output_weight(layer).double()
            v = trace.site("v", layer)[row, real].double()
            expected["value_norm"] = v.norm(dim=-1).T.repeat_interleave(shape.group, dim=0)
            expected["output_norm"] = z.norm(dim=-1).T
            expected["result_norm"] = torch.einsum("t h d, h d m -> h t m", z, w).norm(dim=-1)
            expected["along"] = torch.einsum("t h d, h d -> h t", z, along[layer].double())
            for name, function in (("value_mass", lambda x: x.norm(dim=-1)), ("largest", largest)):
                of_values = function(v).T.repeat_interleave(shape.group, dim=0)
                expected[name] = torch.einsum("h i j, h j -> h i", a, of_values)
            for name, value in pooled(a).items():
                found = trace[name][row, layer, : shape.heads]
                size = value.shape[-1]
                own = found[..., :size, :size] if name.startswith("block") else found[..., :size]
                same(own, value, f"{name} of layer {layer}, prompt {row}")
                assert int((~found.isnan()).sum()) == value.numel(), name
                unread.discard(name)
            hit = a > 0.15
            first = torch.where(hit.any(1), hit.int().argmax(1) + start, -1)
            assert torch.equal(trace["column_above_0.15"][row, layer, : shape.heads, real], first)
            unread.discard("column_above_0.15")
            for name, value in expected.items():
                same(trace[name][row, layer, : shape.heads, real], value, f"{name} of layer {layer}, prompt {row}")
            unread -= set(expected)

            # An entry of the pattern and its logit give the row's log-sum-exp; keys are columns of the batch.
            best = trace["argmax"][row, layer, : shape.heads, real]
            assert ((best >= start) & (best < start + length)).all()
            mass = torch.gather(a, 2, best[..., None] - start)[..., 0]
            same(mass, a.amax(-1), "argmax")
            q = trace.site("q", layer)[row, real].double().transpose(0, 1)
            k = trace.site("k", layer)[row].double().transpose(0, 1).repeat_interleave(shape.group, dim=0)
            logit = shape.scale * (q * torch.stack([head[keys] for head, keys in zip(k, best, strict=True)])).sum(-1)
            logit = logit if shape.softcap is None else shape.softcap * torch.tanh(logit / shape.softcap)
            same(trace["lse"][row, layer, : shape.heads, real], logit - mass.log(), "lse")

            keys = trace["top_k"][row, layer, : shape.heads, real]
            seen = torch.arange(1, length + 1).clamp(max=min(4, shape.window or 4))
            assert ((keys >= 0).sum(-1) == seen).all()
            masses = torch.gather(a, 2, (keys - start).clamp(min=0)) * (keys >= 0)
            heaviest = a.topk(min(4, length), dim=-1).values
            same(masses[..., : heaviest.shape[-1]], heaviest, "top_k")
            same(trace["top_k_mass"][row, layer, : shape.heads, real], masses, "top_k_mass")
    assert unread == {"lse", "argmax", "top_k", "top_k_mass"}


@pytest.mark.parametrize("side", SIDES)
@few
def test_padding_is_marked_and_nothing_else(subject, make_batch, side: str) -> None:
    batch = make_batch(LENGTHS, side)
    trace = subject.model.trace(batch, statistics=everything(batch))
    padding = ~batch.mask[:, None, None, :]
    for name, value in trace.values.items():
        if trace.statistics[name].axis in ("distance", "block"):
            size = 16 if trace.statistics[name].axis == "block" else 1
            short = torch.arange(value.shape[-1]) * size >= batch.lengths[:, None]
            short = (short[:, None] | short[:, :, None] if size > 1 else short)[:, None, None]
            assert (value.isnan() == short.expand_as(value)).all(), name
        elif name == "column_above_0.15":
            assert value.dtype == torch.int64 and (value[padding.expand_as(value)] == -1).all()
        elif name in ("argmax", "top_k"):
            assert value.dtype == torch.int64
            missing = value.flatten(4).amax(-1) < 0 if name == "top_k" else value < 0
        else:
            assert value.dtype == torch.float32
            missing = value.isnan().flatten(4).any(-1) if value.ndim > 4 else value.isnan()
        if trace.statistics[name].axis in ("query", "key") and name != "column_above_0.15":
            assert (missing == padding.expand_as(missing)).all(), name


@few
def test_running_prompts_in_pieces_changes_nothing(subject, make_batch) -> None:
    batch = make_batch((3, 64, 20, 21, 22, 1), seed=1)
    whole = subject.model.trace(batch, statistics=everything(batch), sites=["z"], logits="last", loss=True)
    done: list[tuple[int, int]] = []
    pieces = subject.model.trace(
        batch, statistics=everything(batch), sites=["z"], logits="last", loss=True, tokens_at_once=45,
        progress=lambda *count: done.append(count),
    )  # fmt: skip
    assert done == [(1, 6), (2, 6), (4, 6), (6, 6)]
    for name, value in whole.values.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pieces.loss, whole.loss, rtol=1e-4, atol=1e-4, equal_nan=True)
    for layer in range(subject.model.spec.n_layers):
        real = batch.mask
        torch.testing.assert_close(pieces.site("z", layer)[real], whole.site("z", layer)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("subject", ["mistral", "gpt_oss"], indirect=True)
def test_one_statistic_alone_is_the_same_as_among_all(subject, make_batch) -> None:
    batch = make_batch((30, 12))
    everyone = everything(batch)
    together = subject.model.trace(batch, statistics=everyone)
    for statistic in everyone:
        alone = subject.model.trace(batch, statistics=[statistic])
        for name, value in alone.values.items():
            torch.testing.assert_close(value, together[name], rtol=1e-4, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("subject", ["llama"], indirect=True)
def test_names_that_look_like_keys_are_no_keys(subject, make_batch) -> None:
    batch = make_batch((8,))
    found = subject.model.trace(batch, statistics=[statistics.mass("top_k", batch.ids % 2 == 0)])["top_k"]
    assert found.dtype == torch.float32
    assert ((found > 0) & (found < 1)).any()


@pytest.mark.parametrize("subject", ["llama"], indirect=True)
def test_means_leave_padding_out(subject, make_batch) -> None:
    batch = make_batch((9, 4))
    labels = given(batch)
    trace = subject.model.trace(
        batch, statistics=[statistics.entropy(), statistics.argmax(), statistics.mass("weights", labels["weights"])]
    )
    values = trace["entropy"]
    torch.testing.assert_close(trace.mean("entropy")[1], values[1, :, :, :4].mean(-1))
    rows = torch.zeros_like(batch.mask)
    rows[:, 2:6] = True
    torch.testing.assert_close(trace.mean("entropy", rows)[1], values[1, :, :, 2:4].mean(-1))
    weights = trace.mean("weights", rows)
    assert weights.shape == (2, 3, 6, 3)
    torch.testing.assert_close(weights[0], trace["weights"][0, :, :, 2:6].mean(2))
    with pytest.raises(RequestError, match="'argmax' holds keys"):
        trace.mean("argmax")


@pytest.mark.parametrize("subject", ["mistral"], indirect=True)
def test_the_dataset_is_labelled(subject, make_batch) -> None:
    batch = make_batch((9, 4))
    wanted = [statistics.entropy(), statistics.column_sum(), statistics.top_k(2), statistics.diagonal()]
    wanted += [statistics.block_max(16), statistics.column_weighted("span", torch.ones(2, 9, 3))]
    trace = subject.model.trace(batch, statistics=wanted)
    data = trace.dataset()
    assert data["entropy"].dims == ("prompt", "layer", "head", "query")
    assert data["column_sum"].dims == ("prompt", "layer", "head", "key")
    assert data["top_k"].dims == ("prompt", "layer", "head", "query", "top_k_column")
    assert data["diagonal"].dims == ("prompt", "layer", "head", "distance")
    assert data["block_max_16"].dims == ("prompt", "layer", "head", "query_block", "key_block")
    assert data["span"].dims == ("prompt", "layer", "head", "key", "span_column")
    assert data["top_k"].values.tolist() == trace["top_k"].tolist()


@pytest.mark.parametrize("subject", ["llama"], indirect=True)
def test_wrong_requests_are_named(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((8, 5))
    wrong = torch.zeros(2, 7, dtype=torch.bool)
    with pytest.raises(RequestError, match=r"'span' is given for \(2, 7\) prompts and tokens, but .* \(2, 8\)"):
        model.trace(batch, statistics=[statistics.mass("span", wrong)])
    with pytest.raises(RequestError, match=r"'needle' is given for \(1, 8\)"):
        model.trace(batch, statistics=[statistics.at_keys("needle", torch.zeros(1, 8, dtype=torch.long))])
    with pytest.raises(RequestError, match=r"mass\('span'\): keys of shape \(2, 8, 1, 1\)"):
        statistics.mass("span", torch.zeros(2, 8, 1, 1))
    with pytest.raises(RequestError, match=r"at_keys\('needle'\): keys of shape \(2, 8, 1, 1\)"):
        statistics.at_keys("needle", torch.zeros(2, 8, 1, 1, dtype=torch.long))
    with pytest.raises(RequestError, match=r"column_weighted\('span'\): weights of shape \(2, 8, 1, 1\)"):
        statistics.column_weighted("span", torch.zeros(2, 8, 1, 1))
    with pytest.raises(RequestError, match=r"'span' is given for \(2, 7\)"):
        model.trace(batch, statistics=[statistics.column_weighted("span", wrong)])
    with pytest.raises(RequestError, match="one size; ask in two calls"):
        model.trace(batch, statistics=[statistics.block_sum(16), statistics.block_max(32)])
    with pytest.raises(RequestError, match="Blocks of 3"):
        statistics.block_sum(3)
    with pytest.raises(RequestError, match=r"'norms': its function made \(2, 8\) of values"):
        model.trace(batch, statistics=[statistics.value_mass("norms", lambda v: v.norm(dim=-1)[:, 0])])
    with pytest.raises(RequestError, match="'along': directions of layer 0 are"):
        model.trace(batch, statistics=[statistics.value_mass("along", torch.zeros(3, 1, 1))])
    with pytest.raises(RequestError, match="no positions to take a mean over; its axes are query_block and key_block"):
        model.trace(batch, statistics=[statistics.block_sum(16)]).mean("block_sum_16")
    for statistic in (statistics.diagonal(), statistics.value_mass("norms")):
        with pytest.raises(RequestError, match=statistic.name):
            model.generate([[5, 6]], 2, statistics=[statistic])
    with pytest.raises(RequestError, match="65 key features"):
        model.trace(batch, statistics=[statistics.mass("many", torch.zeros(2, 8, 65))])
    with pytest.raises(RequestError, match="Two statistics are called 'entropy'"):
        model.trace(batch, statistics=[statistics.entropy(), statistics.mass("entropy", batch.ids > 5)])
    for make, value in ((statistics.top_k, 0), (statistics.top_k, 65), (statistics.first, 0), (statistics.offset, 2)):
        with pytest.raises(RequestError, match=str(value)):
            make(value)
    with pytest.raises(RequestError, match="No statistic 'entropy' in this trace; it has lse"):
        model.trace(batch, statistics=[statistics.lse()])["entropy"]
    with pytest.raises(RequestError, match="Token id 101 is outside the vocabulary of 101"):
        model.trace([[5, 101]])
    assert math.isnan(model.trace(batch, statistics=[statistics.lse()])["lse"][1, 0, 0, 5])


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_statistics_of_a_half_precision_model_are_float32(name: str, make_batch) -> None:
    """Accumulated in float32 from its own bfloat16 q and k: rows sum to one far closer than bfloat16 can say."""
    from workbench.models.testing import TINY
    from workbench.tracing import load

    model, batch = load(TINY[name]().to(torch.bfloat16)), make_batch((40, 13))
    rows = torch.ones(*batch.ids.shape, dtype=torch.bool)
    trace = model.trace(
        batch, statistics=[statistics.mass("all", rows), *everything(batch)], sites=["z"], logits="last", loss=True
    )
    assert trace.site("z", 0).dtype == torch.bfloat16
    assert trace.logits.dtype == trace.loss.dtype == torch.float32
    floats = {name: value for name, value in trace.values.items() if value.is_floating_point()}
    assert len(floats) > 20 and all(value.dtype == torch.float32 for value in floats.values())
    total = (trace["all"] + trace["sink_mass"])[batch.mask[:, None, None, :].expand_as(trace["all"])]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_one_edit_stands_for_a_list_of_one():
    model = workbench.load(TINY["llama"]())
    one = model.trace([[1, 2, 3]], edits=workbench.ablate("L0H0"), logits="last")
    many = model.trace([[1, 2, 3]], edits=[workbench.ablate(["L0H0"])], logits="last")
    assert torch.equal(one.logits, many.logits)
