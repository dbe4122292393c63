"""The column pass: what each key receives, from the rows' log-sum-exp.

A program owns a block of keys of one query head and sweeps over the queries that can see them, so that sums are
taken in a fixed order and nothing is added atomically.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from workbench.kernels.fused.tiles import HIDDEN, LN2, capped, product, query_bounds, visible

NEVER = tl.constexpr(2**30)


@triton.jit
@no_type_check
def _sweep(
    state, low, high, k, q, lse, w, keys, start, end, offset, scale, softcap, window, above, least, stride_qn,
    stride_wn, dims, columns, queries, D,
    C: tl.constexpr, M: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, SUM: tl.constexpr, MAXIMUM: tl.constexpr,
    WEIGHTS: tl.constexpr, ABOVE: tl.constexpr,
):  # fmt: skip
    total, top, weighted, first = state
    step = tl.arange(0, M)
    for m0 in range(low, high, M):
        m0 = tl.multiple_of(m0, M)
        index = m0 + step
        q_tile = q + m0.to(tl.int64) * stride_qn + dims[:, None] + step[None, :] * stride_qn
        if EVEN and not MASKED:
            queries_t = tl.load(q_tile)
            lse_tile = tl.load(lse + index)
        else:
            queries_t = tl.load(q_tile, mask=(dims[:, None] < D) & (index[None, :] < queries), other=0.0)
            lse_tile = tl.load(lse + index, mask=index < queries, other=0.0)
        logits = product(k, queries_t, EXACT)
        if SOFTCAP:
            x = capped(logits, scale, SOFTCAP, softcap) - lse_tile[None, :] / LN2
        else:
            x = logits * scale - lse_tile[None, :] / LN2
        if MASKED:
            seen = visible((index + offset)[None, :], keys[:, None], start, end, WINDOW, window, CAUSAL)
            seen = seen & ((index < queries) & (index >= least))[None, :]
            x = tl.where(seen, x, HIDDEN)
        if MAXIMUM:
            top = tl.maximum(top, tl.max(x, 1))
        if SUM or WEIGHTS:
            p = tl.exp2(x)
        if SUM:
            total += tl.sum(p, 1)
        if WEIGHTS:
            w_tile = w + m0.to(tl.int64) * stride_wn + step[:, None] * stride_wn + columns[None, :]
            weights = tl.load(w_tile, mask=(columns[None, :] < C) & (index[:, None] < queries), other=0.0)
            weighted = tl.dot(p, weights, weighted, input_precision="ieee" if EXACT else "tf32x3")
        if ABOVE:
            first = tl.minimum(first, tl.min(tl.where(x > above, index[None, :], NEVER), 1))
    return total, top, weighted, first


@triton.jit
@no_type_check
def column_kernel(
    Q, K, LSE, W, START, END, FROM, SUMS, TOPS, WEIGHTED, FIRST,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_wb, stride_wn,
    heads, queries, keys, scale, softcap, window, above, D,
    C: tl.constexpr, GROUP: tl.constexpr, D_PAD: tl.constexpr, C_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr,
    EXACT: tl.constexpr, SUM: tl.constexpr, MAXIMUM: tl.constexpr, WEIGHTS: tl.constexpr, ABOVE: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """One block of keys: sums, maxima, weighted sums over queries, and the first query above a threshold."""
    block, lane = tl.program_id(0), tl.program_id(1)
    batch, head = lane // heads, lane % heads
    wide, offset = batch.to(tl.int64), keys - queries
    column = block * N + tl.arange(0, N)
    start, end = 0, keys
    if PADDED:
        start, end = tl.load(START + batch), tl.load(END + batch)
    dims, columns = tl.arange(0, D_PAD), tl.arange(0, C_PAD)
    inside = column < keys
    k_rows = K + wide * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    k_rows += column.to(tl.int64)[:, None] * stride_kn + dims[None, :]
    k = tl.load(k_rows, mask=inside[:, None] & (dims[None, :] < D), other=0.0)
    q = Q + wide * stride_qb + head.to(tl.int64) * stride_qh
    lse, w = LSE + (wide * heads + head) * queries, W + wide * stride_wb
    low, clear_low, clear_high, high = query_bounds(
        block * N, tl.minimum(block * N + N, keys), start, end, offset, queries, WINDOW, window, CAUSAL, M
    )
    least = 0
    if LAST:
        # Only the last rows count: every tile of them is masked.
        least = tl.load(FROM + batch)
        low = tl.maximum(low, least // M * M)
        clear_low, clear_high = low, low
    if (block * N < start) | (block * N + N > end):
        # Keys of padding are in this block: all of it is masked.
        clear_high = clear_low
    zero = tl.zeros([N], tl.float32)
    state = (zero, zero + HIDDEN, tl.zeros([N, C_PAD], tl.float32), tl.zeros([N], tl.int32) + NEVER)
    state = _sweep(
        state, low, clear_low, k, q, lse, w, column, start, end, offset, scale, softcap, window, above, least,
        stride_qn, stride_wn, dims, columns, queries, D, C, M, True, EVEN, CAUSAL, WINDOW, SOFTCAP, EXACT, SUM,
        MAXIMUM, WEIGHTS, ABOVE,
    )  # fmt: skip
    state = _sweep(
        state, clear_low, clear_high, k, q, lse, w, column, start, end, offset, scale, softcap, window, above,
        least, stride_qn, stride_wn, dims, columns, queries, D, C, M, False, EVEN, CAUSAL, WINDOW, SOFTCAP, EXACT, SUM,
        MAXIMUM, WEIGHTS, ABOVE,
    )  # fmt: skip
    state = _sweep(
        state, clear_high, high, k, q, lse, w, column, start, end, offset, scale, softcap, window, above,
        least, stride_qn, stride_wn, dims, columns, queries, D, C, M, True, EVEN, CAUSAL, WINDOW, SOFTCAP, EXACT, SUM,
        MAXIMUM, WEIGHTS, ABOVE,
    )  # fmt: skip
    total, top, weighted, first = state
    out = (wide * heads + head) * keys + column
    if SUM:
        tl.store(SUMS + out, total, mask=inside)
    if MAXIMUM:
        tl.store(TOPS + out, tl.exp2(top), mask=inside)
    if WEIGHTS:
        place = ((wide * heads + head) * C + columns[None, :]) * keys + column.to(tl.int64)[:, None]
        tl.store(WEIGHTED + place, weighted, mask=inside[:, None] & (columns[None, :] < C))
    if ABOVE:
        tl.store(FIRST + out, tl.where(first < NEVER, first, -1).to(tl.int64), mask=inside)
