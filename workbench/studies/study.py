"""A study from its file to its run: measure what is missing, then join everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.runs import Run
from workbench.studies.cells import Cell, chosen
from workbench.studies.collect import check_target, collect
from workbench.studies.engine import CellEngine, Local, run_cells
from workbench.studies.spec import Study
from workbench.studies.store import Store
from workbench.studies.survey import Reporter


@dataclass(frozen=True)
class Outcome:
    """The study's run, and what went wrong: cells by id with their messages."""

    run: Run
    cells: list[Cell]
    failed: dict[str, str]


def run_study(
    study: Study,
    path: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    only: Sequence[str] = (),
    engine: CellEngine | None = None,
    reporter: Reporter | None = None,
    command: str | None = None,
) -> Outcome:
    """Measure the cells that are missing (of those named by `only`), then join all that are there into a run.

    Raises `RunLocked` where another process runs the study, `RunError` where `path` holds another run, and
    `RequestError` where not one cell could be measured. A cell that fails is in the outcome, and is tried again by the
    next call.
    """
    store = Store(Path(path).expanduser().resolve())
    cells = study.cells(model, dtype)
    wanted = chosen(cells, only)
    check_target(study, store)
    with store.locked():
        failed = run_cells(store, wanted, engine or Local(), reporter=reporter)
        return Outcome(collect(study, cells, store, command=command), cells, failed)
