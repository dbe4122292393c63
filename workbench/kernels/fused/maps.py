"""Attention pooled into blocks and along diagonals, from the rows' log-sum-exp.

`block_kernel` writes the sum and the maximum of every b x b block (what a viewer zooms), or, given the output's
gradient, the sum of the absolute first-order effect of removing each entry (MoA's profile). `diagonal_kernel` sums
along each diagonal: a tile is skewed by a gather, so that its diagonals become columns.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from workbench.kernels.fused.tiles import LN2, capped, key_bounds, product, visible


@triton.jit
@no_type_check
def block_kernel(
    Q, K, V, LSE, GRAD, DELTA, UNDO, PLACE, START, END, SUMS, TOPS,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, queries, keys, block_rows, block_columns, scale, softcap, window, D, DV,
    GROUP: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    B: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr, EXACT: tl.constexpr, MAXIMUM: tl.constexpr, REMOVAL: tl.constexpr,
    HEAVY: tl.constexpr,
):  # fmt: skip
    """A row block's share of the map; blocks that no row sees are left as they were (zero). Under REMOVAL, entries
    above HEAVY are left out, and each row's is named in PLACE."""
    block, lane = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    batch, head = lane // heads, lane % heads
    wide, offset = batch.to(tl.int64), keys - queries
    row, step = block * M + tl.arange(0, M), tl.arange(0, N)
    inside, dims = row < queries, tl.arange(0, D_PAD)
    start, end = 0, keys
    if PADDED:
        start, end = tl.load(START + batch), tl.load(END + batch)
    q_rows = Q + wide * stride_qb + head.to(tl.int64) * stride_qh + row.to(tl.int64)[:, None] * stride_qn
    q = tl.load(q_rows + dims[None, :], mask=inside[:, None] & (dims[None, :] < D), other=0.0)
    k = K + wide * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    flat = (wide * heads + head) * queries + row
    lse = tl.load(LSE + flat, mask=inside, other=0.0) / LN2
    if REMOVAL:
        values = tl.arange(0, DV_PAD)
        near = inside[:, None] & (values[None, :] < DV)
        grad = tl.load(GRAD + flat[:, None] * DV + values[None, :], mask=near, other=0.0)
        delta = tl.load(DELTA + flat, mask=inside, other=0.0)
        undo = tl.load(UNDO + flat, mask=inside, other=0.0)
        heavy = tl.zeros([M], tl.int32) - 1
        v = V + wide * stride_vb + (head // GROUP).to(tl.int64) * stride_vh
    low, clear_low, clear_high, high = key_bounds(
        block * M + offset, tl.minimum(block * M + M, queries) + offset, start, end, WINDOW, window, CAUSAL, N
    )
    # Rows of padding are in this block: all of it is masked.
    ragged = (block * M + offset < start) | (block * M + M + offset > end)
    grid = (wide * heads + head) * block_rows * block_columns
    for n0 in range(low, high, N):
        n0 = tl.multiple_of(n0, N)
        key = n0 + step
        k_tile = k + n0.to(tl.int64) * stride_kn + dims[:, None] + step[None, :] * stride_kn
        keys_t = tl.load(k_tile, mask=(dims[:, None] < D) & (key[None, :] < end), other=0.0)
        x = capped(product(q, keys_t, EXACT), scale, SOFTCAP, softcap) - lse[:, None]
        p = tl.exp2(x)
        if ragged | (n0 < clear_low) | (n0 >= clear_high):
            seen = visible((row + offset)[:, None], key[None, :], start, end, WINDOW, window, CAUSAL)
            p = tl.where(seen & inside[:, None], p, 0.0)
        if REMOVAL:
            v_tile = v + n0.to(tl.int64) * stride_vn + values[:, None] + step[None, :] * stride_vn
            vals = tl.load(v_tile, mask=(values[:, None] < DV) & (key[None, :] < end), other=0.0)
            gain = product(grad, vals.to(grad.dtype), EXACT) - delta[:, None]
            # Near one, 1 - p has lost its digits. Where there is no mass, values may be anything, NaN too.
            heavy = tl.maximum(heavy, tl.max(tl.where(p > HEAVY, key[None, :], -1), 1))
            p = tl.where((p > HEAVY) | (p == 0.0), 0.0, tl.abs(p * gain) * undo[:, None] / (1.0 - p))
        parts = tl.reshape(p, [M // B, B, N // B, B])
        place = (block * (M // B) + tl.arange(0, M // B)).to(tl.int64)[:, None] * block_columns
        column = n0 // B + tl.arange(0, N // B)
        fits = (block * (M // B) + tl.arange(0, M // B) < block_rows)[:, None] & (column < block_columns)[None, :]
        tl.store(SUMS + grid + place + column[None, :], tl.sum(tl.sum(parts, 3), 1), mask=fits)
        if MAXIMUM:
            tl.store(TOPS + grid + place + column[None, :], tl.max(tl.max(parts, 3), 1), mask=fits)
    if REMOVAL:
        tl.store(PLACE + flat, heavy.to(tl.int64), mask=inside)


@triton.jit
@no_type_check
def diagonal_kernel(
    Q, K, LSE, START, END, FIRST, OUT,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    heads, queries, keys, scale, softcap, window, D,
    GROUP: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PADDED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Tiles along one diagonal: sums for distances (t N .. t N + N) and the N before, in OUT[.., t, 2, N].

    With tile row r and column c, the distance is t N + r - c; a row's entry for the skewed column d is that at
    c = (r - d) mod N, of distance t N + d where c <= r and t N + d - N elsewhere.
    """
    tile, lane = tl.program_id(0), tl.program_id(1)
    batch, head = lane // heads, lane % heads
    wide, offset = batch.to(tl.int64), keys - queries
    step, dims = tl.arange(0, N), tl.arange(0, D_PAD)
    start, end = 0, keys
    if PADDED:
        start, end = tl.load(START + batch), tl.load(END + batch)
    q = Q + wide * stride_qb + head.to(tl.int64) * stride_qh
    k = K + wide * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    lse = LSE + (wide * heads + head) * queries
    first_row = tl.load(FIRST + batch)
    skew = (step[:, None] - step[None, :]) & (N - 1)
    near, far = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    # Row tiles are aligned on the key axis: row i of a tile has key index n0 + i.
    for n0 in range(tl.maximum(first_row + offset, tile * N) // N * N, keys, N):
        row, key = n0 + step - offset, n0 - tile * N + step
        inside = (row >= first_row) & (row < queries)
        q_tile = q + row.to(tl.int64)[:, None] * stride_qn + dims[None, :]
        q_rows = tl.load(q_tile, mask=inside[:, None] & (dims[None, :] < D), other=0.0)
        k_tile = k + key.to(tl.int64)[None, :] * stride_kn + dims[:, None]
        real = (key >= 0) & (key < keys)
        keys_t = tl.load(k_tile, mask=real[None, :] & (dims[:, None] < D), other=0.0)
        level = tl.load(lse + row, mask=inside, other=0.0) / LN2
        x = capped(product(q_rows, keys_t, EXACT), scale, SOFTCAP, softcap) - level[:, None]
        seen = visible((row + offset)[:, None], key[None, :], start, end, WINDOW, window, CAUSAL) & inside[:, None]
        p = tl.where(seen, tl.exp2(tl.where(seen, x, 0.0)), 0.0)
        skewed = tl.gather(p, skew, 1)
        below = skew <= step[:, None]
        near += tl.sum(tl.where(below, skewed, 0.0), 0)
        far += tl.sum(tl.where(below, 0.0, skewed), 0)
    out = OUT + ((wide * heads + head) * tl.num_programs(0) + tile) * 2 * N
    tl.store(out + step, near)
    tl.store(out + N + step, far)
