"""Heads of two models laid side by side by what detectors say of them, where their indices mean nothing.

1. Each head's profile is its place among the heads of its own model by every detector that both runs have: ranks from
   0 to 1, turned so that the largest says most, so that scales and sizes of models do not matter.
2. The distance of two heads is the root mean square difference of their profiles: 0 for the same places, about 0.41
   for unrelated ones.
3. Heads are paired, each at most once, so that the sum of distances is smallest (`linear_sum_assignment`), within a
   window of relative depth (layer over the last layer). Heads without a partner in their window stay alone.
4. Null: each detector's scores are shuffled among the second model's heads of the same part of its depth, and heads are
   paired again, a few times. p is the share of shuffled pairs that are at least as near; q over the pairs.
5. Held out: each detector is left out of the profiles in turn, heads are paired by the others, and the rank correlation
   of the left-out scores over the pairs is compared with that of heads paired at random within the window.

What a pair means: of all heads at that depth, these two stand in the most similar places by these detectors. It does
not mean that they compute the same, and detectors that measure nearly the same count twice. Shuffling also breaks up
what detectors share, so that the null is easier to beat than that of one trait; the held-out correlation is the
stricter question. Costs one assignment (heads cubed at worst) a shuffle and detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from workbench.errors import RequestError, RunError

from .run import Run

WINDOW, SHUFFLES, PARTS, MOST_HEADS = 0.2, 8, 4, 4096
LEAST_DETECTORS = 3
# Of models with more heads than that, only some detectors are held out: each takes an assignment of a good part of a
# second.
MANY_HEADS, FEW_HELD_OUT = 512, 12
# Larger than any distance: heads beyond the window are never paired while others can be.
_FAR = 1e3
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Alignment:
    """`pairs`: layer_a, head_a, depth_a, layer_b, head_b, depth_b, distance, p, q, the nearest first; `held_out`:
    detector, rho over the pairs made without it; chance, low and high: mean, least and greatest rho of random pairs.
    `detectors` made the profiles; `distance` and `null` are means over pairs, as found and as shuffled;
    `alone` is how many heads of either have no partner.
    """

    pairs: pd.DataFrame
    held_out: pd.DataFrame
    detectors: tuple[str, ...]
    distance: float
    null: float
    alone: tuple[int, int]


def align_runs(a: Run, b: Run, *, window: float = WINDOW, seed: int = 0) -> Alignment:
    """Heads of two runs with head scores, paired by their profiles."""
    for run in (a, b):
        if not run.has_table("head_scores") or not run.has_table("detectors"):
            raise RunError(
                f"the run {run.path} ({run.kind}) has no head scores to align by; make some: workbench atlas"
            )
    profiles = [profiles_of(run) for run in (a, b)]
    return align(profiles[0], profiles[1], window=window, seed=seed)


def profiles_of(run: Run) -> pd.DataFrame:
    """Heads by detectors, ranks from 0 to 1 within the model; the index is (layer, head)."""
    # Reading runs needs no torch, which stands behind the heads' statistics.
    from workbench.heads.agreement import strengths

    wide = strengths(run.table("head_scores"), run.table("detectors"))
    # A detector that leaves heads out, or calls all equal, places none.
    wide = wide.loc[:, wide.notna().all() & (wide.nunique() > 1)]
    ranks = (rankdata(wide.to_numpy(dtype=float), axis=0) - 0.5) / len(wide)
    return pd.DataFrame(ranks, index=wide.index, columns=wide.columns)


def align(a: pd.DataFrame, b: pd.DataFrame, *, window: float = WINDOW, seed: int = 0) -> Alignment:
    """Pairs of heads of two tables of profiles (see `profiles_of`), by the detectors that both have."""
    shared = [name for name in a.columns if name in set(b.columns)]
    if len(shared) < LEAST_DETECTORS:
        raise RequestError(
            f"{len(shared)} detectors tell heads apart in both runs; profiles take at least {LEAST_DETECTORS}. Run "
            "`workbench atlas` on both models with the same detectors."
        )
    if not 0 < window <= 1:
        raise RequestError(f"window={window}: a share of the depth is needed, above 0 and up to 1.")
    if max(len(a), len(b)) > MOST_HEADS:
        raise RequestError(f"{max(len(a), len(b))} heads: up to {MOST_HEADS} can be paired.")
    first, second = a[shared].to_numpy(dtype=float), b[shared].to_numpy(dtype=float)
    depths = relative_depths(a), relative_depths(b)
    allowed = np.abs(depths[0][:, None] - depths[1]) <= window + 1e-9
    rng = np.random.default_rng(seed)
    rows, columns, distance = _paired(_distances(first, second), allowed)
    pool = np.concatenate(
        [_paired(_distances(first, _shuffled(second, depths[1], rng)), allowed)[2] for _ in range(SHUFFLES)]
    )
    p = (1 + (pool[None] <= distance[:, None] + 1e-12).sum(1)) / (1 + len(pool))
    pairs = _table(a, b, depths, (rows, columns), distance, p)
    return Alignment(
        pairs, _held_out(first, second, allowed, shared, rng), tuple(shared), float(distance.mean()),
        float(pool.mean()), (len(a) - len(rows), len(b) - len(rows)),
    )  # fmt: skip


def relative_depths(heads: pd.DataFrame) -> Array:
    """Layer over the last layer, of tables indexed by (layer, head)."""
    layers = np.asarray(heads.index.get_level_values("layer"), dtype=float)
    return np.asarray(layers / max(float(layers.max()), 1.0))


def _distances(a: Array, b: Array) -> Array:
    """Root mean square differences of all pairs."""
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.asarray(np.sqrt(np.clip(square, 0, None) / a.shape[1]))


def _paired(distance: Array, allowed: NDArray[np.bool_]) -> tuple[Any, Any, Array]:
    rows, columns = linear_sum_assignment(np.where(allowed, distance, _FAR))
    near = allowed[rows, columns]
    if not near.any():
        raise RequestError("No head has another within the window of relative depth; widen it.")
    return rows[near], columns[near], distance[rows[near], columns[near]]


def _shuffled(values: Array, depth: Array, rng: np.random.Generator) -> Array:
    """Each detector's values among the heads of the same part of the depth, detector by detector."""
    part = np.minimum((depth * PARTS).astype(int), PARTS - 1)
    made = values.copy()
    for one in np.unique(part):
        made[part == one] = rng.permuted(values[part == one], axis=0)
    return made


