"""The pages, in the order of the navigation."""

from __future__ import annotations

from workbench.apps.pages.pattern import PAGE as PATTERN
from workbench.apps.pages.runs import PAGE as RUNS

PAGES = (RUNS, PATTERN)
