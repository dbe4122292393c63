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
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import comb, prod

import numpy as np
import pandas as pd
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Array
from workbench.heads.inference import Better, bootstrap_mean, paired_p, q_values
from workbench.heads.probes import Probe, ProbeSettings, build_probe
from workbench.models import Batch, Head, Spec
from workbench.models.spec import check_head
from workbench.tasks import Metric, TextMetric
from workbench.tracing import Model, ablate
from workbench.tracing.edits import Ablation, How

MIN_DRAWS = 10
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Claim:
    """Heads that a detector named, and the probe whose metrics should suffer without them."""

    detector: str
    heads: tuple[Head, ...]
    probe: Probe


@dataclass(frozen=True)
class Ablator:
    """How heads are ablated: the form, and what it needs (mean outputs, made once for all heads)."""

    how: How = "mean"
    means: Mapping[Head, Tensor] | None = None
    reference: Batch | None = field(default=None, repr=False)

    @staticmethod
    def prepare(model: Model, how: How, reference: Batch) -> Ablator:
        """Run the reference prompts once, where the form needs them."""
        if how == "mean":
            return Ablator(how, model.head_outputs(reference, model.spec.heads(), mean=True))
        return Ablator(how, reference=reference if how == "resample" else None)

    def __call__(self, heads: Sequence[Head]) -> Ablation:
        values = None if self.means is None else {head: self.means[head] for head in heads}
        return ablate(heads, self.how, values=values, reference=self.reference)


def matched_heads(spec: Spec, heads: Sequence[Head], rng: np.random.Generator, *, sets: int = 1) -> tuple[Head, ...]:
    """As many other heads, layer by layer the same number, drawn without replacement.

    Where the layers hold fewer than `sets` different draws, heads of the nearest layers are drawn as well.
    """
    taken = set(heads)
    free = {
        layer.index: [Head(layer.index, h) for h in range(layer.heads) if Head(layer.index, h) not in taken]
        for layer in spec.layers
    }
    _check_count(len(taken), len(spec.heads()))
    reach = _reach({layer: len(pool) for layer, pool in free.items()}, Counter(head.layer for head in taken), sets)
    drawn: list[Head] = []
    for head in sorted(taken):
        pool = [other for layer in reach[head.layer] for other in free[layer]]
        if not pool:
            nearest = min((layer for layer in free if free[layer]), key=lambda layer: (abs(layer - head.layer), layer))
            pool = free[nearest]
        chosen = pool[int(rng.integers(len(pool)))]
        free[chosen.layer].remove(chosen)
        drawn.append(chosen)
    return tuple(sorted(drawn))


def _reach(free: Mapping[int, int], wanted: Mapping[int, int], sets: int) -> dict[int, list[int]]:
    """The layers that each layer's controls are drawn from: its own, and more where draws would repeat."""
    reach = {layer: [layer] for layer in wanted}

    def choices(layer: int) -> int:
        return comb(sum(free[near] for near in reach[layer]), wanted[layer])

    while prod(map(choices, reach)) < sets:
        narrow = [layer for layer in reach if len(reach[layer]) < len(free)]
        if not narrow:
            break
        layer = min(narrow, key=choices)
        reach[layer].append(min(set(free) - set(reach[layer]), key=lambda near: (abs(near - layer), near)))
    return reach


def check_heads(layers: Sequence[int], heads: Sequence[Head]) -> None:
    """Refuse heads that a model with so many in its `layers` lacks, and so many that none are left to compare with."""
    if not heads:
        raise RequestError("No heads were given; name some, e.g. ['L18H6'].")
    for head in heads:
        check_head(head, layers)
    _check_count(len(set(heads)), sum(layers))


def _check_count(count: int, heads: int) -> None:
    if 2 * count > heads:
        raise RequestError(f"{count} heads of {heads} leave too few others to compare with; test fewer.")


def _controls(spec: Spec, heads: Sequence[Head], draws: int, rng: np.random.Generator) -> list[tuple[Head, ...]]:
    """Different matched sets; where a small model does not have enough of them, some come twice."""
    found: dict[tuple[Head, ...], None] = {}
    for _ in range(20 * draws):
        found[matched_heads(spec, heads, rng, sets=draws)] = None
        if len(found) == draws:
            return list(found)
    return [list(found)[index % len(found)] for index in range(draws)]


