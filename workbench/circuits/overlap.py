"""How alike circuits are: of several tasks, methods or seeds, and of one method on resampled prompts.

Jaccard indices of edges (and nodes), beside what two random sets of these sizes share. Overlap is not faithfulness
(Hanna et al. 2024, arXiv 2403.17806), so circuits are also run on each other's tasks. Circuits found on other prompts
of the same task are often others (Meloux et al. 2025 propose .8 before calling one stable).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.circuits.circuit import Circuit, How
from workbench.circuits.faithfulness import faithfulness
from workbench.circuits.forks import Ablation
from workbench.circuits.graph import Graph, Scores
from workbench.circuits.trials import Progress, Trials
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

Array = np.ndarray[Any, np.dtype[np.float64]]
STABLE = 0.8


def jaccard(one: Bool[np.ndarray, " *part"], other: Bool[np.ndarray, " *part"]) -> float:
    """Shared parts over all parts of either; 1 for two empty sets."""
    either = int((one | other).sum())
    return 1.0 if not either else int((one & other).sum()) / either


def expected_jaccard(one: int, other: int, parts: int) -> float:
    """Of two random sets of these sizes, from the expected number of shared parts."""
    if not one + other:
        return 1.0
    shared = one * other / parts
    return shared / (one + other - shared)


def overlap(circuits: Mapping[str, Circuit]) -> pd.DataFrame:
    """One row a pair: Jaccard of edges and of nodes, what chance gives, and how much of each is in the other."""
    rows = []
    for (name, one), (other, two) in combinations(circuits.items(), 2):
        _check_same(one.graph, two.graph)
        shared = int((one.kept & two.kept).sum())
        nodes = one.writers[1:], two.writers[1:]
        rows.append(
            {
                "one": name,
                "other": other,
                "edges": jaccard(one.kept, two.kept),
                "edges_by_chance": expected_jaccard(one.size, two.size, one.graph.count),
                "nodes": jaccard(*nodes),
                "nodes_by_chance": expected_jaccard(int(nodes[0].sum()), int(nodes[1].sum()), len(nodes[0])),
                "of_one": shared / one.size if one.size else np.nan,
                "of_other": shared / two.size if two.size else np.nan,
                "shared": shared,
                "one_size": one.size,
                "other_size": two.size,
            }
        )
    return pd.DataFrame(rows)


def cross_tasks(
    model: Model,
    tasks: Mapping[str, PairTask],
    circuits: Mapping[str, Circuit],
    *,
    ablation: Ablation | str = "patching",
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Faithfulness of every circuit on every task: one row (circuit, task) with interval, size and edge overlap.

    `overlap` is with the circuit of that task's name, where there is one. NaN with a `reason` where a task has no gap.
    """
    rows = []
    for number, (task_name, task) in enumerate(tasks.items()):
        trials = Trials(model, task, ablation=ablation)
        values = trials.values(np.stack([one.kept for one in circuits.values()]))
        found = faithfulness(values, trials.clean, trials.baseline, seed)
        own = circuits.get(task_name)
        for place, (name, one) in enumerate(circuits.items()):
            _check_same(one.graph, trials.graph)
            rows.append(
                {
                    "circuit": name,
                    "task": task_name,
                    "value": found.value[place],
                    "low": found.low[place],
                    "high": found.high[place],
                    "edges": one.size,
                    "overlap": np.nan if own is None else jaccard(one.kept, own.kept),
                    "n": len(task),
                    "metric": trials.metric,
                    "ablation": trials.ablation,
                    "reason": trials.refusal,
                }
            )
        if progress is not None:
            progress(number + 1, len(tasks))
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class Stability:
    """Circuits of one size on resampled prompts.

    `with_whole` and `pairwise` are Jaccard indices of edges with the circuit of all prompts and of all pairs of
    resamples, `nodes` those of nodes with the circuit of all prompts; `chance` what random circuits have; `frequency`
    in what share of the resamples each edge was chosen.
    """

    circuit: Circuit
    with_whole: Float[np.ndarray, " resample"]
    pairwise: float
    nodes: Float[np.ndarray, " resample"]
    chance: float
    frequency: Float[np.ndarray, "writer reader"]

    def table(self) -> pd.DataFrame:
        """One row."""
        low, high = np.percentile(self.with_whole, [2.5, 97.5])
        return pd.DataFrame(
            [
                {
                    "circuit": self.circuit.name,
                    "edges": self.circuit.size,
                    "resamples": len(self.with_whole),
                    "jaccard": self.with_whole.mean(),
                    "low": low,
                    "high": high,
                    "pairwise": self.pairwise,
                    "nodes": self.nodes.mean(),
                    "by_chance": self.chance,
                    "stable": bool(self.pairwise >= STABLE),
                }
            ]
        )

    def edges(self) -> pd.DataFrame:
        """Edges by how often they were chosen; `kept` says whether by all prompts together."""
        graph = self.circuit.graph
        places = np.argwhere(self.frequency > 0)
        frame = pd.DataFrame([(graph.writers[one], *graph.readers[two]) for one, two in places])
        frame.columns = pd.Index(["source", "target", "through"])
        frame["frequency"] = self.frequency[tuple(places.T)]
        frame["kept"] = self.circuit.kept[tuple(places.T)]
        return frame.sort_values("frequency", ascending=False, kind="stable", ignore_index=True)


