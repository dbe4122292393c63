"""Scores of heads, and what ablating heads changes: `detect`, `verify`, `ablation_forms`, `kept_heads`."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, field_validator, model_validator

from workbench.errors import RequestError
from workbench.heads import DETECTORS, Claim, ProbeSettings, Settings, ablation_maps, involved, verify_sets
from workbench.heads.ablation_map import MAPPED, worse
from workbench.heads.agreement import agreement
from workbench.heads.controls import POOLS, Pool
from workbench.heads.detection import choose
from workbench.heads.detector import Array, Progress
from workbench.heads.detectors.razor import razor_heads
from workbench.heads.inference import bootstrap_mean, paired_p, q_values
from workbench.heads.probes import check_phase
from workbench.heads.verification import MIN_DRAWS, check_heads, dose_sizes
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
from workbench.tracing import ablate
from workbench.tracing.edits import HOWS, How
from workbench.tracing.generate import Phase

Names = Annotated[tuple[str, ...], Field(min_length=1)]
# A head's effect on a metric has a sign of its own; as a score, more harm says more.
_SPLITS = 50


class Detect(Parameters):
    """Detectors by name; `sizes` changes those of `workbench.heads.Settings`."""

    detectors: Names
    sizes: Sizes = Field(default_factory=dict)

    @field_validator("detectors")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        choose(names)
        return names

    @model_validator(mode="after")
    def _sized(self) -> Detect:
        self.settings()
        return self

    def settings(self) -> Settings:
        """The detectors' settings."""
        return sized(Settings(seed=self.seed), self.sizes, "Settings")


def _detect(bench: Bench, asked: Detect, progress: Progress | None) -> Tables:
    found = bench.scores(asked.detectors, asked.settings(), progress)
    tables = {"head_scores": found.table, "detectors": found.detectors}
    if len(found.domains):
        tables["domain_contrast"] = found.domains.drop_duplicates(["layer", "head", "domain"])
    return tables


class Probed(Parameters):
    """A probe of a detector's claim; `sizes` are those of its detection, `probe_sizes` those of the probe."""

    detector: str = "induction"
    probe: str | None = None
    sizes: Sizes = Field(default_factory=dict)
    probe_sizes: Sizes = Field(default_factory=dict)
    phase: Phase = "both"

    @field_validator("detector")
    @classmethod
    def _known(cls, name: str) -> str:
        choose([name])
        return name

    @model_validator(mode="after")
    def _fits(self) -> Probed:
        sized(Settings(), self.sizes, "Settings")
        self.probe_settings()
        check_phase(self.probe_name, self.phase)
        return self

    @property
    def probe_name(self) -> str:
        """The probe asked for, or the one that the detector's claim is about."""
        found = self.probe or DETECTORS[self.detector].probe
        if found is None:
            raise RequestError(f"Detector {self.detector!r} only describes heads; name a probe.")
        return found

    def settings(self) -> Settings:
        """The detector's settings."""
        return sized(Settings(seed=self.seed), self.sizes, "Settings")

    def probe_settings(self) -> ProbeSettings:
        """The probe's settings; its seed is never the detector's."""
        return sized(ProbeSettings(seed=PROBE_SEED + self.seed, phase=self.phase), self.probe_sizes, "ProbeSettings")


class Verify(Probed):
    """A detector's top `k` heads (or `heads` by name), ablated in a form, against `draws` matched random sets."""

    heads: tuple[str, ...] = ()
    k: Annotated[int, Field(ge=1)] = 8
    how: How = "mean"
    dose: tuple[int, ...] = ()
    single: bool = False
    draws: Annotated[int, Field(ge=MIN_DRAWS)] = MIN_DRAWS
    pool: Pool = "all"
    # Not written where it is whole: cells from before it was a parameter keep their address.
    strength: Annotated[float, Field(ge=0, le=1, exclude_if=lambda strength: strength == 1)] = 1.0

    @model_validator(mode="after")
    def _sensible(self) -> Verify:
        for text in self.heads:
            Head.parse(text)
        dose_sizes(len(self.heads) or self.k, self.dose)
        if self.heads and self.pool != "all":
            raise RequestError(f"pool={self.pool!r} keeps out what a detector scores high; leave heads or pool out.")
        assert self.how in HOWS and self.pool in POOLS
        return self


