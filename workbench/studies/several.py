"""Engines that measure several cells at once: processes of this machine, or Ray's on one machine or many.

Neither schedules anything itself. Cells are tasks of `concurrent.futures` or of Ray, as many in flight as there are
workers; a process holds one model at a time, and results are handed on as they come. When a process or a machine is
lost, what it was measuring is measured again elsewhere, at most `RETRIES` times; cells that are done never are.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from workbench.errors import MissingExtra, RequestError
from workbench.heads.detector import Progress
from workbench.studies.cells import Cell
from workbench.studies.worker import Result, Worker

# How often a cell whose worker was lost is tried again.
RETRIES = 3
# The worker of this process, where an engine started it: it keeps its model from cell to cell.
_MINE: dict[str | None, Worker] = {}


def measure_here(cell: Cell, device: str | None) -> Result:
    """Measure a cell in this process, which holds the model of the cell before."""
    return _MINE.setdefault(device, Worker(device)).measure(cell)


def lost(cell: Cell, why: object) -> Result:
    """What is kept of a cell whose workers die."""
    told = " ".join(f"{type(why).__name__}: {why}".split())[:300]
    return Result(
        cell,
        0.0,
        error=f"The worker was lost {RETRIES + 1} times while it measured this cell; if memory ran short, use fewer "
        f"workers, or a larger machine ({told})",
    )


@dataclass(frozen=True)
class Processes:
    """Several processes of this machine, each with its share of the processors.

    When a process dies, its pool ends with it, and nobody says which of its cells was at fault. So the cells that were
    in flight run again one by one, behind all others.
    """

    workers: int
    device: str | None = None

    def results(self, cells: Sequence[Cell], begin: Callable[[Cell], None], progress: Progress) -> Iterator[Result]:
        """Each result as it is there."""
        suspects: deque[Cell] = deque()
        waiting = deque(cells)
        while waiting:
            yield from self._together(waiting, suspects, begin)
        for cell in suspects:
            begin(cell)
            yield self._alone(cell)

    def _together(self, waiting: deque[Cell], suspects: deque[Cell], begin: Callable[[Cell], None]) -> Iterator[Result]:
        """Until all are done, or a process dies: what was in flight then is suspect."""
        running: dict[Future[Result], Cell] = {}
        pool = self._pool(min(self.workers, len(waiting)))
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    running[pool.submit(measure_here, waiting[0], self.device)] = waiting[0]
                    waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    del running[future]
                    begin(result.cell)
                    yield result
        except BrokenProcessPool:
            suspects.extend(running.values())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _alone(self, cell: Cell) -> Result:
        """A cell that was in flight when a process died, which was its first try."""
        why: object = None
        for _ in range(RETRIES):
            with self._pool(1) as pool:
                try:
                    return pool.submit(measure_here, cell, self.device).result()
                except BrokenProcessPool as error:
                    why = error
        return lost(cell, why)

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        share = max(1, (os.cpu_count() or 1) // self.workers)
        # Fresh interpreters: copies of this one would share its threads and its device.
        return ProcessPoolExecutor(workers, get_context("spawn"), _take_threads, (share,))


def _take_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


@dataclass(frozen=True)
class OnRay:
    """Ray's tasks: on this machine, or on the cluster at `address` (by default the one that `RAY_ADDRESS` names).

    As many cells at once as there are GPUs, or processors where there are none; `workers` caps that. Ray itself finds
    a place for each, and another one when a worker or a node is lost.
    """

    device: str | None = None
    workers: int | None = None
    address: str | None = None

    def results(self, cells: Sequence[Cell], begin: Callable[[Cell], None], progress: Progress) -> Iterator[Result]:
        """Each result as it is there."""
        ray = imported_ray()
        ours = not ray.is_initialized()
        if ours:
            self._connect(ray)
        running: dict[Any, Cell] = {}
        try:
            has = ray.cluster_resources()
            gpus = int(has.get("GPU", 0))
            most = max(1, min(gpus or int(has.get("CPU", 1)), self.workers or len(cells)))
            task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=RETRIES)(measure_here)
            waiting = deque(cells)
            while waiting or running:
                while waiting and len(running) < most:
                    running[task.remote(waiting[0], self.device)] = waiting[0]
                    waiting.popleft()
                for reference in ray.wait(list(running), num_returns=1)[0]:
                    cell = running.pop(reference)
                    begin(cell)
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        result = lost(cell, error)
                    yield result
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            if ours:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        try:
            ray.init(self.address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RequestError(
                f"No Ray cluster answers at {self.address or 'RAY_ADDRESS'!r} ({error}); start one with `ray start "
                "--head`, or leave the address out to work on this machine."
            ) from error


def imported_ray() -> Any:
    """The package, or what to install."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra(
            "The engine 'ray' needs Ray: pip install 'attention-workbench[ray]', or run with --engine local."
        ) from error
    return ray
