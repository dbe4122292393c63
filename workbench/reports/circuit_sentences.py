"""Sentences on runs about circuits that the command line and reports have in common, as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from workbench.figures.text import interval, number
from workbench.figures.verdict import SIGNIFICANT

# With fewer pairs no sign-flip test of all of them can reach 0.05, and a bootstrap has few prompts to draw.
FEW = 6
# With fewer pairs there is no interval.
FEWEST = 3
# What a share of the gap stands beside: far below it is rounding.
WHOLE = (1.0,)


def told_apart(effects: pd.DataFrame) -> str:
    """What too few pairs cannot show of patches, where a direction has found nothing; else empty."""
    for _, rows in effects.dropna(subset=["p"]).groupby("direction", sort=False):
        n = int(rows["n"].max())
        least = 2.0 ** (1 - n)
        if not (rows["q"] < SIGNIFICANT).any() and least > SIGNIFICANT / len(rows):
            return (
                f"With {n} pairs p cannot fall below {number(least)}, so that finding nothing says little; 16 pairs or "
                "more tell chance apart."
            )
    return ""


def few_pairs(n: object) -> str:
    """What intervals over so few pairs are worth; empty where there are enough."""
    if not isinstance(n, int) or n >= FEW:
        return ""
    worth = "there are no intervals" if n < FEWEST else "the intervals say little"
    return f"With {n} pairs {worth}: too few to resample; 16 pairs or more tell chance apart."


def known_circuit(about: Mapping[str, Any], compared: bool) -> str:
    """Whether a circuit of the task is known, and the run held against it (`compared`); empty if that says nothing."""
    known, evaluated = about.get("known_circuit"), about.get("what") == "evaluate"
    if not known:
        return "No circuit of this task is known, so that there is no ROC curve." if evaluated and not compared else ""
    said = f"A circuit of this task is known in {known['model']} ({known['paper']})"
    if compared:
        return f"{said}; the ROC curve holds this run against it."
    return f"{said}; this run is not held against it" + (", so that there is no ROC curve." if evaluated else ".")


def best_below(method: str, row: Mapping[Any, Any]) -> str:
    """That no circuit is faithful enough, and what the best is: a row with value, fraction, edges, low and high."""
    said = f"No circuit of {method} below the whole model is 80 % faithful at any size that was tried"
    if row.get("edges") == 0:
        return (
            f"{said}; none does better than having no edge at all (faithfulness {number(row['value'], beside=WHOLE)})."
        )
    bounds = interval(row.get("low"), row.get("high"))
    share = f"at {100 * float(row['fraction']):.2g} % of the edges"
    if row.get("edges") is not None:
        share += f" ({int(row['edges']):,} of which lead somewhere)"
    reached = number(row["value"], beside=WHOLE) + (f" [{bounds}]" if bounds else "")
    return f"{said}; the best, {share}, reaches {reached}."