def _verify(bench: Bench, asked: Verify, progress: Progress | None) -> Tables:
    """The same probes and controls as `workbench verify`."""
    model, barred = bench.model, frozenset[Head]()
    probe = bench.probe(asked.probe_name, asked.probe_settings())
    if asked.heads:
        named = tuple(Head.parse(text) for text in asked.heads)
        claim = Claim("chosen", named, probe)
    else:
        scores = bench.scores([asked.detector], asked.settings())
        claim = Claim(asked.detector, tuple(scores.top(asked.detector, asked.k)), probe)
        barred = involved(scores, asked.detector) if asked.pool == "score_free" else barred
    check_heads([layer.heads for layer in model.spec.layers], claim.heads)
    found = verify_sets(
        model, claim, bench.ablator(asked.how, probe, asked.settings(), asked.strength),
        dose=asked.dose, single=asked.single, draws=asked.draws, seed=asked.probe_settings().seed, excluded=barred,
        progress=progress,
    )  # fmt: skip
    told = {"probe": asked.probe_name, "phase": asked.phase, "pool": asked.pool}
    tables = {"verification": found.table.assign(**told), "verification_draws": found.draws.assign(how=asked.how)}
    if len(found.single):
        tables["verification_single"] = found.single.assign(**told)
    return tables


class Forms(Probed):
    """Each head ablated alone in several forms, on the probe's prompts."""

    hows: Annotated[tuple[How, ...], Field(min_length=2)] = ("zero", "mean", "resample", "uniform", "to_sink")
    tops: tuple[int, ...] = (5, 10, 20)

    @field_validator("hows")
    @classmethod
    def _mapped(cls, hows: tuple[How, ...]) -> tuple[How, ...]:
        for how in hows:
            if how not in MAPPED:
                raise RequestError(f"how={how!r} has no map of single heads; choose from {', '.join(MAPPED)}.")
        return hows


def _forms(bench: Bench, asked: Forms, progress: Progress | None) -> Tables:
    """Per form the harm that each head's absence does, how the forms agree, and how each agrees with itself.

    `form_reliability` splits the prompts in two halves at random: the mean rank correlation between the maps of the
    halves bounds what two forms could share.
    """
    model, probe = bench.model, bench.probe(asked.probe_name, asked.probe_settings())
    found = ablation_maps(model, probe, asked.hows, progress=progress)
    metric, heads = probe.metrics[0], model.spec.heads()
    layer, head = np.array([one.layer for one in heads]), np.array([one.head for one in heads])
    rows, noise = [], []
    for how, made in found.items():
        harm = worse(metric.better)(made.effects[metric.name])[:, layer, head]
        interval = bootstrap_mean(harm, asked.seed)
        rows.append(
            pd.DataFrame({
                "detector": how, "layer": layer, "head": head, "value": interval.value, "low": interval.low,
                "high": interval.high, "n": len(harm), "metric": metric.name, "unit": metric.unit,
                "caption": probe.caption,
            })
        )  # fmt: skip
        noise.append({"how": how, **_halves(harm, asked.seed), "n": len(harm), "metric": metric.name})
    effects = pd.concat(rows, ignore_index=True)
    forms = pd.DataFrame({"detector": list(found), "better": "higher"})
    agreed = agreement(effects[["detector", "layer", "head", "value"]], forms, tops=asked.tops, seed=asked.seed)
    return {
        "form_effects": effects.rename(columns={"detector": "how"}),
        "form_agreement": agreed.correlations,
        "form_overlap": agreed.overlaps,
        "form_reliability": pd.DataFrame(noise),
    }


def _halves(harm: Array, seed: int) -> dict[str, float]:
    """Mean rank correlation between the maps of two random halves of the prompts, with the range of the splits."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(_SPLITS if len(harm) >= 4 else 0):
        order = rng.permutation(len(harm))
        half = len(harm) // 2
        found.append(spearman(harm[order[:half]].mean(axis=0), harm[order[half:]].mean(axis=0)))
    if not found:
        return {"rho": np.nan, "low": np.nan, "high": np.nan}
    low, high = np.percentile(found, [2.5, 97.5])
    return {"rho": float(np.mean(found)), "low": float(low), "high": float(high)}


class Kept(Probed):
    """RazorAttention's claim: with these KV heads whole, all others may see but the first and the recent tokens."""

    detector: str = "razor_induction"
    echo: Annotated[float, Field(ge=0, le=1)] = 0.01
    induction: Annotated[float, Field(ge=0, le=1)] = 0.14
    sinks: Annotated[int, Field(ge=0)] = 4
    recent: Annotated[int, Field(ge=1)] = 32
    draws: Annotated[int, Field(ge=MIN_DRAWS)] = MIN_DRAWS

    @model_validator(mode="after")
    def _some(self) -> Kept:
        if not self.echo + self.induction:
            raise RequestError("echo = 0 and induction = 0 keep no head; give a share above 0.")
        return self


