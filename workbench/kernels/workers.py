"""Worker threads for CPU work that is already cut into independent pieces.

Each worker runs torch on one thread: pieces then go side by side with no barrier between cores inside an
operation, which costs little on a quiet machine and a factor of ten and more on a busy one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache

import torch


def worker_count() -> int:
    """How many pieces run at once: the threads torch may use (`torch.set_num_threads`)."""
    return torch.get_num_threads()


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    """Workers are kept between calls: starting them anew costs as much as a layer of a short prompt."""
    return ThreadPoolExecutor(workers, "workbench-kernels", initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):
    # A forked child has none of its parent's threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def run_all(tasks: Sequence[Callable[[], None]], *, parallel: bool) -> None:
    """Run every task, on the calling thread or on `worker_count()` workers; the first error is raised.

    Workers take over the caller's gradient and inference modes. An interrupt drops the tasks that have not begun
    and waits for those that have.
    """
    workers = min(worker_count(), len(tasks)) if parallel else 1
    if workers < 2:
        for task in tasks:
            task()
        return
    threads, grad, inference = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(task: Callable[[], None]) -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            task()

    futures = [_pool(threads).submit(run, task) for task in tasks]
    try:
        wait(futures)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
        # A worker's count is its own, but torch takes the last one set as the default of threads to come.
        torch.set_num_threads(threads)
    for future in futures:
        future.result()
