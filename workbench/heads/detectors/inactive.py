"""Thirteen scores of how little a head does on an input, and who is inactive at a quantile of each.

Sandoval-Segura et al. (arXiv 2504.03889), per input and head over real tokens, o = A V before W_O:

| name | score | inactive if |
| --- | --- | --- |
| `awft`, `awft_ln` | mean attention to the first token | above |
| `aeqd`, `aeqd_ln` | mean entropy of the rows | below |
| `ftvvn`, `ftvvn_ln` | norm of the first token's value | below |
| `avvn`, `avvn_ln` | mean norm of the values | below |
| `lthon`, `lthon_ln`, `lthon_hn` | norm of o at the last token (HN: over the head's own mean norm) | below |
| `ahon`, `ahon_ln` | mean norm of o | below |

LN divides by the mean over the heads of the layer (of `ahon` for `lthon_ln`). Thresholds are quantiles of the score
pooled over inputs and heads. `fhon`, `fhon_ln` are the appendix's variant of `ahon` with the norm of o W_O.
Everything comes from one pass of streaming statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.errors import RequestError
from workbench.heads.detector import Array, Detector, Part, PromptScores, stacked, traced
from workbench.heads.detectors.rows import mean_over, visible_keys
from workbench.tracing import Statistic, Trace
from workbench.tracing import statistics as S

QUANTILES = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30)
Side = Literal["above", "below"]
Flags = Bool[np.ndarray, "prompt layer head"]


@dataclass(frozen=True, eq=False)
class Inactivity:
    """A score per input and head (NaN where a layer has fewer heads), and on which side a head is inactive."""

    name: str
    values: Float[np.ndarray, "prompt layer head"]
    inactive: Side

    def threshold(self, quantile: float) -> float:
        """The bar beyond which this share of all (input, head) pairs lies; at 0 nothing lies beyond it."""
        if not 0 <= quantile <= 1:
            raise RequestError(f"quantile = {quantile}: a share lies between 0 and 1 (5 % is 0.05).")
        at = quantile if self.inactive == "below" else 1 - quantile
        return float(np.nanquantile(self.values, at))


def inactive_heads(score: Inactivity, quantile: float) -> Flags:
    """Which heads are inactive on which input, at a quantile of the score pooled over inputs and heads.

    Strictly beyond the threshold, as published: a score that many heads share exactly may flag fewer than asked.
    """
    bar = score.threshold(quantile)
    return np.asarray(score.values < bar if score.inactive == "below" else score.values > bar)


def flagged_shares(scores: Sequence[Inactivity], quantiles: Sequence[float] = QUANTILES) -> pd.DataFrame:
    """Thresholds and what they flag: score, inactive, quantile, threshold, share of all (input, head) pairs, and the
    share of heads that are inactive on every input (`always`) and on at least one (`ever`).
    """
    rows = []
    for score in scores:
        there = ~np.isnan(score.values[0])
        for quantile in quantiles:
            flags = inactive_heads(score, quantile)[:, there]
            rows.append(
                {
                    "score": score.name, "inactive": score.inactive, "quantile": quantile,
                    "threshold": score.threshold(quantile), "share": flags.mean(),
                    "always": flags.all(0).mean(), "ever": flags.any(0).mean(),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _of_layer(values: Array) -> Array:
    """The mean over the heads that a layer has, kept as an axis."""
    return np.asarray(np.nanmean(values, axis=2, keepdims=True))


def _mean(trace: Trace, name: str) -> Array:
    return np.asarray(mean_over(trace[name], visible_keys(trace) > 0).numpy())


def _at(trace: Trace, name: str, *, last: bool) -> Array:
    """A row or column statistic at each prompt's first or last token."""
    batch = trace.batch
    index = batch.starts.cpu() + (batch.lengths.cpu() - 1 if last else 0)
    values = trace[name]
    found = values.gather(3, index[:, None, None, None].expand(*values.shape[:3], 1))[..., 0]
    return np.asarray(found.double().numpy())


def _attention_to_first(trace: Trace) -> Array:
    # Column mean 0 is the mean of A_i0 over the rows that see it: all of them, but for windows.
    return _at(trace, "column_mean", last=False)


@dataclass(frozen=True)
class _Score:
    """How a score is read off a trace; `over` is what it is divided by."""

    name: str
    title: str
    measures: str
    read: Callable[[Trace], Array]
    statistics: Callable[[], list[Statistic]]
    inactive: Side
    unit: str
    over: Callable[[Trace], Array] | None = None

    def __call__(self, trace: Trace) -> Array:
        values = self.read(trace)
        if self.over is None:
            return values
        over = np.broadcast_to(self.over(trace), values.shape)
        # A mean of 0 is of zeros alone (the entropy of a prompt of one token): each is like the mean.
        return np.where(over == 0, 1.0, values / np.where(over == 0, 1.0, over))


