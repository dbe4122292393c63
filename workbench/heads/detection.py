"""Run detectors on a model: kinds share prompts and passes, scores come with intervals, nulls, p and q."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.heads.detector import Array, Detector, Part, Progress, PromptScores, traced
from workbench.heads.detectors import CORE, DETECTORS
from workbench.heads.detectors.text import where_first_is_seen
from workbench.heads.inference import (
    Better,
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    drawn_p,
    paired_p,
    q_values,
    unpaired_p,
)
from workbench.heads.kinds import KINDS
from workbench.heads.settings import Settings
from workbench.models import Head
from workbench.models.snippet import snippet
from workbench.tracing import Model, Trace

# What a notebook shows of the table.
_LEADING = 3
_MOST_ROWS = 36


@dataclass(frozen=True)
class HeadScores:
    """Scores of all heads by some detectors.

    `table`: model, detector, layer, head, value, low, high, n, null, p, q, rank (1 says most). `detectors`: what each
    measured and on what. `curves`: the course of each detector's own statistic over positions, all heads. `samples`:
    what each detector found prompt by prompt, where it found that.
    """

    table: pd.DataFrame
    detectors: pd.DataFrame
    curves: pd.DataFrame
    domains: pd.DataFrame
    samples: Mapping[str, PromptScores] = field(default_factory=dict)

    def top(self, detector: str, k: int) -> list[Head]:
        """The k heads whose scores say most: the highest, but the lowest entropy and the largest contrast."""
        rows = self.table[self.table.detector == detector]
        if rows.empty:
            raise RequestError(f"No scores of {detector!r}; there are {', '.join(self.table.detector.unique())}.")
        best = rows.sort_values("rank").head(k)
        return [Head(int(layer), int(head)) for layer, head in zip(best.layer, best["head"], strict=True)]

    def _repr_html_(self) -> str:
        """The three heads that say most by each detector, for notebooks; `workbench.show` draws them all."""
        found = self.table[self.table["value"].notna() & (self.table["rank"] <= _LEADING)]
        found = found.sort_values(["detector", "rank"], kind="stable")
        names = [f"L{layer}H{head}" for layer, head in zip(found["layer"], found["head"], strict=True)]
        rows = found[["detector", "rank", "value", "low", "high", "null", "q", "n"]].head(_MOST_ROWS)
        rows.insert(2, "name", names[: len(rows)])
        detectors, heads = self.table["detector"].nunique(), len(self.table[["layer", "head"]].drop_duplicates())
        more = f"{len(self.table):,} rows in .table; {len(found) - len(rows)} leading ones are not shown here."
        return snippet(f"Scores of {heads} heads by {detectors} detectors", rows, more)

    @staticmethod
    def join(parts: Sequence[HeadScores]) -> HeadScores:
        """Scores of several kinds in one."""
        table, detectors, curves, domains = (
            pd.concat(
                [getattr(part, name) for part in parts if len(getattr(part, name))] or [parts[0].curves.head(0)],
                ignore_index=True,
            )
            for name in ("table", "detectors", "curves", "domains")
        )
        samples = {name: found for part in parts for name, found in part.samples.items()}
        return HeadScores(table, detectors, curves, domains, samples=samples)


def choose(names: Sequence[str] | None) -> list[Detector]:
    """Detectors by name, the core ones by default; an unknown name is answered with the nearest."""
    for name in names or ():
        if name not in DETECTORS:
            near = get_close_matches(name, DETECTORS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"No detector {name!r}.{hint} There are {', '.join(DETECTORS)}.")
    return [DETECTORS[name] for name in names or CORE]


def score(model: Model, detector: Detector, parts: Sequence[Part], seed: int = 0) -> HeadScores:
    """A detector's scores from what its kind measured."""
    found = detector.score(parts)
    table = _table(model, detector, found, seed)
    caption = " ".join(part.task.caption for part in parts if part.task is not None)
    row = {
        "detector": detector.name, "title": detector.title, "measures": detector.measures, "unit": detector.unit,
        "threshold": np.nan if detector.threshold is None else detector.threshold, "paper": detector.paper,
        "url": detector.url, "caption": f"{_sentence(detector.measures)} {caption} Null: {detector.null}.",
        "positions": detector.positions, "better": detector.better, "null": detector.null, "note": detector.note,
        "prompts": len(found.values),
    }  # fmt: skip
    domains = _domains(parts, seed) if found.unpaired else pd.DataFrame()
    samples = {} if found.exact or len(found.values) < 2 else {detector.name: found}
    return HeadScores(table, pd.DataFrame([row]), _curves(detector, parts), domains, samples)


