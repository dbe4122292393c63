"""One attention call as the kernels take it: tensors, strides, and what they are specialised on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.geometry import Geometry

LN2 = log(2.0)


@dataclass(frozen=True)
class FusedCall:
    """An attention call: q `[B,H,Q,D]`, k and v `[B,Hk,K,D]` (unit stride along the last axis)."""

    q: Tensor
    k: Tensor
    v: Tensor
    geometry: Geometry
    scale: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def exact(self) -> bool:
        """Float32 inputs are multiplied in float32, never in TF32."""
        return self.q.dtype == torch.float32

    @property
    def padded(self) -> bool:
        return self.geometry.start is not None or self.geometry.end is not None

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """`real_keys` for a kernel, which reads them only where there is padding."""
        return self.real_keys if self.padded else (self.none(), self.none())

    @cached_property
    def real_keys(self) -> tuple[Tensor, Tensor]:
        """First and end of each prompt's real keys."""
        start, end, device = self.geometry.start, self.geometry.end, self.q.device
        low = (
            torch.zeros(len(self.q), dtype=torch.int32, device=device)
            if start is None
            else start.to(device, torch.int32)
        )
        high = torch.full_like(low, self.geometry.keys) if end is None else end.to(device, torch.int32)
        return low.clamp(0, self.geometry.keys), high.clamp(0, self.geometry.keys)

    def where_real(self, value: Tensor) -> Tensor:
        """`value` `[batch, lane, query]`, zero at queries that see no key."""
        if not self.padded and not (self.geometry.causal and self.geometry.query_offset < 0):
            return value
        place = torch.arange(self.geometry.queries, device=self.q.device) + self.geometry.query_offset
        low, high = self.real_keys
        real = (place >= low[:, None]) & (place < high[:, None])
        return torch.where(real[:, None], value, 0.0)

    @property
    def flags(self) -> dict[str, Any]:
        """What every kernel is specialised on."""
        return {
            "GROUP": self.group,
            "D_PAD": self.pad(self.q.shape[-1]),
            "CAUSAL": self.geometry.causal,
            "WINDOW": self.geometry.window_of(self.geometry.keys) is not None,
            "SOFTCAP": self.softcap is not None,
            "PADDED": self.padded,
        }

    @property
    def numbers(self) -> tuple[float, float, int]:
        """Base-2 scale, soft cap and window."""
        return self.scale / LN2, self.softcap or 1.0, self.geometry.window or 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads, queries and keys."""
        return self.heads, self.geometry.queries, self.geometry.keys

    @property
    def even(self) -> bool:
        """Whether a tile that touches no edge needs no bounds at all."""
        dim, values = self.q.shape[-1], self.v.shape[-1]
        return dim == self.pad(dim) and values == self.pad(values)

    def pad(self, width: int) -> int:
        """The width of a tile that holds `width` columns: a power of two.

        In half precision a tile's rows fill 128 bytes: Triton 3.6 reads beyond narrower ones in shared memory on
        Hopper (triton issues 10629 and 11366).
        """
        least = 64 if self.q.dtype in (torch.float16, torch.bfloat16) and self.q.device.type == "cuda" else 16
        return max(least, 1 << (width - 1).bit_length())

    def empty(self, *tail: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An array per batch and query head; every kernel writes all of it."""
        return self.q.new_empty(*self.q.shape[:2], *tail, dtype=dtype)

    def real_only(self, functions: Tensor) -> Tensor:
        """Functions `[batch, lane, key, column]` of the key, zero in padding, which may hold anything (NaN too)."""
        if not self.padded:
            return functions
        index = torch.arange(self.geometry.keys, device=self.q.device)
        low, high = self.real_keys
        hidden = (index < low[:, None]) | (index >= high[:, None])
        return functions.masked_fill(hidden[:, None, :, None], 0)

    def none(self) -> Tensor:
        """Stands for an array that a kernel does not touch."""
        return self.q


def power_of_two(largest: Tensor) -> Tensor:
    """Exact factors (float32) that bring `largest` to 2^14 or more, below 2^15; one where it is zero or not finite."""
    exponent = torch.frexp(largest.float()).exponent
    steps = torch.where((largest > 0) & torch.isfinite(largest), 15 - exponent, 0).clamp(-100, 100)
    return ((steps.to(torch.int32) + 127) << 23).view(torch.float32)


def strides(x: Tensor) -> tuple[int, ...]:
    """All but the last axis's."""
    return x.stride()[:-1]
