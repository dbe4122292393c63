"""Documents, patterns and detectors side by side: `influence`, `minference_patterns`, `agreement`."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, field_validator, model_validator

from workbench.errors import RequestError
from workbench.heads import DETECTORS, KINDS, Settings, matched_heads
from workbench.heads.agreement import TOPS, agreement
from workbench.heads.detection import choose
from workbench.heads.detector import Progress
from workbench.heads.detectors.patterns import MINFERENCE, minference_patterns
from workbench.heads.inference import bootstrap_mean
from workbench.heads.influence import influence
from workbench.models import Head
from workbench.studies.measurements.base import (
    PROBE_SEED,
    Bench,
    Measurement,
    Parameters,
    Sizes,
    Tables,
    sized,
    spearman,
)
from workbench.studies.measurements.claims import Names
from workbench.tasks import text_domains


class Influence(Parameters):
    """AttentionInfluence: documents ranked by the loss without the top `share` of a detector's heads.

    `draws` random sets of as many heads of the same layers rank the same documents.
    """

    detector: str = "json_retrieval"
    share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    heads: tuple[str, ...] = ()
    documents: Annotated[int, Field(ge=4)] = 24
    length: Annotated[int, Field(ge=16)] = 128
    draws: Annotated[int, Field(ge=1)] = 10
    sizes: Sizes = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> Influence:
        choose([self.detector])
        sized(Settings(), self.sizes, "Settings")
        for text in self.heads:
            Head.parse(text)
        return self


def _influence(bench: Bench, asked: Influence, progress: Progress | None) -> Tables:
    """Every document's influence by each set of heads, and per domain what the sets' rankings share.

    `influence_ranks`: mean influence; its rank correlation with that of the detector's heads (`rho`, none for
    themselves) and with the document's own loss (`rho_loss`), intervals over documents.
    """
    model = bench.model
    if model.tokenizer is None:
        raise RequestError("Influence ranks documents of text and needs a tokenizer; load the model with one.")
    settings = sized(Settings(seed=asked.seed), asked.sizes, "Settings")
    if asked.heads:
        own = [Head.parse(text) for text in asked.heads]
    else:
        count = max(1, round(asked.share * len(model.spec.heads())))
        own = bench.scores([asked.detector], settings).top(asked.detector, count)
    tasks = text_domains(model.tokenizer, prompts=asked.documents, length=asked.length, seed=PROBE_SEED + asked.seed)
    bench.note(tasks.values())
    documents = {name: list(task.batch.texts or ()) for name, task in tasks.items()}
    rng = np.random.default_rng(asked.seed)
    name = "chosen" if asked.heads else asked.detector
    sets = {name: tuple(own)} | {f"random {i}": matched_heads(model.spec, own, rng) for i in range(asked.draws)}
    frames = []
    for done, (label, heads) in enumerate(sets.items(), start=1):
        found = influence(model, heads, documents)
        frames.append(found.drop(columns="model").assign(set=label, heads=" ".join(map(str, heads))))
        if progress is not None:
            progress(done, len(sets))
    table = pd.concat(frames, ignore_index=True)
    caption = " ".join(task.caption for task in tasks.values())
    return {"influence": table, "influence_ranks": _ranks(table, name, asked.seed).assign(caption=caption)}


def _ranks(table: pd.DataFrame, name: str, seed: int) -> pd.DataFrame:
    rows = []
    for domain, part in table.groupby("domain", sort=False):
        wide = part.pivot(index="document", columns="set", values="influence")
        loss = part[part["set"] == name].set_index("document")["loss"]
        for label in dict.fromkeys(part["set"]):
            interval = bootstrap_mean(wide[[label]].to_numpy(dtype=float), seed)
            row: dict[str, Any] = {
                "domain": domain, "set": label, "influence": float(interval.value[0]), "low": float(interval.low[0]),
                "high": float(interval.high[0]), "n": len(wide),
            }  # fmt: skip
            row |= _correlated(wide[label], loss.loc[wide.index], seed, "rho_loss")
            row |= _correlated(wide[label], wide[name] if label != name else None, seed, "rho")
            rows.append(row)
    return pd.DataFrame(rows)


def _correlated(a: pd.Series, b: pd.Series | None, seed: int, column: str) -> dict[str, float]:
    """Rank correlation over documents with its interval, as three columns."""
    if b is None:
        return dict.fromkeys((column, f"{column}_low", f"{column}_high"), float("nan"))
    x, y, rng = a.to_numpy(dtype=float), b.to_numpy(dtype=float), np.random.default_rng(seed)
    drawn = [spearman(x[pick], y[pick]) for pick in (rng.integers(len(x), size=len(x)) for _ in range(499))]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {column: spearman(x, y), f"{column}_low": float(low), f"{column}_high": float(high)}


class Patterns(Parameters):
    """MInference's candidates on long texts."""

    prompts: Annotated[int, Field(ge=1)] = 2
    length: Annotated[int, Field(ge=64)] = 512


