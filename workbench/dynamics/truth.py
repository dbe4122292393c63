"""What is known about a model before it runs: its circuit, and what each intervention does to its metric.

A `GroundTruth` is a model, pairs of prompts and the answers that a method has to find.  Nodes are named as
everywhere: ``L1H0`` a query head (its output z), ``L1KV0`` a key/value head (its k and its v), ``L1.mlp``,
``embed``, ``logits``; ``L1H0.q``, ``L1KV0.k`` and ``L1KV0.v`` are single inputs of attention.  An edge is what one
node writes, as read by one input of another.  That a key/value head feeds the query heads of its group is a fact of
the architecture and no edge.

Interventions:

* ``zero``: clean prompts, the nodes (or what passes along the edges) set to zero;
* ``noising``: clean prompts, set to what they are on the corrupt ones (what is necessary);
* ``denoising``: corrupt prompts, set to what they are on the clean ones (what is sufficient).

All patched values come from unedited runs, and everything after the patched place is computed anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.dynamics.toy import ToyModel
from workbench.dynamics.wiring import attached
from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.pairs import Edge as Edge
from workbench.tasks.pairs import KnownCircuit, PairTask
from workbench.tracing.model import Model

How = Literal["zero", "noising", "denoising"]
Method = Literal["atp", "qk fix", "qk fix, norm frozen"]
# Pairs of a planted circuit.
PAIRS = 12


@dataclass(frozen=True, eq=False)
class Outcome:
    """The metric of each prompt under one intervention on all of these nodes, or edges, at once: exact."""

    how: How
    metric: Float[Tensor, " prompt"]
    nodes: tuple[str, ...] = ()
    edges: tuple[Edge, ...] = ()


@dataclass(frozen=True, eq=False)
class Estimate:
    """The change of the metric that a first-order method gives for an intervention on one node: exact as well.

    The gradient is taken on the prompts that the intervention starts from.  ``qk fix`` computes the attention
    pattern anew and is linear from there; ``norm frozen`` keeps the scale of the final norm.
    """

    method: Method
    how: How
    node: str
    change: Float[Tensor, " prompt"]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """A model with its pairs and everything that was known before it ran.

    `nodes`, `edges`
        those with any effect; all others have none, under any intervention.
    `clean`, `corrupt`
        the metric of the unedited runs.
    `helps`
        node -> whether noising it alone lowers the metric (+1), raises it (-1) or leaves it (0).
    """

    name: str
    model: Model
    task: PairTask
    nodes: frozenset[str]
    edges: frozenset[Edge]
    clean: Float[Tensor, " prompt"]
    corrupt: Float[Tensor, " prompt"]
    outcomes: tuple[Outcome, ...]
    estimates: tuple[Estimate, ...] = ()

    def outcome(self, how: str, *what: str | Edge) -> Float[Tensor, " prompt"]:
        """The metric under an intervention on these nodes or edges, where it was worked out."""
        if how not in get_args(How):
            raise RequestError(f"how={how!r} is no intervention; choose one of {', '.join(get_args(How))}.")
        wanted = frozenset(what)
        for one in self.outcomes:
            if one.how == how and frozenset((*one.nodes, *one.edges)) == wanted:
                return one.metric
        known = ", ".join(" + ".join(map(str, (*one.nodes, *one.edges))) for one in self.outcomes if one.how == how)
        raise RequestError(f"{self.name} says nothing of {how} {[str(one) for one in what]}; it knows {known}.")

    def effect(self, how: str, *what: str | Edge) -> Float[Tensor, " prompt"]:
        """The same as a change of the metric: negative where noising or zeroing hurts."""
        return self.outcome(how, *what) - (self.corrupt if how == "denoising" else self.clean)

    def recovery(self, how: str, *what: str | Edge) -> float:
        """The effect as a share of the gap, a ratio of means: 1 is all of it, below 0 the other way round."""
        gap = (self.clean - self.corrupt).mean()
        share = float(self.effect(how, *what).mean() / gap)
        return share if how == "denoising" else -share

    @property
    def helps(self) -> dict[str, int]:
        """Signs of the single nodes under noising."""
        signs = {}
        for one in self.outcomes:
            if one.how == "noising" and len(one.nodes) == 1 and not one.edges:
                change = float((self.clean - one.metric).mean())
                signs[one.nodes[0]] = 0 if abs(change) < 1e-9 else 1 if change > 0 else -1
        return signs


def known_circuit(name: str, note: str, nodes: Iterable[str], edges: Iterable[Edge]) -> KnownCircuit:
    """A planted circuit in the form of a published one, for whatever compares with those."""
    chosen = tuple(tuple(edge) for edge in sorted(edges))
    return KnownCircuit(name, "", "", {"planted": tuple(sorted(nodes))}, chosen, note)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Story:
    """The words of a planted circuit, and the circuit."""

    name: str
    caption: str
    nodes: Sequence[str]
    edges: Sequence[Edge]


def planted(
    story: Story,
    model: ToyModel,
    clean: Int[Tensor, "prompt token"],
    corrupt: Int[Tensor, "prompt token"],
    answers: Int[Tensor, " prompt"],
    foils: Int[Tensor, " prompt"],
    metrics: tuple[float, float],
    outcomes: Iterable[Outcome],
    estimates: Iterable[Estimate] = (),
    seed: int = 0,
) -> GroundTruth:
    """Everything in one object; the metric is read at the last column, answer less foil.

    `metrics` of clean and corrupt prompts are the same for all of them, as planted circuits do not depend on which
    values they copy.
    """
    count, tokens = clean.shape
    everywhere = torch.ones_like(clean, dtype=torch.bool)
    task = PairTask(
        name=story.name,
        caption=story.caption,
        seed=seed,
        specials="the last id but none is the start token, at column 0",
        clean=Batch(clean, everywhere),
        corrupt=Batch(corrupt, everywhere),
        answers=answers[:, None],
        foils=foils[:, None],
        position=torch.full((count,), tokens - 1),
        circuit=known_circuit(story.name, story.caption, story.nodes, story.edges),
    )
    return GroundTruth(
        story.name, attached(model), task, frozenset(story.nodes), frozenset(story.edges),
        level(metrics[0]), level(metrics[1]), tuple(outcomes), tuple(estimates),
    )  # fmt: skip


def level(value: float) -> Float[Tensor, " prompt"]:
    """The same metric for each of the `PAIRS` prompts."""
    return torch.full((PAIRS,), value)
