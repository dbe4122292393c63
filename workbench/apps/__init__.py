"""The dashboard: runs on disk and a model at hand, shown in a browser on this machine."""

from __future__ import annotations

from workbench.apps.settings import AppSettings as AppSettings
