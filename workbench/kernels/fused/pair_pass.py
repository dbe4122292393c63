"""Launches of the pair kernel: single entries of attention, or their logits."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from workbench.kernels.fused.call import FusedCall, strides
from workbench.kernels.fused.pairs import pair_kernel

ROWS = 64


@lru_cache(maxsize=256)
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A short list on the device, copied there once: a copy makes the host wait for all that runs."""
    return torch.tensor(values, dtype=dtype, device=device)


def pairs(
    call: FusedCall, lse: Tensor, *, offsets: Tensor | None = None, slots: Tensor | None = None, logit: bool = False
) -> Tensor:
    """Mass (or `logit`) at offsets, or at the keys `[batch, head or 1, query, slot]` listed for each query (-1: none);
    `[batch, head, query, slot]`."""
    listed = offsets if slots is None else slots
    assert listed is not None
    steps = (0, 0, 0)
    if slots is not None:
        listed = slots.contiguous()
        steps = (listed.stride(0), listed.stride(1) if listed.shape[1] > 1 else 0, listed.stride(2))
    out = call.empty(call.geometry.queries, listed.shape[-1])
    pair_kernel[(triton.cdiv(call.geometry.queries, ROWS), len(call.q) * call.heads)](
        call.q, call.k, lse, listed, listed, *call.bounds, out, *strides(call.q), *strides(call.k), *steps,
        *call.sizes, *call.numbers, call.q.shape[-1],
        COUNT=listed.shape[-1], M=ROWS, OFFSET=slots is None, LOGIT=logit, num_warps=4, **call.flags,
    )  # fmt: skip
    return out