def detect(
    model: Model,
    names: Sequence[str] | None = None,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> HeadScores:
    """Score every head by the named detectors (the core ones by default); see `DETECTORS`."""
    settings, chosen = settings or Settings(), choose(names)
    results = []
    for kind in KINDS.values():
        of_kind = [detector for detector in chosen if detector.kind == kind.name]
        if of_kind:
            parts = kind.parts(model, of_kind, kind.tasks(model, settings), settings, progress)
            results += [score(model, detector, parts, settings.seed) for detector in of_kind]
    return HeadScores.join(results)


def _table(model: Model, detector: Detector, found: PromptScores, seed: int) -> pd.DataFrame:
    heads = model.spec.heads()
    layer, head = np.array([h.layer for h in heads]), np.array([h.head for h in heads])
    values, null = found.values[:, layer, head], found.null[:, layer, head]
    missing = np.full(len(heads), np.nan)
    if found.exact:
        interval, p = Interval(values[0], missing, missing), drawn_p(values[0], null, detector.better)
        null_mean = null.mean(axis=0) if len(null) else missing
    elif found.unpaired:
        interval, p = bootstrap_difference(values, null, seed), unpaired_p(values, null, seed)
        null_mean = np.zeros(len(heads))
    elif len(values):
        interval, p = bootstrap_mean(values, seed), paired_p(values, null, detector.better, seed)
        null_mean = null.mean(axis=0)
    else:
        interval, p, null_mean = bootstrap_mean(missing[None], seed), missing, missing
    return pd.DataFrame(
        {
            "model": model.source.name, "detector": detector.name, "layer": layer, "head": head,
            "value": interval.value, "low": interval.low, "high": interval.high, "n": len(values),
            "null": null_mean, "p": p, "q": q_values(p),
            "rank": _ranks(interval.value, None if found.ties is None else found.ties[layer, head], detector.better),
        }
    )  # fmt: skip


def _ranks(values: Array, ties: Array | None, better: Better) -> np.ndarray[Any, np.dtype[np.int64]]:
    """1 for the score that says most (highest, lowest, or largest either way); equal ones by `ties`, then in order."""
    strength = {"higher": values, "lower": -values, "either": np.abs(values)}[better]
    order = np.lexsort((np.arange(len(values)), np.zeros(len(values)) if ties is None else -ties, -strength))
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.arange(1, len(values) + 1)
    return ranks


def _curves(detector: Detector, parts: Sequence[Part]) -> pd.DataFrame:
    """Mean over prompts of the detector's own statistic at each position (positions of all parts together)."""
    frames = []
    for task, found in parts:
        if detector.curve is None or task is None or not isinstance(found, Trace):
            continue
        values = found[detector.curve]
        statistic = detector.curve if len(parts) == 1 else f"{detector.curve}, {task.settings.get('domain', task.name)}"
        seen = ~values.isnan() & (values >= 0)
        if found.statistics[detector.curve].query_keys is not None:
            keys = found.statistics[detector.curve].query_keys
            assert keys is not None
            seen &= (keys >= 0).any(-1)[:, None, None]
        count = seen.sum(0)
        mean = (values.nan_to_num() * seen).sum(0) / count.clamp(min=1)
        layer, head, position = np.nonzero(count.numpy() > 0)
        frames.append(
            pd.DataFrame({
                "detector": detector.name, "layer": layer, "head": head, "statistic": statistic,
                "position": position, "value": mean.numpy()[layer, head, position],
            })
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _domains(parts: Sequence[Part], seed: int) -> pd.DataFrame:
    """First-token share of every head on each domain, with intervals."""
    frames = []
    for part in parts:
        assert part.task is not None
        values = where_first_is_seen(traced(part), "first_1")
        layers, heads = values.shape[1:]
        interval = bootstrap_mean(values.reshape(len(values), -1), seed)
        frames.append(
            pd.DataFrame({
                "layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers),
                "domain": str(part.task.settings["domain"]), "value": interval.value, "low": interval.low,
                "high": interval.high, "n": len(values),
            })
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
