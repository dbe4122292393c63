"""The head table: all heads by all detectors, as columns of numbers for the page's own script."""

from __future__ import annotations

from typing import Any

import pandas as pd

from workbench.reports.catalogue import Catalogue
from workbench.reports.source import RunLike, frame, head_name

_DIGITS = 4


def head_table(run: RunLike, known: Catalogue, *, details: bool = True) -> dict[str, Any] | None:
    """Heads and, for each detector, lists of value, low, high and q in the order of the heads.

    `details=False` keeps only the values. None where the run scored no head.
    """
    scores = frame(run, "head_scores")
    if scores is None:
        return None
    heads = scores[["layer", "head"]].drop_duplicates().sort_values(["layer", "head"])
    index = pd.MultiIndex.from_frame(heads)
    names = ["value", "low", "high", "q"] if details else ["value"]
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
                **{name: rows[name].astype(float).round(_DIGITS).tolist() for name in names},
            }
        )
    return {"heads": [head_name(layer, head) for layer, head in index], "columns": columns}
