"""Cards of the heads that stand out: every score with interval, null and rank, drawn on a track of percentages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from workbench.figures.text import decimals, interval, number, probability
from workbench.reports.catalogue import Catalogue, DetectorInfo
from workbench.reports.examples import Pattern
from workbench.reports.source import RunLike, frame, head_name

MOST_CARDS = 12


@dataclass(frozen=True)
class Bar:
    """One score of a head: texts, and places on the track in percent of the detector's range over all heads."""

    detector: DetectorInfo
    value: str
    interval: str
    null: str
    q: str
    rank: int
    heads: int
    passes: bool
    at: float
    low: float | None
    high: float | None
    null_at: float | None
    threshold_at: float | None


@dataclass(frozen=True)
class Card:
    """One head with its evidence."""

    head: str
    layer: int
    index: int
    roles: tuple[str, ...]
    bars: tuple[Bar, ...]
    patterns: tuple[Pattern, ...]
    curve: str | None


def cards(run: RunLike, known: Catalogue, found: list[Pattern]) -> list[Card]:
    """The heads with most evidence, at most twelve, those that lead a detector first."""
    scores = frame(run, "head_scores")
    if scores is None:
        return []
    curves = frame(run, "position_curves")
    curved = set() if curves is None else set(zip(curves["layer"], curves["head"], strict=True))
    chosen = _chosen(scores, known, found, curved)
    ranges = {d.name: _range(scores[scores["detector"] == d.name], d) for d in known}
    ranked = scores.assign(
        rank=scores.groupby("detector")["value"].rank(ascending=False, method="min").fillna(0).astype(int)
    )
    result = []
    for layer, head in chosen:
        rows = ranked[(ranked["layer"] == layer) & (ranked["head"] == head)].set_index("detector")
        bars = tuple(_bar(rows.loc[d.name].to_dict(), d, *ranges[d.name]) for d in known if d.name in rows.index)
        name = head_name(layer, head)
        result.append(
            Card(
                head=name,
                layer=layer,
                index=head,
                roles=_roles(bars),
                bars=bars,
                patterns=tuple(p for p in found if p.head == name),
                curve=f"curve-{name}" if (layer, head) in curved else None,
            )
        )
    # cards with curves or patterns take the whole width; the short ones follow side by side
    return sorted(result, key=lambda card: not (card.curve or card.patterns))


def _chosen(
    scores: pd.DataFrame, known: Catalogue, found: list[Pattern], curved: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    leading = known.leading()
    order = leading + [d for d in known if d not in leading]
    firsts = [_top(scores, d, 1) for d in order]
    seconds = [_top(scores, d, 2)[1:] for d in leading]
    wanted = [pair for group in firsts for pair in group]
    wanted += [(p.layer, p.index) for p in found]
    wanted += [pair for group in seconds for pair in group]
    wanted += sorted((int(layer), int(head)) for layer, head in curved)
    return list(dict.fromkeys(wanted))[:MOST_CARDS]


def _top(scores: pd.DataFrame, detector: DetectorInfo, count: int) -> list[tuple[int, int]]:
    rows = scores[scores["detector"] == detector.name].nlargest(count, "value")
    return [(int(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True)]


def _range(rows: pd.DataFrame, detector: DetectorInfo) -> tuple[float, float, int]:
    low = min(0.0, float(rows[["value", "low"]].min().min()))
    high = max(float(rows[["value", "high"]].max().max()), detector.threshold if detector.has_threshold else 0.0)
    return low, high if high > low else low + 1.0, len(rows)


def _bar(row: dict[str, Any], detector: DetectorInfo, low: float, high: float, heads: int) -> Bar:
    places = decimals(low, high)

    def place(value: Any) -> float | None:
        known = value is not None and value == value
        return round(min(max((float(value) - low) / (high - low), 0.0), 1.0) * 100, 2) if known else None

    return Bar(
        detector=detector,
        value=number(row["value"], places=places),
        interval=interval(row["low"], row["high"], places=places),
        null=number(row["null"], places=places),
        q=probability(row["q"]),
        rank=int(row["rank"]),
        heads=heads,
        passes=detector.has_threshold and bool(row["value"] >= detector.threshold),
        at=place(row["value"]) or 0.0,
        low=place(row["low"]),
        high=place(row["high"]),
        null_at=place(row["null"]),
        threshold_at=place(detector.threshold) if detector.has_threshold else None,
    )


def _roles(bars: tuple[Bar, ...]) -> tuple[str, ...]:
    """What to call the head: detectors whose threshold it passes, else those it leads."""
    passing = tuple(b.detector.title for b in bars if b.passes)
    return passing or tuple(f"{b.detector.title}, rank 1" for b in bars if b.rank == 1)
