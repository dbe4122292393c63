"""The dashboard for a WSGI server, set up by environment variables (README.md): `waitress-serve wsgi:app`."""

from __future__ import annotations

import os
from pathlib import Path

from workbench.apps.server import create_app
from workbench.apps.settings import AppSettings

hosts = [name.strip() for name in os.environ.get("WORKBENCH_HOSTS", "127.0.0.1,localhost").split(",")]
settings = AppSettings(
    runs=Path(os.environ.get("WORKBENCH_RUNS", "runs")),
    model=os.environ.get("WORKBENCH_MODEL") or None,
    hosts=tuple(name for name in hosts if name),
)
app = create_app(settings).server
