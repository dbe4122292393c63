"""Launches of the row kernel, whole or with its keys split among programs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from workbench.kernels.fused.call import LN2, FusedCall, strides
from workbench.kernels.fused.rows import row_kernel
from workbench.kernels.fused.tuning import Tiles, tiles_for
from workbench.kernels.request import StatisticsRequest

# At most this many rows (queries x heads of a group) are taken together, their keys split among programs.
PACKED_ROWS = 64


def row_pass(call: FusedCall, request: StatisticsRequest) -> dict[str, Tensor]:
    """The statistics that the row kernel carries; "lse" is always among them."""
    found = _launch(call, request)
    result = {"lse": found["lse"]}
    for name in ("output", "entropy", "mean_logit", "distance", "spread", "max_logit", "argmax"):
        if getattr(request, name):
            result[name] = found[name]
    if request.max_prob:
        result["max_prob"] = torch.where(call.real_rows, torch.exp(found["max_logit"] - found["lse"]), 0.0)
    if request.sink_mass:
        result["sink_mass"] = torch.where(call.real_rows, 1.0 - found["real"], 0.0)
    return result


def _splits(call: FusedCall, tiles: Tiles, lanes: int) -> tuple[int, int]:
    """How many programs share a row's keys, and the key tiles of each."""
    count = triton.cdiv(call.geometry.keys, tiles.keys)
    wanted = 16
    if call.q.device.type == "cuda":
        wanted = 2 * torch.cuda.get_device_properties(call.q.device).multi_processor_count
    splits = max(1, min(triton.cdiv(wanted, lanes), triton.cdiv(count, 2)))
    each = triton.cdiv(count, splits)
    return triton.cdiv(count, each), each


def _launch(call: FusedCall, request: StatisticsRequest) -> dict[str, Tensor]:
    batch, heads, queries, dim = call.q.shape
    packed = queries * call.group <= PACKED_ROWS and queries < call.geometry.keys
    kind = "rows" if request.output else "rows only"
    tiles = tiles_for(kind, max(dim, call.v.shape[-1]), call.q.dtype, call.q.device)
    if packed:
        tiles = tiles._replace(rows=max(16, 1 << (queries * call.group - 1).bit_length()), warps=4)
    lanes = batch * (call.k.shape[1] if packed else heads)
    splits, each = _splits(call, tiles, lanes) if packed else (1, 0)
    arrays = _arrays(call, request, (splits,) if splits > 1 else ())
    none = call.none()
    names = ("output", "lse", "max_logit", "argmax", "entropy", "mean_logit", "distance", "spread", "real")
    row_kernel[(triton.cdiv(queries * (call.group if packed else 1), tiles.rows), lanes, splits)](
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
        return merge_states(call, arrays)
    if call.sinks is None:
        arrays["real"] = call.real_rows.to(torch.float32).expand_as(arrays["lse"])
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


def merge_states(call: FusedCall, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """One row from the states of its splits: every sum is rescaled to the common maximum."""
    m, length = states["lse"], states["real"]
    shift = m.amax(0)
    sink = None
    if call.sinks is not None:
        sink = (call.sinks.float() / LN2)[None, :, None]
        shift = torch.maximum(shift, sink)
    weight = torch.exp2(m - shift) * (length > 0)
    seen = call.real_rows
    total = (length * weight).sum(0)
    norm = total if sink is None else total + torch.exp2(sink - shift)
    norm = torch.where(seen, norm, 1.0)
    level = torch.where(seen, torch.log2(norm) + shift, 0.0)
    merged = {"lse": level * LN2, "real": total / norm}
    if "output" in states:
        merged["output"] = (states["output"] * weight[..., None]).sum(0) / norm[..., None]
    if "entropy" in states:
        spent = ((states["entropy"] + length * (m - shift)) * weight).sum(0) / norm
        entropy = ((level - shift) * merged["real"] - spent) * LN2
        merged["entropy"] = torch.where(seen, entropy.clamp(min=0.0), 0.0)
    if "mean_logit" in states:
        merged["mean_logit"] = torch.where(seen, states["mean_logit"].sum(0) * LN2 / call.visible_keys, 0.0)
    if "distance" in states:
        share = length * weight / torch.where(total > 0, total, 1.0)
        centre = (states["distance"] * share).sum(0)
        moment = (states["spread"] * weight).sum(0) / torch.where(total > 0, total, 1.0)
        moment = moment + (share * (states["distance"] - centre) ** 2).sum(0)
        place = torch.arange(call.geometry.queries, device=m.device) + call.geometry.query_offset
        merged["distance"] = torch.where(seen, (place - centre) * merged["real"], 0.0)
        merged["spread"] = torch.where(seen, moment.clamp(min=0.0).sqrt(), 0.0)
    if "max_logit" in states:
        top, best = states["max_logit"].max(0)
        merged["max_logit"] = torch.where(seen, top, 0.0)
        if "argmax" in states:
            merged["argmax"] = torch.where(seen, states["argmax"].gather(0, best[None])[0], -1)
    return merged
