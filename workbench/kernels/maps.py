"""Parts of the attention matrix at their own resolution: exact tiles, pooled pyramids, removal effects.

A viewer of a long prompt keeps the pooled blocks (`StatisticsRequest.block`), the log-sum-exp and post-rotary q and
k; any tile it zooms into is computed again, exactly, from these.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels.dispatch import triton_takes
from workbench.kernels.geometry import Geometry
from workbench.kernels.pyramid import pooled
from workbench.kernels.request import BLOCKS

# Rows whose effects are computed at once, without a fused kernel.
ROWS = 256


def attention_tile(
    q: Float[Tensor, "batch head query dim"],
    k: Float[Tensor, "batch kv_head key dim"],
    lse: Float[Tensor, "batch head query"],
    rows: slice,
    columns: slice,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    key_start: Int[Tensor, " batch"] | None = None,
    key_end: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch head row column"]:
    """Attention from queries `rows` to keys `columns`, exact, in float32, from the rows' log-sum-exp.

    Args:
        lse: of `attention_statistics` (natural, a learned sink included), for all queries.
        rows, columns: slices of the query and the key axis; negative ends and steps are refused.

    Raises:
        RequestError: a slice that leaves the tensors.
    """
    geometry = Geometry(q.shape[0], q.shape[2], k.shape[2], causal, window, key_start, key_end)
    r, c = _inside(rows, geometry.queries, "rows"), _inside(columns, geometry.keys, "columns")
    group = q.shape[1] // k.shape[1]
    queries = q[:, :, r].float().unflatten(1, (k.shape[1], group))  # type: ignore[no-untyped-call]
    logits = torch.einsum("b k g i d, b k j d -> b k g i j", queries, k[:, :, c].float()).flatten(1, 2)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return _masked_exp(logits - lse[:, :, r, None], geometry, r, c)


def _inside(part: slice, size: int, name: str) -> slice:
    first, last = part.start or 0, size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= first <= last <= size:
        raise RequestError(f"{name} {first}:{last} of {size}: give a slice with 0 <= first <= last <= {size}.")
    return slice(first, last)


def _masked_exp(logits: Tensor, geometry: Geometry, rows: slice, columns: slice) -> Tensor:
    """exp where a query sees a key, zero elsewhere."""
    device = logits.device
    place = torch.arange(rows.start, rows.stop, device=device) + geometry.query_offset
    keys = torch.arange(columns.start, columns.stop, device=device)
    seen = torch.ones(1, len(place), len(keys), dtype=torch.bool, device=device)
    if geometry.causal:
        seen = seen & (keys <= place[:, None])
    if geometry.window is not None:
        seen = seen & (keys > place[:, None] - geometry.window)
    for bound, above in ((geometry.start, True), (geometry.end, False)):
        if bound is not None:
            limit = bound.to(device)[:, None, None]
            real = (keys >= limit) & (place[:, None] >= limit) if above else (keys < limit) & (place[:, None] < limit)
            seen = seen & real
    seen = seen[:, None]
    return torch.exp(logits.masked_fill(~seen, 0.0)).masked_fill(~seen, 0.0)


def removal_effects(
    q: Float[Tensor, "batch head query dim"],
    k: Float[Tensor, "batch kv_head key dim"],
    v: Float[Tensor, "batch kv_head key value_dim"],
    gradient: Float[Tensor, "batch head query value_dim"],
    output: Float[Tensor, "batch head query value_dim"],
    lse: Float[Tensor, "batch head query"],
    *,
    block: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    key_start: Int[Tensor, " batch"] | None = None,
    key_end: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch head block_row block_column"], Float[Tensor, "batch head query"]]:
    """How much the loss would change, to first order, if single entries of attention were removed.

    Removing entry (i, j) and renormalising the row changes the loss by `-A_ij (dO_i . v_j - D_i) / (1 - A_ij)` with
    `D_i = dO_i . o_i` (MoA, arXiv 2406.14909). Returns the sums of its absolute value over blocks, and D. A row's
    only key cannot be removed and counts zero.

    Args:
        gradient: of the loss by the attention output.
        output, lse: of `attention_statistics` on the same tensors.
        block: a power of two, 16 to 1024.
    """
    if block not in BLOCKS:
        raise RequestError(f"Blocks of {block}: choose one of {', '.join(map(str, BLOCKS))}.")
    geometry = Geometry(q.shape[0], q.shape[2], k.shape[2], True, window, key_start, key_end)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    delta = (gradient.float() * output.float()).sum(-1)
    if q.device.type == "cuda" and triton_takes(max(q.shape[-1], v.shape[-1]), q.dtype):
        from workbench.kernels.fused.launch import fused_removal

        return fused_removal(q, k, v, geometry, factor, softcap, block, lse, gradient, delta), delta
    group, heads = q.shape[1] // k.shape[1], q.shape[1]
    values = v.float().repeat_interleave(group, dim=1)
    profile = q.new_zeros(len(q), heads, -(-geometry.queries // block), -(-geometry.keys // block), dtype=torch.float32)
    step = max(block, ROWS // block * block)
    for first in range(0, geometry.queries, step):
        rows = slice(first, min(first + step, geometry.queries))
        a = attention_tile(
            q, k, lse, rows, slice(0, geometry.keys), scale=scale, window=window, softcap=softcap,
            key_start=key_start, key_end=key_end,
        )  # fmt: skip
        gain = gradient[:, :, rows].float() @ values.transpose(-1, -2) - delta[:, :, rows, None]
        kept = 1.0 - a
        effect = torch.where(kept > 1e-6, (a * gain).abs() / kept.clamp(min=1e-6), 0.0)
        part = pooled(effect, block, "sum")
        profile[:, :, first // block : first // block + part.shape[2]] = part
    return profile, delta
