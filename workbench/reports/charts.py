"""The plotly figures of a report, each drawn in both modes and tagged with the part that it belongs to.

Parts are what may be left out when a file would grow past its budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pandas as pd

from workbench.figures import (
    ablation_chart,
    domain_scatter,
    dose_curve,
    has_doses,
    head_map,
    pattern_map,
    position_curves,
)
from workbench.reports.atlas import atlas_charts
from workbench.reports.cards import MOST_CURVES, Card
from workbench.reports.catalogue import Catalogue
from workbench.reports.circuits import circuit_charts
from workbench.reports.examples import Pattern
from workbench.reports.payload import figure_pair
from workbench.reports.source import RunLike, ablations, frame
from workbench.reports.statistics import Statistics
from workbench.reports.trial import trial_charts

Pair = dict[str, Any]


def charts(
    run: RunLike, known: Catalogue, cards: list[Card], found: list[Pattern], measured: Statistics | None = None
) -> dict[str, dict[str, Pair]]:
    """`{part: {figure id: figure}}` for all that the run's tables allow."""
    parts: dict[str, dict[str, Pair]] = {}
    plans = [*trial_charts(run), *atlas_charts(run, known), *circuit_charts(run)]
    plans += [*_plans(run, known, cards, found), *_statistics(measured)]
    for part, name, draw in plans:
        parts.setdefault(part, {})[name] = figure_pair(draw)
    return parts


def _plans(
    run: RunLike, known: Catalogue, cards: list[Card], found: list[Pattern]
) -> Iterator[tuple[str, str, Callable[[bool], Any]]]:
    scores, titles = frame(run, "head_scores"), known.titles()
    if scores is not None:
        for index, detector in enumerate(known):
            if detector.name in known.silent:
                continue
            yield "maps", f"map-{index}", partial(_map, scores, detector.name, detector.as_row())
    curves = frame(run, "position_curves")
    if curves is not None:
        for card in cards:
            if card.curve is not None:
                yield "curves", card.curve, partial(_curve, curves, card, titles)
    contrast = frame(run, "domain_contrast")
    if contrast is not None and {"prose", "code"} <= set(contrast["domain"]):
        yield "contrast", "contrast", partial(_contrast, contrast)
    verification = ablations(run)
    if verification is not None:
        draws = frame(run, "verification_draws")
        yield "ablation", "ablation", partial(_ablation, verification, draws, titles)
        if has_doses(verification):
            yield "ablation", "dose", partial(_dose, verification, draws, titles)
    for pattern in found:
        yield "patterns", f"pattern-{pattern.key}", partial(_pattern, pattern)


def _statistics(measured: Statistics | None) -> Iterator[tuple[str, str, Callable[[bool], Any]]]:
    means = None if measured is None else measured.scores()
    if measured is None or means is None:
        return
    for index, entry in enumerate(measured.mapped):
        if means.loc[means["detector"] == entry.info.name, "value"].notna().any():
            yield "maps", f"statistic-{index}", partial(_map, means, entry.info.name, entry.info.as_row())


def _map(scores: pd.DataFrame, detector: str, info: dict[str, Any], dark: bool) -> Any:
    return head_map(scores, detector, info=info, dark=dark)


def _curve(curves: pd.DataFrame, card: Card, titles: dict[str, str], dark: bool) -> Any:
    own = curves[(curves["layer"] == card.layer) & (curves["head"] == card.index)]
    # those of the detectors that name the head; several detectors may have the same statistic
    told = own[own["detector"].isin(card.shown[:MOST_CURVES])]
    rows = (told if len(told) else own).drop_duplicates(["statistic", "position"])
    return position_curves(rows, labels=titles, dark=dark)


def _contrast(contrast: pd.DataFrame, dark: bool) -> Any:
    return domain_scatter(contrast, dark=dark)


def _ablation(verification: pd.DataFrame, draws: pd.DataFrame | None, titles: dict[str, str], dark: bool) -> Any:
    return ablation_chart(verification, draws, labels=titles, dark=dark)


def _dose(verification: pd.DataFrame, draws: pd.DataFrame | None, titles: dict[str, str], dark: bool) -> Any:
    return dose_curve(verification, draws, labels=titles, dark=dark)


def _pattern(pattern: Pattern, dark: bool) -> Any:
    figure = pattern_map(pattern.values, pattern.tokens, head=(pattern.layer, pattern.index), dark=dark)
    # the page has the head's name above the map
    return figure.update_layout(title={"text": ""}, margin={"t": 12})
