"""Trials in a process of their own, through Celery: the worker holds the model, servers hold none.

    WORKBENCH_CELERY=redis://localhost WORKBENCH_RUNS=runs WORKBENCH_MODEL=smollm2-135m \\
        celery -A workbench.apps.celery_worker worker -P solo -Q workbench

Messages are JSON alone (no pickle is sent or accepted): an identifier, the name of a job, its fields and the model's
name. Progress and outcomes go to the folder of runs that both sides share, never through Celery. A trial is not begun
twice: what a worker took with it when it ended is told of as failed. `filesystem://` is a queue of files in that same
folder, for which no server has to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from workbench.apps.ledger import Ledger
from workbench.apps.settings import AppSettings
from workbench.apps.worker import Worker
from workbench.errors import MissingExtra, RequestError

QUEUE = "workbench"
_TASK = "workbench.trial"
# Seconds until a server that does not answer is given up.
_TIMEOUT = 4


@cache
def connected(settings: AppSettings) -> Any:
    """Celery for a queue; refuses addresses of which Celery knows nothing."""
    try:
        from celery import Celery
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"A queue needs {error.name}, which is not installed: pip install 'attention-workbench[celery]', or leave "
            "WORKBENCH_CELERY out."
        ) from error
    address = str(settings.celery)
    app = Celery(
        "workbench", broker="filesystem://" if address.startswith("filesystem:") else address, set_as_current=False
    )
    app.conf.update(
        task_serializer="json", accept_content=["json"], result_backend=None, task_ignore_result=True,
        task_default_queue=QUEUE, worker_prefetch_multiplier=1, worker_hijack_root_logger=False,
        broker_connection_timeout=_TIMEOUT, broker_connection_retry_on_startup=True,
        broker_transport_options=_options(settings),
    )  # fmt: skip
    return app


def _options(settings: AppSettings) -> dict[str, Any]:
    address = str(settings.celery)
    if address.startswith("filesystem:"):
        named = address.removeprefix("filesystem:").removeprefix("//")
        folder = Path(named) if named else settings.runs.expanduser().resolve() / ".lab" / "queue"
        folder.mkdir(parents=True, exist_ok=True)
        return {
            "data_folder_in": str(folder),
            "data_folder_out": str(folder),
            "control_folder": str(folder / "control"),
        }
    if address.startswith("redis"):
        return {"socket_connect_timeout": _TIMEOUT, "socket_timeout": 2 * _TIMEOUT}
    return {}


def send(settings: AppSettings, name: str, work: str, asked: Mapping[str, Any]) -> None:
    """Put a trial into the queue; `RequestError` where that cannot be reached."""
    app = connected(settings)
    try:
        app.send_task(_TASK, args=[name, work, dict(asked), str(settings.model)], queue=QUEUE, retry=False)
    # Each kind of queue has errors of its own, of libraries that may not be there.
    except Exception as error:
        raise RequestError(
            f"The queue {app.connection_for_write().as_uri()} cannot be reached ({type(error).__name__}: "
            f"{str(error)[:200]}); start it, or start the dashboard without WORKBENCH_CELERY."
        ) from error


def worker(settings: AppSettings) -> Any:
    """Celery with the one task that there is."""
    if not settings.celery or not settings.model:
        raise RequestError(
            "A worker needs WORKBENCH_CELERY (a queue's address) and WORKBENCH_MODEL (the model to hold)."
        )
    app = connected(settings)
    held = Worker(settings, Ledger(settings.runs.expanduser().resolve() / ".lab"))

    def trial(name: str, work: str, asked: dict[str, Any], model: str) -> None:
        if model != settings.model:
            reason = f"The worker holds {settings.model} and the dashboard asks for {model}; start both with one model."
            held.ledger.close(name, {"status": "failed", "error": reason, "asked": asked})
        else:
            held.run(name, asked, work)

    app.task(trial, name=_TASK, ignore_result=True)
    return app


def __getattr__(name: str) -> Any:
    """`app`, which the command `celery -A` looks for, is made when it is asked for."""
    if name == "app":
        return worker(AppSettings.from_environment())
    raise AttributeError(name)
