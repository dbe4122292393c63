"""Launches of the column kernel."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from workbench.kernels.fused import hopper_pass
from workbench.kernels.fused.call import FusedCall, strides
from workbench.kernels.fused.columns import column_kernel
from workbench.kernels.fused.tuning import tiles_for
from workbench.kernels.request import StatisticsRequest


def columns(call: FusedCall, request: StatisticsRequest, lse: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    """What keys receive: sums, maxima, weighted sums, first queries above thresholds."""
    if not (request.needs_columns or weights is not None):
        return {}
    keys = call.geometry.keys
    found = {name: call.empty(keys) for name in ("column_sum", "column_max") if getattr(request, name)}
    if found and hopper_pass.takes(call):
        hopper_pass.hopper_columns(call, lse, found.get("column_sum"), found.get("column_max"))
    elif found:
        _launch(call, lse, sums=found.get("column_sum"), tops=found.get("column_max"))
    if weights is not None:
        found["column_weighted"] = call.empty(weights.shape[1], keys)
        by_query = call.where_real(weights.float()).transpose(1, 2).contiguous()
        _launch(call, lse, weights=by_query, weighted=found["column_weighted"])
    for name, wanted in (("column_last", request.column_last), ("column_above", request.column_above)):
        if not wanted:
            continue
        parts = []
        for value in wanted:
            parts.append(call.empty(keys, dtype=torch.int64 if name == "column_above" else torch.float32))
            if name == "column_last":
                _launch(call, lse, sums=parts[-1], last=min(int(value), call.geometry.queries))
            else:
                _launch(call, lse, first=parts[-1], level=value)
        found[name] = torch.stack(parts, dim=2)
    return found


def _launch(
    call: FusedCall,
    lse: Tensor,
    *,
    sums: Tensor | None = None,
    tops: Tensor | None = None,
    weights: Tensor | None = None,
    weighted: Tensor | None = None,
    first: Tensor | None = None,
    level: float = 1.0,
    last: int | None = None,
) -> None:
    """Fill the arrays that are given; `weights` `[batch, query, column]`, sums over the `last` queries alone."""
    tiles = tiles_for("columns", call.q.shape[-1], call.q.dtype, call.q.device)
    none, keys = call.none(), call.geometry.keys
    width = 1 if weights is None else weights.shape[-1]
    since = none if last is None else (call.real_keys[1] - call.geometry.query_offset - last).clamp(min=0)
    column_kernel[(triton.cdiv(keys, tiles.keys), len(call.q) * call.heads)](
        call.q, call.k, lse, none if weights is None else weights, *call.bounds, since,
        *(none if array is None else array for array in (sums, tops, weighted, first)),
        *strides(call.q), *strides(call.k), *((0, 0) if weights is None else weights.stride()[:2]), *call.sizes,
        *call.numbers, math.log2(max(level, 1e-38)), call.q.shape[-1],
        C=width, C_PAD=call.pad(width), M=tiles.rows, N=tiles.keys, EVEN=call.even, EXACT=call.exact,
        SUM=sums is not None, MAXIMUM=tops is not None, WEIGHTS=weights is not None, ABOVE=first is not None,
        LAST=last is not None, num_warps=tiles.warps, num_stages=tiles.stages, **call.flags,
    )  # fmt: skip
