"""What an app is started with, and the bounds of what it takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import RequestError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class AppSettings:
    """Where runs lie, which model is at hand, and limits that keep one user from starving the others.

    `model` is what `workbench.load` takes; without one, the pages that work live say so. `hosts` are the names under
    which requests are answered. `celery` is the address of a queue whose workers hold the model; without one this
    process does.
    """

    runs: Path
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    most_prompt_characters: int = 200_000
    most_body_bytes: int = 4 << 20
    celery: str | None = None

    @staticmethod
    def from_environment() -> AppSettings:
        """As a server or worker without a command line is told (`apps/README.md`)."""
        dtype = os.environ.get("WORKBENCH_DTYPE") or None
        if dtype not in (None, *DTYPES):
            raise RequestError(f"WORKBENCH_DTYPE={dtype!r}: choose one of {', '.join(DTYPES)}, or leave it out.")
        names = os.environ.get("WORKBENCH_HOSTS", "127.0.0.1,localhost").split(",")
        return AppSettings(
            runs=Path(os.environ.get("WORKBENCH_RUNS", "runs")),
            model=os.environ.get("WORKBENCH_MODEL") or None,
            device=os.environ.get("WORKBENCH_DEVICE") or None,
            dtype=dtype,
            hosts=tuple(name.strip() for name in names if name.strip()),
            celery=os.environ.get("WORKBENCH_CELERY") or None,
        )