def _patterns(bench: Bench, asked: Patterns, progress: Progress | None) -> Tables:
    """Each head's winner, and per family its share of the heads with the mass that it recalls."""
    kind = KINDS[MINFERENCE.kind]
    settings = Settings(seed=asked.seed, long_prompts=asked.prompts, long_length=asked.length)
    tasks = kind.tasks(bench.model, settings)
    bench.note(tasks)
    found = minference_patterns(kind.parts(bench.model, [MINFERENCE], tasks, settings, progress))
    rows = []
    for family in ("a_shape", "vertical_slash", "block_sparse"):
        won = (found["family"] == family).to_numpy()
        # Heads are the sample here: how far the share rests on which heads there are.
        interval = bootstrap_mean(won[:, None].astype(float), asked.seed)
        rows.append(
            {
                "family": family, "length": asked.length, "share": float(won.mean()), "low": float(interval.low[0]),
                "high": float(interval.high[0]), "heads": int(won.sum()), "n": len(found),
                "recalled": float(found.loc[won, "recalled"].mean()) if won.any() else np.nan,
                "density": float(found.loc[won, "density"].mean()) if won.any() else np.nan,
                "caption": tasks[0].caption,
            }
        )  # fmt: skip
    return {"patterns": found.assign(length=asked.length), "pattern_families": pd.DataFrame(rows)}


class Agreement(Parameters):
    """Detectors whose ranks are compared."""

    detectors: Names
    tops: tuple[int, ...] = TOPS
    sizes: Sizes = Field(default_factory=dict)

    @field_validator("detectors")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        choose(names)
        if len(names) < 2:
            raise RequestError(f"detectors = {list(names)}: agreement takes at least two.")
        return names

    @model_validator(mode="after")
    def _sized(self) -> Agreement:
        sized(Settings(), self.sizes, "Settings")
        return self


def _agreement(bench: Bench, asked: Agreement, progress: Progress | None) -> Tables:
    """Rank correlations and overlaps of all pairs; `shared_kind` where both read the same prompts."""
    found = bench.scores(asked.detectors, sized(Settings(seed=asked.seed), asked.sizes, "Settings"), progress)
    agreed = agreement(found.table, found.detectors, tops=asked.tops, seed=asked.seed)
    same = [
        DETECTORS[a].kind == DETECTORS[b].kind
        for a, b in zip(agreed.correlations["detector_a"], agreed.correlations["detector_b"], strict=True)
    ]
    return {
        "agreement": agreed.correlations.assign(shared_kind=same),
        "overlap": agreed.overlaps,
        "head_scores": found.table,
        "detectors": found.detectors,
    }


TEXTS = (
    Measurement("influence", 1, "documents ranked by loss", Influence, _influence, ("influence", "influence_ranks")),
    Measurement(
        "minference_patterns", 1, "sparse patterns of heads", Patterns, _patterns, ("patterns", "pattern_families")
    ),
    Measurement(
        "agreement", 1, "whether detectors name the same heads", Agreement, _agreement,
        ("agreement", "overlap", "head_scores", "detectors"),
    ),
)  # fmt: skip