@dataclass(frozen=True)
class Verification:
    """`table`: one row a claim and metric; `draws`: one row a random draw."""

    table: pd.DataFrame
    draws: pd.DataFrame

    @staticmethod
    def join(parts: Sequence[Verification]) -> Verification:
        """Several verifications as one family: q-values over all their p-values."""
        table = pd.concat([part.table for part in parts], ignore_index=True)
        table["q"] = q_values(table["p"].to_numpy())
        return Verification(table, pd.concat([part.draws for part in parts], ignore_index=True))


def verify_claim(
    model: Model,
    claim: Claim,
    ablator: Ablator,
    *,
    draws: int = MIN_DRAWS,
    seed: int = 0,
    baseline: Mapping[str, Array] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Ablate a claim's heads and `draws` matched random sets; compare on every metric of its probe.

    `baseline` is what `claim.probe.measure(model)` gives, if that is known already.
    """
    _check_draws(draws)
    rng = np.random.default_rng(seed)
    sets = [claim.heads, *_controls(model.spec, claim.heads, draws, rng)]
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
            _summary(claim, metric, base, own, others, ablator.how, seed)
            | {"different_draws": len(set(sets[1:])), "other_layers": max(map(partial(_strangers, sets[0]), sets[1:]))}
        )
        rows += [
            _draw(claim, metric, base, index, heads, other)
            for index, (heads, other) in enumerate(zip(sets[1:], others, strict=True))
        ]
    table = pd.DataFrame(tables)
    table["q"] = q_values(table["p"].to_numpy())
    return Verification(table, pd.DataFrame(rows))


def verify(
    model: Model,
    heads: Sequence[Head | str],
    *,
    probe: str | Probe = "induction",
    how: How = "mean",
    draws: int = MIN_DRAWS,
    seed: int = 0,
    reference: Batch | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Ablate any head set and compare with matched random sets, e.g. `verify(model, ["L18H6"], probe="induction")`.

    `reference` prompts serve `mean` and `resample`; prose and code by default, or the probe's own prompts where the
    model has no tokenizer.
    """
    chosen = tuple(dict.fromkeys(Head.parse(head) if isinstance(head, str) else Head(*head) for head in heads))
    check_heads([layer.heads for layer in model.spec.layers], chosen)
    _check_draws(draws)
    settings = ProbeSettings()
    made = build_probe(probe, model, settings) if isinstance(probe, str) else probe
    if reference is None:
        reference = (build_probe("held_out", model, settings) if model.tokenizer is not None else made).tasks[0].batch
    ablator = Ablator.prepare(model, how, reference)
    return verify_claim(model, Claim("chosen", chosen, made), ablator, draws=draws, seed=seed, progress=progress)


def _strangers(heads: Sequence[Head], drawn: Sequence[Head]) -> int:
    """How many drawn heads are beyond what the layers of `heads` call for."""
    return sum((Counter(head.layer for head in drawn) - Counter(head.layer for head in heads)).values())


def _check_draws(draws: int) -> None:
    if draws < MIN_DRAWS:
        raise RequestError(f"draws = {draws}: fewer than {MIN_DRAWS} random controls say too little; ask for more.")


def _summary(
    claim: Claim, metric: Metric | TextMetric, base: Array, own: Array, others: Array, how: How, seed: int
) -> dict[str, object]:
    """One row: the effect with its interval, the controls with theirs, and whether they differ prompt by prompt."""
    interval = bootstrap_mean(own[:, None], seed)
    mean_control = others.mean(axis=1)
    worse: Better = "lower" if metric.better == "higher" else "higher"
    p = paired_p(own[:, None], others.mean(axis=0)[:, None], worse, seed)
    beaten = own.mean() < mean_control if worse == "lower" else own.mean() > mean_control
    return {
        "detector": claim.detector, "k": len(claim.heads), "heads": " ".join(map(str, claim.heads)), "how": how,
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
