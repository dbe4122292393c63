"""How much memory a trace will take, said before anything is allocated.

What a model's own layers hold grows linearly with the tokens of a forward pass; it is measured once per
attached model, on three short probes, by counting live tensor storage as operators allocate it
(`AllocationMeter`), from mark to mark along the pass. What statistics, captured sites and logits take follows
from their shapes, and is held from the mark on where it is stored. The most that is held at any mark is the
predicted peak beyond the weights; a prediction over the limit is refused with both numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.errors import MemoryRefused
from workbench.models.architectures import ends
from workbench.models.attach import Attachment, AttentionCall
from workbench.models.available import available_memory

PROBE_TOKENS = 96
LOGIT_ROWS = 8


class AllocationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of tensor storage alive, and their peak, among what is allocated while the mode is on.

    It sees what operators return, not what they use inside; works on any device, unlike the CUDA counters.
    Storage of the `known` tensors (weights) is not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._live = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address == 0 or address in self._live:
            return
        self._live.add(address)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._live.discard(address)
        self.current -= size


@dataclass(frozen=True)
class Cost:
    """Bytes held in a forward pass, as a function of its size.

    What depends on positions alone (rotary angles) is held once for all prompts, unless padding gives each
    prompt positions of its own.
    """

    fixed: float
    per_token: float
    per_position: float

    def __call__(self, prompts: int, tokens: int, padded: bool) -> int:
        positions = tokens * (prompts if padded else 1)
        return int(self.fixed + self.per_token * prompts * tokens + self.per_position * positions)


@dataclass(frozen=True)
class Mark:
    """A place that a forward pass comes by, in a layer.

    `place` is the name of a site, "attention" (where the attention function is entered), "logits" (where the
    unembedding is) or "end"; `alive` is what is held there, `peak` the most that was since the mark before.
    """

    place: str
    layer: int
    alive: Cost
    peak: Cost


@dataclass(frozen=True)
class BodyCost:
    """What the model's own layers hold, mark by mark, and what one row of logits takes while it is made.

    Attention itself is left out: what it takes is known from its shapes.
    """

    marks: tuple[Mark, ...]
    logit_row: float


@dataclass(frozen=True)
class Prediction:
    """The predicted peak of one trace beyond the weights (bytes), what is kept of it, and where it is reached."""

    peak: int
    stored: int
    place: str

    def check(self, limit: int | None, advice: str) -> None:
        """Refuse a peak over `limit` bytes; None, where the system does not say what is free, refuses nothing."""
        if limit is not None and self.peak > limit:
            raise MemoryRefused(
                f"This trace needs about {size(self.peak)} beyond the weights, reached at {self.place} "
                f"({size(self.stored)} are results that it keeps), but {size(limit)} are allowed. {advice}"
            )

    def __str__(self) -> str:
        return f"predicted peak {size(self.peak)} beyond the weights, {size(self.stored)} of results"


def size(count: float) -> str:
    """Bytes for people: binary units, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, a container's limit considered; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return available_memory()


def measure_body(attachment: Attachment) -> BodyCost:
    """Run three short probes and fit what the model's own layers hold per token and per position."""
    longest = attachment.spec.max_positions or 2 * PROBE_TOKENS
    few = max(1, min(PROBE_TOKENS, longest // 2))
    many = max(few, min(2 * few, longest))
    with torch.no_grad():
        one, longer, two = (_Probe(attachment).run(*shape) for shape in ((1, few), (1, many), (2, few)))

    def fit(ones: int, longers: int, twos: int) -> Cost:
        per_token = (twos - ones) / few
        per_position = (longers - ones) / max(1, many - few) - per_token
        return Cost(ones - few * (per_token + per_position), per_token, per_position)

    marks = tuple(
        Mark(a.place, a.layer, fit(a.alive, b.alive, c.alive), fit(a.peak, b.peak, c.peak))
        for a, b, c in zip(one, longer, two, strict=True)
    )
    entry, end = longer[-2:]
    return BodyCost(marks, (end.peak - entry.alive) / min(LOGIT_ROWS, many))


class _Seen(NamedTuple):
    place: str
    layer: int
    alive: int
    peak: int


class _Probe:
    """A forward pass under the meter, with a mark at every place where a trace would store something."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment, self.seen = attachment, list[_Seen]()
        hf_model = attachment.hf_model
        self.meter = AllocationMeter([*hf_model.parameters(), *hf_model.buffers()])

    def run(self, prompts: int, tokens: int) -> list[_Seen]:
        hf_model, spec = self.attachment.hf_model, self.attachment.spec
        ids = torch.arange(prompts * tokens, device=self.attachment.device) * 7919 % spec.vocab_size
        with ExitStack() as stack:
            for layer in self.attachment.layers:
                index = layer.index
                stack.callback(layer.block.register_forward_pre_hook(self._hook("resid_pre", index)).remove)
                writes = (
                    (layer.attention_write, "attn_out"),
                    (layer.mlp_write, "mlp_out"),
                    (layer.block, "resid_post"),
                )
                for module, place in writes:
                    if module is not None:
                        stack.callback(module.register_forward_hook(self._hook(place, index)).remove)
            unembedding = ends(hf_model).unembedding
            stack.callback(unembedding.register_forward_pre_hook(self._hook("logits", spec.n_layers)).remove)
            stack.enter_context(self.attachment.observe(self._attention))
            stack.enter_context(self.meter)
            hf_model(ids.reshape(prompts, tokens), use_cache=False, logits_to_keep=min(LOGIT_ROWS, tokens))
        self._mark("end", spec.n_layers)
        return self.seen

    def _hook(self, place: str, layer: int) -> Callable[..., None]:
        return lambda module, *_: self._mark(place, layer)

    def _attention(self, call: AttentionCall) -> Tensor:
        self._mark("attention", call.layer)
        # A stand-in of z's size: what attention takes is known from its shapes.
        return call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1])

    def _mark(self, place: str, layer: int) -> None:
        self.seen.append(_Seen(place, layer, self.meter.current, self.meter.peak))
        self.meter.peak = self.meter.current
