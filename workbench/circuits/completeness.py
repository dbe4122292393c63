"""Completeness and minimality of a circuit (Wang et al. 2022, arXiv 2211.00593), from what happens without its parts.

A complete circuit C does without any set K of its nodes what the model M does without it: |F(C \\ K) - F(M \\ K)| is
small for every K. It is looked for where it is large: at random sets, and by a greedy search. In a minimal circuit
every node v matters for some K: |F(C \\ (K + v)) - F(C \\ K)| is large, sought over no K, random ones, and the other
heads of v's layer (which may stand in for it). "Without" is replaced as everything outside of the circuit is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.circuits.circuit import Circuit
from workbench.circuits.graph import layer_of
from workbench.circuits.inference import mean_effect
from workbench.circuits.trials import Trials
from workbench.errors import RequestError

Array = np.ndarray[Any, np.dtype[np.float64]]
Set = tuple[str, ...]


def completeness(
    trials: Trials,
    circuit: Circuit,
    *,
    nodes: Sequence[str] | None = None,
    draws: int = 10,
    searches: int = 3,
    tries: int = 10,
    largest: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """One row a set K: what the circuit and the model do without it, and the difference.

    Args:
        nodes: that K is made of (the circuit's heads and MLPs).
        draws: random sets, each node being in them with probability one half.
        searches: greedy searches. Each step tries up to `tries` nodes and takes the one with the largest difference,
            until `largest` nodes are in K or no node makes it larger.

    Returns:
        `search` ("none", "random" or "greedy"), `nodes` in K, `circuit` and `model` (means of the metric without K),
        `difference` of the prompts' means with its interval, `share` of it in the gap, and `size` of K.
    """
    chosen = _nodes(circuit, nodes)
    rng = np.random.default_rng(seed)
    sets: list[tuple[str, Set]] = [("none", ())]
    sets += [("random", tuple(node for node in chosen if rng.random() < 0.5)) for _ in range(draws)]
    sets += [("greedy", _searched(trials, circuit, chosen, tries, largest, rng)) for _ in range(searches)]
    own, model = _without(trials, circuit, [nodes for _, nodes in sets])
    found = mean_effect(own - model, seed)
    rows = pd.DataFrame({"search": [name for name, _ in sets], "nodes": [" ".join(one) for _, one in sets]})
    rows = rows.assign(size=[len(one) for _, one in sets], circuit=own.mean(1), model=model.mean(1))
    rows = rows.assign(difference=found.value, low=found.low, high=found.high)
    return rows.assign(share=found.value / _gap(trials), metric=trials.metric, n=len(trials.task))


def _searched(trials: Trials, circuit: Circuit, nodes: Set, tries: int, largest: int, rng: np.random.Generator) -> Set:
    """Greedily, the set whose removal tells the circuit from the model most."""
    best: Set = ()
    reached = -np.inf
    while len(best) < min(largest, len(nodes)):
        left = [node for node in nodes if node not in best]
        drawn = rng.choice(len(left), size=min(tries, len(left)), replace=False)
        sets = [(*best, left[place]) for place in drawn]
        own, model = _without(trials, circuit, sets)
        differences = np.abs((own - model).mean(1))
        place = int(differences.argmax())
        if differences[place] <= reached:
            break
        best, reached = sets[place], float(differences[place])
    return best


def minimality(
    trials: Trials, circuit: Circuit, *, nodes: Sequence[str] | None = None, draws: int = 5, seed: int = 0
) -> pd.DataFrame:
    """One row a node: the set K without which it matters most, and how much, in the metric and as share of the gap.

    Sets are none, `draws` random ones and the other heads of its layer in the circuit. `alone` is the effect without
    K. Signs are kept: positive where the circuit does worse without the node.
    """
    chosen = _nodes(circuit, nodes)
    rng = np.random.default_rng(seed)
    sets: list[tuple[str, Set]] = []
    for node in chosen:
        others = [one for one in chosen if one != node]
        mine: list[Set] = [(), tuple(one for one in others if _beside(one, node))]
        mine += [tuple(one for one in others if rng.random() < 0.5) for _ in range(draws)]
        sets += [(node, one) for one in dict.fromkeys(mine)]
    masks = [circuit.without(one).kept for _, one in sets]
    masks += [circuit.without((*one, node)).kept for node, one in sets]
    values = trials.values(np.stack(masks))
    effects = values[: len(sets)] - values[len(sets) :]
    found = mean_effect(effects, seed)
    rows = []
    for node in chosen:
        own = [place for place, (name, _) in enumerate(sets) if name == node]
        best = max(own, key=lambda place: abs(found.value[place]))
        rows.append(
            {
                "node": node,
                "effect": found.value[best],
                "low": found.low[best],
                "high": found.high[best],
                "share": found.value[best] / _gap(trials),
                "alone": found.value[own[0]],
                "without": " ".join(sets[best][1]),
                "sets": len(own),
            }
        )
    return pd.DataFrame(rows).assign(metric=trials.metric, n=len(trials.task))


def _without(
    trials: Trials, circuit: Circuit, sets: Sequence[Set]
) -> tuple[Float[np.ndarray, "set prompt"], Float[np.ndarray, "set prompt"]]:
    """The metric of the circuit, and of the model, without each set."""
    whole = Circuit.whole(circuit.graph)
    masks: list[Bool[np.ndarray, "writer reader"]] = [circuit.without(one).kept for one in sets]
    values = trials.values(np.stack([*masks, *(whole.without(one).kept for one in sets)]))
    return values[: len(sets)], values[len(sets) :]


def _nodes(circuit: Circuit, nodes: Sequence[str] | None) -> Set:
    there = [circuit.graph.writers[place] for place in np.flatnonzero(circuit.writers) if place]
    if nodes is None:
        if not there:
            raise RequestError(f"{circuit.name} has neither heads nor MLPs, so there is nothing to take away.")
        return tuple(there)
    if missing := [node for node in nodes if node not in there]:
        raise RequestError(
            f"{missing[0]!r} writes nothing in {circuit.name}; its nodes are {', '.join(there) or 'none'}."
        )
    return tuple(nodes)


def _beside(one: str, node: str) -> bool:
    """Whether both are heads of one layer."""
    return "H" in one and "H" in node and layer_of(one) == layer_of(node)


def _gap(trials: Trials) -> float:
    """NaN where it vanishes."""
    return float("nan") if trials.refusal else float((trials.clean - trials.baseline).mean())
