"""Sinks and heads that rest: `sink_rates`, `hidden_sinks`, `residual_peaks`, `dormancy`, `dormancy_dose`,
`flagged_shares`."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from workbench.errors import RequestError
from workbench.heads import Settings, matched_heads
from workbench.heads.detector import Progress
from workbench.heads.detectors.dormancy import dormancy_scatter, inactive_dose
from workbench.heads.detectors.inactive import QUANTILES, THIRTEEN, flagged_shares, inactivity, inactivity_statistics
from workbench.heads.detectors.massive import massive_activations, residual_peaks
from workbench.heads.detectors.sink_tables import sink_rates
from workbench.heads.detectors.sinks import HIDDEN_THRESHOLD, hidden_sinks
from workbench.heads.inference import bootstrap_mean
from workbench.heads.plain import one_token_prompts, random_prompts
from workbench.studies.measurements.base import PROBE_SEED, Bench, Measurement, Parameters, Tables, heads_of, spearman
from workbench.tasks import TOKEN_CLASSES, Task, text_domains, token_classes
from workbench.tracing import statistics as S

Share = Annotated[float, Field(gt=0, lt=1)]
Source = Literal["prose", "code", "random", "repeated"]


class Texts(Parameters):
    """Prompts of one source: prose or code, random tokens, one token repeated."""

    source: Source = "prose"
    prompts: Annotated[int, Field(ge=2)] = 32
    length: Annotated[int, Field(ge=8)] = 64


def texts(bench: Bench, asked: Texts) -> Task:
    """The prompts asked for, noted."""
    settings = Settings(seed=asked.seed, plain_prompts=asked.prompts, text_length=asked.length)
    if asked.source == "random":
        task = random_prompts(bench.model, settings)[0]
    elif asked.source == "repeated":
        task = one_token_prompts(bench.model, settings)[0]
    else:
        if bench.model.tokenizer is None:
            raise RequestError(f"source = {asked.source!r} is text and needs a tokenizer; take random or repeated.")
        task = text_domains(
            bench.model.tokenizer, [asked.source], prompts=asked.prompts, length=asked.length, seed=asked.seed
        )[asked.source]
    bench.note([task])
    return task


class SinkRates(Texts):
    """Sink_k^epsilon at the first `positions` positions."""

    epsilon: Share = 0.3
    positions: Annotated[int, Field(ge=1)] = 1


def _sink_rates(bench: Bench, asked: SinkRates, progress: Progress | None) -> Tables:
    task = texts(bench, asked)
    trace = bench.model.trace(task.batch, statistics=[S.column_mean()], progress=progress)
    found = sink_rates([trace], asked.epsilon, asked.positions, asked.seed)
    return {"sink_rates": found.assign(source=asked.source, length=asked.length, caption=task.caption)}


def _residual_peaks(bench: Bench, asked: Texts, progress: Progress | None) -> Tables:
    task = texts(bench, asked)
    peaks = residual_peaks(bench.model, task.batch, asked.seed)
    massive = massive_activations(bench.model, task.batch)
    tables = {"residual_peaks": peaks.assign(source=asked.source, caption=task.caption)}
    if len(massive):
        counted = massive.groupby(["depth", "dim", "position"], as_index=False).agg(
            prompts=("prompt", "nunique"), value=("value", "mean")
        )
        tables["massive"] = counted.assign(source=asked.source, n=asked.prompts)
    return tables


class Hidden(Texts):
    """Sinks beyond position 0: columns whose mean exceeds `threshold`."""

    threshold: Share = HIDDEN_THRESHOLD


def _hidden(bench: Bench, asked: Hidden, progress: Progress | None) -> Tables:
    """Which classes of tokens the hidden sinks are, against how common the class is; means over prompts.

    A pair of prompt and head without a hidden sink counts with none. `sinks` is the mean number a head, `share` a
    class's share of a prompt's hidden sinks, `tokens` its share of the keys that could be one, `lift` the first less
    the second.
    """
    task = texts(bench, asked)
    trace = bench.model.trace(task.batch, statistics=[S.column_mean()], progress=progress)
    heads = bench.model.spec.heads()
    layer, head = np.array([one.layer for one in heads]), np.array([one.head for one in heads])
    found = hidden_sinks(trace, asked.threshold).numpy()[:, layer, head].astype(float)
    per_key = found.sum(axis=1)
    tokenizer = bench.model.tokenizer
    marks = token_classes(tokenizer, task.batch.ids) if tokenizer is not None else {}
    classes = {name: marks[name].numpy() for name in TOKEN_CLASSES[1:] if name in marks}
    classes["word"] = ~np.logical_or.reduce([*classes.values(), np.zeros(per_key.shape, dtype=bool)])
    # Keys that too few queries see are never counted as sinks, nor here.
    possible = np.arange(per_key.shape[1]) <= per_key.shape[1] - 1 / asked.threshold
    possible[0] = False
    rows = []
    total = per_key.sum(axis=1)
    for name, mark in classes.items():
        share = (per_key * mark).sum(axis=1) / np.where(total > 0, total, np.nan)
        base = (mark & possible).sum(axis=1) / possible.sum()
        lift = (share - base)[~np.isnan(share)]
        interval = bootstrap_mean(lift[:, None], asked.seed) if len(lift) else None
        rows.append(
            {
                "source": asked.source, "class": name, "share": np.nanmean(share) if len(lift) else np.nan,
                "tokens": base.mean(), "lift": np.nan if interval is None else interval.value[0],
                "low": np.nan if interval is None else interval.low[0],
                "high": np.nan if interval is None else interval.high[0],
                "n": len(lift), "sinks": found.sum(axis=2).mean(), "threshold": asked.threshold,
                "caption": task.caption,
            }
        )  # fmt: skip
    each = found.sum(axis=2)
    interval = bootstrap_mean(each, asked.seed)
    counts = pd.DataFrame(
        {
            "source": asked.source, "layer": layer, "head": head, "value": interval.value, "low": interval.low,
            "high": interval.high, "n": len(each), "threshold": asked.threshold,
        }
    )  # fmt: skip
    return {"hidden_classes": pd.DataFrame(rows), "hidden_counts": counts}


class Dormancy(Parameters):
    """The heads of the largest contrast between prose and code, zeroed one by one, and as many of their layers."""

    detector: str = "active_dormant"
    k: Annotated[int, Field(ge=1)] = 4
    prompts: Annotated[int, Field(ge=4)] = 16
    length: Annotated[int, Field(ge=8)] = 64
    text_prompts: Annotated[int, Field(ge=2)] = 30


def _dormancy(bench: Bench, asked: Dormancy, progress: Progress | None) -> Tables:
    """Points (a text and head each), and per head how the rise of the loss goes with the first token's share.

    The texts are not those that found the heads. `rho` is over all texts of both domains, its interval over texts.
    """
    model = bench.model
    if model.tokenizer is None:
        raise RequestError("Dormancy compares prose with code and needs a tokenizer; load the model with one.")
    scores = bench.scores([asked.detector], Settings(seed=asked.seed, text_prompts=asked.text_prompts))
    chosen = scores.top(asked.detector, asked.k)
    rng = np.random.default_rng(asked.seed)
    controls = matched_heads(model.spec, chosen, rng)
    tasks = text_domains(model.tokenizer, prompts=asked.prompts, length=asked.length, seed=PROBE_SEED + asked.seed)
    bench.note(tasks.values())
    points = dormancy_scatter(model, tasks, [*chosen, *controls], progress=progress)
    named = set(chosen)
    points.insert(0, "set", np.where([head in named for head in heads_of(points)], "contrast", "control"))
    rows = []
    for (group, layer, head), part in points.groupby(["set", "layer", "head"], sort=False):
        x, y = part["first_share"].to_numpy(), part["loss_increase"].to_numpy()
        drawn = [spearman(x[pick], y[pick]) for pick in (rng.integers(len(x), size=len(x)) for _ in range(499))]
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        means = {
            f"{column}_{domain}": float(part.loc[part["domain"] == domain, column].mean())
            for column in ("first_share", "loss_increase")
            for domain in tasks
        }
        rows.append(
            {"set": group, "layer": layer, "head": head, "rho": spearman(x, y), "low": low, "high": high, "n": len(x)}
            | means
        )
    caption = " ".join(task.caption for task in tasks.values())
    return {"dormancy": points, "dormancy_heads": pd.DataFrame(rows).assign(caption=caption)}


class Inactive(Texts):
    """Scores of inactivity, and the shares of pairs of input and head that are flagged."""

    scores: Annotated[tuple[str, ...], Field(min_length=1)] = THIRTEEN
    quantiles: Annotated[tuple[float, ...], Field(min_length=1)] = QUANTILES

    @model_validator(mode="after")
    def _known(self) -> Inactive:
        for name in self.scores:
            if name not in (*THIRTEEN, "fhon", "fhon_ln"):
                raise RequestError(f"No inactive-head score {name!r}; there are {', '.join(THIRTEEN)}, fhon, fhon_ln.")
        for quantile in self.quantiles:
            if not 0 <= quantile <= 1:
                raise RequestError(f"quantile = {quantile}: a share lies between 0 and 1 (5 % is 0.05).")
        return self


def _flagged(bench: Bench, asked: Inactive, progress: Progress | None) -> Tables:
    task = texts(bench, asked)
    trace = bench.model.trace(task.batch, statistics=inactivity_statistics(), progress=progress)
    found = flagged_shares(inactivity([trace], asked.scores), asked.quantiles)
    return {"flagged": found.assign(source=asked.source, caption=task.caption)}


class Dose(Inactive):
    """The flagged heads of each input removed, at each quantile, against as many at random."""

    draws: Annotated[int, Field(ge=1)] = 3
    same_layers: bool = True


def _dose(bench: Bench, asked: Dose, progress: Progress | None) -> Tables:
    task = texts(bench, asked)
    trace = bench.model.trace(task.batch, statistics=inactivity_statistics())
    frames = []
    for at, score in enumerate(inactivity([trace], asked.scores)):
        frames.append(
            inactive_dose(
                bench.model, task.batch, score, asked.quantiles, draws=asked.draws, same_layers=asked.same_layers,
                seed=asked.seed,
            )
        )  # fmt: skip
        if progress is not None:
            progress(at + 1, len(asked.scores))
    return {"dose": pd.concat(frames, ignore_index=True).assign(source=asked.source, caption=task.caption)}


SINKS = (
    Measurement(
        "sink_rates", 1, "share of heads with a sink at each position", SinkRates, _sink_rates, ("sink_rates",)
    ),
    Measurement("hidden_sinks", 1, "sinks beyond position 0", Hidden, _hidden, ("hidden_classes", "hidden_counts")),
    Measurement(
        "residual_peaks", 1, "norms of the stream at position 0", Texts, _residual_peaks, ("residual_peaks", "massive")
    ),
    Measurement("dormancy", 1, "first-token share against harm", Dormancy, _dormancy, ("dormancy", "dormancy_heads")),
    Measurement("flagged_shares", 1, "shares of inactive heads", Inactive, _flagged, ("flagged",)),
    Measurement("dormancy_dose", 1, "loss without the inactive heads of each input", Dose, _dose, ("dose",)),
)
