"""Run a study's cells, here or on Ray; each is kept by itself, so that stopping and adding cells repeats none.

1. Cells that are in the store already are left alone.
2. The others are measured by a `Worker`, which loads a model once for consecutive cells of it: in this process, or in
   several, here or on Ray (`several`).
3. Each result is written as it comes, by this process alone, as a finished run named by the cell's id. A kill costs the
   cells that were being measured: one a worker.
4. What goes wrong in a cell is kept with its message, the other cells run on, and the next call tries it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from workbench.errors import RequestError
from workbench.heads.detector import Progress
from workbench.studies.cells import Cell, by_model
from workbench.studies.several import OnRay, Processes, imported_ray
from workbench.studies.store import Store
from workbench.studies.survey import Reporter, Silent
from workbench.studies.worker import Load, Result, Worker, load_model

Engine = Literal["local", "ray"]
ENGINES: tuple[Engine, ...] = ("local", "ray")


@runtime_checkable
class CellEngine(Protocol):
    """Measures cells and yields each result as it is there."""

    def results(self, cells: Sequence[Cell], begin: Callable[[Cell], None], progress: Progress) -> Iterator[Result]:
        """Each as it is there. `begin` is told of a cell before its result; `progress` of what is done within it, where
        that is known."""


@dataclass(frozen=True)
class Local:
    """One after the other, in this process."""

    device: str | None = None
    load: Load = load_model

    def results(self, cells: Sequence[Cell], begin: Callable[[Cell], None], progress: Progress) -> Iterator[Result]:
        worker = Worker(self.device, self.load)
        try:
            for cell in cells:
                begin(cell)
                yield worker.measure(cell, progress)
        finally:
            worker.close()


def make_engine(
    name: str, device: str | None = None, workers: int | None = None, address: str | None = None
) -> CellEngine:
    """An engine by name; `local` has one process, this one, unless there are more `workers`."""
    if name not in ENGINES:
        raise RequestError(f"engine={name!r}: choose one of {', '.join(ENGINES)}.")
    if workers is not None and workers < 1:
        raise RequestError(f"workers={workers}: a number of processes, 1 or more.")
    if address is not None and name != "ray":
        raise RequestError(f"address={address!r} names a cluster of Ray; give it with the engine 'ray'.")
    if name == "ray":
        imported_ray()
        return OnRay(device, workers, address)
    return Local(device) if workers in (None, 1) else Processes(workers, device)


@dataclass
class _Clock:
    """How many cells are done, and how long the others will take at the pace so far."""

    total: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def left(self) -> str:
        if not self.done:
            return ""
        seconds = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        return f"about {seconds:.0f} s left" if seconds < 120 else f"about {seconds / 60:.0f} min left"


def run_cells(
    store: Store, cells: Sequence[Cell], engine: CellEngine, *, reporter: Reporter | None = None
) -> dict[str, str]:
    """Measure the cells that the store lacks; the errors, by id. The store must be locked by the caller."""
    reporter = reporter or Silent()
    for cell in cells:
        if store.has(cell):
            reporter.step(cell.id, cell.label, True)
    wanted = by_model([cell for cell in cells if not store.has(cell)])
    failed: dict[str, str] = {}
    clock = _Clock(len(wanted))

    def begin(cell: Cell) -> None:
        reporter.step(cell.id, ", ".join(filter(None, [cell.label, clock.left()])), False)

    if not wanted:
        return failed
    for result in engine.results(wanted, begin, reporter.advance):
        clock.done += 1
        if result.error is None:
            store.keep(result.cell, result.tables, result.manifest, result.seconds)
        else:
            failed[result.cell.id] = result.error
            store.keep_error(result.cell, result.error, result.detail, result.seconds)
    return failed