def _held_out(
    a: Array, b: Array, allowed: NDArray[np.bool_], names: Sequence[str], rng: np.random.Generator
) -> pd.DataFrame:
    random = [_paired(rng.random(allowed.shape), allowed)[:2] for _ in range(SHUFFLES)]
    rows = []
    few = max(allowed.shape) > MANY_HEADS
    places = np.linspace(0, len(names) - 1, FEW_HELD_OUT).astype(int) if few else np.arange(len(names))
    for at in np.unique(places):
        name = names[at]
        others = [i for i in range(len(names)) if i != at]
        left, right, _ = _paired(_distances(a[:, others], b[:, others]), allowed)
        drawn = np.array([_correlation(a[i, at], b[j, at]) for i, j in random])
        rows.append((name, _correlation(a[left, at], b[right, at]), drawn.mean(), drawn.min(), drawn.max()))
    return pd.DataFrame(rows, columns=["detector", "rho", "chance", "low", "high"])


def _correlation(x: Array, y: Array) -> float:
    ranks = [rankdata(one) for one in (x, y)]
    if len(x) < LEAST_DETECTORS or any(one.std() == 0 for one in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _table(
    a: pd.DataFrame, b: pd.DataFrame, depths: tuple[Array, Array], pairs: tuple[Any, Any], distance: Array, p: Array
) -> pd.DataFrame:
    from workbench.heads.inference import q_values

    found: dict[str, Any] = {}
    for side, heads, depth, at in (("a", a, depths[0], pairs[0]), ("b", b, depths[1], pairs[1])):
        for level in ("layer", "head"):
            found[f"{level}_{side}"] = np.asarray(heads.index.get_level_values(level))[at]
        found[f"depth_{side}"] = depth[at]
    made = pd.DataFrame({**found, "distance": distance, "p": p, "q": q_values(p)})
    return made.sort_values("distance", kind="stable", ignore_index=True)
