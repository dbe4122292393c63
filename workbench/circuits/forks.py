"""The forked forward: every reader of the stream has an input of its own, put together from what writers write.

A reader v (q of a head, k or v of a KV head, an MLP, the logits) is given, instead of the residual stream,

    sum over writers u before it of  m[u, v] a_u + (1 - m[u, v]) r_u,  plus the biases of attention's projections,

a_u being what u writes in this very run and r_u a replacement: what it writes on the corrupt prompt, its mean, zero,
a constant. With m = 1 everywhere this is the model, with m = 0 its run on the corrupt prompt; what lies between is a
circuit (as MIB evaluates one, arXiv 2504.13151), or a soft one, through which gradients flow to m and r.

Nothing of the model is rewritten. The model's own blocks run on rows (`blocks`): those of all readers of a layer side
by side, from which each head takes its own q, k or v; attention is the model's own on what they took. So a layer costs
a projection of each reader's input; readers with equal inputs share theirs, and layers before the first edge that is
cut do not run at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.circuits.blocks import Blocks, near
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Group, record
from workbench.errors import ModelRefused, RequestError
from workbench.models import AttentionCall, Batch
from workbench.models.architectures import output_weight
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

Ablation = Literal["patching", "mean", "zero", "clean"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)
# Rows of one block call.
ROWS = 8192
_QKV: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
Writes = Float[Tensor, "writer prompt token d_model"]


@torch.no_grad()
def writes(model: Model, batch: Batch, memory_limit: int | None = None) -> Writes:
    """What every writer of the graph (in its order) adds to the stream on prompts of one length without padding."""
    layers = model.attachment.layers
    sites: list[tuple[Site, int]] = [("resid_pre", 0), *(("z", number) for number in range(len(layers)))]
    sites += [("mlp_out", number) for number, modules in enumerate(layers) if modules.mlp is not None]
    run = record(model, batch, sites, memory_limit)
    parts = [run.at("resid_pre", 0)[None]]
    for number, modules in enumerate(layers):
        weight = output_weight(modules, model.spec.layers[number])
        parts.append(torch.einsum("pthc,hcd->hptd", run.at("z", number), weight))
        if modules.mlp is not None:
            parts.append(run.at("mlp_out", number)[None])
    return torch.cat(parts)


def replacement(model: Model, task: PairTask, group: Group, how: Ablation | str) -> Writes:
    """What stands in for writes outside of a circuit, for a group of the task's prompts.

    "patching": the corrupt prompt's; "mean": at each token, over the references of the prompts with the same template
    (over the corrupt prompts, where the task has no references); "zero"; "clean": the clean prompt's. Axes along which
    nothing varies have length 1.
    """
    if how not in ABLATIONS:
        raise RequestError(f"ablation={how!r} is unknown; choose from {', '.join(ABLATIONS)}.")
    if how == "zero":
        shape = (len(Graph.of(model).writers), 1, 1, model.spec.d_model)
        return torch.zeros(shape, dtype=model.attachment.dtype, device=model.device)
    if how != "mean":
        return writes(model, group.cut(task.clean if how == "clean" else task.corrupt))
    found = writes(model, group.cut(task.corrupt if task.references is None else task.references))
    numbers = task.groups[group.prompts]
    for number in torch.unique(numbers):
        same = (numbers == number).nonzero().flatten().to(found.device)
        found[:, same] = found[:, same].mean(1, keepdim=True).expand(-1, len(same), -1, -1)
    return found


@dataclass(frozen=True, eq=False)
class Forks:
    """One forked run: logits where the prompts are read and, if kept, what every writer wrote."""

    logits: Float[Tensor, "prompt vocab"]
    writes: Writes | None = None


class _Read(Exception):
    """q, k and v are known; the rest of the layer need not run."""


@dataclass(eq=False)
class _Stream:
    """Writes so far, less their replacements, `[run or 1, writer, rest]`, and the sum of the latter and biases.

    Runs have a mask each. `shape` is what the last axis holds: (prompt, token, d_model).
    """

    runs: int
    shape: tuple[int, int, int]
    base: Tensor
    parts: list[Tensor] = field(default_factory=list)
    buffer: Tensor | None = None
    held: int = 0

    def add(self, found: Tensor) -> None:
        """More writers; without gradients they are laid into one buffer, so that mixing is one product."""
        if self.buffer is None:
            self.parts.append(found)
        else:
            self.buffer[:, self.held : self.held + found.shape[1]] = found
        self.held += found.shape[1]

    def differences(self) -> Iterator[Tensor]:
        yield from self.parts
        if self.buffer is not None and self.held:
            yield self.buffer[:, : self.held]

    def mixed(self, columns: Float[Tensor, "run writer reader"]) -> Float[Tensor, "row d_model"]:
        """Inputs of readers, given their columns of the mask; rows are reader by reader, run by run."""
        readers, at = columns.shape[2], 0
        turned = columns.permute(2, 0, 1)
        total = self.base.expand(self.runs, -1)[None].expand(readers, -1, -1)
        for part in self.differences():
            own = turned[:, :, at : at + part.shape[1]]
            at += part.shape[1]
            if len(part) == 1:
                total = total + (own.flatten(0, 1) @ part[0]).view(readers, self.runs, -1)
            else:
                total = total + torch.bmm(own.transpose(0, 1), part).transpose(0, 1)
        return total.reshape(-1, self.shape[2])


class Forked:
    """Prompts of one length, without padding, that are run forked.

    `replacement` is `[writer, prompt, token, d_model]`, or has 1 in place of prompts or tokens.
    """

    def __init__(self, model: Model, graph: Graph, batch: Batch, replacement: Writes) -> None:
        if not bool(batch.mask.all()):
            raise RequestError("Forked runs take prompts of one length without padding; cut them into groups.")
        self.model, self.graph, self.batch, self.replacement = model, graph, batch, replacement
        self.prompts, self.tokens = batch.ids.shape
        width = (len(graph.writers), self.prompts, self.tokens, model.spec.d_model)
        if replacement.ndim != 4 or any(one not in (1, two) for one, two in zip(replacement.shape, width, strict=True)):
            raise RequestError(
                f"replacement has shape {tuple(replacement.shape)}; {width} is needed, or 1 for an axis."
            )
        self.blocks = Blocks(model.attachment, self.tokens)
        layers = model.attachment.layers
        self._weights = [output_weight(one, spec) for one, spec in zip(layers, model.spec.layers, strict=True)]
        self._biases = [getattr(one.projection, "bias", None) for one in layers]
        self._before = torch.as_tensor(graph.exists.sum(0)).tolist()
        self._embed = record(model, batch, [("resid_pre", 0)], None).at("resid_pre", 0)
        self._own: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self._embed.dtype

    @property
    def own(self) -> Writes:
        """What writers write in the model's own run of these prompts."""
        if self._own is None:
            self._own = writes(self.model, self.batch)
        return self._own

    def check(self) -> None:
        """`ModelRefused` where a forked run with everything kept is not the model's own."""
        expected = self.model.trace(self.batch, logits="last").logits
        ones = torch.ones(1, len(self.graph.writers), len(self.graph.readers))
        with torch.no_grad():
            found, _ = self._pass(ones, apart=False, start=0)
        if expected is None or not near(found[0], expected[:, -1].to(found)):
            raise ModelRefused(
                f"{self.model.spec.architecture}: a forked run with every edge kept does not give the model's logits."
            )

    def run(
        self, mask: Float[Tensor, "writer reader"] | Float[Tensor, "prompt writer reader"], *, keep: bool = False
    ) -> Forks:
        """The prompts under one mask, or one for each. What it says of edges that do not exist is not looked at."""
        apart = mask.ndim == 3
        if apart and len(mask) != self.prompts:
            raise RequestError(f"{len(mask)} masks for {self.prompts} prompts; give one for each, or a single one.")
        logits, stream = self._pass(mask if apart else mask[None], apart)
        found = self._writes(stream, apart) if keep else None
        return Forks(logits.flatten(0, 1), found)

    def run_many(self, masks: Float[Tensor, "run writer reader"]) -> Float[Tensor, "run prompt vocab"]:
        """All prompts under each of many masks, together."""
        return self._pass(masks, False)[0]

    def runs_at_once(self, allowed: int = 1 << 29) -> int:
        """Masks for which writes take up to so many bytes."""
        each = (
            len(self.graph.writers) * self.prompts * self.tokens * self.model.spec.d_model * self._embed.element_size()
        )
        return max(1, min(64, allowed // each))

    def _pass(self, mask: Tensor, apart: bool, start: int | None = None) -> tuple[Tensor, _Stream]:
        expected = (len(self.graph.writers), len(self.graph.readers))
        if tuple(mask.shape[1:]) != expected:
            raise RequestError(
                f"A mask of shape {tuple(mask.shape[1:])} for {expected[0]} writers and {expected[1]} readers."
            )
        mask = mask.to(self._embed)
        graded = torch.is_grad_enabled() and (mask.requires_grad or self.replacement.requires_grad)
        first = (0 if graded else self._start(mask)) if start is None else start
        with _frozen(self.model.attachment.hf_model) if graded else torch.no_grad():
            stream = self._begin(len(mask), apart, first, graded)
            for layer in range(first, self.model.spec.n_layers):
                self._layer(layer, mask, stream, apart)
            end = stream.mixed(mask[:, : len(self.graph.writers), -1:]).view(-1, self.tokens, stream.shape[2])[:, -1]
            return self.blocks.logits(end).view(len(mask), stream.shape[0], -1), stream

    def _start(self, mask: Tensor) -> int:
        """The first layer with an edge that is not kept whole."""
        whole = (mask == 1).all(0) | ~torch.as_tensor(self.graph.exists, device=mask.device)
        columns = whole.all(0).tolist()
        for layer, places in enumerate(self.graph.layers):
            if not all(columns[places.q.start : max(places.v.stop, places.mlp.stop)]):
                return layer
        return self.model.spec.n_layers

    def _begin(self, runs: int, apart: bool, first: int, graded: bool) -> _Stream:
        """The stream as it enters a layer, the writers before it being as in the model's own run."""
        shape = (1 if apart else self.prompts, self.tokens, self.model.spec.d_model)
        count = self.graph.layers[first].heads.start if first < self.model.spec.n_layers else len(self.graph.writers)
        old = self._laid(slice(0, count), apart)
        base = old.sum(1)
        for bias in self._biases[:first]:
            base = base if bias is None else base + bias.detach().repeat(shape[0] * shape[1])
        own = self._embed[None] if first == 0 else self.own[:count]
        stream = _Stream(runs, shape, base, [self._lay(own, apart) - old])
        if not graded:
            rest = len(self.graph.writers) - count
            stream.buffer = base.new_empty(runs, rest, shape[0] * shape[1] * shape[2])
        return stream

    def _layer(self, layer: int, mask: Tensor, stream: _Stream, apart: bool) -> None:
        places = self.graph.layers[layer]
        runs, (prompts, tokens, width) = stream.runs, stream.shape
        z = self._attention(layer, mask[:, : places.heads.start, places.q.start : places.v.stop], stream)
        heads = torch.einsum("ihtc,hcd->hitd", z, self._weights[layer].detach())
        heads = heads.reshape(-1, runs, prompts * tokens * width).transpose(0, 1)
        has_mlp, parallel = places.mlp.stop > places.mlp.start, self.model.spec.parallel
        found = self._mlp(layer, mask, stream) if has_mlp and parallel else None
        self._written(heads, places.heads, stream, apart, self._biases[layer])
        if has_mlp:
            found = self._mlp(layer, mask, stream) if found is None else found
            self._written(found.view(runs, 1, -1), places.mlp_out, stream, apart, None)

    def _written(self, found: Tensor, where: slice, stream: _Stream, apart: bool, bias: Tensor | None) -> None:
        old = self._laid(where, apart)
        stream.base = stream.base + old.sum(1)
        if bias is not None:
            stream.base = stream.base + bias.detach().repeat(stream.shape[0] * stream.shape[1])
        stream.add(found - old)

    def _attention(self, layer: int, columns: Tensor, stream: _Stream) -> Float[Tensor, "item head token dim"]:
        """z of a layer in every run and prompt, each head with q, k and v of its own inputs."""
        distinct, which = _distinct(columns)
        spec = self.model.spec.layers[layer]
        counts = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
        owners = dict(zip(_QKV, torch.split(which, list(counts.values())), strict=True))
        picked: dict[str, list[Tensor]] = {name: [] for name in _QKV}
        order: dict[str, list[Tensor]] = {name: [] for name in _QKV}
        items = stream.runs * stream.shape[0]
        at_once = max(1, ROWS // (items * self.tokens))
        call: AttentionCall | None = None
        for first in range(0, distinct.shape[2], at_once):
            part = distinct[:, :, first : first + at_once]
            call = self._projected(layer, stream.mixed(part))
            for name in _QKV:
                heads = ((owners[name] >= first) & (owners[name] < first + part.shape[2])).nonzero().flatten()
                value: Tensor = getattr(call, name)[0]
                value = value.reshape(len(value), part.shape[2], items, self.tokens, -1)
                picked[name].append(value[heads, owners[name][heads] - first])
                order[name].append(heads)
        assert call is not None
        q, k, v = (torch.cat(picked[name])[torch.cat(order[name]).argsort()].transpose(0, 1) for name in _QKV)
        return replace(
            call, q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), key_start=None, key_end=None
        ).output()

    def _projected(self, layer: int, hidden: Float[Tensor, "row d_model"]) -> AttentionCall:
        """The attention call of a block on rows; nothing after it runs."""
        seen: list[AttentionCall] = []

        def attend(call: AttentionCall) -> Tensor:
            seen.append(call)
            raise _Read

        with suppress(_Read):
            self.blocks.run(layer, hidden, self._positions(hidden), attend)
        return seen[0]

    def _mlp(self, layer: int, mask: Tensor, stream: _Stream) -> Float[Tensor, "row d_model"]:
        """What the MLP writes; its block runs on the MLP's input with nothing from attention."""
        place = self.graph.layers[layer].mlp.start
        hidden = stream.mixed(mask[:, : self._before[place], place : place + 1])
        seen: list[Tensor] = []

        def note(value: Tensor) -> Tensor:
            seen.append(value)
            return value

        self.blocks.run(
            layer, hidden, self._positions(hidden), lambda call: torch.zeros_like(call.q),
            {"attn_out": torch.zeros_like, "mlp_out": note},
        )  # fmt: skip
        return seen[0]

    def _positions(self, hidden: Tensor) -> Int[Tensor, " row"]:
        return torch.arange(self.tokens, device=hidden.device).repeat(len(hidden) // self.tokens)

    def _laid(self, where: slice, apart: bool) -> Tensor:
        return self._lay(self.replacement[where], apart)

    def _lay(self, value: Writes, apart: bool) -> Float[Tensor, "run writer rest"]:
        """Writes as the stream holds them: with one mask for all prompts, or one for each."""
        whole = value.to(self._embed).expand(-1, self.prompts, self.tokens, -1)
        return whole.transpose(0, 1).flatten(2) if apart else whole.flatten(1)[None]

    def _writes(self, stream: _Stream, apart: bool) -> Writes:
        """What writers wrote in a run of one mask, or of one for each prompt."""
        whole = torch.cat(list(stream.differences()), 1) + self._laid(slice(None), apart)
        shaped = whole.view(len(whole), whole.shape[1], *stream.shape)
        return shaped[:, :, 0].transpose(0, 1) if apart else shaped[0]


def _distinct(
    columns: Float[Tensor, "run writer reader"],
) -> tuple[Float[Tensor, "run writer some"], Int[Tensor, " reader"]]:
    """Readers with the same columns have the same input: each once, and which one is whose."""
    if columns.requires_grad:
        return columns, torch.arange(columns.shape[2], device=columns.device)
    rows = columns.permute(2, 0, 1).flatten(1)
    found, which = torch.unique(rows, dim=0, return_inverse=True)
    return found.view(-1, *columns.shape[:2]).permute(1, 2, 0), which


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the weights, while they flow to masks and replacements."""
    wanted: list[Any] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
