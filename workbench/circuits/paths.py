"""Path patching: what one part of the model does to another, or to the output, by the direct path alone.

A sender's output is that of the other run; receivers see it, and what follows is recomputed.

* `strict`: the edge. The sender's difference is added to what enters the receiver; everything in between, MLPs as
  well, is as in the receiving run.
* `wang`: every other head is frozen, MLPs are recomputed, so that ways through MLPs count as direct (Wang et al. 2022,
  arXiv 2211.00593, appendix; Goldowsky-Dill et al. 2023, arXiv 2304.05969).

Senders are `L5H3`, `L5.attn`, `L5.mlp` and `embed`; receivers are q of heads, k and v of KV heads, MLPs (their input),
and "logits". Where a norm follows the output projection (Gemma, OLMo 2), a head's difference is that of the normed
output, all other heads as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.blocks import Blocks
from workbench.circuits.effects import Direction, Effects
from workbench.circuits.patching import Options, Progress, patch_changes
from workbench.circuits.recorded import Group, Metric, Recorded, Source, Values, first_difference
from workbench.circuits.spots import Change, Spot, spot
from workbench.errors import RequestError
from workbench.models import AttentionCall, Spec
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

Form = Literal["strict", "wang"]
_RECEIVES = ("q", "k", "v", "mlp_out")


def patch_paths(
    model: Model,
    task: PairTask,
    senders: Sequence[str],
    receivers: Sequence[Spot] | Literal["logits"] = "logits",
    *,
    form: Form = "wang",
    at: int | str | None = None,
    apart: bool = False,
    direction: Direction | Literal["both"] = "both",
    metric: str | Metric | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Effects:
    """The effect of each sender through the receivers (all together, or each `apart`), by the direct path.

    `at` patches the sender at one position (or role) alone. A sender that cannot reach a receiver has an effect of
    zero, but for rounding. Costs one short run of the layers a sender, and the patch of its receivers.
    """
    if form not in ("strict", "wang"):
        raise RequestError(f"form={form!r} is no form of path patching; choose 'strict' or 'wang'.")
    spec = model.spec
    sent = [_sender(name, spec) for name in senders]
    ends = (Spot(spec.n_layers - 1, "resid_post"),) if isinstance(receivers, str) else tuple(receivers)
    for one in ends:
        one.check(spec)
        if not isinstance(receivers, str) and one.site not in _RECEIVES:
            raise RequestError(f"{one.site} of {one.node} receives nothing; receivers are {', '.join(_RECEIVES)}.")
    sets = [(one,) for one in ends] if apart else [ends]
    changes: list[Change] = []
    labels, numbers = list[str](), list[int]()
    for number, (name, sender) in enumerate(zip(senders, sent, strict=True)):
        for chosen in sets:
            reached = tuple(one for one in chosen if _reaches(sender, one, spec, isinstance(receivers, str)))
            # A sender that reaches nothing puts its receivers' own values in place.
            changes.append(reached or chosen)
            numbers.append(number if reached else -1)
            where = "logits" if isinstance(receivers, str) else " ".join(f"{one.node}.{one.site}" for one in chosen)
            labels.append(f"{name} -> {where}")
    source = _Paths(spec, sent, numbers, ends, form, at, task)
    return patch_changes(
        model, task, changes, labels=labels, direction=direction, metric=metric, source=source, options=options,
        progress=progress,
    )  # fmt: skip


def _sender(name: str, spec: Spec) -> Spot:
    """`embed` is the stream that enters layer 0."""
    sender = Spot(0, "resid_pre") if name == "embed" else spot(name)
    if sender.site not in ("z", "mlp_out", "attn_out", "resid_pre"):
        raise RequestError(f"{name} sends nothing; senders are 'L5H3', 'L5.attn', 'L5.mlp' and 'embed'.")
    sender.check(spec)
    return sender


def _reaches(sender: Spot, receiver: Spot, spec: Spec, logits: bool) -> bool:
    """Whether what the sender writes is in what the receiver reads."""
    if logits or sender.site == "resid_pre":
        return True
    if receiver.site == "mlp_out" and sender.site in ("z", "attn_out") and not spec.parallel:
        return receiver.layer >= sender.layer
    return receiver.layer > sender.layer


@dataclass(eq=False)
class _Paths(Source):
    spec: Spec
    senders: list[Spot]
    numbers: list[int]
    receivers: tuple[Spot, ...]
    form: Form
    position: int | str | None
    task: PairTask

    def __post_init__(self) -> None:
        sent = {(sender.place, sender.layer) for sender in self.senders}
        self.sites = frozenset(sent | {(one.place, one.layer) for one in self.receivers})

    def values(self, group: Group, blocks: Blocks, base: Recorded, other: Recorded) -> Values:
        tracer = _Tracer(self, group, blocks, base, other)
        found = [tracer.received(sender) for sender in self.senders]
        return _Received(first_difference(base.batch, other.batch), base, self.numbers, found)


@dataclass(eq=False)
class _Received(Values):
    """What receivers see of each sender: of KV heads and MLPs whole sites, of the rest what the receiving run has."""

    same_before: Tensor
    base: Recorded
    numbers: list[int]
    found: list[dict[tuple[Site, int], Tensor]]

    def at(self, change: int, site: Site, layer: int) -> Tensor:
        number = self.numbers[change]
        own = self.found[number] if number >= 0 else {}
        return own[site, layer] if (site, layer) in own else self.base.at(site, layer)


class _Read(Exception):
    """q, k and v are known; the rest of the layer need not run."""


@dataclass(eq=False)
class _Tracer:
    """Runs one sender at a time on all prompts and tokens of a group."""

    paths: _Paths
    group: Group
    blocks: Blocks
    base: Recorded
    other: Recorded

    def __post_init__(self) -> None:
        prompts, tokens = self.base.batch.ids.shape
        device = self.base.at("resid_pre", 0).device
        self.shape = (prompts, tokens)
        self.positions = torch.arange(tokens, device=device).repeat(prompts)
        self.layers = sorted({one.layer for one in self.paths.receivers})

    @torch.no_grad()
    def received(self, sender: Spot) -> dict[tuple[Site, int], Tensor]:
        """What every receiver sees: its q, k, v or output, or the last layer's stream."""
        difference = self._difference(sender)
        return self._strict(sender, difference) if self.paths.form == "strict" else self._wang(sender, difference)

    def _difference(self, sender: Spot) -> Float[Tensor, "row d_model"]:
        """What the sender writes in the other run less what it writes in this one."""
        own, value = self.base.at(sender.place, sender.layer), self.other.at(sender.place, sender.layer)
        if sender.site == "z":
            mixed = own.clone()
            mixed[:, :, sender.head] = value[:, :, sender.head]
            stream = self._stream(sender.layer)
            own, value = (self.blocks.added(sender.layer, z.flatten(0, 1), stream) for z in (own, mixed))
        difference = (value - own).reshape(*self.shape, -1)
        if self.paths.position is not None:
            place = self.paths.position
            rows = self.group.rows(self.paths.task, place) if isinstance(place, str) else torch.tensor(place)
            here = torch.arange(self.shape[1])[None] == rows.expand(self.shape[0])[:, None]
            difference = difference * here[..., None].to(difference)
        return difference.flatten(0, 1)

    def _stream(self, layer: int) -> Float[Tensor, "row d_model"]:
        return self.base.at("resid_pre", layer).flatten(0, 1)

    def _frozen(self, call: AttentionCall) -> Tensor:
        return self.base.at("z", call.layer).flatten(0, 1).transpose(0, 1)[None].to(call.q)

    def _strict(self, sender: Spot, difference: Tensor) -> dict[tuple[Site, int], Tensor]:
        found: dict[tuple[Site, int], Tensor] = {}
        for layer in self.layers:
            sites = {one.site for one in self.paths.receivers if one.layer == layer}
            if "resid_post" in sites:
                end = self.base.at("resid_post", layer)
                found["resid_post", layer] = end + difference.reshape(end.shape)
            if sites & {"q", "k", "v"} and (sender.layer < layer or sender.site == "resid_pre"):
                self._run(layer, self._stream(layer) + difference, found, stop=True)
            if "mlp_out" in sites and _reaches(sender, Spot(layer, "mlp_out"), self.paths.spec, False):
                found["mlp_out", layer] = self._mlp(layer, difference)
        return found

    def _mlp(self, layer: int, difference: Tensor) -> Tensor:
        """The MLP's output where its input has the difference in it, its layer's heads as they are."""
        stream, seen = self._stream(layer), list[Tensor]()

        def note(value: Tensor) -> Tensor:
            seen.append(value)
            return value

        if self.paths.spec.parallel:
            self.blocks.run(layer, stream + difference, self.positions, self._frozen, {"mlp_out": note})
        else:
            moved = {"attn_out": lambda value: value + difference, "mlp_out": note}
            self.blocks.run(layer, stream, self.positions, self._frozen, moved)
        return seen[0].reshape(*self.shape, -1)

    def _wang(self, sender: Spot, difference: Tensor) -> dict[tuple[Site, int], Tensor]:
        """From the sender on with all heads frozen: the stream changes through MLPs alone."""
        found: dict[tuple[Site, int], Tensor] = {}
        first = sender.layer
        stream = self._stream(first)
        if sender.site == "mlp_out":
            at_end = first == self.paths.spec.n_layers - 1
            after = self.base.at("resid_post", first) if at_end else self.base.at("resid_pre", first + 1)
            hidden, first = after.flatten(0, 1) + difference, first + 1
        elif sender.site == "resid_pre":
            hidden = stream + difference
        else:
            hidden = self._run(first, stream, found, stop=False, added=difference)
            first += 1
        for layer in range(first, max(self.layers) + 1):
            hidden = self._run(layer, hidden, found, stop=False)
        last = self.paths.spec.n_layers - 1
        if any(one.site == "resid_post" for one in self.paths.receivers):
            found["resid_post", last] = hidden.reshape(*self.shape, -1)
        return found

    def _run(
        self,
        layer: int,
        hidden: Tensor,
        found: dict[tuple[Site, int], Tensor],
        *,
        stop: bool,
        added: Tensor | None = None,
    ) -> Tensor:
        """One layer with frozen heads; q, k, v and the MLP's output are noted where receivers read them."""
        sites = {one.site for one in self.paths.receivers if one.layer == layer}

        def attend(call: AttentionCall) -> Tensor:
            if added is None:
                parts: dict[Site, Tensor] = {"q": call.q, "k": call.k, "v": call.v}
                for site, value in parts.items():
                    if site in sites:
                        found[site, layer] = value[0].transpose(0, 1).reshape(*self.shape, *value.shape[1::2])
            if stop:
                raise _Read
            return self._frozen(call)

        def note(value: Tensor) -> Tensor:
            if "mlp_out" in sites:
                found["mlp_out", layer] = value.reshape(*self.shape, -1)
            return value

        rewrites = {"mlp_out": note}
        if added is not None:
            rewrites["attn_out"] = lambda value: value + added
        try:
            return self.blocks.run(layer, hidden, self.positions, attend, rewrites)
        except _Read:
            return hidden
