"""Cards of the heads that stand out: every score with interval, null and rank, as places on a track."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import pandas as pd

from workbench.figures.text import decimals, interval, number, probability
from workbench.reports.catalogue import Catalogue, DetectorInfo, like_null
from workbench.reports.examples import Pattern
from workbench.reports.source import RunLike, frame, head_name

MOST_CARDS = 12
MOST_CURVES = 4
# Scores on one card; of more, those where the head ranks best.
MOST_BARS = 16
_EXTREME = {"higher": "highest", "lower": "lowest", "either": "largest"}


@dataclass(frozen=True)
class Bar:
    """One score of a head: texts, and places on the track in percent of the range over all heads.

    `rank` to `last` are the places that it shares with heads of the same score. `reaches` the threshold is not yet
    `passes`: a score that reaches it with a q that does not tell it from the null names no head.
    """

    detector: DetectorInfo
    value: str
    interval: str
    null: str
    q: str
    rank: int
    last: int
    heads: int
    reaches: bool
    passes: bool
    at: float | None
    low: float | None
    high: float | None
    null_at: float | None
    thresholds_at: tuple[float, ...]


@dataclass(frozen=True)
class Role:
    """What to call a head; `weak` where its score is not distinguished from the null."""

    text: str
    weak: bool


@dataclass(frozen=True)
class Card:
    """One head with its evidence; `shown` names the detectors whose curves belong on it."""

    head: str
    layer: int
    index: int
    roles: tuple[Role, ...]
    bars: tuple[Bar, ...]
    patterns: tuple[Pattern, ...]
    curve: str | None
    shown: tuple[str, ...]


def cards(run: RunLike, known: Catalogue, found: list[Pattern]) -> list[Card]:
    """The heads with most evidence, at most twelve, those that lead a detector first."""
    scores = frame(run, "head_scores")
    if scores is None:
        return []
    curves = frame(run, "position_curves")
    curved = set() if curves is None else {(int(a), int(b)) for a, b in curves[["layer", "head"]].to_numpy()}
    ranked = _ranked(scores, known)
    ranges = {name: _range(rows, known.get(name)) for name, rows in ranked.groupby("detector")}
    result = []
    for layer, head in _chosen(ranked, known, found, curved):
        rows = ranked[(ranked["layer"] == layer) & (ranked["head"] == head)].set_index("detector")
        bars = tuple(_bar(rows.loc[d.name].to_dict(), d, *ranges[d.name]) for d in known if d.name in rows.index)
        # among equals nobody leads: a score that half of all heads share says little
        named = [bar for bar in bars if bar.reaches or bar.last == 1]
        named.sort(key=lambda bar: (bar.reaches and not bar.passes, bar.last))
        name = head_name(layer, head)
        result.append(
            Card(
                head=name,
                layer=layer,
                index=head,
                roles=tuple(_role(bar) for bar in named),
                bars=_best(bars),
                patterns=tuple(p for p in found if p.head == name),
                curve=f"curve-{name}" if (layer, head) in curved else None,
                shown=tuple(bar.detector.name for bar in named),
            )
        )
    # cards with curves or patterns take the whole width; the short ones follow side by side
    return sorted(result, key=lambda card: not (card.curve or card.patterns))


def _best(bars: tuple[Bar, ...]) -> tuple[Bar, ...]:
    """The bars that say most of a head, in the order of the detectors; the head table has the others."""
    if len(bars) <= MOST_BARS:
        return bars
    kept = sorted(bars, key=lambda bar: (not bar.passes, bar.last))[:MOST_BARS]
    return tuple(bar for bar in bars if bar in kept)


def _ranked(scores: pd.DataFrame, known: Catalogue) -> pd.DataFrame:
    """The scores that have a value, with each head's rank among the heads of its detector."""
    rows = scores[scores["value"].notna()]
    parts = [
        part.assign(strength=known.get(str(name)).strength(part["value"].to_numpy(float)))
        for name, part in rows.groupby("detector")
    ]
    joined = pd.concat(parts) if parts else rows.assign(strength=0.0)
    groups = joined.groupby("detector")["strength"]
    first, last = (groups.rank(ascending=False, method=method).astype(int) for method in ("min", "max"))
    return joined.assign(rank=first, last=last)


def _chosen(
    ranked: pd.DataFrame, known: Catalogue, found: list[Pattern], curved: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    leading = known.leading()
    order = leading + [d for d in known if d not in leading]
    wanted = [pair for detector in order for pair in _top(ranked, detector, 1)]
    wanted += [(p.layer, p.index) for p in found]
    wanted += [pair for detector in leading for pair in _top(ranked, detector, 2)[1:]]
    # a table of curves for all heads says nothing about which stand out
    wanted += sorted(curved) if len(curved) <= MOST_CARDS else []
    return list(dict.fromkeys(wanted))[:MOST_CARDS]


def _top(ranked: pd.DataFrame, detector: DetectorInfo, count: int) -> list[tuple[int, int]]:
    rows = ranked[ranked["detector"] == detector.name].nlargest(count, "strength")
    return [(int(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True)]


def _range(rows: pd.DataFrame, detector: DetectorInfo) -> tuple[float, float, int]:
    numbers = rows[["value", "low", "high"]].to_numpy(float).ravel()
    marks = list(detector.thresholds)
    marks += [float(n) for n in (*numbers, *rows["null"].to_numpy(float)) if math.isfinite(n)]
    low, high = min(0.0, *marks), max(0.0, *marks)
    return low, high if high > low else low + 1.0, len(rows)


def _bar(row: dict[str, Any], detector: DetectorInfo, low: float, high: float, heads: int) -> Bar:
    places = decimals(low, high)
    reaches = detector.has_threshold and bool(detector.passes(float(row["value"])))

    def spot(value: float) -> float:
        return round(min(max((value - low) / (high - low), 0.0), 1.0) * 100, 2)

    def place(value: Any) -> float | None:
        return spot(float(value)) if isinstance(value, Real) and not math.isnan(value) else None

    return Bar(
        detector=detector,
        value=number(row["value"], places=places),
        interval=interval(row["low"], row["high"], places=places),
        null=number(row["null"], places=places),
        q=probability(row["q"]),
        rank=int(row["rank"]),
        last=int(row["last"]),
        heads=heads,
        reaches=reaches,
        passes=reaches and not like_null(row["q"]),
        at=place(row["value"]),
        low=place(row["low"]),
        high=place(row["high"]),
        null_at=place(row["null"]),
        thresholds_at=tuple(map(spot, detector.thresholds)),
    )


def _role(bar: Bar) -> Role:
    """What to call a head that passes a detector's threshold, or leads it without."""
    title = bar.detector.title
    if bar.reaches and not bar.passes:
        return Role(f"{title}: reaches the threshold, not distinguished from the null", True)
    return Role(title if bar.passes else f"{title}, {_EXTREME[bar.detector.better]}", False)
