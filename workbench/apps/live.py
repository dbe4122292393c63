"""The model at hand: trials wait their turn, one worker runs them, pages only ask how far they are.

The worker is a thread of the server, or with `AppSettings.celery` a process of Celery's (`celery_worker`). What is
known of a trial lies in files (`ledger`): a reload, another browser tab, another process of the server or its restart
loses nothing. Without Celery each process of a server has a worker, and a model, of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from workbench.apps.ledger import Ledger
from workbench.apps.library import counted
from workbench.apps.settings import AppSettings
from workbench.apps.worker import Work, Worker
from workbench.errors import RequestError

MOST_WAITING = 16
# After so many seconds a page says that no worker has taken its trial.
_PATIENCE = 10.0


class Live:
    """Trials on one model, in the order in which they are asked for."""

    def __init__(self, settings: AppSettings) -> None:
        self.settings = settings
        self.ledger = Ledger(settings.runs.expanduser().resolve() / ".lab")
        self._worker = Worker(settings, self.ledger)
        self._turns = ThreadPoolExecutor(1, "workbench-lab")
        self._lock = Lock()

    @property
    def name(self) -> str | None:
        """The model's name; None where the app was started without one."""
        return self.settings.model

    @property
    def folder(self) -> Path:
        """Where outcomes lie, and what is kept beside them."""
        return self.ledger.folder

    def submit(self, asked: Mapping[str, Any], work: str | Work) -> str:
        """Queue a trial; the identifier that its page asks by. `asked` is kept with the outcome.

        `work` is a name of `jobs.JOBS`, which is given `asked`; a function works without Celery alone.
        """
        if self.name is None:
            raise RequestError("There is no model here; start with `workbench serve RUNS --model smollm2-135m`.")
        if self.settings.celery and not isinstance(work, str):
            raise RequestError("This work cannot be sent to a worker of Celery's; give it a name in `jobs.JOBS`.")
        with self._lock:
            waiting = self.ledger.waiting()
            if waiting >= MOST_WAITING:
                raise RequestError(f"{waiting} trials are waiting already; try again when some are done.")
            name = self.ledger.open({"asked": dict(asked), "queue": bool(self.settings.celery)})
        if self.settings.celery:
            self._send(name, str(work), asked)
        else:
            self._worker.heart.add(name)
            self._turns.submit(self._worker.run, name, dict(asked), work)
        return name

    def state(self, name: str) -> dict[str, Any]:
        """How far a trial is: `status` is "waiting", "running", "done", "failed" or "cancelled"."""
        found = self.ledger.state(name)
        if found["status"] == "waiting":
            before = self.ledger.before(name)
            found["step"] = f"waiting: {counted(before, 'trial')} before it" if before else "waiting: it is next"
        if found["status"] == "waiting" and found.get("queue") and found["age"] > _PATIENCE:
            found["step"] = (
                f"no worker has taken this for {found['age']:.0f} s; others may be before it, or none runs: "
                "celery -A workbench.apps.celery_worker worker -P solo -Q workbench"
            )
        return found

    def cancel(self, name: str) -> None:
        """Give a trial up; one that runs ends at its next step."""
        self.ledger.stop(name)

    def close(self) -> None:
        """End the worker after the step at hand; trials that wait are told of as not done."""
        for name in self._worker.heart.end():
            self.ledger.stop(name)
        self._turns.shutdown(wait=True, cancel_futures=True)

    def _send(self, name: str, work: str, asked: Mapping[str, Any]) -> None:
        from workbench.apps.celery_worker import send

        try:
            send(self.settings, name, work, asked)
        except RequestError:
            self.ledger.forget(name)
            raise
