"""The graph of a model's parts, and scores on it.

Writers add to the residual stream: `embed` (what enters layer 0), query heads `L5H3` (z times their part of the
output projection, without its bias, which belongs to no head) and MLPs `L5.mlp`. Readers take the stream in, before
the norm in front of them: q of query heads, k and v of key/value heads (with grouped queries there are fewer of
these), MLPs, and the logits. An edge is what a writer writes, as read by one reader. That a key/value head feeds the
query heads of its group is architecture and no edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.circuits.inference import mean_effect
from workbench.errors import ModelRefused, RequestError
from workbench.models import Spec
from workbench.models.snippet import snippet
from workbench.tasks.pairs import Edge
from workbench.tracing import Model

Array = np.ndarray[Any, np.dtype[np.float64]]
Single = np.ndarray[Any, np.dtype[np.float32]]
Through = Literal["q", "k", "v", ""]
# Per-prompt values whose means are bootstrapped at a time.
_COLUMNS = 4096
# Rows that a notebook shows.
_SHOWN = 12


class Places(NamedTuple):
    """A layer's parts among writers (`heads`, `mlp_out`) and readers; those of an MLP are empty where there is none."""

    heads: slice
    mlp_out: slice
    q: slice
    k: slice
    v: slice
    mlp: slice


@dataclass(frozen=True, eq=False)
class Graph:
    """Writers, readers and which edges there are.

    `writers`: "embed", then layer by layer its heads and its MLP. `readers`: (node, through), layer by layer q of
    heads, k and v of KV heads and the MLP, then ("logits", "").
    """

    writers: tuple[str, ...]
    readers: tuple[tuple[str, str], ...]
    exists: Bool[np.ndarray, "writer reader"]
    layers: tuple[Places, ...]

    @classmethod
    def of(cls, model: Model) -> Graph:
        """The graph of a model; refuses models in which single heads do not add to the stream."""
        for modules in model.attachment.layers:
            if modules.attention_write is not modules.projection:
                raise ModelRefused(
                    f"{model.spec.architecture}: attention's output passes a norm before it is added to the stream, "
                    "so that single heads do not write to it and there are no edges from them. Patch activations or "
                    "paths instead, which take such models."
                )
        return cls.of_spec(model.spec, tuple(modules.mlp is not None for modules in model.attachment.layers))

    @classmethod
    def of_spec(cls, spec: Spec, mlps: tuple[bool, ...] | None = None) -> Graph:
        """The same from a shape alone; `mlps` says which layers have one (all of them)."""
        writers, readers, before, layers = ["embed"], list[tuple[str, str]](), list[int](), list[Places]()
        for layer, has_mlp in zip(spec.layers, mlps or (True,) * spec.n_layers, strict=True):
            at, seen = f"L{layer.index}", len(writers)
            own: list[slice] = []
            for through, kind, count in (
                ("q", "H", layer.heads),
                ("k", "KV", layer.kv_heads),
                ("v", "KV", layer.kv_heads),
            ):
                own.append(slice(len(readers), len(readers) + count))
                readers += [(f"{at}{kind}{head}", through) for head in range(count)]
            writers += [f"{at}H{head}" for head in range(layer.heads)]
            before += [seen] * (len(readers) - len(before))
            after, end = len(writers), len(readers)
            if has_mlp:
                readers.append((f"{at}.mlp", ""))
                before.append(seen if spec.parallel else after)
                writers.append(f"{at}.mlp")
            layers.append(
                Places(slice(seen, after), slice(after, len(writers)), own[0], own[1], own[2], slice(end, len(readers)))
            )
        readers.append(("logits", ""))
        before.append(len(writers))
        exists = np.arange(len(writers))[:, None] < np.array(before)[None]
        return cls(tuple(writers), tuple(readers), exists, tuple(layers))

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, writer by writer."""
        return tuple(Edge(self.writers[one], *self.readers[two]) for one, two in np.argwhere(self.exists))

    @property
    def count(self) -> int:
        """How many edges there are."""
        return int(self.exists.sum())

    @cached_property
    def _writer(self) -> Mapping[str, int]:
        return {name: place for place, name in enumerate(self.writers)}

    @cached_property
    def _reader(self) -> Mapping[tuple[str, str], int]:
        return {name: place for place, name in enumerate(self.readers)}

    def writer(self, name: str) -> int:
        """A writer's place."""
        if name not in self._writer:
            raise RequestError(
                f"{name!r} writes nothing in this graph; writers are 'embed', 'L0H0', 'L0.mlp' and so on."
            )
        return self._writer[name]

    def reader(self, node: str, through: str = "") -> int:
        """A reader's place."""
        if (node, through) not in self._reader:
            raise RequestError(
                f"{node!r} through {through!r} reads nothing in this graph; readers are q of 'L0H0', k and v of "
                "'L0KV0', 'L0.mlp' and 'logits' (through '')."
            )
        return self._reader[node, through]

    def place(self, edge: Edge) -> tuple[int, int]:
        """(writer, reader) of an edge; refuses edges that do not exist."""
        where = self.writer(edge.source), self.reader(edge.target, edge.through)
        if not self.exists[where]:
            raise RequestError(f"There is no edge {edge}: {edge.source} writes after {edge.target} has read.")
        return where

    def layer_slices(self) -> Iterator[tuple[int, Through, slice]]:
        """(layer, "q", "k", "v" or "" for the MLP, places among the readers)."""
        for layer, places in enumerate(self.layers):
            yield layer, "q", places.q
            yield layer, "k", places.k
            yield layer, "v", places.v
            if places.mlp.stop > places.mlp.start:
                yield layer, "", places.mlp

    def feeds(self, reader: int) -> tuple[int, ...]:
        """Writers behind a reader: the head of its q, the heads of the group of its k and v, the MLP of its input."""
        for places in self.layers:
            heads = places.heads.stop - places.heads.start
            for kind in (places.q, places.k, places.v):
                if kind.start <= reader < kind.stop:
                    group = heads // (kind.stop - kind.start)
                    first = places.heads.start + (reader - kind.start) * group
                    return tuple(range(first, first + group))
            if places.mlp.start <= reader < places.mlp.stop:
                return (places.mlp_out.start,)
        return ()


