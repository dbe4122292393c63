"""Attention-weighted sums of functions of the key, from the log-sum-exp, only where the functions are not zero.

Spans hold few keys. A second pass over just those keys, gathered, costs a fraction of attention, and it keeps the row
pass free of a product that most tiles do not need. Probabilities are split into two half-precision parts, functions too
unless they are exact: the sums keep about float32 accuracy on tensor cores (2^-16 in bfloat16).

The exponents of float16 are few, so that probabilities are multiplied by 2^15 and functions by the power of two that
brings a column's largest to 2^14: what is lost of each key is below 2^-40 of the probability, and of the column's
largest function.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from workbench.kernels.fused.tiles import LN2, capped, key_bounds, product, visible

# Steps of two that probabilities are raised by, in half precision.
SHIFT = tl.constexpr(15.0)


@triton.jit
@no_type_check
def feature_kernel(
    Q, K, LSE, F, F2, UNDO, LIST, BEFORE, START, END, OUT,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_fb, stride_fh, stride_fn, stride_ub,
    stride_uh, stride_lb, stride_lh, stride_tb, stride_th, heads, queries, keys, scale, softcap, window, D,
    C: tl.constexpr, C_PAD: tl.constexpr, GROUP: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr, EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """LIST holds the keys where any function is non-zero, in order; BEFORE how many of them precede each key."""
    block, lane = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    batch, head = lane // heads, lane % heads
    wide, offset, kv_head = batch.to(tl.int64), keys - queries, head // GROUP
    row, step, columns = block * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, C_PAD)
    inside, dims, place = row < queries, tl.arange(0, D_PAD), row + offset
    start, end = 0, keys
    if PADDED:
        start, end = tl.load(START + batch), tl.load(END + batch)
    q_rows = Q + wide * stride_qb + head.to(tl.int64) * stride_qh + row.to(tl.int64)[:, None] * stride_qn
    q = tl.load(q_rows + dims[None, :], mask=inside[:, None] & (dims[None, :] < D), other=0.0)
    k = K + wide * stride_kb + kv_head.to(tl.int64) * stride_kh
    f_lane = wide * stride_fb + kv_head.to(tl.int64) * stride_fh
    out = (wide * heads + head) * queries + row
    lse = tl.load(LSE + out, mask=inside, other=0.0) / LN2
    low, _, _, high = key_bounds(
        block * M + offset, tl.minimum(block * M + M, queries) + offset, start, end, WINDOW, window, CAUSAL, N
    )
    before = BEFORE + batch * stride_tb + kv_head * stride_th
    listed = LIST + batch * stride_lb + kv_head * stride_lh
    total = tl.zeros([M, C_PAD], tl.float32)
    first, last = tl.load(before + tl.minimum(low, keys)), tl.load(before + tl.minimum(high, keys))
    for index in range(first, last, N):
        index = tl.multiple_of(index, 1)
        real = index + step < last
        key = tl.load(listed + index + step, mask=real, other=0)
        k_tile = k + key.to(tl.int64)[None, :] * stride_kn + dims[:, None]
        keys_t = tl.load(k_tile, mask=(dims[:, None] < D) & real[None, :], other=0.0)
        x = capped(product(q, keys_t, EXACT), scale, SOFTCAP, softcap) - lse[:, None]
        seen = visible(place[:, None], key[None, :], start, end, WINDOW, window, CAUSAL) & real[None, :]
        if not EXACT:
            x += SHIFT
        p = tl.where(seen, tl.exp2(tl.where(seen, x, 0.0)), 0.0)
        f_tile = f_lane + key.to(tl.int64)[:, None] * stride_fn + columns[None, :]
        near = (columns[None, :] < C) & real[:, None]
        f = tl.load(F + f_tile, mask=near, other=0.0)
        if EXACT:
            total = tl.dot(p, f, total, input_precision="ieee")
        else:
            high_part = p.to(f.dtype)
            low_part = (p - high_part.to(tl.float32)).to(f.dtype)
            total = tl.dot(high_part, f, total)
            total = tl.dot(low_part, f, total)
            if SPLIT:
                total = tl.dot(high_part, tl.load(F2 + f_tile, mask=near, other=0.0), total)
    if not EXACT:
        undo = UNDO + wide * stride_ub + kv_head.to(tl.int64) * stride_uh + columns
        total = total * tl.load(undo, mask=columns < C, other=0.0)[None, :]
    total = tl.where((lse != lse)[:, None], float("nan"), total)
    tl.store(OUT + out[:, None] * C + columns[None, :], total, mask=inside[:, None] & (columns[None, :] < C))
