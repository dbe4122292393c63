"""Drafted, prefix-sharing decoding against token-by-token decoding; given answers against a teacher-forced trace."""

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
def test_drafts_right_wrong_and_missing_change_nothing(subject, monkeypatch):
    # So few tokens at a time that prompts are cut.
    monkeypatch.setattr(continuations, "CHUNK", 3)
    prompts = grid()
    truth = subject.model.generate(Batch.from_ids(prompts), STEPS, statistics=rows(), stop_ids=())
    right = truth.ids.tolist()
    half = [[*row[:4], 3, 4, 5] for row in right]
    for drafts in (None, right, half, [[11] * 30] * len(prompts)):
        found = continue_greedily(
            subject.model, prompts, STEPS, drafts=drafts, statistics=rows(), stop_ids=()
        )  # fmt: skip
        close(found, truth)


@pytest.mark.parametrize("subject", ["llama"], indirect=True)
def test_stops_end_an_answer_within_a_draft(subject):
    prompts = grid()
    free = subject.model.generate(Batch.from_ids(prompts), STEPS, stop_ids=()).ids
    stop = int(free[0, 3])
    truth = subject.model.generate(Batch.from_ids(prompts), STEPS, statistics=rows(), stop_ids=[stop])
    found = continue_greedily(
        subject.model, prompts, STEPS, drafts=free.tolist(), statistics=rows(), stop_ids=[stop]
    )  # fmt: skip
    assert (truth.ids < 0).any()
    close(found, truth)


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
    runner = continuations._Runner._forward
    monkeypatch.setattr(
        continuations._Runner, "_forward", lambda self, ids, rows: ran.append(len(ids)) or runner(self, ids, rows)
    )
    prompts = grid()
    continue_with(subject.model, prompts, [[3]] * len(prompts))
    # The tokens of the tree of prompts, and the last token of each that ends within one already run.
    tree = {tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))}
    assert len(tree) <= sum(ran) <= len(tree) + len(prompts)


@pytest.mark.parametrize("subject", ["llama"], indirect=True)
def test_what_does_not_fit_is_refused(subject):
    model, prompts = subject.model, grid()
    with pytest.raises(RequestError, match="2 drafts for 5 prompts"):
        continue_greedily(model, prompts, drafts=[[], []])
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
