"""Hypothesis tests of a circuit (Shi et al. 2024, arXiv 2410.13032): does it do what the model does, and only that?

* Equivalence: circuit and model score better than each other equally often (a sign test over prompts, with a
  tolerance). A small p speaks against the circuit.
* Independence: what is left of the model without the circuit says nothing of what the model does (HSIC with Gaussian
  kernels, by permutation). A small p speaks against the circuit: something of the task is elsewhere.
* Sufficiency: the circuit is nearer to the model than random circuits of its size. A small p speaks for it.
* Necessity: the model is worse without the circuit than without random circuits of its size. A small p speaks for it.
* Minimality (of each edge): cutting it changes the circuit more than cutting an edge of a random path that was added
  to it does. A small p speaks for the edge.

Where tests rest on random circuits, p is the share of them that do at least as well, the circuit itself counted in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats
from scipy.spatial.distance import pdist, squareform

from workbench.circuits.circuit import Circuit, Draw, feeding
from workbench.circuits.graph import Graph
from workbench.circuits.inference import q_values
from workbench.circuits.trials import Trials
from workbench.errors import RequestError

Array = np.ndarray[Any, np.dtype[np.float64]]
LEVEL = 0.05
# Paths that are drawn until one is not all in the circuit.
TRIES = 1000


class Tested(NamedTuple):
    """A statistic and its p-value."""

    statistic: float
    p: float


def equivalence(
    circuit: Float[np.ndarray, " prompt"], model: Float[np.ndarray, " prompt"], tolerance: float = 0.1
) -> Tested:
    """Share of prompts on which the circuit scores higher (ties count half), and p of a share within .5 +- tolerance.

    Ties are left out of the test, as in any sign test; p is the largest over all shares within the tolerance.
    """
    if not 0 <= tolerance < 0.5:
        raise RequestError(f"tolerance={tolerance} of the sign test; give a number from 0 to below .5.")
    difference = circuit - model
    # Sums in another order differ in their last bits.
    difference = np.where(np.abs(difference) <= 1e-5 * np.abs(model).max(initial=1e-30), 0.0, difference)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    n = wins + losses
    share = (wins + (len(model) - n) / 2) / len(model)
    if not n:
        return Tested(share, 1.0)
    most = max(wins, losses)
    upper = stats.binom.sf(most - 1, n, 0.5 + tolerance)
    lower = stats.binom.cdf(n - most, n, 0.5 + tolerance)
    return Tested(share, float(min(1.0, upper + lower)))


def independence(
    one: Float[np.ndarray, " prompt"], other: Float[np.ndarray, " prompt"], permutations: int = 999, seed: int = 0
) -> Tested:
    """HSIC of two scores of the same prompts, and its permutation p-value; widths of kernels are median distances."""
    n = len(one)
    if n < 3 or len(other) != n:
        raise RequestError(f"{n} and {len(other)} scores; independence needs as many of both, 3 or more.")
    first, second = _kernel(one), _kernel(other)
    centred = first - first.mean(0) - first.mean(1, keepdims=True) + first.mean()
    observed = float((centred * second).sum()) / n**2
    rng = np.random.default_rng(seed)
    extreme = 1
    for _ in range(permutations):
        order = rng.permutation(n)
        extreme += float((centred * second[np.ix_(order, order)]).sum()) / n**2 >= observed - 1e-12
    return Tested(observed, extreme / (permutations + 1))


def _kernel(values: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, "prompt prompt"]:
    distances = pdist(values[:, None])
    apart = distances[distances > 0]
    width = float(np.median(apart)) if len(apart) else 1.0
    found: Array = np.exp(-(squareform(distances) ** 2) / (2 * width**2))
    return found


def hypothesis_tests(
    trials: Trials,
    circuit: Circuit,
    *,
    random: int = 99,
    draw: Draw | str = "matched",
    tolerance: float = 0.1,
    permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Equivalence, independence, sufficiency and necessity: one row a test, with what it says at 5 %.

    `statistic` is the share of prompts that the circuit does better on; HSIC; the distance |F(C) - F(M)|; the loss
    F(M) - F(M without C). `null` is the mean of the last two over `random` circuits.
    """
    whole = circuit.graph.exists
    drawn = [circuit.random_like(seed + number, draw).kept for number in range(random)]
    masks = [circuit.kept, whole & ~circuit.kept, *drawn, *(whole & ~one for one in drawn)]
    values = trials.values(np.stack(masks))
    own, left, model = values[0], values[1], trials.clean
    rows = [("equivalence", *equivalence(own, model, tolerance), np.nan, False)]
    if len(model) >= 3:
        rows.append(("independence", *independence(left, model, permutations, seed), np.nan, False))
    means = values.mean(1)
    if random:
        distance = np.abs(means - model.mean())
        others = distance[2 : 2 + random]
        rows.append(("sufficiency", distance[0], _rank(-distance[0], -others), float(others.mean()), True))
        losses = model.mean() - means
        rows.append(
            ("necessity", losses[1], _rank(losses[1], losses[2 + random :]), float(losses[2 + random :].mean()), True)
        )
    frame = pd.DataFrame(rows, columns=["test", "statistic", "p", "null", "wanted"])
    rejected = frame.p <= LEVEL
    frame["passed"] = rejected == frame.wanted.astype(bool)
    frame = frame.drop(columns="wanted")
    return frame.assign(circuit=circuit.name, edges=circuit.size, n=len(model), random=random, metric=trials.metric)


