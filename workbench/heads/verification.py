"""Test by ablation what a detector claims: do these heads matter more than others like them?

1. Measure a task's metric on the intact model, per prompt.
2. Ablate the detector's top k heads together and measure again: the effect.
3. Ablate as many heads drawn at random from the same layers, never one of the k, at least ten times: the control.
   Where a layer has too few other heads for that many different sets, they also come from the nearest layers; the
   table says how many sets were different, and how many of a set's heads at most are from other layers.
4. Per prompt, the effect less the mean effect of the controls; its interval by bootstrap, its p by sign flips over
   prompts; q over everything tested in one go.

The control range is that of all draws, from the least to the greatest. An effect inside it is a negative result and is
reported like any other.

Further questions, asked of the same claim by `verify_sets`: how the effect grows with k (nested sets of the first
heads, each with controls of its own), what each head does alone (redundant heads hide from that), and what is left when
heads that the detector itself scores high are kept out of the controls (`involved`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.controls import POOLS as POOLS
from workbench.heads.controls import Pool as Pool
from workbench.heads.controls import check_heads as check_heads
from workbench.heads.controls import control_sets, strangers
from workbench.heads.controls import involved as involved
from workbench.heads.controls import matched_heads as matched_heads
from workbench.heads.detector import Array
from workbench.heads.inference import Better, bootstrap_mean, paired_p, q_values
from workbench.heads.probes import Probe, ProbeSettings, build_probe
from workbench.models import Batch, Head
from workbench.tasks import Metric, TextMetric
from workbench.tracing import Model, ablate
from workbench.tracing.edits import Ablation, How, check_strength
from workbench.tracing.generate import Phase
from workbench.tracing.rotation import mean_queries

MIN_DRAWS = 10
# Forms that need every token of the prompt at once.
_ONE_PASS: tuple[How, ...] = ("resample", "frozen_zero")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Claim:
    """Heads that a detector named, and the probe whose metrics should suffer without them."""

    detector: str
    heads: tuple[Head, ...]
    probe: Probe


@dataclass(frozen=True)
class Ablator:
    """How heads are ablated: form and strength, and what the form needs (means, made once for all heads)."""

    how: How = "mean"
    means: Mapping[Head, Tensor] | None = None
    reference: Batch | None = field(default=None, repr=False)
    strength: float = 1.0

    @staticmethod
    def prepare(model: Model, how: How, reference: Batch, strength: float = 1.0) -> Ablator:
        """Run the reference prompts once, where the form needs them."""
        if how == "mean":
            return Ablator(how, model.head_outputs(reference, model.spec.heads(), mean=True), strength=strength)
        if how == "q_mean":
            return Ablator(how, mean_queries(model, reference, model.spec.heads()), strength=strength)
        return Ablator(how, reference=reference if how == "resample" else None, strength=strength)

    def __call__(self, heads: Sequence[Head]) -> Ablation:
        values = None if self.means is None else {head: self.means[head] for head in heads}
        return ablate(heads, self.how, values=values, reference=self.reference, strength=self.strength)


def other_prompts(batch: Batch) -> Batch:
    """For each prompt another one to resample from: the next, repeated where it is shorter than the longest."""
    rows = [ids[mask].tolist() for ids, mask in zip(batch.ids.cpu(), batch.mask.cpu(), strict=True)]
    if len(rows) < 2:
        raise RequestError("Resampling takes a head's output on another prompt; give the probe at least two prompts.")
    width = batch.ids.shape[1]
    following = [rows[(index + 1) % len(rows)] for index in range(len(rows))]
    return Batch.from_ids([(row * (width // len(row) + 1))[:width] for row in following])


@dataclass(frozen=True)
class Verification:
    """`table`: one row a set of heads and metric; `draws`: one row a random draw.

    `single` and `single_draws` are the same of each head alone, where that was asked for.
    """

    table: pd.DataFrame
    draws: pd.DataFrame
    single: pd.DataFrame = field(default_factory=pd.DataFrame)
    single_draws: pd.DataFrame = field(default_factory=pd.DataFrame)

    @staticmethod
    def join(parts: Sequence[Verification]) -> Verification:
        """Several verifications as one family: q-values over all their p-values."""
        frames = [[getattr(part, name) for part in parts] for name in ("table", "draws", "single", "single_draws")]
        return Verification(
            *(pd.concat([one for one in some if len(one)] or some[:1], ignore_index=True) for some in frames)
        ).family()

    def family(self) -> Verification:
        """The same with q over every test in it, of sets and of single heads."""
        p = [frame["p"].to_numpy(dtype=float) for frame in (self.table, self.single) if len(frame)]
        q = q_values(np.concatenate(p))
        single = self.single.assign(q=q[len(self.table) :]) if len(self.single) else self.single
        return replace(self, table=self.table.assign(q=q[: len(self.table)]), single=single)


def verify_claim(
    model: Model,
    claim: Claim,
    ablator: Ablator,
    *,
    draws: int = MIN_DRAWS,
    seed: int = 0,
    baseline: Mapping[str, Array] | None = None,
    excluded: Collection[Head] = (),
    progress: Progress | None = None,
) -> Verification:
    """Ablate a claim's heads and `draws` matched random sets; compare on every metric of its probe.

    `baseline` is what `claim.probe.measure(model)` gives, if that is known already; heads that are `excluded` are never
    drawn as controls.
    """
    _check_draws(draws)
    _check_form(claim.probe, ablator.how)
    rng = np.random.default_rng(seed)
    sets = [claim.heads, *control_sets(model.spec, claim.heads, draws, rng, excluded)]
    intact = claim.probe.measure(model) if baseline is None else baseline
    effects = []
    for done, heads in enumerate(sets, start=1):
        found = claim.probe.measure(model, [ablator(heads)])
        effects.append({name: found[name] - values for name, values in intact.items()})
        if progress is not None:
            progress(done, len(sets))
    rows, tables = [], []
    for metric in claim.probe.metrics:
        base = intact[metric.name]
        own, others = effects[0][metric.name], np.stack([effect[metric.name] for effect in effects[1:]])
        tables.append(
            _summary(claim, metric, base, own, others, ablator, seed)
            | {"different_draws": len(set(sets[1:])), "other_layers": max(map(partial(strangers, sets[0]), sets[1:]))}
        )
        rows += [
            _draw(claim, metric, base, index, heads, other)
            for index, (heads, other) in enumerate(zip(sets[1:], others, strict=True))
        ]
    table = pd.DataFrame(tables)
    table["q"] = q_values(table["p"].to_numpy())
    return Verification(table, pd.DataFrame(rows))


def dose_sizes(count: int, dose: Sequence[int]) -> list[int]:
    """The sizes of nested sets of `count` ranked heads: those asked for, and all; refuses what is no size of them."""
    for size in dose:
        if not 1 <= size <= count:
            raise RequestError(
                f"dose {size}: sets hold 1 to {count} of the {count} heads; name more heads, or a larger k."
            )
    return sorted({*dose, count}, reverse=True)


def verify_sets(
    model: Model,
    claim: Claim,
    ablator: Ablator,
    *,
    dose: Sequence[int] = (),
    single: bool = False,
    draws: int = MIN_DRAWS,
    seed: int = 0,
    baseline: Mapping[str, Array] | None = None,
    excluded: Collection[Head] = (),
    progress: Progress | None = None,
) -> Verification:
    """`verify_claim` of the claim's heads together, of its first so many (`dose`), and of each alone (`single`).

    The heads of the claim stand in the order of their scores. Every set has controls of its own size; q is over all.
    """
    sizes = dose_sizes(len(claim.heads), dose)
    baseline = claim.probe.measure(model) if baseline is None else baseline
    sets = [claim.heads[:size] for size in sizes] + ([(head,) for head in claim.heads] if single else [])
    each = draws + 1
    found = []
    for index, heads in enumerate(sets):
        told = None if progress is None else partial(_shifted, progress, index * each, len(sets) * each)
        found.append(
            verify_claim(
                model, replace(claim, heads=tuple(heads)), ablator, draws=draws, seed=seed, baseline=baseline,
                excluded=excluded, progress=told,
            )
        )  # fmt: skip
    joint, alone = found[: len(sizes)], found[len(sizes) :]
    return Verification.join(
        [*joint, *(Verification(joint[0].table[:0], joint[0].draws[:0], v.table, v.draws) for v in alone)]
    )


def _shifted(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def verify(
    model: Model,
    heads: Sequence[Head | str],
    *,
    probe: str | Probe = "induction",
    how: How = "mean",
    strength: float = 1.0,
    draws: int = MIN_DRAWS,
    seed: int = 0,
    reference: Batch | None = None,
    dose: Sequence[int] = (),
    single: bool = False,
    phase: Phase = "both",
    excluded: Collection[Head] = (),
    progress: Progress | None = None,
) -> Verification:
    """Ablate any head set and compare with matched random sets, e.g. `verify(model, ["L18H6"], probe="induction")`.

    Args:
        strength: how much of each head is replaced, from 0 (nothing, so that there is no effect) to 1; of controls too.
        reference: prompts for `mean` and `q_mean` (prose and code by default, or the probe's own where the model has no
            tokenizer) and `resample` (the probe's own by default, each prompt the next one).
        dose: also the first 1, 2, 4 ... of the heads, each with its own controls.
        single: also each head alone.
        phase: where a probe that answers is ablated ("prefill", "decode" or "both"); with a probe that is built here.
        excluded: heads that are never drawn as controls, e.g. `involved(scores, "induction")`.
    """
    chosen = tuple(dict.fromkeys(Head.parse(head) if isinstance(head, str) else Head(*head) for head in heads))
    check_heads([layer.heads for layer in model.spec.layers], chosen)
    _check_draws(draws)
    check_strength(strength)
    dose_sizes(len(chosen), dose)
    if phase != "both" and not isinstance(probe, str):
        raise RequestError(f"phase={phase!r}: build the probe with ProbeSettings(phase={phase!r}), or name it.")
    settings = ProbeSettings()
    made = build_probe(probe, model, replace(settings, phase=phase)) if isinstance(probe, str) else probe
    _check_form(made, how)
    if reference is None and how == "resample":
        reference = other_prompts(made.tasks[0].batch)
    elif reference is None:
        reference = (build_probe("held_out", model, settings) if model.tokenizer is not None else made).tasks[0].batch
    ablator = Ablator.prepare(model, how, reference, strength)
    return verify_sets(
        model, Claim("chosen", chosen, made), ablator, dose=dose, single=single, draws=draws, seed=seed,
        excluded=excluded, progress=progress,
    )  # fmt: skip


def _check_form(probe: Probe, how: How) -> None:
    if probe.decodes and how in _ONE_PASS:
        raise RequestError(
            f"how={how!r} needs all tokens of a prompt at once, and the probe {probe.name!r} writes them one by one; "
            "use the probe 'answer', or another form."
        )


def _check_draws(draws: int) -> None:
    if draws < MIN_DRAWS:
        raise RequestError(f"draws = {draws}: fewer than {MIN_DRAWS} random controls say too little; ask for more.")


def _summary(
    claim: Claim, metric: Metric | TextMetric, base: Array, own: Array, others: Array, ablator: Ablator, seed: int
) -> dict[str, object]:
    """One row: the effect with its interval, the controls with theirs, and whether they differ prompt by prompt."""
    interval = bootstrap_mean(own[:, None], seed)
    mean_control = others.mean(axis=1)
    worse: Better = "lower" if metric.better == "higher" else "higher"
    p = paired_p(own[:, None], others.mean(axis=0)[:, None], worse, seed)
    beaten = own.mean() < mean_control if worse == "lower" else own.mean() > mean_control
    return {
        "detector": claim.detector, "k": len(claim.heads), "heads": " ".join(map(str, claim.heads)), "how": ablator.how,
        "strength": ablator.strength,
        "metric": metric.name, "unit": metric.unit, "better": metric.better,
        "baseline": float(base.mean()), "ablated": float((base + own).mean()), "effect": float(own.mean()),
        "low": float(interval.low[0]), "high": float(interval.high[0]),
        "control_effect": float(mean_control.mean()),
        "control_low": float(mean_control.min()),
        "control_high": float(mean_control.max()),
        "draws": len(others), "beaten": int(np.sum(beaten)), "p": float(p[0]), "n": len(own),
        "caption": claim.probe.caption,
    }  # fmt: skip


def _draw(
    claim: Claim, metric: Metric | TextMetric, base: Array, index: int, heads: Sequence[Head], effect: Array
) -> dict[str, object]:
    return {
        "detector": claim.detector, "k": len(claim.heads), "metric": metric.name, "draw": index,
        "heads": " ".join(map(str, heads)), "value": float((base + effect).mean()), "effect": float(effect.mean()),
    }  # fmt: skip
