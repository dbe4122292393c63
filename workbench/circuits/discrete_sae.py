"""Circuit identification by discrete sparse autoencoders, without a gradient through the model.

O'Neill and Bui 2024, "Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models"
(arXiv 2405.12522): head outputs averaged over positions, one small autoencoder for all heads, codes, and how many of
them only positive prompts have (`codes`). Positives are prompts of the task that the model gets right, negatives
near-identical ones on which the behaviour cannot work.

What it finds are heads that *differ* between the classes, whether or not the output depends on them: correlation, to
be checked by patching. Scores count codes and have no sign. Means over positions and the strongest feature alone hide
much: of a trained two-layer induction model it scores the heads that matter most in layer 1 zero, and all heads of
layer 0 alike (repeated against unrepeated sequences, published settings).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.circuits.codes import (
    SILENT,
    AutoencoderSettings,
    Curve,
    codes_of,
    curve,
    edge_scores,
    heads_in_pairs,
    node_scores,
    train_autoencoder,
)
from workbench.circuits.graph import Graph, Scores
from workbench.errors import RequestError
from workbench.models import Batch, Head
from workbench.models.architectures import output_weight
from workbench.tasks.pairs import Edge, PairTask, right
from workbench.tracing import Model

# Tokens whose z of all layers is held at once.
TOKENS = 4096
What = Literal["node", "edge", "pairs"]


@dataclass(frozen=True, eq=False)
class DiscreteCircuit:
    """Codes of every training and what follows from them.

    `codes` are `[training, prompt, head]` (-1 where no feature is active), `positive` says which prompts are;
    `node_scores` count a head's codes that only positives have, `edge_scores` the pairs of codes of two heads (lower
    layer to higher; NaN elsewhere). `kv_heads` names the key/value head behind each head.
    """

    task: str
    heads: tuple[Head, ...]
    codes: Int[np.ndarray, "training prompt head"]
    positive: Bool[np.ndarray, " prompt"]
    node_scores: Float[np.ndarray, "training head"]
    edge_scores: Float[np.ndarray, "training head head"]
    settings: AutoencoderSettings
    seed: int
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    kv_heads: tuple[str, ...] = ()

    @property
    def probability(self) -> Float[np.ndarray, " head"]:
        """Softmax of the mean node scores over heads."""
        mean = self.node_scores.mean(0)
        raised = np.exp(mean - mean.max())
        share: Float[np.ndarray, " head"] = raised / raised.sum()
        return share

    @property
    def silent(self) -> Float[np.ndarray, " head"]:
        """Share of a head's codes that no feature stands behind; near 1, its score says nothing."""
        share: Float[np.ndarray, " head"] = (self.codes == SILENT).mean((0, 1))
        return share

    def nodes(self) -> pd.DataFrame:
        """One row a head: mean score, its standard deviation over trainings, softmax, share of silent codes."""
        frame = pd.DataFrame(
            {
                "node": [str(head) for head in self.heads],
                "layer": [head.layer for head in self.heads],
                "head": [head.head for head in self.heads],
                "score": self.node_scores.mean(0),
                "deviation": self.node_scores.std(0),
                "probability": self.probability,
                "silent": self.silent,
                "n": int(self.positive.sum()),
                "trainings": len(self.node_scores),
            }
        )
        frame = frame.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)
        return frame.assign(rank=np.arange(1, len(frame) + 1))

    def edges(self, most: int | None = 1000) -> pd.DataFrame:
        """One row a pair of heads, the best `most` of them: mean score and its deviation over trainings."""
        mean, deviation = self.edge_scores.mean(0), self.edge_scores.std(0)
        first, second = np.nonzero(~np.isnan(mean))
        order = np.argsort(-mean[first, second], kind="stable")[:most]
        first, second = first[order], second[order]
        return pd.DataFrame(
            {
                "source": [str(self.heads[one]) for one in first],
                "target": [str(self.heads[one]) for one in second],
                "score": mean[first, second],
                "deviation": deviation[first, second],
                "rank": np.arange(1, len(first) + 1),
            }
        )

    def curves(self, truth: Iterable[str] | Iterable[Edge], what: What = "node") -> list[Curve]:
        """ROC curves against known heads or edges, one a training.

        "node": heads by their scores; "edge": pairs of heads by theirs (edges of `truth` between heads, whichever
        input they go through; one into a key/value head is into all heads of its group); "pairs": heads by how often
        they are in the best pairs, which the paper calls edge.
        """
        names = {str(head): place for place, head in enumerate(self.heads)}
        known = list(truth)
        if what == "edge":
            wanted = np.zeros((len(names), len(names)), dtype=bool)
            for one in known:
                if isinstance(one, Edge) and one.source in names:
                    wanted[names[one.source], self._behind(one.target)] = True
            return [curve(scores.reshape(-1), wanted.reshape(-1)) for scores in self.edge_scores]
        if what not in ("node", "pairs"):
            raise RequestError(f"what={what!r}: choose 'node', 'edge' or 'pairs'.")
        missing = [one for one in known if isinstance(one, Edge) or one not in names]
        if missing:
            raise RequestError(f"{missing[0]} is no head of this model; heads are 'L0H0' to {self.heads[-1]}.")
        true = np.isin(list(names), known)
        scored = self.node_scores if what == "node" else [heads_in_pairs(one) for one in self.edge_scores]
        return [curve(scores, true) for scores in scored]

    def _behind(self, node: str) -> list[int]:
        """Heads that a head or a key/value head is part of."""
        whole = self.kv_heads or ("",) * len(self.heads)
        both = zip(self.heads, whole, strict=True)
        return [place for place, (head, kv) in enumerate(both) if node in (str(head), kv)]

    def scores(self, graph: Graph) -> Scores:
        """Node scores (means over trainings) on a model's graph, to be compared and evaluated with other methods'."""
        nodes = np.full(len(graph.writers), np.nan)
        for head, score in zip(self.heads, self.node_scores.mean(0), strict=True):
            nodes[graph.writer(str(head))] = score
        return Scores(
            graph, "discrete sae", self.task, "codes", int(self.positive.sum()), self.seed, nodes=nodes,
            notes=self.notes, work={"forwards": len(self.positive)}, seconds=sum(self.seconds.values()),
            direction="none", ablation="none",
        )  # fmt: skip


