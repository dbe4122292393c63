"""From a request to kernel launches; the contract of `attention_statistics`.

One row pass gives the output, the log-sum-exp and what is summed beside them; everything else follows from the
log-sum-exp: named entries, bands, columns, blocks, diagonals.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels.fused.call import FusedCall, power_of_two, strides
from workbench.kernels.fused.column_pass import columns
from workbench.kernels.fused.feature_pass import features
from workbench.kernels.fused.map_pass import block_maps, diagonals, removal_map
from workbench.kernels.fused.pair_pass import on_device, pairs
from workbench.kernels.fused.pairs import band_kernel
from workbench.kernels.fused.row_pass import row_pass
from workbench.kernels.fused.select import top_kernel
from workbench.kernels.fused.tuning import tiles_for
from workbench.kernels.geometry import Geometry
from workbench.kernels.request import WIDEST, AttentionStatistics, StatisticsRequest


def fused_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: StatisticsRequest,
    geometry: Geometry,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_features: Tensor | None = None,
    value_features: Tensor | None = None,
    query_keys: Tensor | None = None,
    query_weights: Tensor | None = None,
    lse: Tensor | None = None,
) -> AttentionStatistics:
    """All requested statistics by the Triton kernels, accumulated in float32."""
    call = fused_call(q, k, v, geometry, scale, softcap, sinks)
    if lse is None or request.needs_rows:
        found = row_pass(call, request)
    else:
        found = {"lse": call.where_real(lse.float()).contiguous()}
    lse = found["lse"]
    found |= features(call, lse, key_features, value_features)
    found |= _lookups(call, request, lse, query_keys) | _bands(call, request, lse)
    if request.top_k:
        found["top_keys"], found["top_mass"] = top(call, request.top_k, lse)
    found |= columns(call, request, lse, query_weights)
    if request.block:
        found["block_sum"], found["block_max"] = block_maps(call, request.block, lse)
    if request.diagonal:
        found["diagonal"] = diagonals(call, geometry.queries, lse)
    if request.diagonal_last:
        found["diagonal_last"] = diagonals(call, min(request.diagonal_last, geometry.queries), lse)
    if not request.lse:
        del found["lse"]
    return AttentionStatistics(**found)


def fused_removal(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float, softcap: float | None, block: int, lse: Tensor,
    gradient: Tensor, output: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Block sums of absolute removal effects without heavy entries, and each row's heavy key (-1: none); the contract
    of `kernels.removal.removal_effects`."""
    call = fused_call(q, k, v, geometry, scale, softcap, None)
    # Products are in the dtype of q, whose exponents may be few: each row is brought to order one, and back.
    factor = power_of_two(gradient.abs().amax(-1))
    scaled = (gradient.float() * factor[..., None]).to(call.q.dtype).contiguous()
    # Of the rounded gradient, so that its differences from the products keep their digits.
    delta = (scaled.float() * output.float()).sum(-1)
    return removal_map(call, block, call.where_real(lse.float()).contiguous(), scaled, delta, 1.0 / factor)


def fused_call(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float, softcap: float | None, sinks: Tensor | None
) -> FusedCall:
    """A call whose tensors the kernels can address."""
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        raise RequestError(f"Heads of {q.shape[-1]} numbers: the Triton kernels take up to {WIDEST}; ask for 'blocks'.")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if q.dtype == torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    return FusedCall(q, k, v, geometry, scale, softcap, sinks)


def _lookups(call: FusedCall, request: StatisticsRequest, lse: Tensor, slots: Tensor | None) -> dict[str, Tensor]:
    """Mass at offsets and at listed keys, and the logit of the first visible key."""
    found = {}
    if request.offsets:
        # What lies beyond the first key is nothing, however far; a kernel counts in 32 bits.
        near = tuple(max(offset, -call.geometry.keys) for offset in request.offsets)
        offsets = on_device(near, torch.int32, lse.device)
        found["offsets"] = pairs(call, lse, offsets=offsets)
    if slots is not None:
        found["at_keys"] = pairs(call, lse, slots=slots[:, None])
    if request.first_logit:
        first = call.real_keys[0].long()[:, None, None].expand(-1, call.geometry.queries, 1)
        if call.geometry.window is not None:
            place = torch.arange(call.geometry.queries, device=lse.device) + call.geometry.query_offset
            first = torch.maximum(first, (place - call.geometry.window + 1)[None, :, None])
        found["first_logit"] = pairs(call, lse, slots=first[:, None], logit=True)[..., 0] + lse * 0.0
    return found


def _bands(call: FusedCall, request: StatisticsRequest, lse: Tensor) -> dict[str, Tensor]:
    """Mass on the first s and the last w keys, and counts above thresholds."""
    tiles = tiles_for("band", call.q.shape[-1], call.q.dtype, call.q.device)
    found = {}
    for kind, dtype in (("first", torch.int32), ("recent", torch.int32), ("above", torch.float32)):
        wanted = getattr(request, kind)
        if not wanted:
            continue
        if kind != "above":
            wanted = tuple(min(size, call.geometry.keys) for size in wanted)
        out = call.empty(call.geometry.queries, len(wanted))
        grid = (triton.cdiv(call.geometry.queries, tiles.rows), len(call.q) * call.heads, len(wanted))
        band_kernel[grid](
            call.q, call.k, lse, on_device(tuple(wanted), dtype, lse.device), *call.bounds, out,
            *strides(call.q), *strides(call.k), *call.sizes, *call.numbers, call.q.shape[-1],
            COUNT=len(wanted), M=tiles.rows, N=tiles.keys, EXACT=call.exact, KIND=kind, num_warps=tiles.warps,
            num_stages=tiles.stages, **call.flags,
        )  # fmt: skip
        found[kind] = out
    return found


def top(call: FusedCall, count: int, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The `count` heaviest keys of each row, heaviest first, and their probabilities."""
    tiles = tiles_for("top", call.q.shape[-1], call.q.dtype, call.q.device)
    width, queries = max(2, 1 << (count - 1).bit_length()), call.geometry.queries
    logits, keys = call.empty(queries, width), call.empty(queries, width, dtype=torch.int64)
    top_kernel[(triton.cdiv(queries, tiles.rows), len(call.q) * call.heads)](
        call.q, call.k, *call.bounds, logits, keys, *strides(call.q), *strides(call.k), *call.sizes, *call.numbers,
        call.q.shape[-1], M=tiles.rows, N=tiles.keys, TOP=width, EXACT=call.exact, num_warps=tiles.warps,
        num_stages=tiles.stages, **call.flags,
    )  # fmt: skip
    best, order = logits.topk(count, dim=-1)
    chosen = keys.gather(-1, order)
    return chosen, torch.where(chosen >= 0, torch.exp(best - lse[..., None]), lse[..., None] * 0.0)
