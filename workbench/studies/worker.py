"""One process's share of a study: a model at hand, and cells measured on it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workbench.heads.detector import Progress
from workbench.runs import environment
from workbench.studies.cells import Cell
from workbench.studies.measurements import MEASUREMENTS, Bench, Tables
from workbench.studies.survey import model_facts
from workbench.tracing import Model

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
