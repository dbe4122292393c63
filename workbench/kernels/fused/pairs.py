"""Single entries, bands and counts of rows, from the log-sum-exp: work that is linear in the tokens, or nearly.

`pair_kernel` takes the mass at a few named keys of each query (offsets, lists, the first key); `band_kernel` sums
runs of keys (the first s, the last w); `count_kernel` sweeps whole rows for entries above a threshold.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from workbench.kernels.fused.tiles import LN2, capped, key_bounds, product, visible


@triton.jit
@no_type_check
def _place(heads, queries, keys, START, END, M: tl.constexpr, PADDED: tl.constexpr):
    """(batch, head, rows, whether they exist, start, end) of a program over row blocks and heads."""
    lane = tl.program_id(1)
    batch, head = lane // heads, lane % heads
    row = tl.program_id(0) * M + tl.arange(0, M)
    start, end = 0, keys
    if PADDED:
        start, end = tl.load(START + batch), tl.load(END + batch)
    return batch, head, row, row < queries, start, end


@triton.jit
@no_type_check
def pair_kernel(
    Q, K, LSE, OFFSETS, SLOTS, START, END, OUT,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_sb, stride_sh, stride_sn,
    heads, queries, keys, scale, softcap, window, D,
    COUNT: tl.constexpr, GROUP: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr, OFFSET: tl.constexpr, LOGIT: tl.constexpr,
):  # fmt: skip
    """Entry (i, key) for COUNT keys of each query: at fixed offsets, or listed in SLOTS (-1: none)."""
    batch, head, row, inside, start, end = _place(heads, queries, keys, START, END, M, PADDED)
    wide, place, dims = batch.to(tl.int64), row + keys - queries, tl.arange(0, D_PAD)
    q_rows = Q + wide * stride_qb + head.to(tl.int64) * stride_qh + row.to(tl.int64)[:, None] * stride_qn
    q = tl.load(q_rows + dims[None, :], mask=inside[:, None] & (dims[None, :] < D), other=0.0).to(tl.float32)
    k = K + wide * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    out = (wide * heads + head) * queries + row
    lse = tl.load(LSE + out, mask=inside, other=0.0)
    for slot in range(COUNT):
        if OFFSET:
            key = place + tl.load(OFFSETS + slot)
        else:
            listed = SLOTS + wide * stride_sb + head.to(tl.int64) * stride_sh + row.to(tl.int64) * stride_sn + slot
            # Whatever is no key is none; compared before it is narrowed.
            named = tl.load(listed, mask=inside, other=-1)
            key = tl.where((named >= 0) & (named < keys), named, -1).to(tl.int32)
        seen = visible(place, key, start, end, WINDOW, window, CAUSAL) & inside
        k_rows = k + tl.where(seen, key, 0).to(tl.int64)[:, None] * stride_kn
        picked = tl.load(k_rows + dims[None, :], mask=seen[:, None] & (dims[None, :] < D), other=0.0)
        logit = capped(tl.sum(q * picked.to(tl.float32), 1), scale, SOFTCAP, softcap)
        if LOGIT:
            found = tl.where(seen, logit * LN2, 0.0)
        else:
            found = tl.where(seen, tl.exp2(logit - lse / LN2), 0.0)
        tl.store(OUT + out * COUNT + slot, found, mask=inside)


@triton.jit
@no_type_check
def _probabilities(q, k, n0, place, lse, start, end, low_key, high_key, scale, softcap, window, stride_kn, dims, D,
                   N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
                   EXACT: tl.constexpr):  # fmt: skip
    """One masked tile of attention, zero outside `[low_key, high_key)` of each row."""
    step = tl.arange(0, N)
    keys = n0 + step
    k_tile = k + n0.to(tl.int64) * stride_kn + dims[:, None] + step[None, :] * stride_kn
    keys_t = tl.load(k_tile, mask=(dims[:, None] < D) & (keys[None, :] < end), other=0.0)
    x = capped(product(q, keys_t, EXACT), scale, SOFTCAP, softcap) - lse[:, None] / LN2
    seen = visible(place[:, None], keys[None, :], start, end, WINDOW, window, CAUSAL)
    seen = seen & (keys[None, :] >= low_key[:, None]) & (keys[None, :] < high_key[:, None])
    return tl.where(seen, tl.exp2(tl.where(seen, x, 0.0)), 0.0), seen


@triton.jit
@no_type_check
def band_kernel(
    Q, K, LSE, SIZES, START, END, OUT,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    heads, queries, keys, scale, softcap, window, D,
    COUNT: tl.constexpr, GROUP: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr, EXACT: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Mass on the first ("first") or last ("recent") SIZES[slot] keys, or how many keys exceed it ("above")."""
    batch, head, row, inside, start, end = _place(heads, queries, keys, START, END, M, PADDED)
    slot = tl.program_id(2)
    wide, place, dims = batch.to(tl.int64), row + keys - queries, tl.arange(0, D_PAD)
    q_rows = Q + wide * stride_qb + head.to(tl.int64) * stride_qh + row.to(tl.int64)[:, None] * stride_qn
    q = tl.load(q_rows + dims[None, :], mask=inside[:, None] & (dims[None, :] < D), other=0.0)
    k = K + wide * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    out = (wide * heads + head) * queries + row
    lse = tl.load(LSE + out, mask=inside, other=0.0)
    least, limit = tl.zeros_like(row), tl.zeros_like(row) + keys
    first = tl.program_id(0) * M + keys - queries
    low, _, _, high = key_bounds(first, tl.minimum(first + M, keys), start, end, WINDOW, window, CAUSAL, N)
    level = 0.0
    if KIND == "first":
        limit = tl.zeros_like(row) + start + tl.load(SIZES + slot)
        high = tl.minimum(high, start + tl.load(SIZES + slot))
    elif KIND == "recent":
        least = place - tl.load(SIZES + slot) + 1
        low = tl.maximum(low, (first - tl.load(SIZES + slot) + 1) // N * N)
    else:
        level = tl.load(SIZES + slot)
    total = tl.zeros([M], tl.float32)
    for n0 in range(low, high, N):
        n0 = tl.multiple_of(n0, N)
        p, seen = _probabilities(
            q, k, n0, place, lse, start, end, least, limit, scale, softcap, window, stride_kn, dims, D, N, CAUSAL,
            WINDOW, SOFTCAP, EXACT,
        )  # fmt: skip
        if KIND == "above":
            total += tl.sum((seen & (p > level)).to(tl.float32), 1)
        else:
            total += tl.sum(p, 1)
    if KIND == "above":
        # A NaN is above nothing, and its row no count.
        total = tl.where(lse == lse, total, lse)
    tl.store(OUT + out * COUNT + slot, total, mask=inside)