def discrete_sae(
    model: Model,
    task: PairTask,
    *,
    negatives: Literal["references", "corrupt"] | Batch | None = None,
    settings: AutoencoderSettings | None = None,
    trainings: int = 10,
    normalise: bool = False,
    only_right: bool = True,
    seed: int = 0,
    memory_limit: int | None = None,
) -> DiscreteCircuit:
    """Score heads and pairs of heads by codes that only prompts with the behaviour have.

    Args:
        negatives: prompts on which the behaviour cannot work: the task's `references` (the default where it has
            them: of indirect objects, three different names), its corrupt prompts, or others.
        trainings: autoencoders trained from scratch, each on other examples; scores are kept apart.
        normalise: divide by how many codes (pairs) there are at all.
        only_right: positives are the prompts that the model gets right.
    """
    settings = settings or AutoencoderSettings()
    if trainings < 1:
        raise RequestError(f"trainings={trainings}: train at least once.")
    started = time.perf_counter()
    clean, others, notes = _classes(model, task, negatives, only_right)
    outputs = torch.cat([mean_outputs(model, batch, memory_limit=memory_limit) for batch in (clean, others)])
    positive = np.arange(len(outputs)) < len(clean)
    ran = time.perf_counter()
    heads = tuple(model.spec.heads())
    found = identify(outputs, positive, [head.layer for head in heads], settings, trainings, normalise, seed)
    seconds = {"model": ran - started, "autoencoders": time.perf_counter() - ran}
    kv_heads = tuple(f"L{head.layer}KV{head.head // model.spec.layers[head.layer].group}" for head in heads)
    return DiscreteCircuit(task.name, heads, *found, settings, seed, notes, seconds, kv_heads)


