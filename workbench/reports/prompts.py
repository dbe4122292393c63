"""Whether a score could have been told from its null at all: with few prompts no p-value can be small.

p comes from sign flips over prompts, so N prompts bound it from below: 2^-N, twice that where values of either sign
count, and one over the resamples where not all flips are tried. Where two samples of prompts are compared (a score
of either sign), labels are shuffled instead, which bounds it less; the lower of the two bounds is taken there.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from workbench.figures.text import probability
from workbench.figures.verdict import SIGNIFICANT
from workbench.heads.inference import RESAMPLES
from workbench.reports.catalogue import DetectorInfo


def least_p(prompts: int, better: str) -> float:
    """The smallest p-value that so many prompts allow."""
    flips, shuffles = 2**prompts, math.comb(2 * prompts, prompts)
    drawn = 1 / (RESAMPLES + 1)
    if better != "either":
        return 1 / flips if flips <= RESAMPLES else drawn
    return 2 * (1 / max(flips, shuffles) if max(flips, shuffles) <= RESAMPLES else drawn)


def too_few(rows: pd.DataFrame, detector: DetectorInfo) -> str:
    """Why none of these heads, all of which reach the threshold, can have a q below 0.05; empty where one could.

    Either no p is below 0.05, or the heads have the smallest p that there is and it is too large for so many heads.
    """
    if "n" not in rows or rows.empty or rows["n"].isna().any():
        return ""
    prompts = int(rows["n"].max())
    least = least_p(prompts, detector.better)
    if least >= SIGNIFICANT:
        return f"with {_prompts(prompts)} no q below 0.05 is possible; use more prompts"
    smallest: Any = rows["p"].min() if "p" in rows else math.nan
    # a bound by the number of resamples is none by prompts
    if least > 2 / (RESAMPLES + 1) and smallest <= least * (1 + 1e-9):
        return (
            f"with {_prompts(prompts)} no p below {probability(least)} is possible, too large for a q below 0.05 over "
            "all heads; use more prompts"
        )
    return ""


def _prompts(count: int) -> str:
    return "one prompt" if count == 1 else f"{count} prompts"