def _kept(bench: Bench, asked: Kept, progress: Progress | None) -> Tables:
    """What is lost when all heads but the kept ones stream, for Razor's KV heads and as many at random.

    The random sets hold as many KV heads, drawn from the whole model, Razor's own left out of the draw: an effect of
    keeping the right ones shows as a smaller loss than any of theirs.
    """
    model, spec = bench.model, bench.model.spec
    probe = bench.probe(asked.probe_name, asked.probe_settings())
    scores = bench.scores(["razor_echo", "razor_induction"], asked.settings()).table
    own = razor_heads(scores, spec, echo=asked.echo, induction=asked.induction)
    rng = np.random.default_rng(asked.probe_settings().seed)
    others = [pair for layer in spec.layers for pair in _kv_heads(layer.index, layer.kv_heads) if pair not in set(own)]
    if len(others) < len(own):
        raise RequestError(f"{len(own)} KV heads kept leave {len(others)} others to compare with; ask for fewer.")
    sets = [own] + [[others[i] for i in rng.permutation(len(others))[: len(own)]] for _ in range(asked.draws)]
    intact = probe.measure(model)
    losses: list[dict[str, Array]] = []
    for done, kept in enumerate([[], *sets], start=1):
        rest = [head for head in spec.heads() if (head.layer, head.head // spec.layers[head.layer].group) not in kept]
        found = probe.measure(model, [ablate(rest, "streaming", sinks=asked.sinks, recent=asked.recent)])
        losses.append({name: found[name] - values for name, values in intact.items()})
        if progress is not None:
            progress(done, len(sets) + 1)
    rows = []
    for metric in probe.metrics:
        none, razor, *random = (loss[metric.name] for loss in losses)
        rows += _kept_rows(asked, metric, intact[metric.name], {"none": none, "razor": razor}, np.stack(random), own)
    table = pd.DataFrame(rows)
    table["q"] = q_values(table["p"].to_numpy(dtype=float))
    return {"kept": table.assign(caption=probe.caption)}


def _kv_heads(layer: int, count: int) -> list[tuple[int, int]]:
    return [(layer, head) for head in range(count)]


def _kept_rows(
    asked: Kept, metric: Any, base: Array, sets: dict[str, Array], random: Array, own: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    draws, mean = random.mean(axis=1), random.mean(axis=0)
    rows = []
    for name, effect in (*sets.items(), ("random", mean)):
        interval = bootstrap_mean(effect[:, None], asked.seed)
        tested = name == "razor"
        rows.append(
            {
                "kept": name, "kv_heads": 0 if name == "none" else len(own), "metric": metric.name,
                "unit": metric.unit, "better": metric.better, "baseline": float(base.mean()),
                "effect": float(effect.mean()), "low": float(interval.low[0]), "high": float(interval.high[0]),
                "control_effect": float(draws.mean()), "control_low": float(draws.min()),
                "control_high": float(draws.max()), "draws": len(draws), "n": len(base),
                "heads": " ".join(f"L{layer}KV{head}" for layer, head in own) if tested else "",
                "p": float(paired_p(effect[:, None], mean[:, None], metric.better, asked.seed)[0])
                if tested else np.nan,
            }
        )  # fmt: skip
    return rows


DETECT = Measurement(
    "detect", 1, "scores of every head", Detect, _detect, ("head_scores", "detectors", "domain_contrast")
)
VERIFY = Measurement(
    "verify", 1, "heads ablated against matched random heads", Verify, _verify,
    ("verification", "verification_draws", "verification_single"), ("verification", "verification_single"),
)  # fmt: skip
FORMS = Measurement(
    "ablation_forms", 1, "each head ablated alone, in several forms", Forms, _forms,
    ("form_effects", "form_agreement", "form_overlap", "form_reliability"),
)  # fmt: skip
KEPT = Measurement("kept_heads", 1, "all heads but the kept ones stream", Kept, _kept, ("kept",), ("kept",))
CLAIMS = (DETECT, VERIFY, FORMS, KEPT)
