"""The methods by name: what each scores, how many passes it takes, where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from workbench.circuits.attribution import edges, nodes
from workbench.circuits.attribution.settings import Settings
from workbench.circuits.attribution.work import Chunk

EdgeMethod = Callable[[Chunk, int], Tensor]
NodeMethod = Callable[[Chunk], nodes.NodeScores]
# Where gradients are taken: where the run begins, or at points between two runs.
Points = Literal["base", "inputs", "ends", "components"]


@dataclass(frozen=True)
class Method:
    """A method of attribution.

    `relevance` replaces gradients by relevance, `patterns` says that whole attention patterns are computed; `signed`
    is False where scores are sizes.
    """

    caption: str
    paper: str
    url: str
    points: Points = "base"
    of_edges: EdgeMethod | None = None
    of_nodes: NodeMethod | None = None
    relevance: bool = False
    patterns: bool = False
    signed: bool = True

    def count(self, settings: Settings) -> int:
        """Points a component at which gradients are taken."""
        return {"base": 1, "inputs": settings.steps, "ends": 2, "components": settings.steps}[self.points]


_ATP = ("Kramár et al. 2024; Nanda 2023", "https://arxiv.org/abs/2403.00745")
_EAP = ("Syed, Rager and Conmy 2023", "https://arxiv.org/abs/2310.10348")
_IG = ("Hanna, Pezzelle and Belinkov 2024", "https://arxiv.org/abs/2403.17806")
_RELP = ("Rezaei Jafari et al. 2025", "https://arxiv.org/abs/2508.21258")

METHODS: dict[str, Method] = {
    "atp": Method("attribution patching of nodes", *_ATP, of_nodes=nodes.node_patching),
    "atp-qk": Method(
        "with patterns computed anew where q or k changes", *_ATP, of_nodes=partial(nodes.node_patching, qk_fix=True),
        patterns=True,
    ),
    "atp-drop": Method(
        "with each layer left out of the gradient in turn, sizes added up", *_ATP,
        of_nodes=partial(nodes.node_patching, drop=True), signed=False,
    ),
    "atp-star": Method(
        "AtP*: with both corrections", *_ATP, of_nodes=partial(nodes.node_patching, qk_fix=True, drop=True),
        patterns=True, signed=False,
    ),
    "relp": Method("relevance in place of gradients, nodes", *_RELP, of_nodes=nodes.node_patching, relevance=True),
    "relp-edges": Method(
        "relevance in place of gradients, edges", *_RELP, of_edges=edges.edge_patching, relevance=True
    ),
    "eap": Method("edge attribution patching", *_EAP, of_edges=edges.edge_patching),
    "eap-ig": Method(
        "gradients integrated between the prompts' embeddings", *_IG, points="inputs", of_edges=edges.integrated_inputs
    ),
    "eap-clean-corrupted": Method(
        "gradients at both runs", *_IG, points="ends", of_edges=edges.both_ends
    ),
    "eap-ig-activations": Method(
        "gradients integrated along every component's own activation, mean of all", *_IG, points="components",
        of_edges=edges.integrated_activations,
    ),
    "eap-ig-own": Method(
        "the same, for each edge along its own writer's activation", *_IG, points="components",
        of_edges=edges.integrated_own,
    ),
}  # fmt: skip
