"""Random heads to compare an ablation with: as many, of the same layers, never one of those that are tested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from math import comb, prod
from typing import Literal, get_args

import numpy as np

from workbench.errors import RequestError
from workbench.heads.detection import HeadScores
from workbench.models import Head, Spec
from workbench.models.spec import check_head

# Where controls are drawn from: all other heads, or those that the detector's scores do not speak for.
Pool = Literal["all", "score_free"]
POOLS: tuple[Pool, ...] = get_args(Pool)
# Share of heads that count as involved for their score alone.
INVOLVED = 0.2


def involved(scores: HeadScores, detector: str, quantile: float = INVOLVED) -> frozenset[Head]:
    """Heads that a detector's own scores speak for: they reach its threshold, or are among the top share.

    Kept out of the controls, these are heads that the claim says nothing about.
    """
    if not 0 <= quantile < 1:
        raise RequestError(f"quantile={quantile}: give the share of heads to leave out, from 0 to below 1.")
    rows = scores.table[(scores.table["detector"] == detector) & scores.table["value"].notna()]
    about = scores.detectors[scores.detectors["detector"] == detector]
    if rows.empty:
        raise RequestError(f"No scores of {detector!r}; there are {', '.join(scores.table['detector'].unique())}.")
    threshold, better = float(about["threshold"].iloc[0]), str(about["better"].iloc[0])
    values = rows["value"].to_numpy(dtype=float)
    reached = {"higher": values >= threshold, "lower": values <= threshold, "either": np.abs(values) >= threshold}
    chosen = rows[reached[better] | (rows["rank"].to_numpy() <= quantile * len(rows))]
    return frozenset(Head(int(layer), int(head)) for layer, head in zip(chosen["layer"], chosen["head"], strict=True))


def matched_heads(
    spec: Spec,
    heads: Sequence[Head],
    rng: np.random.Generator,
    *,
    sets: int = 1,
    excluded: Collection[Head] = (),
) -> tuple[Head, ...]:
    """As many other heads, layer by layer the same number, drawn without replacement; never one of `excluded`.

    Where the layers hold fewer than `sets` different draws, heads of the nearest layers are drawn as well.
    """
    taken = set(heads)
    barred = taken | set(excluded)
    free = {
        layer.index: [Head(layer.index, h) for h in range(layer.heads) if Head(layer.index, h) not in barred]
        for layer in spec.layers
    }
    check_count(len(taken), len(spec.heads()))
    if sum(map(len, free.values())) < len(taken):
        raise RequestError(
            f"Only {sum(map(len, free.values()))} heads are left to draw {len(taken)} controls from, as {len(barred)} "
            f"of {len(spec.heads())} are kept out; test fewer heads, or draw from all others (pool='all')."
        )
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
    check_count(len(set(heads)), sum(layers))


def check_count(count: int, heads: int) -> None:
    """Refuse so many heads that fewer others are left."""
    if 2 * count > heads:
        raise RequestError(f"{count} heads of {heads} leave too few others to compare with; test fewer.")


def control_sets(
    spec: Spec, heads: Sequence[Head], draws: int, rng: np.random.Generator, excluded: Collection[Head]
) -> list[tuple[Head, ...]]:
    """Different matched sets; where a small model does not have enough of them, some come twice."""
    found: dict[tuple[Head, ...], None] = {}
    for _ in range(20 * draws):
        found[matched_heads(spec, heads, rng, sets=draws, excluded=excluded)] = None
        if len(found) == draws:
            return list(found)
    return [list(found)[index % len(found)] for index in range(draws)]


def strangers(heads: Sequence[Head], drawn: Sequence[Head]) -> int:
    """How many drawn heads are beyond what the layers of `heads` call for."""
    return sum((Counter(head.layer for head in drawn) - Counter(head.layer for head in heads)).values())
