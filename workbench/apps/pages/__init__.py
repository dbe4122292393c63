"""The pages, in the order of the navigation."""

from __future__ import annotations

from workbench.apps.pages.atlas import PAGE as ATLAS
from workbench.apps.pages.circuits import PAGE as CIRCUITS
from workbench.apps.pages.compare import PAGE as COMPARE
from workbench.apps.pages.head import PAGE as HEAD
from workbench.apps.pages.lab import PAGE as LAB
from workbench.apps.pages.pattern import PAGE as PATTERN
from workbench.apps.pages.runs import PAGE as RUNS

PAGES = (RUNS, ATLAS, HEAD, PATTERN, LAB, CIRCUITS, COMPARE)
