"""Heads ablated one by one: a table of texts, and how their effects add up beside that of the whole set."""

from __future__ import annotations

from typing import Any

from workbench.figures.controls import with_controls
from workbench.figures.text import BY_HAND, readable, signed
from workbench.reports.catalogue import Catalogue
from workbench.reports.findings import verification_row
from workbench.reports.source import RunLike, frame


def single_rows(run: RunLike, known: Catalogue) -> list[dict[str, Any]]:
    """The table of single heads as texts."""
    table = frame(run, "verification_single")
    if table is None:
        return []
    rows = with_controls(table, frame(run, "verification_single_draws"))
    return [
        verification_row(row, known) | {"of": _title(str(row["detector"]), known)} for row in rows.to_dict("records")
    ]


def redundancy(run: RunLike, known: Catalogue) -> str:
    """What the heads do together beside the sum of what each does alone, for each detector's first metric."""
    joint, alone = frame(run, "verification"), frame(run, "verification_single")
    if joint is None or alone is None:
        return ""
    sentences = []
    for detector, singles in alone.groupby("detector", sort=False):
        metric = singles["metric"].iloc[0]
        sets = joint[(joint["detector"] == detector) & (joint["metric"] == metric)].sort_values("k")
        if sets.empty or int(sets["k"].iloc[-1]) == 1:
            continue
        whole, parts = float(sets["effect"].iloc[-1]), float(singles[singles["metric"] == metric]["effect"].sum())
        sentences.append(
            f"{_title(str(detector), known)}: {readable(metric)} changes by {signed(whole)} without all "
            f"{int(sets['k'].iloc[-1])} heads together, and by {signed(parts)} summed over each alone."
        )
    return " ".join([*sentences, "Heads that stand in for one another do less alone than together."])


def _title(detector: str, known: Catalogue) -> str:
    return "Chosen by hand" if detector == BY_HAND else known.get(detector).title