def stability(
    scores: Scores, n: int, how: How | str = "top", *, signed: bool = False, resamples: int = 100, seed: int = 0
) -> Stability:
    """Circuits of n edges from scores of resampled prompts; nothing is run. Needs scores of every prompt."""
    if scores.per_prompt is None or scores.edges is None:
        raise RequestError(f"{scores.method} kept no scores of single edges and prompts, which resampling needs.")
    prompts = len(scores.per_prompt)
    if prompts < 2 or resamples < 2:
        raise RequestError(f"{prompts} prompts and {resamples} resamples; at least 2 of each are needed.")
    graph = scores.graph
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts
    single = scores.per_prompt[:, graph.exists]
    whole = Circuit.from_scores(scores, n, how, signed=signed)
    kept = np.zeros((resamples, graph.count), bool)
    writers = np.zeros((resamples, len(graph.writers)), bool)
    for number, weights in enumerate(counts):
        edges = np.full(graph.exists.shape, np.nan)
        edges[graph.exists] = weights @ single
        found = Circuit.from_scores(_with(scores, edges), n, how, signed=signed)
        kept[number], writers[number] = found.kept[graph.exists], found.writers
    own = whole.kept[graph.exists]
    frequency = np.full(graph.exists.shape, np.nan)
    frequency[graph.exists] = kept.mean(0)
    sizes = kept.sum(1)
    shared = kept.astype(np.float32) @ kept.T.astype(np.float32)
    either = sizes[:, None] + sizes[None] - shared
    upper = np.triu_indices(resamples, 1)
    pairs = np.where(either > 0, shared / np.maximum(either, 1), 1.0)[upper]
    mean_size = round(float(sizes.mean()))
    return Stability(
        whole,
        np.array([jaccard(own, one) for one in kept]),
        float(pairs.mean()),
        np.array([jaccard(whole.writers[1:], one[1:]) for one in writers]),
        expected_jaccard(mean_size, whole.size, graph.count),
        frequency,
    )


def agreement(circuits: Sequence[Circuit]) -> float:
    """Mean Jaccard of edges over all pairs, as of runs with other seeds: 1 if all are the same."""
    if len(circuits) < 2:
        raise RequestError(f"{len(circuits)} circuit; two or more can agree.")
    return float(np.mean([jaccard(one.kept, two.kept) for one, two in combinations(circuits, 2)]))


def _with(scores: Scores, edges: Float[np.ndarray, "writer reader"]) -> Scores:
    return Scores(scores.graph, scores.method, scores.task, scores.metric, scores.n, scores.seed, edges=edges)


def _check_same(one: Graph, other: Graph) -> None:
    if one.writers != other.writers or one.readers != other.readers:
        raise RequestError("These circuits are of models of different shapes, which have no edges in common.")