def identify(
    outputs: Float[Tensor, "prompt head d_model"],
    positive: Bool[np.ndarray, " prompt"],
    layers: Sequence[int],
    settings: AutoencoderSettings,
    trainings: int = 10,
    normalise: bool = False,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, `positive`, node and edge scores of head outputs, whatever they come from."""
    sides = [np.flatnonzero(positive), np.flatnonzero(~positive)]
    wanted = (settings.examples - settings.examples // 2, settings.examples // 2)
    for side, count, name in zip(sides, wanted, ("positive", "negative"), strict=True):
        if len(side) < count:
            raise RequestError(
                f"{len(side)} {name} prompts, but {count} of the {settings.examples} examples are; give more prompts, "
                "or lower examples."
            )
    codes, nodes, edges = [], [], []
    for training in range(trainings):
        rng = np.random.default_rng([seed, training])
        chosen = np.concatenate([rng.choice(side, count, False) for side, count in zip(sides, wanted, strict=True)])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        model = train_autoencoder(outputs[torch.from_numpy(chosen)].flatten(0, 1).float(), settings, generator)
        codes.append(codes_of(model, outputs))
        nodes.append(node_scores(codes[-1], positive, normalise))
        edges.append(edge_scores(codes[-1], positive, np.asarray(layers), normalise))
    return np.stack(codes), positive, np.stack(nodes), np.stack(edges)


@torch.no_grad()
def mean_outputs(
    model: Model, batch: Batch, *, memory_limit: int | None = None
) -> Float[Tensor, "prompt head d_model"]:
    """What each head writes (z times its part of the output projection), its mean over each prompt's real tokens."""
    size = max(1, TOKENS // batch.ids.shape[1])
    weights = [
        output_weight(modules, shape).detach().float()
        for modules, shape in zip(model.attachment.layers, model.spec.layers, strict=True)
    ]
    found = []
    for part in batch.split(size):
        trace = model.trace(part, sites=["z"], memory_limit=memory_limit)
        real = (part.mask / part.mask.sum(1, keepdim=True)).cpu().float()
        means = [
            torch.einsum("pt,pthe->phe", real, trace.site("z", layer).cpu().float())
            for layer in range(model.spec.n_layers)
        ]
        written = [torch.einsum("phe,hed->phd", z.to(w.device), w).cpu() for z, w in zip(means, weights, strict=True)]
        found.append(torch.cat(written, 1))
    return torch.cat(found)


def _classes(
    model: Model, task: PairTask, negatives: str | Batch | None, only_right: bool
) -> tuple[Batch, Batch, tuple[str, ...]]:
    """Positive and negative prompts, and what is to be said about them."""
    name = negatives if isinstance(negatives, str) else "prompts given"
    if negatives is None:
        name = "corrupt" if task.references is None else "references"
    if isinstance(negatives, Batch):
        others = negatives
    elif name == "corrupt":
        others = task.corrupt
    elif name == "references":
        if task.references is None:
            raise RequestError(f"{task.name} has no reference prompts; use negatives='corrupt', or give a batch.")
        others = task.references
    else:
        raise RequestError(f"negatives={negatives!r}: choose 'references', 'corrupt' or a batch.")
    notes = [f"negatives: {name}", "codes of heads that differ between the classes; no sign, no causal claim"]
    clean = task.clean
    if only_right:
        logits = model.trace(clean, logits=task.position[:, None]).logits
        assert logits is not None
        rows = right(task, logits[:, 0]).nonzero().flatten().tolist()
        if not rows:
            raise RequestError(
                f"The model gets none of the {len(task)} prompts of {task.name} right, so that there are no positives; "
                "use only_right=False, or a task that it can do."
            )
        clean = clean.select(rows)
        # As many of either class: more prompts have more codes.
        others = others.select(rows) if len(others) == len(task) else others
        notes.append(f"positives: {len(rows)} of {len(task)} prompts that the model gets right")
    return clean, others, tuple(notes)
