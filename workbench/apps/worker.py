"""Whoever holds the model and does what pages ask for: a thread of the server, or a process of Celery's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

from workbench.apps.ledger import Heart, Ledger
from workbench.apps.settings import AppSettings
from workbench.errors import RequestError, WorkbenchError

if TYPE_CHECKING:
    from workbench.heads.detector import Progress
    from workbench.tracing import Model

Work = Callable[["Model", "Progress"], Mapping[str, Any]]
# Progress is written no more often; pages ask less often.
_PAUSE = 0.2
_log = logging.getLogger("workbench")


class Cancelled(Exception):
    """The trial was given up by whoever asked for it."""


class Worker:
    """Holds the model and runs one trial at a time; every end of a trial is an outcome in the ledger."""

    def __init__(self, settings: AppSettings, ledger: Ledger) -> None:
        self.settings, self.ledger, self.heart = settings, ledger, Heart(ledger)
        self._model: Model | None = None
        self._lock = Lock()

    def run(self, name: str, asked: Mapping[str, Any], work: str | Work) -> None:
        """Do a trial, whatever happens."""
        self.heart.add(name)
        try:
            with self._lock:
                outcome = self._outcome(name, asked, work)
            self.ledger.close(name, {**outcome, "asked": dict(asked)})
        finally:
            self.heart.drop(name)

    def _outcome(self, name: str, asked: Mapping[str, Any], work: str | Work) -> dict[str, Any]:
        state = {"status": "running", "done": 0, "total": 0, "step": "loading the model", "asked": dict(asked)}
        written = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal written
            if self.ledger.stopped(name):
                raise Cancelled
            if time.monotonic() - written > _PAUSE:
                self.ledger.update(name, {**state, "done": done, "total": total})
                written = time.monotonic()

        try:
            progress(0, 0)
            model = self._loaded()
            state["step"], written = "measuring", 0.0
            progress(0, 0)
            if isinstance(work, str):
                return {"status": "done", "result": dict(_job(work)(model, asked, self.ledger.folder, progress))}
            return {"status": "done", "result": dict(work(model, progress))}
        except Cancelled:
            return {"status": "cancelled"}
        except WorkbenchError as error:
            return {"status": "failed", "error": str(error)}
        except Exception:  # noqa: BLE001 (the worker must live on, and the page must hear of it)
            _log.exception("trial %s", name)
            return {"status": "failed", "error": "This is a fault of the workbench; the terminal has the reason."}

    def _loaded(self) -> Model:
        if self._model is None:
            import torch

            from workbench.tracing import load

            dtype = None if self.settings.dtype is None else getattr(torch, self.settings.dtype)
            self._model = load(str(self.settings.model), dtype=dtype, device=self.settings.device)
        return self._model


def _job(name: str) -> Any:
    from workbench.apps.jobs import JOBS

    if name not in JOBS:
        raise RequestError(f"There is no work called {name[:40]!r}; there is {', '.join(JOBS)}.")
    return JOBS[name]
