"""Worker threads: the same bits on any number of them, errors raised, nothing of the caller's changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from workbench.kernels import StatisticsRequest, attention_statistics, workspace_bytes
from workbench.kernels.workers import run_all, worker_count

EVERYTHING = StatisticsRequest(
    output=True, lse=True, argmax=True, top_k=3, entropy=True, distance=True, first=(2,), recent=(9,), offsets=(-1,),
    column_sum=True, column_max=True, column_last=(5,),
)  # fmt: skip


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_results_are_the_same_bits_on_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 700, 16, generator=generator) for heads in (6, 2, 2))
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(attention_statistics(q, k, v, EVERYTHING))
        assert worker_count() == count
    for name in ("output", "lse", "top_keys", "entropy", "column_sum", "column_max", "column_last"):
        first, *others = (getattr(one, name) for one in found)
        assert all(torch.equal(first, other) for other in others), name


def test_tasks_run_side_by_side_under_the_callers_modes() -> None:
    torch.set_num_threads(2)
    together = threading.Barrier(2, timeout=20)
    seen = []

    def task() -> None:
        together.wait()
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()))

    with torch.no_grad():
        run_all([task, task], parallel=True)
    with torch.inference_mode():
        run_all([task, task], parallel=True)
    assert sorted(seen) == [(False, False, 1)] * 2 + [(False, True, 1)] * 2
    assert torch.get_num_threads() == 2
    new: list[int] = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [2]


def test_the_first_error_is_raised_and_workers_go_on_serving() -> None:
    torch.set_num_threads(2)

    def fail() -> None:
        raise ZeroDivisionError("task")

    with pytest.raises(ZeroDivisionError, match="task"):
        run_all([fail, lambda: None, lambda: None], parallel=True)
    done: list[int] = []
    run_all([lambda: done.append(1), lambda: done.append(2)], parallel=True)
    assert sorted(done) == [1, 2]


def test_every_worker_has_buffers_of_its_own() -> None:
    shapes = torch.Size([1, 6, 4096, 16]), torch.Size([1, 2, 4096, 16])
    needs = []
    for count in (1, 2):
        torch.set_num_threads(count)
        needs.append(workspace_bytes(*shapes, None, "cpu"))
    assert needs[1] == 2 * needs[0]
