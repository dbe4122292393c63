"""The model at hand: one worker runs trials one after the other, pages only ask how far they are.

A trial's outcome is a JSON file in the folder of runs (`.lab/<id>.json`), so that a reload, another browser tab or a
restart of the server loses nothing; identifiers cannot be guessed, so that users do not meet each other's trials.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from workbench.apps.settings import AppSettings
from workbench.errors import RequestError, WorkbenchError
from workbench.runs.disk import write_atomically

if TYPE_CHECKING:
    from workbench.tracing import Model

MOST_WAITING = 16
MOST_KEPT = 500
_ID = re.compile(r"[A-Za-z0-9_-]{16}")
_log = logging.getLogger("workbench")
Progress = Callable[[int, int], None]
Work = Callable[["Model", Progress], Mapping[str, Any]]


class Cancelled(Exception):
    """The trial was given up by whoever asked for it."""


@dataclass
class _Job:
    future: Future[None] | None = None
    done: int = 0
    total: int = 0
    step: str = "waiting"
    stop: Event = field(default_factory=Event)


class Live:
    """Trials on one model, in the order in which they are asked for."""

    def __init__(self, settings: AppSettings) -> None:
        self.settings = settings
        self.folder = settings.runs.expanduser().resolve() / ".lab"
        self._worker = ThreadPoolExecutor(1, "workbench-lab")
        self._jobs: dict[str, _Job] = {}
        self._lock = Lock()
        self._model: Model | None = None

    @property
    def name(self) -> str | None:
        """The model's name; None where the app was started without one."""
        return self.settings.model

    def submit(self, asked: Mapping[str, Any], work: Work) -> str:
        """Queue a trial; the identifier that its page asks by. `asked` is kept with the outcome."""
        if self.name is None:
            raise RequestError("There is no model here; start with `workbench serve RUNS --model smollm2-135m`.")
        with self._lock:
            waiting = [job for job in self._jobs.values() if job.future is not None and not job.future.done()]
            if len(waiting) >= MOST_WAITING:
                raise RequestError(f"{len(waiting)} trials are waiting already; try again when some are done.")
            name, job = secrets.token_urlsafe(12), _Job()
            self._jobs[name] = job
            job.future = self._worker.submit(self._run, name, job, dict(asked), work)
        return name

    def state(self, name: str) -> dict[str, Any]:
        """How far a trial is: `status` is "waiting", "running", "done", "failed" or "cancelled"."""
        kept = self._read(name)
        if kept is not None:
            return kept
        job = self._jobs.get(name)
        if job is None or job.future is None:
            raise RequestError(f"There is no trial {name[:20]!r} here; it may have been cleared away. Run it again.")
        running = job.future.running()
        return {"status": "running" if running else "waiting", "done": job.done, "total": job.total, "step": job.step}

    def cancel(self, name: str) -> None:
        """Give a trial up; one that runs ends at its next step."""
        job = self._jobs.get(name)
        if job is not None:
            job.stop.set()

    def close(self) -> None:
        """End the worker after the trial at hand."""
        for job in self._jobs.values():
            job.stop.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _run(self, name: str, job: _Job, asked: dict[str, Any], work: Work) -> None:
        def progress(done: int, total: int) -> None:
            if job.stop.is_set():
                raise Cancelled
            job.done, job.total = done, total

        try:
            progress(0, 0)
            job.step = "loading the model"
            model = self._loaded()
            job.step = "measuring"
            outcome: dict[str, Any] = {"status": "done", "result": dict(work(model, progress))}
        except Cancelled:
            outcome = {"status": "cancelled"}
        except WorkbenchError as error:
            outcome = {"status": "failed", "error": str(error)}
        except Exception:  # noqa: BLE001 (the worker must live on, and the page must hear of it)
            _log.exception("trial %s", name)
            outcome = {"status": "failed", "error": "This is a fault of the workbench; the terminal has the reason."}
        self._write(name, {**outcome, "asked": asked})

    def _loaded(self) -> Model:
        if self._model is None:
            import torch

            from workbench.tracing import load

            dtype = None if self.settings.dtype is None else getattr(torch, self.settings.dtype)
            self._model = load(str(self.name), dtype=dtype, device=self.settings.device)
        return self._model

    def _file(self, name: str) -> Path:
        if not _ID.fullmatch(name):
            raise RequestError(f"{name[:20]!r} is no trial's identifier; take the link from the lab's history.")
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self._file(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RequestError(f"The trial {name} cannot be read ({error}); run it again.") from error
        return found if isinstance(found, dict) else None

    def _write(self, name: str, outcome: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(name), json.dumps(outcome, allow_nan=False) + "\n")
        with self._lock:
            self._jobs.pop(name, None)
        kept = sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        for file in kept[:-MOST_KEPT]:
            file.unlink(missing_ok=True)
