"""Many patches in few passes, exactly: each starts at its own layer and token, and shares block calls with others.

1. The receiving run is recorded once: the residual stream into each layer, q, k, v and z.
2. A change begins in its first layer. z there is put together from the recorded q, k, v and z, so that the layer's
   attention does not run again, and only the rows that it changes go through the rest of the layer. A change of
   mlp_out or resid_post is added to the recorded stream, and nothing runs.
3. From the next layer on, rows from its first changed token on are run, against recorded keys and values before.
4. Rows of many changes, prompts and first tokens lie side by side in one block call (`blocks`).
5. The last rows go through the model's own end, and the metric is taken.

The result is that of one edited pass a change (tested on every architecture), at the cost that `rows` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.attending import Rows, attend_suffix, first_z
from workbench.circuits.blocks import Blocks, CannotRun, Rewrite, near
from workbench.circuits.lanes import Lane
from workbench.circuits.recorded import Recorded, Values
from workbench.circuits.spots import SpotSite
from workbench.models import Attachment, AttentionCall

# Sites whose change reaches the stream as it is, so that no part of the layer runs.
_ADDED = frozenset(["mlp_out", "resid_post"])
Finish = Callable[[list[Lane], Float[Tensor, "lane_prompt vocab"]], None]


@dataclass
class _Flight:
    """Lanes on their way that begin at one token, and their rows of the stream `[lane_prompt, row, d_model]`."""

    lanes: list[Lane]
    hidden: Tensor


@dataclass
class Engine:
    """Runs lanes of one group of prompts into one receiving run."""

    attachment: Attachment
    blocks: Blocks
    base: Recorded
    values: Values

    def __post_init__(self) -> None:
        self.spec = self.attachment.spec
        self.last = self.spec.n_layers - 1
        self.tokens = int(self.base.batch.ids.shape[1])

    def check(self) -> None:
        """`CannotRun` where blocks on rows do not give what the model gave in its own pass (first prompt)."""
        first = self.tokens // 2
        lane = Lane(0, (), torch.tensor([0]), first, self.tokens)
        before = self.blocks.rows
        for layer in range(self.last + 1):
            hidden = self.base.at("resid_pre", layer)[:1, first:]
            flight = {first: _Flight([lane], hidden)}
            self._advance(layer, flight)
            expected = self.after(layer)[:1, first:]
            if not near(flight[first].hidden, expected):
                raise CannotRun(f"layer {layer}, run on its own, does not give what it gave within the model")
        end = self.after(self.last)[:1, -1]
        if not near(self.blocks.logits(end), self.base.logits[:1].to(end)):
            raise CannotRun("the model's end, run on its own, does not give the same logits")
        self.blocks.rows = before

    def after(self, layer: int) -> Float[Tensor, "prompt token d_model"]:
        """The receiving run's stream after a layer."""
        return self.base.at("resid_pre", layer + 1) if layer < self.last else self.base.at("resid_post", layer)

    def run(self, lanes: Sequence[Lane], finish: Finish) -> None:
        """Run lanes (by layer), all together; `finish` takes the logits of all, through which gradients flow."""
        flights: dict[int, _Flight] = {}
        for layer in range(min(lane.layer for lane in lanes), self.last + 1):
            starting = [lane for lane in lanes if lane.layer == layer]
            entering = [lane for lane in starting if _enters(lane, layer)]
            prompts = [lane.prompts.to(self._device) for lane in entering]
            stream = self.base.at("resid_pre", layer)
            _join(flights, [(lane, stream[own, lane.first :]) for lane, own in zip(entering, prompts, strict=True)])
            self._advance(layer, flights)
            _join(flights, self._begin(layer, [lane for lane in starting if not _enters(lane, layer)]))
        done = [flights[first] for first in sorted(flights)]
        ends = torch.cat([flight.hidden[:, -1] for flight in done])
        finish([lane for flight in done for lane in flight.lanes], self.blocks.logits(ends))

    @property
    def _device(self) -> torch.device:
        return self.base.at("resid_pre", 0).device

    def _advance(self, layer: int, flights: dict[int, _Flight]) -> None:
        """All lanes on their way through one layer, in one block call."""
        if not flights:
            return
        order = [flights[first] for first in sorted(flights)]
        rows = [Rows(lane, list(range(lane.first, lane.tokens))) for flight in order for lane in flight.lanes]
        flat = torch.cat([flight.hidden.flatten(0, 1) for flight in order])
        flat = self._rewrite(layer, "resid_pre", rows)(flat)
        positions = torch.cat(
            [torch.arange(flight.lanes[0].first, self.tokens).repeat(len(flight.hidden)) for flight in order]
        ).to(flat.device)

        def attend(call: AttentionCall) -> Tensor:
            parts, at = [], 0
            for flight in order:
                count, width = flight.hidden.shape[:2]
                own = slice(at, at + count * width)
                part = _call(call, own, count)
                z = attend_suffix(part, self.base, flight.lanes[0].first, flight.lanes, self.values)
                parts.append(z.transpose(1, 2).flatten(0, 1))
                at += count * width
            return torch.cat(parts).transpose(0, 1)[None]

        flat = self._layer(layer, flat, positions, attend, rows)
        at = 0
        for flight in order:
            count, width = flight.hidden.shape[:2]
            flight.hidden = flat[at : at + count * width].reshape(count, width, -1)
            at += count * width

    def _layer(
        self, layer: int, flat: Tensor, positions: Tensor, attend: Callable[[AttentionCall], Tensor], rows: list[Rows]
    ) -> Tensor:
        """A block with what changes outside of its attention."""
        sites = {spot.site for one in rows for spot in one.lane.within(layer)}
        entry, rewrites = flat, dict[str, Rewrite]()
        if sites & {"attn_out", "resid_mid"}:

            def attn_out(value: Tensor) -> Tensor:
                value = self._rewrite(layer, "attn_out", rows)(value)
                # resid_mid has no module of its own: it is moved through what attention adds.
                return self._rewrite(layer, "resid_mid", rows)(value + entry) - entry

            rewrites["attn_out"] = attn_out
        if "mlp_out" in sites:
            rewrites["mlp_out"] = self._rewrite(layer, "mlp_out", rows)
        flat = self.blocks.run(layer, flat, positions, attend, rewrites)
        return self._rewrite(layer, "resid_post", rows)(flat)

    def _rewrite(self, layer: int, site: SpotSite, rows: Sequence[Rows]) -> Callable[[Tensor], Tensor]:
        def rewrite(flat: Tensor) -> Tensor:
            changed, at = flat, 0
            for one in rows:
                own = slice(at, at + one.count)
                at += one.count
                for spot in one.lane.within(layer):
                    places = one.places(spot) if spot.site == site else []
                    if places:
                        changed = changed.clone() if changed is flat else changed
                        part = changed[own].view(len(one.lane.prompts), len(one.rows), -1)
                        value = one.value(spot, self.values, places).to(flat)
                        part[:, places] = self.values.mixed(spot, value, part[:, places])
            return changed

        return rewrite

    def _begin(self, layer: int, lanes: Sequence[Lane]) -> Iterator[tuple[Lane, Tensor]]:
        """The stream after the layer in which lanes begin."""
        run = []
        for lane in lanes:
            if all(spot.site in _ADDED for spot in lane.within(layer)):
                yield lane, self._added(layer, lane)
            else:
                run.append(lane)
        rows = [Rows(lane, lane.changed(layer, layer == self.last)) for lane in run]
        yield from ((one.lane, self._of_base(layer, one.lane)) for one in rows if not one.rows)
        rows = [one for one in rows if one.rows]
        if not rows:
            return
        stream = self.base.at("resid_pre", layer)
        flat = torch.cat([_at(stream, one).flatten(0, 1) for one in rows])
        positions = torch.cat([torch.tensor(one.rows).repeat(len(one.lane.prompts)) for one in rows]).to(flat.device)

        def attend(call: AttentionCall) -> Tensor:
            shape = self.spec.layers[layer]
            z = [first_z(self.base, call, shape, one, self.values).transpose(1, 2).flatten(0, 1) for one in rows]
            return torch.cat(z).transpose(0, 1)[None].to(call.q)

        flat = self._layer(layer, flat, positions, attend, rows)
        at = 0
        for one in rows:
            hidden = self._of_base(layer, one.lane).clone()
            places = [row - one.lane.first for row in one.rows]
            hidden[:, places] = flat[at : at + one.count].reshape(len(one.lane.prompts), len(one.rows), -1)
            at += one.count
            yield one.lane, hidden

    def _of_base(self, layer: int, lane: Lane) -> Tensor:
        return self.after(layer)[lane.prompts.to(self._device), lane.first :]

    def _added(self, layer: int, lane: Lane) -> Tensor:
        """mlp_out as its difference, resid_post as it is; nothing runs."""
        rows = Rows(lane, list(range(lane.first, lane.tokens)))
        hidden = self._of_base(layer, lane).clone()
        for spot in sorted(lane.within(layer), key=lambda spot: spot.site):
            places = rows.places(spot)
            if not places:
                continue
            value = rows.value(spot, self.values, places).to(hidden)
            if spot.site == "resid_post":
                hidden[:, places] = self.values.mixed(spot, value, hidden[:, places])
            else:
                own = self.base.at("mlp_out", layer)[lane.prompts.to(self._device)][:, [rows.rows[p] for p in places]]
                hidden[:, places] += self.values.mixed(spot, value, own.to(hidden)) - own.to(hidden)
        return hidden