def layer_of(name: str) -> int | None:
    """The layer in a node's name; None for `embed` and `logits`."""
    digits = name[1:].split("H")[0].split("KV")[0].split(".")[0]
    return int(digits) if name.startswith("L") and digits.isdigit() else None


@dataclass(frozen=True, eq=False)
class Scores:
    """What a method says of a graph's parts, positive where a part helps the task.

    `edges`
        mean over prompts, NaN where there is no edge.
    `nodes`, `inputs`
        of writers and of readers as nodes (q, k, v and MLP inputs), where the method has such; NaN where it has not.
    `per_prompt`, `node_per_prompt`, `input_per_prompt`
        the same of every prompt.
    `direction`, `ablation`
        what was moved: "noising" (from clean to corrupt) or "denoising", and what stands in for the clean value.
    `clean`, `corrupt`
        the metric of the two runs, prompt by prompt.
    `positions`
        quantity -> `[prompt, part, token]`, where scores were asked for by position (NaN beyond a prompt's end).
    `work`
        passes of single prompts: "forwards", "backwards", and what an exact count would be: "exact".
    """

    graph: Graph
    method: str
    task: str
    metric: str
    n: int
    seed: int
    edges: Float[np.ndarray, "writer reader"] | None = None
    nodes: Float[np.ndarray, " writer"] | None = None
    inputs: Float[np.ndarray, " reader"] | None = None
    per_prompt: Float[np.ndarray, "prompt writer reader"] | None = None
    node_per_prompt: Float[np.ndarray, "prompt writer"] | None = None
    input_per_prompt: Float[np.ndarray, "prompt reader"] | None = None
    notes: tuple[str, ...] = ()
    work: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    direction: str = "noising"
    ablation: str = "patching"
    clean: Float[np.ndarray, " prompt"] | None = None
    corrupt: Float[np.ndarray, " prompt"] | None = None
    positions: Mapping[str, Float[np.ndarray, "prompt part token"]] = field(default_factory=dict)

    def of(self, edge: Edge) -> float:
        """The score of one edge."""
        if self.edges is None:
            raise RequestError(f"{self.method} has no scores of edges; ask for those of nodes.")
        return float(self.edges[self.graph.place(edge)])

    def table(self, kind: Literal["edges", "nodes", "inputs"] = "edges") -> pd.DataFrame:
        """One row an edge, a node or an input of one, the largest first.

        `low` and `high` are the 95 % bootstrap interval of the mean over prompts (NaN with one prompt, or where the
        method has no values of single ones); `rank` is by size, 1 for the largest.
        """
        scores, prompts, names = self._rows(kind)
        low, high = np.full_like(scores, np.nan), np.full_like(scores, np.nan)
        if prompts is not None:
            for first in range(0, len(scores), _COLUMNS):
                part = slice(first, first + _COLUMNS)
                _, low[part], high[part] = mean_effect(prompts[:, part].T.astype(np.float64), self.seed)
        frame = names.assign(score=scores, low=low, high=high, n=self.n, method=self.method, metric=self.metric)
        frame = frame.assign(direction=self.direction, ablation=self.ablation, task=self.task, seed=self.seed)
        frame = frame.iloc[np.argsort(-np.abs(scores), kind="stable")].reset_index(drop=True)
        return frame.assign(rank=np.arange(1, len(frame) + 1))

    def means(self, kind: Literal["edges", "nodes", "inputs"] = "edges") -> pd.DataFrame:
        """Parts and their scores, the largest first, without the intervals that `table` computes."""
        scores, _, names = self._rows(kind)
        order = np.argsort(-np.abs(scores), kind="stable")
        return names.assign(score=scores).iloc[order].reset_index(drop=True)

    def _repr_html_(self) -> str:
        """The largest scores, for notebooks; `workbench.show` draws them."""
        kind: Literal["edges", "nodes", "inputs"] = (
            "edges" if self.edges is not None else "nodes" if self.nodes is not None else "inputs"
        )
        rows = self.means(kind)
        more = f'{len(rows):,} {kind}, with intervals in .table("{kind}"); mean over n = {self.n} prompts.'
        return snippet(f"{self.method} on {self.task}: {self.metric}", rows.head(_SHOWN), more)

    def _rows(self, kind: str) -> tuple[Array, Array | Single | None, pd.DataFrame]:
        chosen = {"edges": self.edges, "nodes": self.nodes, "inputs": self.inputs}
        if kind not in chosen:
            raise RequestError(f"kind={kind!r} is no kind of scores; choose 'edges', 'nodes' or 'inputs'.")
        scores = chosen[kind]
        if scores is None:
            known = " and ".join(name for name, value in chosen.items() if value is not None) or "nothing"
            raise RequestError(f"{self.method} scores {known}, not {kind}.")
        graph = self.graph
        if kind == "edges":
            where = np.asarray(graph.exists)
            frame = pd.DataFrame(graph.edges, columns=["source", "target", "through"])
            frame["source_layer"] = _layers(frame.source)
            frame["target_layer"] = _layers(frame.target)
            return scores[where], None if self.per_prompt is None else self.per_prompt[:, where], frame
        there = np.flatnonzero(~np.isnan(scores))
        prompts = self.node_per_prompt if kind == "nodes" else self.input_per_prompt
        if kind == "nodes":
            frame = pd.DataFrame({"node": [graph.writers[place] for place in there]})
        else:
            frame = pd.DataFrame([graph.readers[place] for place in there], columns=["node", "through"])
        frame["layer"] = _layers(frame.node)
        return scores[there], None if prompts is None else prompts[:, there], frame


def _layers(names: pd.Series[str]) -> Any:
    return pd.array([layer_of(name) for name in names], dtype="Int64")
