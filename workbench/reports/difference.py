"""A second run beside the reported one: the same heads by the same detectors, as differences with their intervals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from workbench.errors import RequestError
from workbench.figures import difference_map, told_apart
from workbench.figures.text import interval, number, probability, signed
from workbench.reports.catalogue import Catalogue, DetectorInfo
from workbench.reports.payload import figure_pair
from workbench.reports.source import RunLike, head_name, shown_title
from workbench.runs import Run, compare_runs

MOST_DETECTORS = 6
MOST_HEADS = 8


@dataclass(frozen=True, eq=False)
class Difference:
    """Two runs compared, as texts; `figures` are by id, in the order of `detectors`."""

    title: str
    run_id: str
    notes: tuple[str, ...]
    detectors: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    figures: dict[str, dict[str, Any]]


def difference(run: RunLike, against: RunLike | None, known: Catalogue) -> Difference | None:
    """What separates `run` from `against`, as the second less the first; None where no second run is given.

    Shown are the leading detectors that both have. `RunError` where the two have no head score in common.
    """
    if against is None:
        return None
    if not isinstance(run, Run) or not isinstance(against, Run):
        raise RequestError("Only runs on disk can be compared; open both with Run.open.")
    found = compare_runs(run, against)
    shared = set(found["detector"])
    shown = [info for info in known.leading() if info.name in shared]
    # Statistics of a trace are in no catalogue.
    shown = shown or [known.get(str(name)) for name in dict.fromkeys(found["detector"])]
    shown = shown[:MOST_DETECTORS]
    return Difference(
        title=shown_title(against),
        run_id=against.id,
        notes=tuple(map(str, found.attrs["notes"])),
        detectors=tuple(_told(found, info) for info in shown),
        rows=tuple(row for info in shown for row in _rows(found, info)),
        figures={f"difference-{index}": figure_pair(partial(_map, found, info)) for index, info in enumerate(shown)},
    )


def _of(found: pd.DataFrame, info: DetectorInfo) -> pd.DataFrame:
    rows: pd.DataFrame = found[found["detector"] == info.name]
    return rows


def _told(found: pd.DataFrame, info: DetectorInfo) -> str:
    rows = _of(found, info)
    told = f"{info.title}: {len(rows)} heads in both"
    judged = rows["q"].notna()
    if not judged.any():
        return f"{told}, without intervals."
    return f"{told}; the differences of {int(told_apart(rows).sum())} of {int(judged.sum())} are told from zero."


def _rows(found: pd.DataFrame, info: DetectorInfo) -> list[dict[str, str]]:
    rows = _of(found, info).dropna(subset="difference")
    order = rows["difference"].abs().sort_values(ascending=False, kind="stable").index[:MOST_HEADS]
    return [
        {
            "head": head_name(row["layer"], row["head"]),
            "detector": info.title,
            "first": number(row["value_a"], 3),
            "first_interval": interval(row["low_a"], row["high_a"], 3),
            "second": number(row["value_b"], 3),
            "second_interval": interval(row["low_b"], row["high_b"], 3),
            "difference": signed(row["difference"], 3),
            "bounds": interval(row["low"], row["high"], 3),
            "q": probability(row["q"]),
        }
        for row in rows.loc[order].to_dict("records")
    ]


def _map(found: pd.DataFrame, info: DetectorInfo, dark: bool) -> Any:
    sides = ("this run", "the other")
    return difference_map(_of(found, info), info.title, unit=info.unit, sides=sides, dark=dark)
