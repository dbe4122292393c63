"""How much memory a trace will take, said before anything is allocated.

What a model's own layers take grows linearly with the tokens of a forward pass; the slope is measured once per
attached model, on two short probes, by counting live tensor storage as operators allocate it (`AllocationMeter`).
What statistics, captured sites and logits take follows from their shapes. The sum is the predicted peak beyond the
weights; a prediction over the limit is refused with both numbers.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.errors import MemoryRefused
from workbench.models.attach import AttentionCall, Attachment

PROBE_TOKENS = (96, 192)


class AllocationMeter(TorchDispatchMode):
    """Bytes of tensor storage alive, and their peak, among what is allocated while the mode is on.

    It sees what operators return, not what they use inside; works on any device, unlike the CUDA counters. Storage
    of the `known` tensors (weights) is not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
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
class BodyCost:
    """Bytes that the model's own layers hold: `fixed + per_token * tokens`, outside attention and at its entry."""

    fixed: float
    per_token: float
    entry_fixed: float
    entry_per_token: float

    def peak(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens

    def at_attention(self, tokens: int) -> float:
        return self.entry_fixed + self.entry_per_token * tokens


@dataclass(frozen=True)
class Prediction:
    """The predicted peak of one trace beyond the weights (bytes), by what takes it."""

    body: int
    attention: int
    logits: int
    stored: int

    @property
    def peak(self) -> int:
        """Layers, attention and logits take turns; what is kept is held throughout."""
        return self.stored + max(self.body, self.attention, self.logits)

    def check(self, limit: int | None, advice: str) -> None:
        """Refuse a peak over `limit` bytes (None: what the machine has free)."""
        allowed = limit
        if allowed is not None and self.peak > allowed:
            raise MemoryRefused(
                f"This trace needs about {size(self.peak)} beyond the weights ({size(self.stored)} of it kept), "
                f"but {size(allowed)} are allowed. {advice}"
            )

    def __str__(self) -> str:
        return f"predicted peak {size(self.peak)} beyond the weights, {size(self.stored)} of it kept"


def size(count: float) -> str:
    """Bytes for people: binary units, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None


def measure_body(attachment: Attachment) -> BodyCost:
    """Run two short prompts and fit what the model's own layers hold per token."""
    longest = attachment.spec.max_positions or PROBE_TOKENS[1]
    counts = [min(tokens, max(2, longest // (2 - i))) for i, tokens in enumerate(PROBE_TOKENS)]
    (few, (peak_few, entry_few)), (many, (peak_many, entry_many)) = (
        (n, _probe(attachment, n)) for n in counts
    )
    step = max(1, many - few)
    slope, entry_slope = (peak_many - peak_few) / step, (entry_many - entry_few) / step
    return BodyCost(peak_few - slope * few, slope, entry_few - entry_slope * few, entry_slope)


def _probe(attachment: Attachment, tokens: int) -> tuple[int, int]:
    """Peak of one forward pass over `tokens` tokens, and what is alive when attention is entered."""
    hf_model = attachment.hf_model
    meter, entries = AllocationMeter([*hf_model.parameters(), *hf_model.buffers()]), [0]

    def watch(call: AttentionCall) -> Tensor:
        # What attention itself takes is known from its shapes; a stand-in of z's size keeps it out of the slope.
        entries.append(meter.current)
        return call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1])

    vocabulary = attachment.spec.vocab_size
    ids = (torch.arange(tokens, device=attachment.device) * 7919 % vocabulary)[None]
    with torch.no_grad(), attachment.observe(watch), meter:
        hf_model(ids, use_cache=False, logits_to_keep=1)
    return meter.peak, max(entries)
