"""The detectors of a run in their order, with titles, units and thresholds, as far as the run has them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

from workbench.figures.scales import strength
from workbench.figures.verdict import SIGNIFICANT
from workbench.reports.source import RunLike, frame

_BETTER = ("higher", "lower", "either")
# sink, previous token, induction, retrieval: the words by which the detectors named first are known
_PLAIN_NAMES = frozenset(["sink", "previous_token", "induction", "retrieval"])
_ROLES = (("sink",), ("previous",), ("induction",), ("retriev", "needle", "copy"))


@dataclass(frozen=True)
class DetectorInfo:
    """One detector as a report shows it."""

    name: str
    title: str
    measures: str
    unit: str
    threshold: float
    paper: str
    url: str
    caption: str
    positions: str
    better: str = "higher"
    null: str = ""
    note: str = ""

    @property
    def has_threshold(self) -> bool:
        return math.isfinite(self.threshold)

    def strength(self, values: Any) -> Any:
        """Values turned so that the strongest head has the largest."""
        return strength(values, self.better)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The bars that values are held against: two where a value of either sign counts, none without a threshold."""
        if not self.has_threshold:
            return ()
        return (-self.threshold, self.threshold) if self.better == "either" else (self.threshold,)

    def passes(self, values: Any) -> Any:
        """Whether values reach the threshold; none does where there is no threshold."""
        bar = -self.threshold if self.better == "lower" else self.threshold
        return self.strength(values) >= bar

    def as_row(self) -> dict[str, Any]:
        """The form that `workbench.figures` takes."""
        return {"detector": self.name} | {
            key: getattr(self, key) for key in ("title", "unit", "threshold", "caption", "measures", "better")
        }


def like_null(q: Any) -> Any:
    """Whether a q-value fails to tell a score from its null; where none was computed, nothing is said against it."""
    return q >= SIGNIFICANT


@dataclass(frozen=True)
class Catalogue:
    """All detectors that have rows in the score table; `silent` are those without any value."""

    detectors: tuple[DetectorInfo, ...]
    silent: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[DetectorInfo]:
        return iter(self.detectors)

    def __len__(self) -> int:
        return len(self.detectors)

    def get(self, name: str) -> DetectorInfo:
        """The detector of that name, or a bare entry where the run describes none."""
        return next((d for d in self.detectors if d.name == name), _bare(name))

    def titles(self) -> dict[str, str]:
        return {d.name: d.title for d in self.detectors}

    def leading(self) -> list[DetectorInfo]:
        """Those that a summary speaks of: sink, previous token, induction, retrieval; else the first four."""
        found: list[DetectorInfo] = []
        speaking = [d for d in self.detectors if d.name not in self.silent]
        for words in _ROLES:
            named = [d for d in speaking if any(w in d.name.lower() for w in words)]
            # One that is called so and no more goes before those that only have the word.
            match = min(named, key=lambda d: d.name not in _PLAIN_NAMES, default=None)
            if match is not None and match not in found:
                found.append(match)
        return found or speaking[:4]


def catalogue(run: RunLike) -> Catalogue:
    """Detectors in the order of the detector table, then any others that have scores."""
    scores = frame(run, "head_scores")
    scored = [str(name) for name in dict.fromkeys(scores["detector"])] if scores is not None else []
    table = frame(run, "detectors")
    described = {} if table is None else {str(r["detector"]): _info(r) for r in table.to_dict("records")}
    names = [name for name in described if name in scored] + [name for name in scored if name not in described]
    values = {} if scores is None else scores.groupby("detector")["value"].count().to_dict()
    silent = frozenset(name for name in names if not values.get(name))
    return Catalogue(tuple(described.get(name) or _bare(name) for name in names), silent)


def _info(row: dict[str, Any]) -> DetectorInfo:
    name = str(row["detector"])
    texts = {key: _text(row.get(key)) for key in ("measures", "unit", "paper", "caption", "positions", "null", "note")}
    threshold, url, better = row.get("threshold"), _text(row.get("url")), _text(row.get("better"))
    return DetectorInfo(
        name=name,
        title=_text(row.get("title")) or _bare(name).title,
        threshold=float(threshold) if isinstance(threshold, Real) else math.nan,
        better=better if better in _BETTER else "higher",
        url=url if url.startswith(("https://", "http://")) else "",
        **texts,
    )


def _bare(name: str) -> DetectorInfo:
    return DetectorInfo(name, name.replace("_", " ").capitalize(), "", "", math.nan, "", "", "", "")


def _text(value: object) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