def _enters(lane: Lane, layer: int) -> bool:
    """Whether a lane begins before the layer rather than within it."""
    return any(spot.site == "resid_pre" for spot in lane.within(layer))


def _join(flights: dict[int, _Flight], found: Iterable[tuple[Lane, Tensor]]) -> None:
    """Put lanes beside those that begin at the same token."""
    new: dict[int, list[tuple[Lane, Tensor]]] = {}
    for lane, hidden in found:
        new.setdefault(lane.first, []).append((lane, hidden))
    for first, parts in new.items():
        lanes, streams = [lane for lane, _ in parts], [value for _, value in parts]
        if first in flights:
            lanes, streams = [*flights[first].lanes, *lanes], [flights[first].hidden, *streams]
        flights[first] = _Flight(lanes, torch.cat(streams))


def _at(stream: Tensor, rows: Rows) -> Float[Tensor, "prompt row d_model"]:
    at = torch.tensor(rows.rows, device=stream.device)
    return stream[rows.lane.prompts.to(stream.device)[:, None], at[None]]


def _call(call: AttentionCall, rows: slice, prompts: int) -> AttentionCall:
    """The part of a call over rows side by side that belongs to some lanes of one width: `[prompt, head, row, dim]`."""

    def part(value: Tensor) -> Tensor:
        heads, dim = value.shape[1], value.shape[3]
        return value[0, :, rows].reshape(heads, prompts, -1, dim).transpose(0, 1)

    return replace(call, q=part(call.q), k=part(call.k), v=part(call.v))


def chunks(lanes: Iterable[Lane], rows: int) -> Iterator[list[Lane]]:
    """Lanes that run together: up to so many rows, one lane's prompts dealt out where they are too many."""
    chunk: list[Lane] = []
    held = 0
    for lane in lanes:
        for part in lane.split(max(1, rows // lane.width)):
            if chunk and held + part.rows > rows:
                yield chunk
                chunk, held = [], 0
            chunk.append(part)
            held += part.rows
    if chunk:
        yield chunk
