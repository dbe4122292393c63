"""Launches of the row kernel, whole or with its keys split among programs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from workbench.kernels.fused import hopper_pass
from workbench.kernels.fused.call import FusedCall, strides
from workbench.kernels.fused.merge import merge_kernel
from workbench.kernels.fused.pair_pass import pairs
from workbench.kernels.fused.rows import row_kernel
from workbench.kernels.fused.tuning import Tiles, tiles_for
from workbench.kernels.request import StatisticsRequest

# Up to so many queries, the heads of a group share their keys' tiles, and the keys are split among programs.
FEW_QUERIES = 64
# Rows (queries x heads of a group) of such a program at most.
PACKED_ROWS = 128


def row_pass(call: FusedCall, request: StatisticsRequest) -> dict[str, Tensor]:
    """The statistics that the row kernel carries; "lse" is always among them."""
    found = _launch(call, request)
    result = {"lse": found["lse"]}
    for name in ("output", "entropy", "mean_logit", "distance", "spread", "max_logit", "argmax"):
        if getattr(request, name):
            result[name] = found[name]
    if request.max_prob:
        result["max_prob"] = call.where_real(torch.exp(found["max_logit"] - found["lse"]))
    if request.sink_mass:
        none = torch.zeros_like(found["lse"])
        if call.sinks is not None:
            # Not 1 less the keys' mass: that would cancel.
            none = call.where_real(torch.exp(call.sinks.float()[:, None] - found["lse"]))
        result["sink_mass"] = none
    return result


def _splits(call: FusedCall, tiles: Tiles, programs: int) -> tuple[int, int]:
    """How many programs share a row's keys, and the key tiles of each."""
    count = triton.cdiv(call.geometry.keys, tiles.keys)
    wanted = 16
    if call.q.device.type == "cuda":
        wanted = 2 * torch.cuda.get_device_properties(call.q.device).multi_processor_count
    splits = max(1, min(triton.cdiv(wanted, programs), triton.cdiv(count, 2)))
    each = triton.cdiv(count, splits)
    return triton.cdiv(count, each), each


def _launch(call: FusedCall, request: StatisticsRequest) -> dict[str, Tensor]:
    batch, heads, queries, dim = call.q.shape
    packed = queries <= FEW_QUERIES and queries < call.geometry.keys
    beyond = request.mean_logit or request.distance or request.spread
    if not packed and not beyond and hopper_pass.takes(call, call.v):
        arrays = _arrays(call, request, ())
        hopper_pass.hopper_rows(call, request, arrays)
        if request.argmax and "max_logit" in arrays:
            # The maximum was rounded to make room for its column: take that one logit again.
            place = arrays["argmax"][..., None]
            arrays["max_logit"] = pairs(call, arrays["lse"], slots=place, logit=True)[..., 0]
        return arrays
    kind = "rows" if request.output else "rows only"
    tiles = tiles_for(kind, max(dim, call.v.shape[-1]), call.q.dtype, call.q.device)
    if packed:
        rows = min(PACKED_ROWS, max(16, 1 << (queries * call.group - 1).bit_length()))
        tiles = tiles._replace(rows=rows, warps=min(tiles.warps, 8 if rows == PACKED_ROWS else 4))
    lanes = batch * (call.k.shape[1] if packed else heads)
    blocks = triton.cdiv(queries * (call.group if packed else 1), tiles.rows)
    splits, each = _splits(call, tiles, blocks * lanes) if packed else (1, 0)
    arrays = _arrays(call, request, (splits,) if splits > 1 else ())
    none = call.none()
    names = ("output", "lse", "max_logit", "argmax", "entropy", "mean_logit", "distance", "spread", "real")
    row_kernel[(blocks, lanes, splits)](
        call.q, call.k, call.v, none if call.sinks is None else call.sinks.float(), *call.bounds,
        *(arrays.get(name, none) for name in names), *strides(call.q), *strides(call.k), *strides(call.v),
        *call.sizes, each, *call.numbers, dim, call.v.shape[-1],
        DV_PAD=call.pad(call.v.shape[-1]) if request.output else 16, M=tiles.rows, N=tiles.keys, EVEN=call.even,
        SINK=call.sinks is not None and splits == 1, EXACT=call.exact, PACKED=packed, SPLIT=splits > 1,
        OUTPUT=request.output, ENTROPY=request.entropy, MAXIMUM="max_logit" in arrays, ARGMAX=request.argmax,
        MEAN=request.mean_logit, PLACE=request.distance or request.spread, num_warps=tiles.warps,
        num_stages=tiles.stages, **call.flags,
    )  # fmt: skip
    if splits > 1:
        return _merged(call, request, arrays)
    return arrays


def _arrays(call: FusedCall, request: StatisticsRequest, lead: tuple[int, ...]) -> dict[str, Tensor]:
    """Uninitialised results (or split states): the kernel writes every entry."""
    wanted = {"lse": True, "real": bool(lead) or call.sinks is not None, "output": request.output}
    wanted |= {name: getattr(request, name) for name in ("argmax", "entropy", "mean_logit")}
    wanted["max_logit"] = request.max_logit or request.max_prob or (bool(lead) and request.argmax)
    wanted["distance"] = wanted["spread"] = request.distance or request.spread
    shape = (*lead, *call.q.shape[:3])
    return {
        name: call.q.new_empty(
            *shape,
            *((call.v.shape[-1],) if name == "output" else ()),
            dtype=torch.int64 if name == "argmax" else torch.float32,
        )
        for name, asked in wanted.items()
        if asked
    }


def _merged(call: FusedCall, request: StatisticsRequest, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """One row from the states of its splits."""
    splits, none = len(states["lse"]), call.none()
    arrays = _arrays(call, request, ())
    arrays["real"] = torch.empty_like(arrays["lse"])
    if "max_logit" in states:
        arrays["max_logit"] = torch.empty_like(arrays["lse"])
    names = ("lse", "real", "output", "entropy", "mean_logit", "distance", "spread", "max_logit", "argmax")
    rows, flags = arrays["lse"].numel(), call.flags
    merge_kernel[(rows,)](
        *(states.get(name, none) for name in names), none if call.sinks is None else call.sinks.float(), *call.bounds,
        *(arrays.get(name, none) for name in names), rows, *call.sizes, call.geometry.window or 0, call.v.shape[-1],
        SPLITS=splits, S_PAD=max(2, 1 << (splits - 1).bit_length()), DV_PAD=1 << (call.v.shape[-1] - 1).bit_length(),
        PADDED=flags["PADDED"], SINK=call.sinks is not None, CAUSAL=flags["CAUSAL"], WINDOW=flags["WINDOW"],
        OUTPUT=request.output, ENTROPY=request.entropy, MEAN=request.mean_logit,
        PLACE=request.distance or request.spread, MAXIMUM="max_logit" in states, ARGMAX=request.argmax, num_warps=4,
    )  # fmt: skip
    return arrays