def _plain_and_normed(
    name: str,
    measures: str,
    read: Callable[[Trace], Array],
    statistics: Callable[[], list[Statistic]],
    inactive: Side,
    unit: str,
) -> tuple[_Score, _Score]:
    title = name.upper()
    normed = f"{measures}, over the mean of the layer's heads"

    def layer(trace: Trace) -> Array:
        return _of_layer(read(trace))

    return (
        _Score(name, title, measures, read, statistics, inactive, unit),
        _Score(f"{name}_ln", f"{title}-LN", normed, read, statistics, inactive, "ratio", layer),
    )


def _lthon() -> tuple[_Score, ...]:
    read, mean = partial(_at, name="output_norm", last=True), partial(_mean, name="output_norm")
    text = "norm of the head's output at the last token"
    made = partial(_Score, read=read, statistics=lambda: [S.output_norm()], inactive="below")
    return (
        made("lthon", "LTHON", text, unit="norm"),
        made(
            "lthon_ln", "LTHON-LN", f"{text}, over the mean norm of the layer's heads at all tokens", unit="ratio",
            over=lambda trace: _of_layer(mean(trace)),
        ),
        made("lthon_hn", "LTHON-HN", f"{text}, over the head's own mean norm", unit="ratio", over=mean),
    )  # fmt: skip


_SCORES: tuple[_Score, ...] = (
    *_plain_and_normed(
        "awft", "mean attention to the first token", _attention_to_first, lambda: [S.column_mean()], "above", "mass"
    ),
    *_plain_and_normed(
        "aeqd", "mean entropy of the rows", partial(_mean, name="entropy"), lambda: [S.entropy()], "below", "nats"
    ),
    *_plain_and_normed(
        "ftvvn", "norm of the first token's value", partial(_at, name="value_norm", last=False),
        lambda: [S.value_norm()], "below", "norm",
    ),
    *_plain_and_normed(
        "avvn", "mean norm of the values", partial(_mean, name="value_norm"), lambda: [S.value_norm()], "below", "norm"
    ),
    *_lthon(),
    *_plain_and_normed(
        "ahon", "mean norm of the head's output", partial(_mean, name="output_norm"), lambda: [S.output_norm()],
        "below", "norm",
    ),
    *_plain_and_normed(
        "fhon", "mean norm of what the head writes (z W_O)", partial(_mean, name="result_norm"),
        lambda: [S.result_norm()], "below", "norm",
    ),
)  # fmt: skip
THIRTEEN = tuple(score.name for score in _SCORES if not score.name.startswith("fhon"))


def inactivity_statistics() -> list[Statistic]:
    """What a trace must hold for `inactivity`."""
    return list({one.name: one for score in _SCORES for one in score.statistics()}.values())


def inactivity(traces: Sequence[Trace], names: Sequence[str] = THIRTEEN) -> list[Inactivity]:
    """Scores per input (all prompts of the traces, one below the other) and head; see the table above."""
    known = {score.name: score for score in _SCORES}
    for name in names:
        if name not in known:
            raise RequestError(f"No inactive-head score {name!r}; there are {', '.join(known)}.")
    return [
        Inactivity(name, np.concatenate([known[name](trace) for trace in traces]), known[name].inactive)
        for name in names
    ]


def _scored(parts: Sequence[Part], of: _Score) -> PromptScores:
    def layer_mean(part: Part) -> Array:
        values = of(traced(part))
        return np.where(np.isnan(values), np.nan, _of_layer(values))

    return PromptScores(stacked(parts, lambda part: of(traced(part))), stacked(parts, layer_mean))


def _detector(score: _Score) -> Detector:
    def wanted(task: object) -> list[Statistic]:
        return score.statistics()

    beyond = "above" if score.inactive == "above" else "below"
    return Detector(
        name=score.name,
        title=f"Inactivity by {score.title}",
        kind="text",
        measures=score.measures,
        null="the mean of the same over the heads of the layer",
        unit=score.unit,
        positions="all real tokens" if not score.name.startswith("lthon") else "the last token",
        threshold=None,
        paper="Sandoval-Segura et al. 2025, Identifying and evaluating inactive heads in pretrained LLMs",
        url="https://arxiv.org/abs/2504.03889",
        statistics=wanted,
        score=partial(_scored, of=score),
        better="higher" if score.inactive == "above" else "lower",
        note=f"Inactive on an input if {beyond} a quantile (0 to 30 %) of the score pooled over inputs and heads: "
        "`inactive_heads`. Published thresholds belong to models and data sets, so none is set here. What the claim "
        "predicts is that nothing suffers: `inactive_dose` removes the flagged heads input by input.",
    )


INACTIVE = tuple(map(_detector, _SCORES))
