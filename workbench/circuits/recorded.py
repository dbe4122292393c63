"""Recorded runs: prompts of one length up to what is read, with the sites that patches start from and put in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.circuits.blocks import Blocks
from workbench.circuits.spots import Change, Spot
from workbench.models import Batch
from workbench.tasks.pairs import METRICS, PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

# Metric of logits `[row, vocab]` whose rows are of these prompts (of the whole task).
Metric = Callable[[Float[Tensor, "row vocab"], Int[Tensor, " row"]], Float[Tensor, " row"]]


def metric_of(task: PairTask, name: str | Metric | None) -> tuple[str, Metric]:
    """A task's metric, one named, or one's own, as a function of rows of logits and their prompts."""
    if callable(name):
        return getattr(name, "__name__", "custom"), name
    chosen = task.metric if name is None else name
    # Refuses names that do not exist, and metrics that this task cannot have.
    task.score(torch.zeros(len(task), int(torch.cat([task.answers, task.foils], 1).max()) + 1), chosen)

    def measure(logits: Tensor, prompts: Tensor) -> Tensor:
        where = prompts.to(task.answers.device)
        answers, foils = task.answers[where], task.foils[where]
        return METRICS[chosen](logits.float(), answers.to(logits.device), foils.to(logits.device))

    return chosen, measure


@dataclass(frozen=True, eq=False)
class Group:
    """Prompts of one length up to (and with) the token that is read; nothing after it matters to a causal model.

    `prompts` are their places in the task, `starts` the columns of their first tokens, `lengths` all of their tokens.
    """

    prompts: Int[Tensor, " prompt"]
    tokens: int
    starts: Int[Tensor, " prompt"]
    lengths: Int[Tensor, " prompt"]

    def cut(self, batch: Batch) -> Batch:
        """These prompts without padding, up to what is read."""
        columns = self.starts[:, None] + torch.arange(self.tokens)
        ids = batch.ids.cpu()[self.prompts[:, None], columns]
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool))

    def rows(self, task: PairTask, role: str) -> Int[Tensor, " prompt"]:
        """A role's position, counted from the first token."""
        return task.roles[role].cpu()[self.prompts] - self.starts


def groups(task: PairTask) -> Iterator[Group]:
    """The task's prompts by their length up to what is read."""
    yield from by_length(task.clean, task.position)


def by_length(batch: Batch, position: Int[Tensor, " prompt"]) -> Iterator[Group]:
    """Prompts by their length up to (and with) the column `position`."""
    starts = batch.starts.cpu()
    tokens = position.cpu() - starts + 1
    for count in torch.unique(tokens).tolist():
        prompts = (tokens == count).nonzero().flatten()
        yield Group(prompts, int(count), starts[prompts], batch.lengths.cpu()[prompts])


@dataclass(frozen=True, eq=False)
class Recorded:
    """One run of a group: sites `[prompt, token, ...]` on the model's device, and the metric."""

    batch: Batch
    sites: Mapping[tuple[Site, int], Tensor]
    logits: Float[Tensor, "prompt vocab"]

    def at(self, site: Site, layer: int) -> Tensor:
        return self.sites[site, layer]


class Values(ABC):
    """What changes put in place; the run that they are put into has the same tokens before `same_before`."""

    same_before: Int[Tensor, " prompt"]

    @abstractmethod
    def at(self, change: int, site: Site, layer: int) -> Tensor:
        """The site's value `[prompt, token, ...]` for a change (its number)."""

    def mixed(self, spot: Spot, value: Float[Tensor, "*place dim"], current: Float[Tensor, "*place dim"]) -> Tensor:
        """What a vector site becomes, given the value and what stands there in the changed run; the value itself."""
        return value


@dataclass(eq=False)
class OfRun(Values):
    """Values of another run, the same for every change."""

    run: Recorded
    same_before: Int[Tensor, " prompt"]

    def at(self, change: int, site: Site, layer: int) -> Tensor:
        return self.run.at(site, layer)


class Source(ABC):
    """Makes what changes put in place, from the receiving and the other run of a group.

    `sites` are what both runs must hold beside what the changes name.
    """

    sites: frozenset[tuple[Site, int]] = frozenset()

    @abstractmethod
    def values(self, group: Group, blocks: Blocks, base: Recorded, other: Recorded) -> Values:
        """Values for the changes of one direction."""


def first_difference(one: Batch, other: Batch) -> Int[Tensor, " prompt"]:
    """How many tokens two runs have in common: until then a causal model does the same in both."""
    differs: Bool[Tensor, "prompt token"] = one.ids != other.ids
    return torch.where(differs.any(1), differs.to(torch.uint8).argmax(1), differs.shape[1])


def record(model: Model, batch: Batch, sites: Iterable[tuple[Site, int]], memory_limit: int | None) -> Recorded:
    """Run prompts of one length once and keep what patches need."""
    wanted = sorted(set(sites))
    names = [_name(site, layer, model) for site, layer in wanted]
    trace = model.trace(batch, sites=names, logits="last", memory_limit=memory_limit)
    kept = {(site, layer): trace.site(site, layer).to(model.device) for site, layer in wanted}
    assert trace.logits is not None
    return Recorded(batch, kept, trace.logits[:, -1].to(model.device))


def starting_sites(model: Model) -> list[tuple[Site, int]]:
    """What the receiving run must hold for patches to start at any layer and token."""
    layers = range(model.spec.n_layers)
    found: list[tuple[Site, int]] = [(site, layer) for layer in layers for site in _STARTING]
    return [*found, ("resid_post", model.spec.n_layers - 1)]


_STARTING: tuple[Site, ...] = ("resid_pre", "q", "k", "v", "z")


def read_sites(changes: Sequence[Change]) -> set[tuple[Site, int]]:
    """Sites whose values changes take from the other run."""
    return {(spot.place, spot.layer) for change in changes for spot in change if spot.site != "mask"}


def _name(site: Site, layer: int, model: Model) -> str:
    if site.startswith("resid") or site.endswith("_out"):
        return f"blocks.{layer}.hook_{site}"
    rotated = "rot_" if site in ("q", "k") and model.spec.rotary else ""
    return f"blocks.{layer}.attn.hook_{rotated}{site}"
