"""Launches of the feature kernel."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from workbench.kernels.fused.call import FusedCall, power_of_two, strides
from workbench.kernels.fused.features import SHIFT, feature_kernel
from workbench.kernels.fused.tuning import tiles_for


def features(call: FusedCall, lse: Tensor, shared: Tensor | None, own: Tensor | None) -> dict[str, Tensor]:
    """Sums of functions of the key that all heads share `[B, K, C]`, and of each KV head's own `[B, Hk, K, C]`."""
    found = {}
    if shared is not None:
        found["features"] = _launch(call, lse, shared[:, None])
    if own is not None:
        found["value_features"] = _launch(call, lse, own)
    return found


def _halves(call: FusedCall, functions: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Functions in the dtype of the products, what rounding to half precision took from them, and the factor of each
    column `[batch, lane, column]` that undoes its scaling and that of the probabilities."""
    batch, lanes, _, width = functions.shape
    if call.exact or functions.dtype == torch.bool:
        whole = functions.to(call.q.dtype).contiguous()
        return whole, whole, torch.full((batch, lanes, width), 2.0**-SHIFT.value, device=functions.device), False
    factor = power_of_two(functions.abs().amax(2))
    scaled = functions.float() * factor[:, :, None]
    high = scaled.to(call.q.dtype).contiguous()
    return high, (scaled - high.float()).to(call.q.dtype).contiguous(), 2.0**-SHIFT.value / factor, True


def _launch(call: FusedCall, lse: Tensor, functions: Tensor) -> Tensor:
    tiles = tiles_for("features", call.q.shape[-1], call.q.dtype, call.q.device)
    functions = call.real_only(functions)
    high, low, undo, split = _halves(call, functions)
    used = (functions != 0).any(-1)
    # Labelled keys first, in order, without asking the device how many there are.
    order = used.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    before = torch.nn.functional.pad(used.cumsum(-1), (1, 0)).to(torch.int32)
    width = functions.shape[-1]
    out = call.empty(call.geometry.queries, width)

    def lanes(x: Tensor) -> tuple[int, ...]:
        """Strides of batch and KV head, the latter zero where heads share."""
        return x.stride(0), 0 if x.shape[1] == 1 else x.stride(1)

    feature_kernel[(triton.cdiv(call.geometry.queries, tiles.rows), len(call.q) * call.heads)](
        call.q, call.k, lse, high, low, undo, order, before, *call.bounds, out, *strides(call.q), *strides(call.k),
        *lanes(high), high.stride(2), *lanes(undo), *lanes(order), *lanes(before), *call.sizes, *call.numbers,
        call.q.shape[-1], C=width, C_PAD=call.pad(width), M=tiles.rows, N=tiles.keys, EXACT=call.exact, SPLIT=split,
        num_warps=tiles.warps, num_stages=tiles.stages, **call.flags,
    )  # fmt: skip
    return out
