"""Attention of rows that belong to many changed runs: cached keys and values before them, their own after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.lanes import Lane
from workbench.circuits.recorded import Recorded, Values
from workbench.circuits.spots import Spot, SpotSite
from workbench.models import AttentionCall, LayerSpec

_QKV: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Rows:
    """One lane among the rows of a block call: tokens `rows` of each of its prompts."""

    lane: Lane
    rows: list[int]

    @property
    def count(self) -> int:
        return len(self.lane.prompts) * len(self.rows)

    def places(self, spot: Spot) -> list[int]:
        """Which of these rows a spot overwrites."""
        if spot.position is None:
            return list(range(len(self.rows)))
        return [place for place, row in enumerate(self.rows) if row == spot.position]

    def value(self, spot: Spot, values: Values, places: Sequence[int]) -> Float[Tensor, "prompt place ..."]:
        """What a spot puts in place, at the named rows (patterns: `[prompt, place, head, key]`)."""
        whole = values.at(self.lane.change, spot.place, spot.layer)
        if spot.place == "pattern":
            whole = whole.transpose(1, 2)
        rows = torch.tensor([self.rows[place] for place in places], dtype=torch.long, device=whole.device)
        prompts = self.lane.prompts.to(whole.device)
        found = whole[prompts[:, None], rows[None]]
        return found if spot.head is None else found[:, :, spot.head : spot.head + 1]


def query_heads(spots: Sequence[Spot], shape: LayerSpec) -> list[int]:
    """KV heads in whose groups anything changes."""
    found: set[int] = set()
    for spot in spots:
        if spot.head is None:
            return list(range(shape.kv_heads))
        found.add(spot.head if spot.site in ("k", "v") else spot.head // shape.group)
    return sorted(found)


def put(
    target: Tensor, rows: Rows, spots: Sequence[Spot], site: SpotSite, values: Values, heads: list[int] | None
) -> None:
    """Overwrite a site `[prompt, head, row, dim]`, whose heads are `heads` of the layer, in place."""
    for spot in spots:
        if spot.site != site:
            continue
        places = rows.places(spot)
        if not places:
            continue
        value = rows.value(spot, values, places).transpose(1, 2).to(target)
        if spot.head is None:
            value, own = value if heads is None else value[:, heads], slice(None)
        else:
            place = _own(spot.head, heads)
            own = slice(place, place + 1)
        target[:, own, places] = values.mixed(spot, value, target[:, own, places])


def shaped_pattern(
    call: AttentionCall, rows: Rows, spots: Sequence[Spot], values: Values, heads: list[int] | None
) -> Float[Tensor, "prompt head row dim"]:
    """z of a call whose pattern is overwritten or some of whose keys are taken away; rows are its queries.

    Keys that are taken away leave their share to the others (and to the sink, where the softmax has one): what a
    score of minus infinity does. A row that has no other key writes nothing.
    """
    pattern = call.pattern(torch.float64)
    sink = 1.0 - pattern.sum(-1, keepdim=True) if call.sinks is not None else torch.zeros_like(pattern[..., :1])
    removed = torch.zeros_like(pattern, dtype=torch.bool)
    keys = pattern.shape[-1]
    for spot in spots:
        places = rows.places(spot)
        if spot.place != "pattern" or not places:
            continue
        own = list(range(pattern.shape[1])) if spot.head is None else [_own(spot.head, heads)]
        if spot.site == "mask":
            columns = _columns(spot, keys)
            for place in places:
                for head in own:
                    removed[:, head, place, columns] = True
            continue
        value = rows.value(spot, values, places).transpose(1, 2)[..., :keys].to(pattern)
        value = value if spot.head is not None or heads is None else value[:, heads]
        columns = _columns(spot, keys)
        for at, place in enumerate(places):
            for which, head in enumerate(own):
                pattern[:, head, place, columns] = value[:, which, at][:, columns]
    kept = pattern.masked_fill(removed, 0.0)
    total = kept.sum(-1, keepdim=True) + sink
    renormalised = torch.where(total > 0, kept / total.clamp(min=1e-300), 0.0)
    pattern = torch.where(removed.any(-1, keepdim=True), renormalised, pattern)
    group = call.q.shape[1] // call.k.shape[1]
    return (pattern @ call.v.double().repeat_interleave(group, dim=1)).to(call.q.dtype)


def _columns(spot: Spot, keys: int) -> list[int]:
    """The keys of a row that a spot is about, among the first `keys`."""
    if spot.key is None:
        return list(range(keys))
    assert isinstance(spot.key, int)
    return [spot.key] if spot.key < keys else []


def _own(head: int, heads: list[int] | None) -> int:
    return head if heads is None else heads.index(head)


def first_z(
    base: Recorded, template: AttentionCall, shape: LayerSpec, rows: Rows, values: Values
) -> Float[Tensor, "prompt head row dim"]:
    """z of the layer in which a lane begins, from the receiving run's q, k and v: its attention does not run again.

    Heads that nothing touches keep their recorded z, and only keys up to the last changed row are looked at.
    """
    layer, prompts = template.layer, rows.lane.prompts
    spots = rows.lane.within(layer)
    device = template.q.device
    at = torch.tensor(rows.rows, device=device)
    where = prompts.to(device)
    z = base.at("z", layer)[where[:, None], at[None]].transpose(1, 2).clone()
    inside = [spot for spot in spots if spot.site in ("q", "k", "v", "pattern", "mask")]
    if inside:
        kv = query_heads(inside, shape)
        heads = [head for one in kv for head in range(one * shape.group, (one + 1) * shape.group)]
        first, end = rows.rows[0], rows.rows[-1] + 1
        parts: dict[str, Tensor] = {}
        for name in _QKV:
            low, high, chosen = (first, end, heads) if name == "q" else (0, end, kv)
            part = base.at(name, layer)[where, low:high][:, :, chosen].transpose(1, 2).contiguous()
            put(part, Rows(rows.lane, list(range(low, high))), spots, name, values, chosen)
            parts[name] = part
        sinks = None if template.sinks is None else template.sinks[heads]
        call = replace(template, q=parts["q"], k=parts["k"], v=parts["v"], sinks=sinks, key_start=None, key_end=None)
        span = Rows(rows.lane, list(range(first, end)))
        shaped = [spot for spot in inside if spot.place == "pattern"]
        found = shaped_pattern(call, span, shaped, values, heads) if shaped else call.output()
        z[:, heads] = found[:, :, [row - first for row in rows.rows]].to(z)
    put(z, rows, spots, "z", values, None)
    return z


def attend_suffix(
    call: AttentionCall, base: Recorded, first: int, lanes: Sequence[Lane], values: Values
) -> Float[Tensor, "lane_prompt head row dim"]:
    """z of rows `first ..` of many lanes; keys and values before are those of the receiving run.

    `call` holds these rows alone, `[lane_prompt, head, row, dim]`.
    """
    layer, device = call.layer, call.q.device
    prompts = torch.cat([lane.prompts for lane in lanes]).to(device)
    q, k, v = call.q, call.k, call.v
    if first:
        k = torch.cat([base.at("k", layer)[prompts, :first].transpose(1, 2).to(k), k], 2)
        v = torch.cat([base.at("v", layer)[prompts, :first].transpose(1, 2).to(v), v], 2)
    marked, at = list[tuple[slice, Lane]](), 0
    for lane in lanes:
        if any(spot.layer == layer for spot in lane.spots):
            marked.append((slice(at, at + len(lane.prompts)), lane))
        at += len(lane.prompts)
    if marked:
        q, k, v = q.clone(), k.clone(), v.clone()
    for own, lane in marked:
        rows, spots = Rows(lane, list(range(first, lane.tokens))), lane.within(layer)
        put(q[own], rows, spots, "q", values, None)
        every = Rows(lane, list(range(lane.tokens)))
        put(k[own], every, spots, "k", values, None)
        put(v[own], every, spots, "v", values, None)
    whole = replace(call, q=q, k=k, v=v, key_start=None, key_end=None)
    z = whole.output()
    for own, lane in marked:
        rows, spots = Rows(lane, list(range(first, lane.tokens))), lane.within(layer)
        shaped = [spot for spot in spots if spot.place == "pattern"]
        if shaped:
            z[own] = shaped_pattern(replace(whole, q=q[own], k=k[own], v=v[own]), rows, shaped, values, None)
        put(z[own], rows, spots, "z", values, None)
    return z
