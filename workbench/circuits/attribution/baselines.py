"""What stands in for a clean activation: the corrupt prompt's, a mean over reference prompts, or nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.attribution.passes import Parts, run
from workbench.circuits.attribution.settings import Ablation
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Group, groups
from workbench.models import AttentionCall, Batch
from workbench.models.architectures import output_weight
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

# Tokens of a pass without gradients.
TOKENS = 2048


class Baselines:
    """Values for the prompts of a task; means are taken once, before the first prompt is attributed."""

    def __init__(self, model: Model, task: PairTask, ablation: Ablation) -> None:
        self.ablation = ablation
        self.labels = task.groups
        self.forwards = 0
        self._means: dict[int, Parts] = {}
        if ablation in ("mean", "mean-positional"):
            self._means = self._taken(model, task)

    def _taken(self, model: Model, task: PairTask) -> dict[int, Parts]:
        """Means by number of group: `[1, token, ...]`, or `[1, 1, ...]` over everything (under 0)."""
        references = task.corrupt if task.references is None else task.references
        sums: dict[int, Parts] = {}
        counts: dict[int, int] = {}
        for group in groups(task):
            for prompts, parts in self._recorded(model, group, group.cut(references)):
                labels = self.labels[group.prompts[prompts]]
                positional = self.ablation == "mean-positional"
                for label in torch.unique(labels).tolist() if positional else [0]:
                    own = (labels == label).nonzero().flatten() if positional else torch.arange(len(labels))
                    axes = (0,) if positional else (0, 1)
                    new = {key: value[own.to(value.device)].sum(axes, keepdim=True) for key, value in parts.items()}
                    old = sums.get(label)
                    sums[label] = new if old is None else {key: value + old[key] for key, value in new.items()}
                    counts[label] = counts.get(label, 0) + len(own) * (1 if positional else group.tokens)
        return {label: {key: value / counts[label] for key, value in parts.items()} for label, parts in sums.items()}

    def _recorded(self, model: Model, group: Group, batch: Batch) -> Iterator[tuple[Tensor, Parts]]:
        for prompts in torch.split(torch.arange(len(batch)), max(1, TOKENS // group.tokens)):
            self.forwards += len(prompts)
            one = run(model, batch.ids[prompts], AttentionCall.output, gradients=False)
            yield prompts, one.parts(model.spec.parallel)

    def values(self, prompts: Tensor, corrupt: Parts) -> Parts:
        """For these prompts of the task, `[prompt, token, ...]` or what broadcasts to it."""
        if self.ablation == "patching":
            return corrupt
        if self.ablation == "zero":
            return {key: torch.zeros_like(value) for key, value in corrupt.items()}
        if self.ablation == "mean":
            return {key: value.expand_as(corrupt[key]) for key, value in self._means[0].items()}
        labels = self.labels[prompts].tolist()
        return {key: torch.cat([self._means[label][key] for label in labels]) for key in corrupt}


def writes(model: Model, graph: Graph, parts: Parts) -> Float[Tensor, "prompt writer token d_model"]:
    """What each writer adds to the stream, from the outputs of nodes; an output projection's bias is no head's."""
    embed = parts["embed", 0]
    prompts, tokens, width = embed.shape
    found = embed.new_empty(prompts, len(graph.writers), tokens, width)
    found[:, 0] = embed
    for layer, places in enumerate(graph.layers):
        weight = output_weight(model.attachment.layers[layer], model.spec.layers[layer]).detach()
        found[:, places.heads] = torch.einsum("p t h e, h e d -> p h t d", parts["z", layer], weight)
        if ("mlp_out", layer) in parts:
            found[:, places.mlp_out.start] = parts["mlp_out", layer]
    return found
