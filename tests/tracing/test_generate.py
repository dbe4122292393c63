"""Greedy decoding against Hugging Face's own, and its statistics against a teacher-forced trace of the same text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Batch, Head
from workbench.tracing import Model, Statistic, Trace, ablate, patch, statistics

LENGTHS = (1, 4, 12, 9)
STEPS = 11
one = pytest.mark.parametrize("subject", ["llama"], indirect=True)


def row_statistics() -> list[Statistic | tuple[Statistic, ...]]:
    return [
        statistics.lse(), statistics.entropy(), statistics.max_prob(), statistics.argmax(), statistics.top_k(3),
        statistics.first(1), statistics.first(6), statistics.recent(3), statistics.recent(9), statistics.offset(0),
        statistics.offset(-2), statistics.offset(-8), statistics.distance(), statistics.sink_mass(),
        statistics.output_norm(),
    ]  # fmt: skip


def teacher_forced(model: Model, batch: Batch, new: Tensor, **options: Any) -> Trace:
    """Prompt and new tokens but the last (which was never fed back), each prompt padded on the right."""
    rows = [
        [*ids[mask].tolist(), *tokens[:-1].tolist()]
        for ids, mask, tokens in zip(batch.ids, batch.mask, new, strict=True)
    ]
    return model.trace(Batch.from_ids(rows), **options)


def test_tokens_are_those_of_hugging_face(subject, make_batch) -> None:
    batch = make_batch(LENGTHS, "left", seed=7)
    found = subject.model.generate(make_batch(LENGTHS, "right", seed=7), STEPS, stop_ids=())
    own = subject.own.generate(
        batch.ids,
        attention_mask=batch.mask.long(),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
    )
    # Hugging Face masks the end token until `min_new_tokens`; ours goes on past it.
    new = own[:, batch.ids.shape[1] :]
    ends = found.ids == 2
    before_end = ends.cumsum(1) == 0
    assert before_end.sum() > STEPS
    assert found.ids[before_end].tolist() == new[before_end].tolist()
    assert found.texts is None


def test_decoded_rows_are_those_of_a_teacher_forced_trace(subject, make_batch) -> None:
    """Also where a sliding cache has dropped the first keys: prompt and new tokens are longer than its window."""
    model, batch = subject.model, make_batch(LENGTHS, seed=8)
    found = model.generate(batch, STEPS, statistics=row_statistics(), stop_ids=())
    trace = teacher_forced(model, batch, found.ids, statistics=row_statistics(), logits="all", sites=["pattern"])
    assert set(found.values) == set(trace.values)
    for row, length in enumerate(LENGTHS):
        rows = slice(length - 1, length - 1 + STEPS)
        assert trace.logits[row, rows].argmax(-1).tolist() == found.ids[row].tolist()
        for name, value in found.values.items():
            truth = trace[name][row, :, :, rows]
            assert value[row].shape == truth.shape and value.dtype == truth.dtype, name
            if value.is_floating_point():
                torch.testing.assert_close(
                    value[row], truth, rtol=1e-4, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}"
                )
        for layer in range(model.spec.n_layers):
            pattern = trace.site("pattern", layer)[row][:, rows]
            for keys in (found["argmax"][row, layer][..., None], found["top_k"][row, layer]):
                mass = torch.gather(pattern, 2, keys.clamp(min=0)) * (keys >= 0)
                best = pattern.topk(keys.shape[-1], dim=-1).values
                torch.testing.assert_close(mass, best, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("subject", ["gpt2", "mistral", "gemma3", "gpt_oss"], indirect=True)
@pytest.mark.parametrize("how", ["zero", "mean", "uniform", "to_sink"])
def test_ablation_acts_in_every_step(subject, make_batch, how) -> None:
    model, batch = subject.model, make_batch(LENGTHS, seed=9)
    heads = [Head(0, 1), Head(2, 0), Head(2, 2)]
    edits = [ablate(heads, how, reference=make_batch((20, 7), seed=10))]
    found = model.generate(batch, STEPS, edits=edits, statistics=[statistics.entropy()], stop_ids=())
    trace = teacher_forced(model, batch, found.ids, edits=edits, logits="all", statistics=[statistics.entropy()])
    clean = model.generate(batch, STEPS, stop_ids=())
    assert found.ids.tolist() != clean.ids.tolist()
    for row, length in enumerate(LENGTHS):
        rows = slice(length - 1, length - 1 + STEPS)
        assert trace.logits[row, rows].argmax(-1).tolist() == found.ids[row].tolist()
        torch.testing.assert_close(found["entropy"][row], trace["entropy"][row, :, :, rows], rtol=1e-4, atol=5e-5)


@one
def test_nothing_follows_the_end_of_a_prompt(subject, make_batch) -> None:
    model, batch = subject.model, make_batch(LENGTHS, seed=11)
    wanted = [statistics.entropy(), statistics.top_k(2)]
    free = model.generate(batch, 6, stop_ids=(), statistics=wanted)
    stop = int(free.ids[2, 1])
    found = model.generate(batch, 6, stop_ids=[stop], statistics=wanted)
    ended = 0
    for row, tokens in enumerate(free.ids.tolist()):
        kept = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        ended += kept < len(tokens)
        assert found.ids[row].tolist() == tokens[:kept] + [-1] * (len(tokens) - kept)
        assert torch.equal(found["entropy"][row, :, :, :kept], free["entropy"][row, :, :, :kept])
        assert found["entropy"][row, :, :, kept:].isnan().all()
        assert torch.equal(found["top_k"][row, :, :, :kept], free["top_k"][row, :, :, :kept])
        assert (found["top_k"][row, :, :, kept:] == -1).all()
        assert found["top_k_mass"][row, :, :, kept:].isnan().all()
    assert ended
    # All prompts at their end: no more steps are taken.
    short = model.generate(batch.select([2]), 6, stop_ids=[int(free.ids[2, 0])])
    assert short.ids.tolist() == [[int(free.ids[2, 0])]]


@one
def test_the_models_own_end_token_stops(subject, make_batch, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = subject.model, make_batch((5,), seed=12)
    first = int(model.generate(batch, 1, stop_ids=()).ids[0, 0])
    for end in (first, [first, 2]):
        monkeypatch.setattr(model.attachment.hf_model.generation_config, "eos_token_id", end)
        assert model.generate(batch, 4).ids.tolist() == [[first]]


@one
def test_what_cannot_be_decoded_is_refused_before_anything_runs(subject, make_batch, monkeypatch) -> None:
    model, batch = subject.model, make_batch((8, 5))
    monkeypatch.setattr(model.attachment.hf_model, "forward", None)
    keys = torch.zeros(2, 8, dtype=torch.long)
    for statistic in (
        statistics.column_sum(), statistics.value_norm(), statistics.at_keys("needle", keys),
        statistics.mass("span", keys == 0), statistics.result_norm(),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=f"'{statistic.name}' is"):
            model.generate(batch, 3, statistics=[statistic])
    reference, head = make_batch((8, 8)), Head(1, 1)
    for edit in (
        ablate([head], "resample", reference=reference),
        ablate([head], "mean", values={head: torch.zeros(8, 8)}),
        ablate([head], positions=batch.mask),
    ):
        with pytest.raises(RequestError, match=f"generate.. cannot ablate with how='{edit.how}'"):
            model.generate(batch, 3, edits=[edit])
    with pytest.raises(RequestError, match="takes ablations; patches belong to one forward pass"):
        model.generate(batch, 3, edits=[patch("z", torch.zeros(8), layer=0)])
    with pytest.raises(RequestError, match="max_new_tokens = 0"):
        model.generate(batch, 0)


@pytest.mark.parametrize("subject", ["gpt2", "opt"], indirect=True)
def test_learned_positions_end_somewhere(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((318, 4))
    assert model.generate(batch, 3, stop_ids=()).ids.shape == (2, 3)
    with pytest.raises(RequestError, match="max_new_tokens = 4: 321 tokens exceed the model's 320 learned positions"):
        model.generate(batch, 4)
    with pytest.raises(RequestError, match="A prompt of 321 tokens exceeds the model's 320 learned positions"):
        model.trace(make_batch((321,)))
