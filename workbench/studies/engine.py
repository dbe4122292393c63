"""Run a study's cells, here or on Ray; each is kept by itself, so that stopping and adding cells repeats none.

1. Cells that are in the store already are left alone.
2. The others are measured by a `Worker`, which loads a model once for consecutive cells of it: in this process, or in
   several of Ray's. Scheduling, processes and transport are Ray's own.
3. Each result is written as it comes, by this process alone, as a finished run named by the cell's id. A kill costs the
   cells that were being measured: one here, one a worker on Ray.
4. What goes wrong in a cell is kept with its message, the other cells run on, and the next call tries it again.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from workbench.errors import MissingExtra, RequestError
from workbench.heads.detector import Progress
from workbench.runs import environment
from workbench.studies.cells import Cell, by_model
from workbench.studies.measurements import MEASUREMENTS, Bench, Tables
from workbench.studies.store import Store
from workbench.studies.survey import Reporter, Silent, model_facts
from workbench.tracing import Model

Engine = Literal["local", "ray"]
ENGINES: tuple[Engine, ...] = ("local", "ray")
Load = Callable[[str, str | None, str | None], Model]


@dataclass(frozen=True)
class Result:
    """What became of a cell: its tables and where they come from, or an error."""

    cell: Cell
    seconds: float
    tables: Tables = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    detail: str = ""


def load_model(name: str, dtype: str | None, device: str | None) -> Model:
    """A model by name, as the command line loads it."""
    import torch

    from workbench.tracing import load

    return load(name, dtype=None if dtype is None else getattr(torch, dtype), device=device)


class Worker:
    """One process's share: holds one model at a time, and measures cells. Both engines run this."""

    def __init__(self, device: str | None = None, load: Load = load_model) -> None:
        self._device, self._load = device, load
        self._held: tuple[tuple[str, str | None], Bench] | None = None

    def measure(self, cell: Cell, progress: Progress | None = None) -> Result:
        """Measure a cell; an error of any kind is its result."""
        began = time.monotonic()
        try:
            bench = self._bench(cell)
            bench.noted()
            measurement = MEASUREMENTS[cell.measurement]
            asked = measurement.parameters.model_validate_json(cell.parameters)
            tables = {name: table for name, table in measurement.run(bench, asked, progress).items() if len(table)}
        except Exception as error:  # noqa: BLE001 (one cell's fault must not stop the others; it is kept and told)
            told = " ".join(f"{type(error).__name__}: {error}".split())
            return Result(cell, time.monotonic() - began, error=told, detail=traceback.format_exc())
        manifest = {
            "model": model_facts(bench.model),
            "certificate": bench.model.certificate.as_dict(),
            "environment": environment(),
            "prompts": bench.noted(),
        }
        return Result(cell, time.monotonic() - began, tables, manifest)

    def close(self) -> None:
        """Give the model back."""
        if self._held is not None:
            self._held[1].model.detach()
            self._held = None

    def _bench(self, cell: Cell) -> Bench:
        key = (cell.model, cell.dtype)
        if self._held is None or self._held[0] != key:
            self.close()
            self._held = key, Bench(self._load(cell.model, cell.dtype, self._device))
        return self._held[1]


@runtime_checkable
class CellEngine(Protocol):
    """Measures cells and yields each result as it is there."""

    def results(self, cells: Sequence[Cell], begin: Callable[[Cell], None], progress: Progress) -> Iterator[Result]:
        """`begin` is told of a cell before its result; `progress` of what is done within it, where that is known."""


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


@dataclass(frozen=True)
class OnRay:
    """Several at once, by Ray's actors: on this machine, or on the cluster that `RAY_ADDRESS` names.

    As many workers as there are GPUs, or processors where there are none; `workers` caps that.
    """

    device: str | None = None
    workers: int | None = None

    def results(self, cells: Sequence[Cell], begin: Callable[[Cell], None], progress: Progress) -> Iterator[Result]:
        ray, pool_of = _ray()
        ours = not ray.is_initialized()
        if ours:
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            has = ray.cluster_resources()
            gpus = int(has.get("GPU", 0))
            count = max(1, min(len(cells), gpus or int(has.get("CPU", 1)), self.workers or len(cells)))
            remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(Worker)
            pool = pool_of([remote.remote(self.device) for _ in range(count)])
            for result in pool.map_unordered(lambda worker, cell: worker.measure.remote(cell), list(cells)):
                begin(result.cell)
                yield result
        finally:
            if ours:
                ray.shutdown()


def _ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise MissingExtra(
            "The engine 'ray' needs Ray: pip install 'attention-workbench[ray]', or run with --engine local."
        ) from error
    return ray, ActorPool


def make_engine(name: str, device: str | None = None, workers: int | None = None) -> CellEngine:
    """An engine by name."""
    if name not in ENGINES:
        raise RequestError(f"engine={name!r}: choose one of {', '.join(ENGINES)}.")
    if workers is not None and (workers < 1 or name == "local"):
        raise RequestError(f"workers={workers}: a number of Ray's processes, 1 or more; give it with the engine 'ray'.")
    if name == "ray":
        _ray()
        return OnRay(device, workers)
    return Local(device)


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