def minimal_edges(
    trials: Trials, circuit: Circuit, *, edges: int | None = None, paths: int = 50, seed: int = 0
) -> pd.DataFrame:
    """One row an edge of the circuit: what cutting it changes, beside cutting edges of random paths added to it.

    `edges` of them are drawn at random (all by default; each is a run of every prompt). `q` is Benjamini-Hochberg over
    the edges; `null` the median of the random ones.
    """
    if not circuit.size:
        raise RequestError(f"{circuit.name} has no edges.")
    rng = np.random.default_rng(seed)
    places = np.argwhere(circuit.kept)
    if edges is not None and edges < len(places):
        places = places[np.sort(rng.choice(len(places), edges, replace=False))]
    masks = [circuit.kept, *(_cut(circuit.kept, one, two) for one, two in places.tolist())]
    for _ in range(paths):
        wider, added = _with_path(circuit, rng)
        masks += [wider, _cut(wider, *added)]
    means = trials.values(np.stack(masks)).mean(1)
    effects = np.abs(means[0] - means[1 : 1 + len(places)])
    null = means[1 + len(places) :].reshape(-1, 2)
    chance = np.abs(null[:, 0] - null[:, 1])
    p = np.array([_rank(effect, chance) for effect in effects])
    graph = circuit.graph
    ends = pd.DataFrame([(graph.writers[one], *graph.readers[two]) for one, two in places])
    ends.columns = pd.Index(["source", "target", "through"])
    found = ends.assign(effect=effects, p=p, q=q_values(p), null=float(np.median(chance)), paths=paths)
    return found.sort_values("effect", ascending=False, kind="stable", ignore_index=True)


def _rank(value: float, others: Float[np.ndarray, " random"]) -> float:
    """Share of values at least as large, this one among them; equal up to rounding counts as equal."""
    close = 1e-6 * max(abs(value), float(np.abs(others).max(initial=0.0)))
    return (1 + int((others >= value - close).sum())) / (1 + len(others))


def _cut(kept: Bool[np.ndarray, "writer reader"], writer: int, reader: int) -> Bool[np.ndarray, "writer reader"]:
    found = kept.copy()
    found[writer, reader] = False
    return found


def _with_path(circuit: Circuit, rng: np.random.Generator) -> tuple[Bool[np.ndarray, "writer reader"], tuple[int, int]]:
    """The circuit with a random path from the embedding to the logits that is not all in it, and a new edge of it."""
    for _ in range(TRIES):
        path = _path(circuit.graph, rng)
        new = [edge for edge in path if not circuit.kept[edge]]
        if new:
            kept = circuit.kept.copy()
            for edge in path:
                kept[edge] = True
            return kept, new[int(rng.integers(len(new)))]
    raise RequestError(f"{circuit.name} holds (almost) all paths of the model, so that there are none to compare with.")


def _path(graph: Graph, rng: np.random.Generator) -> list[tuple[int, int]]:
    """From the embedding on, into a random reader and out of a random one of its writers, until the logits read."""
    feeds, writer, found = feeding(graph), 0, list[tuple[int, int]]()
    while True:
        reader = int(rng.choice(np.flatnonzero(graph.exists[writer])))
        found.append((writer, reader))
        if reader == len(graph.readers) - 1:
            return found
        writer = int(rng.choice(np.flatnonzero(feeds[:, reader])))
