"""What an ablation showed, decided from its row by fixed rules, so that every page says the same.

An effect is *shown* where it lies outside the range of matched random draws, its own interval leaves out zero, q is
below 0.05, the metric got worse and at least ten control sets were different. Every other outcome has its own word;
none is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from workbench.figures.controls import beyond_mean, control_sets, few_sets, number_of
from workbench.figures.text import interval, probability, signed

Kind = Literal["shown", "inside", "unsure", "reverse", "uncontrolled"]
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Verdict:
    """The outcome of one ablation: a kind for styling, two words for a table, a sentence for the text."""

    kind: Kind
    label: str
    sentence: str


def verdict(row: Mapping[str, Any]) -> Verdict:
    """Judges one row of the `verification` table."""
    effect, low, high = (number_of(row, name) for name in ("effect", "low", "high"))
    control = (number_of(row, "control_low"), number_of(row, "control_high"))
    if any(map(math.isnan, control)):
        return Verdict("uncontrolled", "no control", "There were no matched random draws to compare with.")
    span = f"the range of {control_sets(row)} ({interval(*control, 3)})"
    if control[0] <= effect <= control[1]:
        beaten = row.get("beaten")
        more = f" They did more than {int(float(beaten))} of the draws." if isinstance(beaten, Real) and beaten else ""
        more = "" if few_sets(row) else more
        means = "nothing particular to these heads is shown."
        if beyond_mean(row):
            mean = signed(row["control_effect"], beside=(effect,))
            means = f"more than random heads do on average ({mean}), but some of them do as much; the claim stays open."
        return Verdict("inside", "inside control range", f"Inside {span}: {means}{more}")
    worse = effect < 0 if row.get("better") == "higher" else effect > 0
    if not worse:
        return Verdict("reverse", "got better", f"Outside {span}, but the metric got better, not worse.")
    q = number_of(row, "q")
    if low <= 0 <= high:
        return Verdict("unsure", "not settled", f"Outside {span}, but the effect's own interval covers zero.")
    if q >= SIGNIFICANT:
        return Verdict("unsure", "not settled", f"Outside {span}, but q = {probability(q)} does not settle it.")
    if few_sets(row):
        return Verdict("unsure", "too few controls", f"Outside {span}, but so few controls bound nothing.")
    return Verdict("shown", "effect shown", f"Outside {span}: the metric depends on these heads.")
