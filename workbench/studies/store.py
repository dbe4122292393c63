"""Where a study's cells lie: a folder beside its run, one finished run a cell, named by the cell's id.

```
runs/ablation-forms/            the study's run, made of the cells (`collect`)
runs/ablation-forms.cells/
    3f9a0c1b2d4e5f60/           a cell: manifest, tables, checksums
    77ab12cd34ef5601.error.json what went wrong in a cell
```

Cells are written by `workbench.runs.RunWriter`: whole or not at all, under its locks. A lock of the folder keeps a
second process from measuring the same cells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.errors import RunError
from workbench.runs import Run, RunWriter
from workbench.runs.disk import write_atomically, writing
from workbench.runs.lock import Lock
from workbench.runs.manifest import utc_now
from workbench.studies.cells import Cell
from workbench.studies.measurements import Tables

CELL_KIND = "cell"
State = Literal["done", "failed", "open"]


@dataclass(frozen=True)
class Store:
    """The cells of a study whose run is at `run`."""

    run: Path

    @property
    def folder(self) -> Path:
        """Where the cells lie."""
        return self.run.with_name(f"{self.run.name}.cells")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store; `RunLocked` where another process does."""
        with writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.folder.with_name(f".{self.folder.name}.lock"), self.folder)
        try:
            yield
        finally:
            lock.release()

    def path(self, cell: Cell) -> Path:
        """Where a cell's run lies, if it is there."""
        return self.folder / cell.id

    def has(self, cell: Cell) -> bool:
        """Whether the cell was measured, and its files are there with their sizes."""
        return self._open(cell, verify=False) is not None

    def state(self, cell: Cell) -> State:
        """Measured, failed the last time, or not tried."""
        if self.has(cell):
            return "done"
        return "failed" if self._error_file(cell).is_file() else "open"

    def read(self, cell: Cell) -> Run | None:
        """A measured cell, its checksums compared; None where there is none."""
        return self._open(cell, verify=True)

    def keep(self, cell: Cell, tables: Tables, manifest: dict[str, Any], seconds: float) -> None:
        """Write a measured cell; all of it, or nothing."""
        with RunWriter.open(
            self.path(cell), kind=CELL_KIND, title=cell.label, fingerprint=cell.identity, overwrite=True
        ) as writer:
            writer.manifest |= manifest | {"settings": cell.identity}
            for name, table in tables.items():
                writer.table(name, table.reset_index(drop=True))
            writer.done("measured", seconds=seconds)
            writer.finish()
        self._error_file(cell).unlink(missing_ok=True)

    def keep_error(self, cell: Cell, error: str, detail: str, seconds: float) -> None:
        """Write what went wrong in a cell."""
        record = {"error": error, "detail": detail, "seconds": round(seconds, 3), "when": utc_now(), **cell.identity}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._error_file(cell), json.dumps(record, indent=2) + "\n")

    def error(self, cell: Cell) -> str:
        """The message of a cell that failed; empty where none did."""
        try:
            return str(json.loads(self._error_file(cell).read_text(encoding="utf-8"))["error"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _error_file(self, cell: Cell) -> Path:
        return self.folder / f"{cell.id}.error.json"

    def _open(self, cell: Cell, *, verify: bool) -> Run | None:
        try:
            return Run.open(self.path(cell), verify=verify)
        except RunError:
            # Damaged or made by a later format: measured again, and replaced.
            return None
