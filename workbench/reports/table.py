"""The head table: all heads by all detectors or statistics, as columns of numbers for the page's own script."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from workbench.reports.catalogue import DetectorInfo, like_null
from workbench.reports.source import head_name

_DIGITS = 4


def head_table(
    scores: pd.DataFrame | None, known: Iterable[DetectorInfo], *, details: bool = True
) -> dict[str, Any] | None:
    """Heads and, for each detector, lists of value, low, high and q in the order of the heads.

    `weak` are the places of heads that reach the threshold and are not distinguished from the null.
    `details=False` keeps only that and the values. None where there are no scores.
    """
    if scores is None:
        return None
    heads = scores[["layer", "head"]].drop_duplicates().sort_values(["layer", "head"])
    index = pd.MultiIndex.from_frame(heads)
    names = [name for name in ("value", "low", "high", "q") if name in scores and (details or name == "value")]
    columns = []
    for detector in known:
        rows = scores[scores["detector"] == detector.name].set_index(["layer", "head"]).reindex(index)
        columns.append(
            {
                "name": detector.name,
                "title": detector.title,
                "unit": detector.unit,
                "threshold": detector.threshold,
                "better": detector.better,
                "weak": _weak(rows, detector),
                **{name: rows[name].astype(float).round(_DIGITS).tolist() for name in names},
            }
        )
    return {"heads": [head_name(layer, head) for layer, head in index], "columns": columns}


def _weak(rows: pd.DataFrame, detector: DetectorInfo) -> list[int]:
    if "q" not in rows or not detector.has_threshold:
        return []
    reaching = detector.passes(rows["value"].to_numpy(float))
    found: list[int] = np.flatnonzero(reaching & like_null(rows["q"].to_numpy(float))).tolist()
    return found
