"""The dashboard for a WSGI server, set up by environment variables (README.md): `waitress-serve wsgi:app`."""

from __future__ import annotations

from workbench.apps.server import create_app
from workbench.apps.settings import AppSettings

settings = AppSettings.from_environment()
app = create_app(settings).server
