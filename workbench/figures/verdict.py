"""What an ablation showed, decided from its row by fixed rules, so that every page says the same.

An effect is *shown* where it lies outside the range of matched random draws, its own interval leaves out
zero, q is below 0.05 and the metric got worse. Every other outcome has its own word; none is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from workbench.figures.text import interval, probability

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
    effect, low, high = (_float(row.get(name)) for name in ("effect", "low", "high"))
    control = (_float(row.get("control_low")), _float(row.get("control_high")))
    if any(map(math.isnan, control)):
        return Verdict("uncontrolled", "no control", "There were no matched random draws to compare with.")
    draws = row.get("draws")
    drawn = "matched random heads"
    if isinstance(draws, Real) and not math.isnan(draws):
        drawn = f"{int(float(draws))} draws of matched random heads"
    span = f"the range of {drawn} ({interval(*control, 3)})"
    if control[0] <= effect <= control[1]:
        beaten = row.get("beaten")
        more = f" They did more than {int(float(beaten))} of the draws." if isinstance(beaten, Real) and beaten else ""
        return Verdict(
            "inside", "inside control range", f"Inside {span}: nothing particular to these heads is shown.{more}"
        )
    worse = effect < 0 if row.get("better") == "higher" else effect > 0
    if not worse:
        return Verdict("reverse", "got better", f"Outside {span}, but the metric got better, not worse.")
    q = _float(row.get("q"))
    if low <= 0 <= high:
        return Verdict("unsure", "not settled", f"Outside {span}, but the effect's own interval covers zero.")
    if q >= SIGNIFICANT:
        return Verdict("unsure", "not settled", f"Outside {span}, but q = {probability(q)} does not settle it.")
    return Verdict("shown", "effect shown", f"Outside {span}: the metric depends on these heads.")


def _float(value: object) -> float:
    """The value as a float; NaN where it is missing or no number."""
    return float(value) if isinstance(value, Real) else math.nan
