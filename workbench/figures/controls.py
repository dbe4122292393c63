"""What the controls of an ablation were: how many different sets, from which layers, and how the effect stands to them.

Runs made before these columns existed get them from their table of draws, so that every sentence about controls
rests on the sets that were drawn.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import pandas as pd

KEYS = ["detector", "k", "metric"]
# fewer different control sets than this bound nothing
FEWEST_SETS = 10
_LAYER = re.compile(r"L(\d+)H\d+")


def with_controls(verification: pd.DataFrame, draws: pd.DataFrame | None) -> pd.DataFrame:
    """The ablations with `different_draws` and `other_layers`, counted from the draws where the table lacks them."""
    lacking = [name for name in ("different_draws", "other_layers") if name not in verification]
    if draws is None or draws.empty or not lacking:
        return verification
    sets = {key: list(map(str, part["heads"])) for key, part in draws.groupby(KEYS)}
    own = [sets.get((row["detector"], row["k"], row["metric"]), []) for row in verification.to_dict("records")]
    counted = {
        "different_draws": [len({frozenset(drawn.split()) for drawn in found}) or math.nan for found in own],
        "other_layers": [
            max((_strangers(str(heads), drawn) for drawn in found), default=math.nan)
            for heads, found in zip(verification["heads"], own, strict=True)
        ],
    }
    return verification.assign(**{name: counted[name] for name in lacking})


def _strangers(heads: str, drawn: str) -> int:
    """How many drawn heads are beyond what the layers of `heads` call for."""
    return sum((Counter(_LAYER.findall(drawn)) - Counter(_LAYER.findall(heads))).values())


def few_sets(row: Mapping[str, Any]) -> bool:
    """Whether the control sets that differ are too few to bound anything; not where their number is unknown."""
    return number_of(row, "different_draws") < FEWEST_SETS


def control_sets(row: Mapping[str, Any]) -> str:
    """`10 draws of matched random heads`, or how many different sets there were where that is fewer."""
    draws, different = number_of(row, "draws"), number_of(row, "different_draws")
    if different < FEWEST_SETS or different < draws:
        return f"{counted_sets(different)} of matched random heads"
    return "matched random heads" if math.isnan(draws) else f"{int(draws)} draws of matched random heads"


def counted_sets(different: float) -> str:
    """`4 different sets`."""
    return "the one set" if different == 1 else f"{int(different)} different sets"


def whence(rows: Iterable[Mapping[str, Any]]) -> str:
    """Which layers the controls came from, to follow `random heads`; empty where no run says so."""
    strangers = [number_of(row, "other_layers") for row in rows]
    if any(count > 0 for count in strangers):
        return " of the same layers or, where these hold too few others, of the nearest ones"
    return "" if not strangers or any(map(math.isnan, strangers)) else " of the same layers"


def beyond_mean(row: Mapping[str, Any]) -> bool:
    """Whether the effect is worse than the controls' mean by more than its own interval.

    Where there is no interval the effect itself counts.
    """
    effect, mean = number_of(row, "effect"), number_of(row, "control_effect")
    if row.get("better") == "higher":
        high = number_of(row, "high")
        return (effect if math.isnan(high) else high) < mean
    low = number_of(row, "low")
    return (effect if math.isnan(low) else low) > mean


def number_of(row: Mapping[str, Any], name: str) -> float:
    """A number of the row; NaN where it is missing or no number."""
    value = row.get(name)
    return float(value) if isinstance(value, Real) else math.nan
