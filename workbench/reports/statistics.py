"""What a trace measured, as a report shows it: means by head, and the values token by token.

1. Means over the positions of the text come from the run's own table, so they are those that the command printed.
   Statistics of queries (rows of the attention matrix) get a map; means over keys describe the text more than the
   head (the column sum has a mean of 1 in every head), so they stay in the table.
2. The values themselves are packed head by head in 16-bit steps for the token view, about 2.7 bytes a token, head and
   statistic. Where all heads would take too much, only those with the highest means are kept; the view says how many.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from markupsafe import Markup
from numpy.typing import NDArray

from workbench.figures.text import number, readable
from workbench.reports.catalogue import DetectorInfo
from workbench.reports.source import RunLike, frame, head_name, model_named

MOST_BYTES = 1_500_000
MOST_TOKENS = 2_000
# the last of the 16-bit numbers stands for no value
_STEPS = 65_534
_SHARE = "share of attention"
# what each is, and its unit
_KNOWN = {
    "entropy": ("entropy of a query's attention", "nats"),
    "lse": ("log-sum-exp of a query's logits", "nats"),
    "max_prob": ("largest weight that a query gives to one key", _SHARE),
    "distance": ("mean distance from a query to what it attends to", "tokens"),
    "sink_mass": ("attention that goes to a learned sink", _SHARE),
    "output_norm": ("norm of the head's output, before the output matrix", "norm"),
    "max_logit": ("largest logit of a row", "nats"),
    "mean_logit": ("mean logit over the keys that a query sees", "nats"),
    "first_logit": ("logit of the first key that a query sees", "nats"),
    "spread": ("standard deviation of the distance to what is attended to", "tokens"),
    "result_norm": ("norm of what the head writes into the residual stream", "norm"),
    "value_norm": ("norm of a key's value vector", "norm"),
    "column_sum": ("attention that a key receives, summed over the queries", "sum of shares"),
    "column_mean": ("attention that a key receives, mean over the queries that can see it", _SHARE),
    "column_max": ("largest weight that any query gives to a key", _SHARE),
}
_SIZED = {
    "above": ("keys that get more than {} of a query's attention", "keys"),
    "first": ("attention to the first {} tokens", _SHARE),
    "recent": ("attention to the last {} tokens, the query's own included", _SHARE),
    "offset": ("attention to the token at offset {}", _SHARE),
    "column_last": ("attention that a key receives, summed over the last {} queries", "sum of shares"),
}
_ONE = {
    "first_1": "attention to the first token",
    "recent_1": "attention to the query's own token",
    "offset_-1": "attention to the token just before",
}


@dataclass(frozen=True)
class Measured:
    """One statistic: what it is, and the heads whose means lie at the two ends."""

    info: DetectorInfo
    per_key: bool
    highest: str
    high: str
    lowest: str
    low: str


@dataclass(frozen=True)
class Statistics:
    """The statistics of a run; `unmapped` names those that have no mean, `view` is what the token view reads."""

    measured: tuple[Measured, ...]
    unmapped: tuple[str, ...]
    means: pd.DataFrame
    positions: int
    heads: int
    view: dict[str, Any] | None

    @property
    def columns(self) -> list[DetectorInfo]:
        """All that have a mean, in their order."""
        return [entry.info for entry in self.measured]

    @property
    def mapped(self) -> list[Measured]:
        """Those of queries, which have a map."""
        return [entry for entry in self.measured if not entry.per_key]

    def scores(self) -> pd.DataFrame | None:
        """The means in the form of a score table; None where no statistic has one."""
        named = self.means.rename(columns={"statistic": "detector", "mean": "value"})
        return None if named.empty else named


def statistics(run: RunLike) -> Statistics | None:
    """The statistics that a trace wrote; None where the run has none."""
    if "statistics" not in run.arrays:
        return None
    data = run.array("statistics")
    means = frame(run, "statistic_means")
    if means is None:
        means = pd.DataFrame(columns=["statistic", "layer", "head", "mean"])
    names = [str(name) for name in dict.fromkeys(means["statistic"]) if name in data]
    measured = tuple(_measured(means[means["statistic"] == name], name, data) for name in names)
    view = _view(run, data, means, names)
    return Statistics(
        measured=measured,
        unmapped=tuple(readable(name) for name in data if name not in names),
        means=means,
        positions=max((data.sizes[dim] for dim in ("query", "key") if dim in data.sizes), default=0),
        heads=len(means[["layer", "head"]].drop_duplicates()),
        view=view,
    )


def _measured(rows: pd.DataFrame, name: str, data: xr.Dataset) -> Measured:
    words, unit = describe(name)
    per_key = "key" in data[name].dims
    where = "mean over the keys" if per_key else "mean over the positions"
    info = DetectorInfo(
        name=name,
        title=readable(name)[:1].upper() + readable(name)[1:],
        measures=words,
        unit=unit,
        threshold=float("nan"),
        paper="",
        url="",
        caption=f"{words[:1].upper()}{words[1:]}, {where} of one text.",
        positions="",
    )
    known = rows[rows["mean"].notna()]
    ends = [known.loc[place] for place in (known["mean"].idxmax(), known["mean"].idxmin())] if len(known) else []
    texts = [(head_name(end["layer"], end["head"]), number(end["mean"])) for end in ends] or [("", "–")] * 2
    return Measured(info, per_key, *texts[0], *texts[1])


def describe(name: str) -> tuple[str, str]:
    """What a statistic is, and its unit; a name that is not known stands for itself."""
    if name in _ONE:
        return _ONE[name], _SHARE
    if name in _KNOWN:
        return _KNOWN[name]
    kind, _, size = name.rpartition("_")
    words, unit = _SIZED.get(kind, (readable(name), ""))
    return words.format(size.replace("-", "−")), unit


def _view(run: RunLike, data: xr.Dataset, means: pd.DataFrame, names: list[str]) -> dict[str, Any] | None:
    """Tokens, heads, and for each statistic its packed values of these heads."""
    tokens = frame(run, "tokens")
    if tokens is None:
        return None
    texts = [str(text) for text in tokens.sort_values("position")["text"]][:MOST_TOKENS]
    ranked = means[means["mean"].notna()].sort_values("mean", ascending=False, kind="stable")
    names = [name for name in names if (ranked["statistic"] == name).any()]
    if not names:
        return None
    room = max(1, int(MOST_BYTES / (2.7 * len(texts) * len(names))))
    pairs = _heads(ranked, room, names)
    layers, heads = (np.array(axis, dtype=int) for axis in zip(*pairs, strict=True))
    shown = []
    for name in names:
        dims = ("layer", "head", "key" if "key" in data[name].dims else "query")
        values = data[name].isel(prompt=0).transpose(*dims).isel({dims[-1]: slice(len(texts))}).values
        top = ranked[ranked["statistic"] == name].iloc[0]
        shown.append(
            {
                "name": name,
                "title": readable(name),
                "says": describe(name)[0],
                "unit": describe(name)[1],
                "start": pairs.index((int(top["layer"]), int(top["head"]))),
                "rows": [pack(row) for row in np.asarray(values, dtype=np.float64)[layers, heads]],
            }
        )
    return {"tokens": texts, "heads": [head_name(*pair) for pair in pairs], "statistics": shown}


def _heads(ranked: pd.DataFrame, room: int, names: list[str]) -> list[tuple[int, int]]:
    """All heads in their order, or as many as there is room for: those that lead a statistic, in turn."""
    every = sorted({(int(layer), int(head)) for layer, head in ranked[["layer", "head"]].to_numpy()})
    if len(every) <= room:
        return every
    share = max(1, room // len(names))
    kept = ranked.groupby("statistic", sort=False).head(share)
    return sorted({(int(layer), int(head)) for layer, head in kept[["layer", "head"]].to_numpy()})


def pack(values: NDArray[np.float64]) -> dict[str, Any]:
    """Values of one head as 16-bit steps between `low` and `high`, little-endian, in base64."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    span = high - low or 1.0
    steps = np.where(np.isfinite(values), np.round((np.nan_to_num(values, nan=low) - low) / span * _STEPS), _STEPS + 1)
    packed = np.clip(steps, 0, _STEPS + 1).astype("<u2")
    return {"low": low, "high": high, "steps": base64.b64encode(packed.tobytes()).decode()}


def statistics_summary(run: RunLike, found: Statistics) -> Markup:
    """One paragraph: what was read, and which heads have the highest means of the statistics of queries."""
    count = "one statistic" if len(found.measured) == 1 else f"{len(found.measured)} statistics"
    each = f"{count} of each head" if found.measured else "no statistic that has a mean"
    parts = [Markup("{} read one text of {} tokens, and {} {} written down.").format(
        model_named(run), f"{found.positions:,}", each, "was" if len(found.measured) <= 1 else "were"
    )]  # fmt: skip
    told = [
        Markup('<a class="head" href="#{}">{}</a> for {} ({})').format(
            entry.highest, entry.highest, readable(entry.info.name), entry.high
        )
        for entry in found.mapped
        if entry.highest
    ]
    if told:
        parts.append(Markup("The highest means over its positions: {}.").format(Markup(", ").join(told)))
    parts.append(
        Markup("This describes one text: there is no interval and no null, and no ablation says what depends on it.")
    )
    return Markup(" ").join(parts)
