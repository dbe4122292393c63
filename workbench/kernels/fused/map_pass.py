"""Launches of the kernels that pool attention into blocks and along diagonals."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from workbench.kernels.fused.call import FusedCall, strides
from workbench.kernels.fused.maps import block_kernel, diagonal_kernel
from workbench.kernels.fused.tuning import tiles_for
from workbench.kernels.pyramid import pooled
from workbench.kernels.request import HEAVY

# Tiles that are skewed are square.
DIAGONAL = 64


def block_maps(call: FusedCall, block: int, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and maximum of every block x block part, `[batch, head, block row, block column]`."""
    sums, tops = _blocks(call, block, lse, None)
    assert tops is not None
    return sums, tops


def removal_map(
    call: FusedCall, block: int, lse: Tensor, gradient: Tensor, delta: Tensor, undo: Tensor
) -> tuple[Tensor, Tensor]:
    """Block sums of the absolute first-order effect of removing an entry, given dO and D = dO . o, times `undo` of its
    row; entries above `HEAVY` are left out, and named by row (-1: none)."""
    heavy = call.empty(call.geometry.queries, dtype=torch.int64)
    return _blocks(call, block, lse, (gradient, delta, undo, heavy))[0], heavy


def _blocks(
    call: FusedCall, block: int, lse: Tensor, removal: tuple[Tensor, Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    tiles = tiles_for("blocks", call.q.shape[-1], call.q.dtype, call.q.device)
    base = min(block, tiles.rows, tiles.keys)
    shape = triton.cdiv(call.geometry.queries, base), triton.cdiv(call.geometry.keys, base)
    sums = call.empty(*shape).zero_()
    tops = torch.zeros_like(sums) if removal is None else None
    none = call.none()
    block_kernel[(triton.cdiv(call.geometry.queries, tiles.rows), len(call.q) * call.heads)](
        call.q, call.k, call.v, lse, *((none,) * 4 if removal is None else removal), *call.bounds, sums,
        none if tops is None else tops, *strides(call.q), *strides(call.k), *strides(call.v),
        *call.sizes, *shape, *call.numbers, call.q.shape[-1], call.v.shape[-1],
        DV_PAD=call.pad(call.v.shape[-1]), M=tiles.rows, N=tiles.keys, B=base, EXACT=call.exact,
        MAXIMUM=tops is not None, REMOVAL=removal is not None, HEAVY=HEAVY, num_warps=tiles.warps,
        num_stages=tiles.stages, **call.flags,
    )  # fmt: skip
    if base < block:
        sums = pooled(sums, block // base, "sum")
        tops = None if tops is None else pooled(tops, block // base, "max")
    return sums, tops


def diagonals(call: FusedCall, last: int, lse: Tensor) -> Tensor:
    """Sum over the last `last` queries of the mass at each distance, `[batch, head, distance]`."""
    keys = call.geometry.keys
    count = triton.cdiv(keys, DIAGONAL) + 1
    out = call.empty(count, 2, DIAGONAL)
    low, high = call.real_keys
    # The last queries of a padded prompt end where its keys do.
    first = (high - call.geometry.query_offset - last).clamp(min=0)
    diagonal_kernel[(count, len(call.q) * call.heads)](
        call.q, call.k, lse, low, high, first, out, *strides(call.q), *strides(call.k), *call.sizes, *call.numbers,
        call.q.shape[-1], N=DIAGONAL, EXACT=call.exact, num_warps=4, num_stages=1,
        **call.flags,
    )  # fmt: skip
    near, far = out[..., 0, :], out[..., 1, :]
    total = near[:, :, :-1] + far[:, :, 1:]
    return total.flatten(2)[..., :keys]
