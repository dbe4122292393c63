"""Reports: a run as one self-contained HTML file, readable offline and printable.

Floor: above figures. Reads a run through `RunLike` only; all texts from prompts and models are escaped.
"""

from __future__ import annotations

from workbench.reports.source import RunLike as RunLike
from workbench.reports.write import BUDGET_BYTES as BUDGET_BYTES
from workbench.reports.write import render as render
from workbench.reports.write import write_report as write_report
