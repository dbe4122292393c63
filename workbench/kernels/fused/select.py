"""The k largest logits of each row and their keys, in one sweep.

A row's list is unsorted; its smallest entry is the bar. From each tile, the largest entries above the bar are taken
one by one, all rows at once, until no row has any left: few rounds, since the bar rises quickly.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from workbench.kernels.fused.tiles import HIDDEN, LN2, capped, key_bounds, product, visible


@triton.jit
@no_type_check
def top_kernel(
    Q, K, START, END, LOGITS, KEYS,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    heads, queries, keys, scale, softcap, window, D,
    GROUP: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TOP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Lists of TOP (a power of two) natural logits and keys (-1 where a row sees fewer), in no order."""
    block, lane = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    batch, head = lane // heads, lane % heads
    wide, offset = batch.to(tl.int64), keys - queries
    row, step, slots = block * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, TOP)
    inside, dims, place = row < queries, tl.arange(0, D_PAD), row + offset
    start, end = 0, keys
    if PADDED:
        start, end = tl.load(START + batch), tl.load(END + batch)
    q_rows = Q + wide * stride_qb + head.to(tl.int64) * stride_qh + row.to(tl.int64)[:, None] * stride_qn
    q = tl.load(q_rows + dims[None, :], mask=inside[:, None] & (dims[None, :] < D), other=0.0)
    k = K + wide * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    low, _, _, high = key_bounds(
        block * M + offset, tl.minimum(block * M + M, queries) + offset, start, end, WINDOW, window, CAUSAL, N
    )
    best = tl.zeros([M, TOP], tl.float32) + HIDDEN
    found = tl.zeros([M, TOP], tl.int32) - 1
    for n0 in range(low, high, N):
        n0 = tl.multiple_of(n0, N)
        key = n0 + step
        k_tile = k + n0.to(tl.int64) * stride_kn + dims[:, None] + step[None, :] * stride_kn
        keys_t = tl.load(k_tile, mask=(dims[:, None] < D) & (key[None, :] < end), other=0.0)
        x = capped(product(q, keys_t, EXACT), scale, SOFTCAP, softcap)
        seen = visible(place[:, None], key[None, :], start, end, WINDOW, window, CAUSAL) & inside[:, None]
        x = tl.where(seen, x, HIDDEN)
        top, where = tl.max(x, 1, return_indices=True)
        bar, weakest = tl.min(best, 1, return_indices=True)
        while tl.max((top > bar).to(tl.int32), 0) > 0:
            enters = (top > bar)[:, None] & (slots[None, :] == weakest[:, None])
            best = tl.where(enters, top[:, None], best)
            found = tl.where(enters, (n0 + where)[:, None], found)
            x = tl.where(step[None, :] == where[:, None], HIDDEN, x)
            top, where = tl.max(x, 1, return_indices=True)
            bar, weakest = tl.min(best, 1, return_indices=True)
    out = ((wide * heads + head) * queries + row)[:, None] * TOP + slots[None, :]
    tl.store(LOGITS + out, best * LN2, mask=inside[:, None])
    tl.store(KEYS + out, found.to(tl.int64), mask=inside[:, None])
