"""Lanes: one change put into some prompts of a group, from the first token that it touches.

A lane's rows are tokens `first .. tokens - 1` of its prompts; everything before is as in the receiving run, whose keys
and values are reused. What cannot change anything is found here and never run: places before the runs' first
different token, after the token that is read, and, in the last layer, anywhere but at that token (keys, values and
patterns aside).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.circuits.recorded import Group
from workbench.circuits.spots import Change, Spot
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask

# Sites of a layer that its own later rows read.
_READ_LATER = frozenset(["k", "v", "resid_pre"])


@dataclass(frozen=True, eq=False)
class Lane:
    """`spots` have positions as numbers; `prompts` are places in the group."""

    change: int
    spots: tuple[Spot, ...]
    prompts: Int[Tensor, " prompt"]
    first: int
    tokens: int

    @property
    def layer(self) -> int:
        return min(spot.layer for spot in self.spots)

    @property
    def width(self) -> int:
        return self.tokens - self.first

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.width

    def within(self, layer: int) -> list[Spot]:
        return [spot for spot in self.spots if spot.layer == layer]

    def split(self, prompts: int) -> Iterator[Lane]:
        for part in torch.split(self.prompts, prompts):
            yield replace(self, prompts=part)

    def changed(self, layer: int, last: bool) -> list[int]:
        """Rows that differ after a layer in which the lane begins; of the last layer only what is read."""
        rows: set[int] = set()
        for spot in self.within(layer):
            if spot.position is None:
                rows |= set(range(self.first, self.tokens))
            elif spot.site in ("k", "v"):
                rows |= set(range(_number(spot), self.tokens))
            else:
                rows.add(_number(spot))
        rows &= {self.tokens - 1} if last else set(range(self.tokens))
        return sorted(rows)


@dataclass(frozen=True, eq=False)
class Sorted:
    """All changes of a group: lanes to run, what exists in which prompt, and how many runs cannot change anything."""

    lanes: list[Lane]
    exists: Bool[Tensor, "change prompt"]
    unchanged: int


def sort_out(
    changes: Sequence[Change], task: PairTask, group: Group, same_before: Int[Tensor, " prompt"], last_layer: int
) -> Sorted:
    """Lanes of all changes, by layer."""
    lanes: list[Lane] = []
    exists = torch.ones(len(changes), len(group.prompts), dtype=torch.bool)
    runs = 0
    for number, change in enumerate(changes):
        for spots, prompts in _resolved(change, task, group):
            there = _there(spots, group.lengths[prompts])
            exists[number, prompts[~there]] = False
            prompts = prompts[there]
            runs += len(prompts)
            prompts = prompts[_matters(spots, same_before[prompts], group.tokens, last_layer)]
            if not len(prompts):
                continue
            start = int(same_before[prompts].min())
            first = min(start if spot.position is None else _number(spot) for spot in spots)
            lanes.append(Lane(number, spots, prompts, min(first, group.tokens - 1), group.tokens))
    lanes.sort(key=lambda lane: (lane.layer, lane.first))
    return Sorted(lanes, exists, runs - sum(len(lane.prompts) for lane in lanes))


def _resolved(change: Change, task: PairTask, group: Group) -> Iterator[tuple[tuple[Spot, ...], Tensor]]:
    """Roles as numbers; prompts with a role at one place together."""
    places = [place for spot in change for place in (spot.position, spot.key)]
    roles = sorted({place for place in places if isinstance(place, str)})
    if not roles:
        yield change, torch.arange(len(group.prompts))
        return
    for role in roles:
        if role not in task.roles:
            raise RequestError(f"{task.name} has no role {role!r}; roles are {', '.join(task.roles) or 'none'}.")
    rows = torch.stack([group.rows(task, role) for role in roles], 1)
    for row in torch.unique(rows, dim=0):
        number: dict[int | str | None, int] = dict(zip(roles, row.tolist(), strict=True))
        spots = tuple(
            replace(spot, position=number.get(spot.position, spot.position), key=number.get(spot.key, spot.key))
            for spot in change
        )
        yield spots, (rows == row).all(1).nonzero().flatten()


def _there(spots: Sequence[Spot], lengths: Tensor) -> Tensor:
    """Whether every position is one of the prompt's."""
    there = torch.ones_like(lengths, dtype=torch.bool)
    for spot in spots:
        for place in (spot.position, spot.key):
            if place is not None:
                there &= lengths > int(place)
    return there


def _matters(spots: Sequence[Spot], same_before: Tensor, tokens: int, last_layer: int) -> Tensor:
    """Whether anything can change what is read."""
    matters = torch.zeros_like(same_before, dtype=torch.bool)
    for spot in spots:
        if spot.position is None:
            matters |= same_before < tokens
            continue
        place = _number(spot)
        if place < tokens and (spot.layer < last_layer or spot.site in _READ_LATER or place == tokens - 1):
            matters |= same_before <= place
    return matters


def _number(spot: Spot) -> int:
    assert isinstance(spot.position, int)
    if spot.position < 0:
        raise RequestError(f"position {spot.position} of {spot.node}: positions are counted from 0, or named by roles.")
    return spot.position
