"""Runs whose q, k, v, z and MLP outputs pass through a function on their way: gates and constants, with gradients.

Works on prompts of one length, all their tokens as rows, through the model's own layers (`Blocks`); copies of the
prompts run side by side, each changed in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.circuits.blocks import Blocks
from workbench.circuits.discovery.objective import Ends
from workbench.circuits.forks import Ablation
from workbench.circuits.recorded import Group, Recorded, groups, record
from workbench.errors import RequestError
from workbench.models import AttentionCall, Batch
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

REPLACEMENTS: tuple[Ablation, ...] = ("patching", "mean", "zero")
_QKV: tuple[Site, ...] = ("q", "k", "v")
# Value `[row_prompt, token, head, dim]` (`[row_prompt, token, d_model]` of MLPs) of a site in a layer -> what goes on.
Rewrite = Callable[[Site, int, Tensor], Tensor]


@dataclass(eq=False)
class Prepared:
    """One group of prompts: both runs with the sites that methods take replacements from."""

    task: PairTask
    group: Group
    clean: Recorded
    corrupt: Recorded
    reference: Recorded | None
    blocks: Blocks

    @property
    def shape(self) -> tuple[int, int]:
        prompts, tokens = self.clean.batch.ids.shape
        return int(prompts), int(tokens)

    @property
    def base(self) -> Recorded:
        """The run that means are taken of."""
        return self.corrupt if self.reference is None else self.reference

    def instead(self, ablation: Ablation | str, site: Site, layer: int) -> Tensor:
        """What stands in for a site: its corrupt value, zero, or its mean over prompts of one template.

        Means are by position, over the references, or over the corrupt prompts of a task without any.
        """
        if ablation == "patching":
            return self.corrupt.at(site, layer)
        if ablation == "zero":
            return torch.zeros_like(self.clean.at(site, layer))
        value = self.base.at(site, layer)
        _, number = torch.unique(self.task.groups[self.group.prompts], return_inverse=True)
        means = torch.stack([value[number == one].mean(0) for one in range(int(number.max()) + 1)])
        return means[number.to(means.device)]

    @property
    def ends(self) -> Ends:
        return Ends(self.group.prompts, self.clean.logits, self.corrupt.logits)

    def run(self, rewrite: Rewrite, *, copies: int = 1, first: int = 0) -> Float[Tensor, "row_prompt vocab"]:
        """Logits at the last token of copies of the prompts (copy by copy), from the layer `first` on."""
        start = self.clean.at("resid_pre", first)
        prompts, tokens = self.shape
        rows = prompts * copies
        hidden = start.repeat(copies, 1, 1).flatten(0, 1)
        positions = torch.arange(tokens, device=hidden.device).repeat(rows)

        def attend(call: AttentionCall) -> Tensor:
            q, k, v = (
                rewrite(site, call.layer, value[0].transpose(0, 1).reshape(rows, tokens, value.shape[1], -1))
                for site, value in zip(_QKV, (call.q, call.k, call.v), strict=True)
            )
            q, k, v = (value.transpose(1, 2) for value in (q, k, v))
            own = replace(call, q=q, k=k, v=v, key_start=None, key_end=None)
            z = rewrite("z", call.layer, own.output().transpose(1, 2))
            return z.flatten(0, 1).transpose(0, 1)[None]

        for layer in range(first, self.blocks.attachment.spec.n_layers):

            def mlp(value: Tensor, layer: int = layer) -> Tensor:
                return rewrite("mlp_out", layer, value.view(rows, tokens, -1)).flatten(0, 1)

            hidden = self.blocks.run(layer, hidden, positions, attend, {"mlp_out": mlp})
        return self.blocks.logits(hidden.view(rows, tokens, -1)[:, -1])


def prepare(
    model: Model, task: PairTask, sites: Sequence[Site], *, ablation: str, memory_limit: int | None = None
) -> list[Prepared]:
    """Both runs of every group, with these sites of all layers and the stream that enters each."""
    check_ablation(ablation)
    layers = range(model.spec.n_layers)
    wanted: list[tuple[Site, int]] = [("resid_pre", layer) for layer in layers]
    wanted += [(site, layer) for layer in layers for site in sites if site != "mlp_out" or has_mlp(model, layer)]
    found = []
    for group in groups(task):
        reference: Batch | None = task.references if ablation == "mean" else None
        found.append(
            Prepared(
                task,
                group,
                record(model, group.cut(task.clean), wanted, memory_limit),
                record(model, group.cut(task.corrupt), wanted, memory_limit),
                None if reference is None else record(model, group.cut(reference), wanted, memory_limit),
                Blocks(model.attachment, group.tokens),
            )
        )
    return found


def has_mlp(model: Model, layer: int) -> bool:
    """Whether a layer has an MLP."""
    return model.attachment.layers[layer].mlp is not None


def check_ablation(ablation: str) -> None:
    """Refuses what cannot stand in for a part."""
    if ablation not in REPLACEMENTS:
        raise RequestError(f"ablation={ablation!r} takes nothing away; choose from {', '.join(REPLACEMENTS)}.")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients on, but none for the weights."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
