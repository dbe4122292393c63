"""Patching within a subspace: only what an activation has along given directions is exchanged.

For directions found by training (`alignment.learn_subspace`) and random ones beside them, for what one head writes,
and for low-rank versions of q, k and v (Lieberum et al. 2023, arXiv 2307.09458): a head's q, k or v kept only along
its strongest directions. Bases are orthonormal columns. q and k are as they enter the softmax: in rotary models a
direction of theirs turns with the position, and low ranks are of the rotated vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.blocks import Blocks
from workbench.circuits.effects import Direction, Effects
from workbench.circuits.patching import Options, Progress, patch_changes
from workbench.circuits.recorded import Group, Metric, Recorded, Source, Values, first_difference
from workbench.circuits.spots import Change, Spot
from workbench.errors import RequestError
from workbench.models import Batch
from workbench.models.architectures import output_weight
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site, site_shape

# Orthonormal columns.
Basis = Float[Tensor, "dim rank"]


@dataclass(frozen=True, eq=False)
class Subspace:
    """Orthonormal columns; low-rank versions keep what is along them around `mean`."""

    basis: Basis
    mean: Float[Tensor, " dim"] | None = None

    def __post_init__(self) -> None:
        basis, rank = self.basis.detach(), self.basis.shape[1]
        error = float((basis.T @ basis - torch.eye(rank).to(basis)).abs().max()) if rank else 0.0
        if error > 1e-3:
            raise RequestError(f"The basis is not orthonormal (error {error:.1e}); pass it through orthonormal(...).")

    def part(self, value: Float[Tensor, "*place dim"]) -> Float[Tensor, "*place dim"]:
        basis = self.basis.to(value)
        return (value @ basis) @ basis.T


def orthonormal(directions: Float[Tensor, "dim rank"]) -> Subspace:
    """The span of columns."""
    return Subspace(torch.linalg.qr(directions.float()).Q)


def written_subspace(model: Model, layer: int, head: int) -> Subspace:
    """What a head can write, in the residual stream: the span of its rows of W_O."""
    weight = output_weight(model.attachment.layers[layer], model.spec.layers[layer])[head]
    return orthonormal(weight.detach().T)


def principal_subspace(model: Model, reference: Batch, place: Spot, rank: int) -> Subspace:
    """The `rank` strongest directions of a site around its mean over real tokens of reference prompts."""
    value = model.trace(reference, sites=[place.place]).site(place.place, place.layer)
    value = value if place.head is None else value[:, :, place.head]
    rows = value[reference.mask.cpu()].double().flatten(0, -2)
    if not 0 <= rank <= min(rows.shape):
        raise RequestError(f"rank={rank}: {place.node}.{place.site} has ranks from 0 to {min(rows.shape)} here.")
    mean = rows.mean(0)
    directions = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:rank]
    return Subspace(directions.T.float(), mean.float())


def random_subspace(model: Model, place: Spot, rank: int, seed: int = 0) -> Subspace:
    """A random subspace of a vector site, every direction as likely: what others of equal rank are compared with."""
    dim = dimension(model, place)
    check_rank(place, rank, dim)
    return orthonormal(torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed)))


def dimension(model: Model, place: Spot) -> int:
    """Entries of the vector at a site (of one head, where it has heads)."""
    place.check(model.spec)
    if place.place == "pattern":
        raise RequestError(f"{place.site} of {place.node} is no vector with directions; patch it as a whole.")
    return int(site_shape(place.place, model.spec, place.layer, 1, 1)[-1])


def check_rank(place: Spot, rank: int, dim: int) -> None:
    """Refuses ranks that a subspace of the site cannot have."""
    if not 1 <= rank <= dim:
        raise RequestError(f"rank={rank}: subspaces of {place.node}.{place.site} have ranks from 1 to {dim}.")


def patch_subspaces(
    model: Model,
    task: PairTask,
    changes: Sequence[Change],
    subspaces: Mapping[Spot, Subspace],
    *,
    how: Literal["exchange", "complement", "low_rank"] = "exchange",
    direction: Direction | Literal["both"] = "both",
    metric: str | Metric | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Patch each change within its spots' subspaces.

    Args:
        subspaces: of every place (a spot without its position) of the changes.
        how: "exchange" takes the part in the subspace from the other run, "complement" everything else; "low_rank"
            keeps of the run's own activation what is in the subspace around its mean, and takes nothing from the
            other run. Several spots act on what the earlier ones left.
    """
    for spot in {spot for change in changes for spot in change}:
        if spot.site in ("pattern", "mask"):
            raise RequestError(f"{spot.site} of {spot.node} is no vector with directions; patch it as a whole.")
        _of(spot, subspaces)
    source = Within(subspaces, how)
    return patch_changes(
        model, task, changes, direction=direction, metric=metric, source=source, options=options, progress=progress
    )


def _of(spot: Spot, subspaces: Mapping[Spot, Subspace]) -> Subspace:
    found = subspaces.get(Spot(spot.layer, spot.site, spot.head))
    if found is not None:
        return found
    raise RequestError(f"There is no subspace for {spot.node}.{spot.site}; give one for each spot that is patched.")


@dataclass(eq=False)
class Within(Source):
    """Values that are exchanged within subspaces alone; see `patch_subspaces`."""

    subspaces: Mapping[Spot, Subspace]
    how: str

    def values(self, group: Group, blocks: Blocks, base: Recorded, other: Recorded) -> Values:
        same = first_difference(base.batch, other.batch)
        if self.how == "low_rank":
            return _Mixed(torch.zeros_like(same), base, self)
        return _Mixed(same, other, self)


@dataclass(eq=False)
class _Mixed(Values):
    same_before: Tensor
    run: Recorded
    within: Within

    def at(self, change: int, site: Site, layer: int) -> Tensor:
        return self.run.at(site, layer)

    def mixed(self, spot: Spot, value: Tensor, current: Tensor) -> Tensor:
        subspace = _of(spot, self.within.subspaces)
        if self.within.how == "low_rank":
            mean = torch.zeros_like(current) if subspace.mean is None else subspace.mean.to(current)
            return mean + subspace.part(current - mean)
        moved = subspace.part(value - current)
        return current + moved if self.within.how == "exchange" else value - moved
