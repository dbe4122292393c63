"""Prompts that share beginnings and are written side by side; given answers against a teacher-forced trace."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tracing import continuations, statistics
from workbench.tracing.continuations import continue_greedily, continue_with

STEPS = 9


def rows():
    return [
        statistics.lse(), statistics.argmax(), statistics.top_k(3)[1], statistics.first(2), statistics.offset(-1),
        statistics.entropy(),
    ]  # fmt: skip


def grid() -> list[list[int]]:
    """Prompts that begin alike, in no order, one of them twice and one the beginning of another."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(3, 101, (14,), generator=generator).tolist()
    return [[*shared, 9, 8], shared[:6], [*shared, 9, 8, 7, 50], [5, 6, 7], shared[:6]]


def close(found, truth) -> None:
    assert found.ids.tolist() == truth.ids.tolist()
    assert set(found.values) == set(truth.values)
    for name, value in truth.values.items():
        if name == "argmax":
            # Two keys of the same weight may be named in either order.
            clear = truth["top_k_mass"][..., 0] - truth["top_k_mass"][..., 1] > 1e-3
            assert torch.equal(found[name][clear], value[clear])
            continue
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=5e-5, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(
    "subject", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt2", "opt", "qwen3_moe"], indirect=True
)
def test_prompts_written_side_by_side_are_those_written_one_by_one(subject, monkeypatch):
    # So few tokens at a time that prompts are cut.
    monkeypatch.setattr(continuations, "CHUNK", 3)
    prompts = grid()
    truth = subject.model.generate(Batch.from_ids(prompts), STEPS, statistics=rows(), stop_ids=())
    # All together; two at a time, of which one has to end first; no room for a second.
    for most, room in ((32, 1 << 30), (2, 1 << 30), (32, 1)):
        monkeypatch.setattr(continuations, "MOST", most)
        monkeypatch.setattr(continuations, "ROOM", room)
        close(continue_greedily(subject.model, prompts, STEPS, statistics=rows(), stop_ids=()), truth)


@pytest.mark.parametrize("subject", ["llama", "gemma3"], indirect=True)
@pytest.mark.parametrize("most", [2, 32])
def test_answers_end_at_stops_each_at_its_own(subject, most, monkeypatch):
    monkeypatch.setattr(continuations, "MOST", most)
    prompts = grid()
    free = subject.model.generate(Batch.from_ids(prompts), STEPS, stop_ids=()).ids
    stop, done = int(free[0, 3]), []
    truth = subject.model.generate(Batch.from_ids(prompts), STEPS, statistics=rows(), stop_ids=[stop])
    found = continue_greedily(
        subject.model, prompts, STEPS, statistics=rows(), stop_ids=[stop],
        progress=lambda step, of: done.append((step, of)),
    )  # fmt: skip
    assert (truth.ids < 0).any()
    close(found, truth)
    assert done == [(step, len(prompts)) for step in range(1, len(prompts) + 1)]


@pytest.mark.parametrize("subject", ["llama"], indirect=True)
def test_statistics_are_read_where_they_are_wanted(subject):
    prompts, asked = grid(), {}
    whole = continue_greedily(subject.model, prompts, STEPS, statistics=rows(), stop_ids=())

    def second(index, written):
        asked[index] = list(written)
        return index == 1

    found = continue_greedily(subject.model, prompts, STEPS, statistics=rows(), stop_ids=(), wanted=second)
    assert [asked[index] for index in range(len(prompts))] == whole.ids.tolist() == found.ids.tolist()
    for name, value in whole.values.items():
        torch.testing.assert_close(found[name][1], value[1], equal_nan=True)
        rest = found[name][[0, 2, 3, 4]]
        assert (rest.isnan() if rest.is_floating_point() else rest == -1).all()
    none = continue_greedily(
        subject.model, prompts, STEPS, statistics=rows(), stop_ids=(), wanted=lambda index, written: False
    )
    assert {name: value.shape for name, value in none.values.items()} == {
        name: value.shape for name, value in whole.values.items()
    }


@pytest.mark.parametrize("subject", ["llama", "gemma2", "gpt_oss", "gpt2"], indirect=True)
def test_given_answers_are_rows_of_a_trace(subject):
    prompts = grid()
    answers = [[20, 21, 22], [4], [30, 31], [7, 8, 9, 10], [60, 61]]
    batch = Batch.from_ids([[*p, *a] for p, a in zip(prompts, answers, strict=True)])
    columns = max(map(len, prompts))
    span = torch.zeros(len(prompts), columns, dtype=torch.bool)
    span[:, 1:3] = True
    wide = torch.nn.functional.pad(span, (0, batch.ids.shape[1] - columns))
    weights = torch.rand(len(prompts), columns, 2, generator=torch.Generator().manual_seed(0))
    # What stands behind a prompt does not count.
    for row, prompt in zip(weights, prompts, strict=True):
        row[len(prompt) :] = 0
    padded = torch.nn.functional.pad(weights, (0, 0, 0, batch.ids.shape[1] - columns))
    found = continue_with(
        subject.model,
        prompts,
        answers,
        statistics=[*rows(), statistics.mass("span", span), statistics.mass("weights", weights)],
    )
    truth = subject.model.trace(
        batch, statistics=[*rows(), statistics.mass("span", wide), statistics.mass("weights", padded)]
    )
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert found.ids[index, : len(answer)].tolist() == answer
        steps = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
        for name in set(found.values) - {"argmax"}:
            value = found[name][index]
            torch.testing.assert_close(
                value[:, :, : len(answer)], truth[name][index][:, :, steps], rtol=1e-4, atol=5e-5, equal_nan=True
            )
            rest = value[:, :, len(answer) :]
            assert rest.isnan().all() if rest.is_floating_point() else (rest == -1).all()


@pytest.mark.parametrize("subject", ["llama"], indirect=True)
def test_a_shared_beginning_is_run_once(subject, monkeypatch):
    ran = []
    forward = continuations._Reader._forward
    monkeypatch.setattr(
        continuations._Reader, "_forward", lambda self, ids, rows: ran.append(len(ids)) or forward(self, ids, rows)
    )
    prompts = grid()
    continue_with(subject.model, prompts, [[3]] * len(prompts))
    # The tokens of the tree of prompts, and the last token of each that ends within one already run.
    tree = {tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))}
    assert len(tree) <= sum(ran) <= len(tree) + len(prompts)


@pytest.mark.parametrize("subject", ["llama"], indirect=True)
def test_what_does_not_fit_is_refused(subject):
    model, prompts = subject.model, grid()
    with pytest.raises(RequestError, match="answer to prompt 1 has no tokens"):
        continue_with(model, prompts[:2], [[3], []])
    with pytest.raises(RequestError, match="1 answers for 2 prompts"):
        continue_with(model, prompts[:2], [[3]])
    with pytest.raises(RequestError, match="'span' is given for 1 prompts"):
        continue_with(
            model, prompts[:2], [[3], [4]], statistics=[statistics.mass("span", torch.ones(1, 30, dtype=torch.bool))]
        )
    with pytest.raises(RequestError, match="takes row statistics"):
        continue_with(model, prompts[:2], [[3], [4]], statistics=[statistics.column_sum()])
    with pytest.raises(RequestError, match="max_new_tokens = 0"):
        continue_greedily(model, prompts, 0)
