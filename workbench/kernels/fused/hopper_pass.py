"""Launches of the Hopper kernels, and which calls they take."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from workbench.kernels.fused.call import LN2, FusedCall
from workbench.kernels.request import StatisticsRequest

WIDTHS = (64, 128)
# Keys (or queries) of a streamed tile, and the places of its ring, with and without values beside it.
TILE, STAGES_WITH_VALUES, STAGES = 128, 2, 4


def takes(call: FusedCall, *tensors: Tensor) -> bool:
    """Whether the Hopper kernels compute this attention: half precision, 64 or 128 wide, nothing but causality, and
    tensors that the copy engine can address (16-byte steps)."""
    width, geometry = call.q.shape[-1], call.geometry
    return (
        _is_hopper(call.q.device)
        and call.q.dtype in (torch.float16, torch.bfloat16)
        and width in WIDTHS
        and call.v.shape[-1] == width
        and call.softcap is None
        and call.sinks is None
        and geometry.start is None
        and geometry.end is None
        and geometry.window_of(geometry.keys) is None
        and geometry.queries <= geometry.keys
        and all(_addressable(x) for x in (call.q, call.k, *tensors))
    )


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        from workbench.kernels.fused import hopper_columns  # noqa: F401
    except ImportError:
        # An older Triton has no Gluon, or another one; the portable kernels serve.
        return False
    return True


def _addressable(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in x.stride()[:-1])


def hopper_rows(call: FusedCall, request: StatisticsRequest, arrays: dict[str, Tensor]) -> None:
    """Fill lse and, where asked for, output, max_logit, argmax, entropy; the contract of `row_kernel`."""
    from workbench.kernels.fused.hopper import GROUPS, START_REGISTERS, M, hopper_row_kernel

    rows, none = GROUPS.value * M.value, call.none()
    names = ("output", "lse", "max_logit", "argmax", "entropy")
    hopper_row_kernel[(triton.cdiv(call.geometry.queries, rows), len(call.q) * call.heads)](
        _descriptor(call.q, M.value), _descriptor(call.k, TILE), _descriptor(call.v, TILE),
        *(arrays.get(name, none) for name in names), *call.sizes, call.numbers[0],
        GROUP=call.group, N=TILE, STAGES=STAGES_WITH_VALUES if request.output else STAGES, W=call.q.shape[-1],
        CAUSAL=call.geometry.causal, OUTPUT=request.output, ENTROPY=request.entropy, MAXIMUM="max_logit" in arrays,
        ARGMAX=request.argmax, num_warps=4, maxnreg=START_REGISTERS,
    )  # fmt: skip


def hopper_columns(call: FusedCall, lse: Tensor, sums: Tensor | None, tops: Tensor | None) -> None:
    """Fill the arrays that are given; the contract of `column_kernel`."""
    from workbench.kernels.fused.hopper import GROUPS, HIDDEN, START_REGISTERS, M
    from workbench.kernels.fused.hopper_columns import hopper_column_kernel

    keys, none, queries = GROUPS.value * M.value, call.none(), call.geometry.queries
    beyond = lse.new_full((*lse.shape[:2], (triton.cdiv(queries, TILE) + 1) * TILE), -HIDDEN.value)
    torch.mul(lse, 1.0 / LN2, out=beyond[..., :queries])
    hopper_column_kernel[(triton.cdiv(call.geometry.keys, keys), len(call.q) * call.heads)](
        _descriptor(call.q, TILE), _descriptor(call.k, M.value), beyond, none if sums is None else sums,
        none if tops is None else tops, beyond.stride(1), *call.sizes, call.numbers[0],
        GROUP=call.group, N=TILE, STAGES=STAGES, W=call.q.shape[-1], CAUSAL=call.geometry.causal,
        SUM=sums is not None, MAXIMUM=tops is not None, num_warps=4, maxnreg=START_REGISTERS,
    )  # fmt: skip


def _descriptor(x: Tensor, rows: int) -> object:
    """What the copy engine needs to fetch `rows` positions of one head."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, x.shape[-1]]
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, kind))
