"""Circuits: which edges of a model's graph are kept, and how they are chosen from scores.

What is not kept is replaced when the circuit runs (`trials`). An edge matters only if its writer gets something from
the circuit and its reader feeds something that goes on: `pruned` drops the others, which changes nothing where
replacements are those of another run.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from workbench.circuits.graph import Graph, Scores, layer_of
from workbench.errors import RequestError
from workbench.tasks.pairs import Edge, KnownCircuit

Array = np.ndarray[Any, np.dtype[np.float64]]
How = Literal["top", "greedy", "threshold"]
Draw = Literal["matched", "uniform", "connected"]


@dataclass(frozen=True, eq=False)
class Circuit:
    """The kept edges; `scores` are those that they were chosen by, NaN where there is none."""

    graph: Graph
    kept: Bool[np.ndarray, "writer reader"]
    name: str = "circuit"
    method: str = ""
    notes: tuple[str, ...] = ()
    scores: Float[np.ndarray, "writer reader"] | None = None

    def __post_init__(self) -> None:
        if self.kept.shape != self.graph.exists.shape:
            raise RequestError(f"kept has shape {self.kept.shape}; the graph's is {self.graph.exists.shape}.")
        object.__setattr__(self, "kept", self.kept & self.graph.exists)

    @property
    def size(self) -> int:
        """How many edges are kept."""
        return int(self.kept.sum())

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Kept edges, writer by writer."""
        graph = self.graph
        return tuple(Edge(graph.writers[one], *graph.readers[two]) for one, two in np.argwhere(self.kept))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Writers that something reads, and KV heads that read something."""
        found = [self.graph.writers[place] for place in np.flatnonzero(self.kept.any(1))]
        reading = (self.graph.readers[place][0] for place in np.flatnonzero(self.kept.any(0)))
        return (*found, *dict.fromkeys(node for node in reading if "KV" in node))

    @property
    def writers(self) -> Bool[np.ndarray, " writer"]:
        """Writers that something reads."""
        found: np.ndarray[Any, np.dtype[np.bool_]] = np.asarray(self.kept.any(1))
        return found

    def pruned(self) -> Circuit:
        """Without edges from writers that get nothing, and into readers that feed nothing (Hanna et al.'s rule)."""
        feeds, kept = feeding(self.graph), self.kept.copy()
        while True:
            alive = kept.any(1) & (feeds @ kept.any(0))
            alive[0] = kept[0].any()
            reads = alive @ feeds
            reads[-1] = True
            left = kept & alive[:, None] & reads[None]
            if (left == kept).all():
                return replace(self, kept=kept)
            kept = left

    def without(self, nodes: Iterable[str]) -> Circuit:
        """The circuit whose named writers are read by nobody."""
        kept = self.kept.copy()
        kept[[self.graph.writer(node) for node in nodes]] = False
        return replace(self, kept=kept)

    @classmethod
    def whole(cls, graph: Graph) -> Circuit:
        """All edges: the model."""
        return cls(graph, graph.exists, "whole")

    @classmethod
    def from_edges(cls, graph: Graph, edges: Iterable[Edge], name: str = "circuit", method: str = "") -> Circuit:
        """These edges; refuses what the graph does not have."""
        kept = np.zeros_like(graph.exists)
        for edge in edges:
            kept[graph.place(edge)] = True
        return cls(graph, kept, name, method)

    @classmethod
    def from_scores(
        cls, scores: Scores, n: float, how: How | str = "top", *, signed: bool = False, prune: bool = True
    ) -> Circuit:
        """Edges by their scores, by size or (`signed`) the most helpful first.

        Args:
            n: how many edges; with "threshold", the least score.
            how: "top" takes the best n; "greedy" begins at the logits and takes, over and over, the best edge into
                what is there already, so that no edge leads nowhere; "threshold" all from `n` on.
            prune: drop afterwards what is not connected, so that fewer than n edges may be left.
        """
        if how not in get_args(How):
            raise RequestError(f"how={how!r} is unknown; choose from {', '.join(get_args(How))}.")
        if scores.edges is None:
            raise RequestError(f"{scores.method} scores nodes, not edges; choose nodes, and take Circuit.from_nodes.")
        values = ranking(scores.edges, signed)
        if how == "threshold":
            kept = values >= n
        else:
            _check_count(n, scores.graph)
            kept = top(values, int(n)) if how == "top" else greedy(scores.graph, values, int(n))
        kind = "signed" if signed else "absolute"
        found = cls(
            scores.graph, kept, f"{scores.method} {how} {n:g}", scores.method, (f"{how}, {kind}",), scores.edges
        )
        return found.pruned() if prune else found

    @classmethod
    def from_nodes(cls, graph: Graph, nodes: Iterable[str], name: str = "circuit", method: str = "") -> Circuit:
        """All edges among the nodes, from the embedding and to the logits.

        A head brings the key/value head of its group, unless key/value heads are named themselves.
        """
        chosen = set(nodes) | {"embed", "logits"}
        every = set(graph.writers) | {node for node, _ in graph.readers}
        if unknown := sorted(chosen - every):
            raise RequestError(f"{unknown[0]!r} is no node of this graph; nodes are 'L0H0', 'L0KV0' and 'L0.mlp'.")
        if not any("KV" in node for node in chosen):
            writing = np.array([writer in chosen for writer in graph.writers])
            fed = writing @ feeding(graph)
            chosen |= {node for place, (node, _) in enumerate(graph.readers) if "KV" in node and fed[place]}
        rows = np.array([writer in chosen for writer in graph.writers])
        columns = np.array([node in chosen for node, _ in graph.readers])
        return cls(graph, rows[:, None] & columns[None] & graph.exists, name, method)

    @classmethod
    def from_known(cls, graph: Graph, known: KnownCircuit) -> Circuit:
        """A published circuit: its edges, or where none were published all those among its nodes.

        Classes stand for all of their nodes; pairs in the wrong order of layers are left out and counted in `notes`.
        """
        if not known.edges:
            nodes = [node for group in known.nodes.values() for node in group]
            found = cls.from_nodes(graph, nodes, known.model, known.paper)
            return replace(found, notes=("no edges were published: all among the nodes",))
        kept, missing = np.zeros_like(graph.exists), 0
        for source, target, through in known.edges:
            for one in known.nodes.get(source, (source,)):
                for two in known.nodes.get(target, (target,)):
                    where = graph.writer(one), graph.reader(*_reader(graph, two, through))
                    kept[where] = True
                    missing += not graph.exists[where]
        notes = (f"{missing} pairs of its classes are no edges",) if missing else ()
        return cls(graph, kept, known.model, known.paper, (*notes, *([known.note] if known.note else [])))

    def random_like(self, seed: int = 0, how: Draw | str = "matched") -> Circuit:
        """A random circuit of as many edges.

        "matched" deals the edges anew among those between the same layers and kinds of parts; "uniform" draws them
        from all; "connected" grows from the logits, each time by a random edge into what is there.
        """
        if how not in get_args(Draw):
            raise RequestError(f"how={how!r} is no way to draw; choose from {', '.join(get_args(Draw))}.")
        rng = np.random.default_rng(seed)
        values = np.where(self.graph.exists, rng.random(self.kept.shape), np.nan)
        if how == "uniform":
            kept = top(values, self.size)
        elif how == "connected":
            kept = greedy(self.graph, values, self.size)
        else:
            kept, cells = np.zeros_like(self.kept), _cells(self.graph)
            for cell in np.unique(cells[self.kept]):
                own = cells == cell
                kept |= top(np.where(own, values, np.nan), int(self.kept[own].sum()))
        return Circuit(self.graph, kept, f"random like {self.name}", f"random, {how}", (f"seed {seed}",))


def feeding(graph: Graph) -> Bool[np.ndarray, "writer reader"]:
    """Which writers read through which readers: heads by their q and their group's k and v, MLPs by their input."""
    found = np.zeros_like(graph.exists)
    for reader in range(len(graph.readers)):
        found[list(graph.feeds(reader)), reader] = True
    return found


def ranking(scores: Float[np.ndarray, "writer reader"], signed: bool) -> Float[np.ndarray, "writer reader"]:
    """What edges are ranked by; NaN stays."""
    values: Array = scores.copy() if signed else np.abs(scores)
    return values


def top(values: Float[np.ndarray, "writer reader"], n: int) -> Bool[np.ndarray, "writer reader"]:
    """The n largest that are not NaN; of equal ones those that come first."""
    flat = np.where(np.isnan(values), -np.inf, values).reshape(-1)
    chosen = np.argsort(-flat, kind="stable")[:n]
    kept = np.zeros(flat.shape, bool)
    kept[chosen[~np.isnan(values.reshape(-1)[chosen])]] = True
    return kept.reshape(values.shape)


def greedy(graph: Graph, values: Float[np.ndarray, "writer reader"], n: int) -> Bool[np.ndarray, "writer reader"]:
    """From the logits up, n times the best edge into a reader of what is there."""
    feeds, kept = feeding(graph), np.zeros_like(graph.exists)
    opened = np.zeros(len(graph.readers), bool)
    heap: list[tuple[float, int, int]] = []

    def open_readers(readers: Iterable[int]) -> None:
        for reader in readers:
            if opened[reader]:
                continue
            opened[reader] = True
            for writer in np.flatnonzero(graph.exists[:, reader] & ~np.isnan(values[:, reader])):
                heapq.heappush(heap, (-float(values[writer, reader]), int(writer), int(reader)))

    open_readers([len(graph.readers) - 1])
    for _ in range(n):
        if not heap:
            break
        _, writer, reader = heapq.heappop(heap)
        kept[writer, reader] = True
        open_readers(np.flatnonzero(feeds[writer]).tolist())
    return kept


def _check_count(n: float, graph: Graph) -> None:
    if n != int(n) or not 0 <= n <= graph.count:
        raise RequestError(f"n={n:g} edges: the graph has {graph.count}; give a whole number up to that.")


def _reader(graph: Graph, node: str, through: str) -> tuple[str, str]:
    """The reader of a published edge: k and v of a head are its group's, MLPs and logits have one input."""
    if through in ("k", "v") and "KV" not in node and "H" in node:
        kv = [name for name, one in graph.readers if one == through and layer_of(name) == layer_of(node)]
        heads = [name for name, one in graph.readers if one == "q" and layer_of(name) == layer_of(node)]
        if node in heads:
            return kv[heads.index(node) * len(kv) // len(heads)], through
    return node, "" if node.endswith(".mlp") or node == "logits" else through


def _cells(graph: Graph) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Edges between the same kinds of parts of the same layers have one number."""
    numbers: Mapping[str, int]
    rows = [f"{layer_of(name)} {name.endswith('.mlp')}" for name in graph.writers]
    columns = [f"{layer_of(node)} {through} {node.endswith('.mlp')}" for node, through in graph.readers]
    numbers = {name: number for number, name in enumerate(dict.fromkeys((*rows, *columns)))}
    one, two = (np.array([numbers[name] for name in names], dtype=np.int64) for names in (rows, columns))
    return one[:, None] * len(numbers) + two[None]
