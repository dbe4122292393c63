"""The row pass: attention's output and every functional of a row, in one sweep over its keys.

An online softmax in base 2. Beside the running maximum m and sum it carries, rescaled in the same way, the sum
of p (s - m) for the entropy, and the mean and spread of the key's position (merged tile by tile, so that they stay
exact far from the origin). The largest key of a row is found without a second reduction: the low bits of each logit are
replaced by its column, so that the maximum brings its place along; its exact logit is taken again at the end.

A row block is `M` queries of one head; in packed form (few queries), all query heads of a KV head are rows of one
block, and the keys may be split among programs whose states are merged by `merge_states`.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from workbench.kernels.fused.tiles import HIDDEN, LN2, capped, key_bounds, product, real_rows, visible


@triton.jit
@no_type_check
def _largest(raw, n0, step, N: tl.constexpr, EXACT: tl.constexpr):
    """The largest logit of each row of a tile, and where: its key, or (half precision) the tile that holds it."""
    if EXACT:
        top, where = tl.max(raw, 1, return_indices=True)
        place = n0 + where
    else:
        bits = (raw.to(tl.int32, bitcast=True) & -N) | step[None, :]
        top = tl.max(bits.to(tl.float32, bitcast=True), 1)
        place = n0
    return top, place


@triton.jit
@no_type_check
def _place(p, weight, before, after, alpha, centre, moment, step, shift):
    """Mean and second moment of the key's position, with one more tile; positions count from the block's first row."""
    c = step[None, :].to(tl.float32)
    inner = tl.sum(p * c, 1) / tl.maximum(weight, 1e-37)
    away = c - inner[:, None]
    delta = inner + shift - centre
    share = weight / tl.maximum(after, 1e-37)
    moment = moment * alpha + tl.sum(p * away * away, 1) + delta * delta * before * share
    return centre + delta * share, moment


@triton.jit
@no_type_check
def _sweep(
    state, low, high, q, k, v, rows, start, end, scale, softcap, window, stride_kn, stride_vn,
    dims, values, D, DV,
    N: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr, OUTPUT: tl.constexpr, ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr, MEAN: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    m, length, acc, spent, best, best_tile, total, centre, moment = state
    step = tl.arange(0, N)
    for n0 in range(low, high, N):
        n0 = tl.multiple_of(n0, N)
        keys = n0 + step
        k_tile = k + n0.to(tl.int64) * stride_kn + dims[:, None] + step[None, :] * stride_kn
        if EVEN and not MASKED:
            keys_t = tl.load(k_tile)
        else:
            keys_t = tl.load(k_tile, mask=(dims[:, None] < D) & (keys[None, :] < end), other=0.0)
        raw = product(q, keys_t, EXACT)
        if SOFTCAP:
            raw = capped(raw, scale, SOFTCAP, softcap)
        if MASKED:
            seen = visible(rows[:, None], keys[None, :], start, end, WINDOW, window, CAUSAL)
            raw = tl.where(seen, raw, HIDDEN)
        if ARGMAX:
            tile_best, place = _largest(raw, n0, step, N, EXACT)
            better = tile_best > best
            best = tl.where(better, tile_best, best)
            best_tile = tl.where(better, place, best_tile)
        else:
            tile_best = tl.max(raw, 1)
        if SOFTCAP:
            m_new = tl.maximum(m, tile_best)
            x = raw - m_new[:, None]
        else:
            m_new = tl.maximum(m, tile_best * scale)
            x = raw * scale - m_new[:, None]
        p = tl.exp2(x)
        if MASKED:
            p = tl.where(seen, p, 0.0)
        alpha = tl.exp2(m - m_new)
        weight = tl.sum(p, 1)
        if ENTROPY:
            spent = alpha * (spent + length * (m - m_new)) + tl.sum(p * x, 1)
        if MEAN:
            logits = raw if SOFTCAP else raw * scale
            if MASKED:
                logits = tl.where(seen, logits, 0.0)
            total += tl.sum(logits, 1)
        before = length * alpha
        length = before + weight
        if PLACE:
            centre, moment = _place(
                p, weight, before, length, alpha, centre, moment, step, (n0 - tl.min(rows, 0)).to(tl.float32)
            )
        if OUTPUT:
            v_tile = v + n0.to(tl.int64) * stride_vn + step[:, None] * stride_vn + values[None, :]
            if EVEN and not MASKED:
                vals = tl.load(v_tile)
            else:
                # What padding holds may be NaN, and zero times it too.
                real = (keys[:, None] >= start) & (keys[:, None] < end)
                vals = tl.load(v_tile, mask=(values[None, :] < DV) & real, other=0.0)
            acc = acc * alpha[:, None]
            if EXACT:
                acc = tl.dot(p, vals, acc, input_precision="ieee")
            else:
                acc = tl.dot(p.to(vals.dtype), vals, acc)
        m = m_new
    return m, length, acc, spent, best, best_tile, total, centre, moment


@triton.jit
@no_type_check
def _range(first, last, offset, queries, start, end, split, tiles_per_split, WINDOW: tl.constexpr, window,
           CAUSAL: tl.constexpr, SPLIT: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Key tiles of a row block, as `key_bounds`, cut to this program's share of them."""
    low, clear_low, clear_high, high = key_bounds(
        first + offset, tl.minimum(last, queries) + offset, start, end, WINDOW, window, CAUSAL, N
    )
    padding = last + offset <= start
    if not CAUSAL:
        padding = padding & (first + offset >= 0)
    if padding | (first + offset >= end):
        # Nothing but padding.
        clear_low, clear_high, high = low, low, low
    if SPLIT:
        mine, stop = split * tiles_per_split * N, (split + 1) * tiles_per_split * N
        low, high = tl.maximum(low, mine), tl.minimum(high, stop)
        clear_low = tl.minimum(tl.maximum(clear_low, low), tl.maximum(high, low))
        clear_high = tl.minimum(tl.maximum(clear_high, clear_low), tl.maximum(high, clear_low)) // N * N
        clear_low = tl.minimum(clear_low, clear_high)
    return low, clear_low, clear_high, high


@triton.jit
@no_type_check
def _write_state(LSE, REAL, ENT, CENTRE, SPREAD, MEANS, m, length, spent, centre, moment, total, rows, seen, inside,
                 ENTROPY: tl.constexpr, PLACE: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip
    """The unnormalised state of one share of the keys."""
    tl.store(LSE, tl.where(seen, m, HIDDEN), mask=inside)
    tl.store(REAL, tl.where(seen, length, 0.0), mask=inside)
    if ENTROPY:
        tl.store(ENT, spent, mask=inside)
    if PLACE:
        tl.store(CENTRE, centre + tl.min(rows, 0).to(tl.float32), mask=inside)
        tl.store(SPREAD, moment, mask=inside)
    if MEAN:
        tl.store(MEANS, total, mask=inside)


@triton.jit
@no_type_check
def _write_rows(LSE, REAL, ENT, CENTRE, SPREAD, MEANS, m, length, spent, centre, moment, total, sink, rows, seen,
                inside, start, end, window, ENTROPY: tl.constexpr, PLACE: tl.constexpr, MEAN: tl.constexpr,
                SINK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """What rows sum up to; returns the factor that turns sums of p into probabilities."""
    shift = m
    if SINK:
        shift = tl.maximum(m, sink)
    factor = tl.exp2(m - shift)
    norm = length * factor
    if SINK:
        norm += tl.exp2(sink - shift)
    norm = tl.where(seen, norm, 1.0)
    inverse = tl.where(seen, factor / norm, 0.0)
    log_norm = tl.log2(norm) + shift
    # NaN stays NaN, where a maximum on the device would drop it.
    bad = length != length
    real = length * inverse
    tl.store(LSE, tl.where(seen, log_norm * LN2, 0.0), mask=inside)
    if SINK:
        tl.store(REAL, real, mask=inside)
    if ENTROPY:
        entropy = ((log_norm - m) * real - spent * inverse) * LN2
        tl.store(ENT, tl.where(bad, length, tl.where(seen, tl.maximum(entropy, 0.0), 0.0)), mask=inside)
    if PLACE:
        away = tl.where(seen, (rows - tl.min(rows, 0)).to(tl.float32) - centre, 0.0)
        tl.store(CENTRE, away * real, mask=inside)
        spread = tl.sqrt(tl.maximum(moment / tl.maximum(length, 1e-37), 0.0))
        tl.store(SPREAD, tl.where(bad, length, tl.where(seen, spread, 0.0)), mask=inside)
    if MEAN:
        low_key, high_key = tl.zeros_like(rows) + start, tl.zeros_like(rows) + end
        if CAUSAL:
            high_key = tl.minimum(high_key, rows + 1)
        if WINDOW:
            low_key = tl.maximum(low_key, rows - window + 1)
        count = tl.maximum(high_key - low_key, 1).to(tl.float32)
        tl.store(MEANS, tl.where(bad, length, tl.where(seen, total * LN2 / count, 0.0)), mask=inside)
    return inverse


@triton.jit
@no_type_check
def _settled(length, rows, start, end, CAUSAL: tl.constexpr, SPLIT: tl.constexpr):
    """Which rows see keys, and their sums: NaN where logits were NaN or infinite."""
    # Rows of right padding went through unmasked tiles.
    seen = real_rows(rows, start, end, CAUSAL)
    if SPLIT:
        seen = seen & (length != 0)
    else:
        # A row that sees keys and sums up to nothing, or to no number, has NaN or infinite logits.
        length = tl.where((length > 0) & (length < 3.0e38), length, float("nan"))
        length = tl.where(seen, length, 0.0)
    return seen, length


@triton.jit
@no_type_check
def row_kernel(
    Q, K, V, SINKS, START, END,
    OUT, LSE, MAX, ARG, ENT, MEANS, CENTRE, SPREAD, REAL,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, queries, keys, tiles_per_split, scale, softcap, window,
    D, DV,
    GROUP: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr,
    PADDED: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, OUTPUT: tl.constexpr,
    ENTROPY: tl.constexpr, MAXIMUM: tl.constexpr, ARGMAX: tl.constexpr, MEAN: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """One block of rows. Under SPLIT, unnormalised states go to `[split, batch, head, query]` arrays."""
    block, lane, split = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lanes = heads // GROUP if PACKED else heads
    batch, at = lane // lanes, lane % lanes
    index = block * M + tl.arange(0, M)
    if PACKED:
        row, head, kv_head = index // GROUP, at * GROUP + index % GROUP, at
        first, last = block * M // GROUP, (block * M + M - 1) // GROUP + 1
    else:
        row, head, kv_head = index, at + tl.zeros_like(index), at // GROUP
        first, last = block * M, block * M + M
    offset = keys - queries
    inside = row < queries
    rows = row + offset
    start, end = 0, keys
    if PADDED:
        start, end = tl.load(START + batch), tl.load(END + batch)
    dims, values = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    wide = batch.to(tl.int64)
    q_rows = Q + wide * stride_qb + head.to(tl.int64)[:, None] * stride_qh + row.to(tl.int64)[:, None] * stride_qn
    q = tl.load(q_rows + dims[None, :], mask=inside[:, None] & (dims[None, :] < D), other=0.0)
    k = K + wide * stride_kb + kv_head.to(tl.int64) * stride_kh
    v = V + wide * stride_vb + kv_head.to(tl.int64) * stride_vh
    low, clear_low, clear_high, high = _range(
        first, last, offset, queries, start, end, split, tiles_per_split, WINDOW, window, CAUSAL, SPLIT, N
    )
    zero = tl.zeros([M], tl.float32)
    state = (
        zero + HIDDEN, zero, tl.zeros([M, DV_PAD], tl.float32), zero, zero + 2 * HIDDEN, tl.zeros([M], tl.int32), zero,
        zero, zero,
    )  # fmt: skip
    if WINDOW or PADDED:
        state = _sweep(
            state, low, clear_low, q, k, v, rows, start, end, scale, softcap, window, stride_kn,
            stride_vn, dims, values, D, DV, N, True, EVEN, CAUSAL, WINDOW, SOFTCAP, EXACT,
            OUTPUT, ENTROPY, ARGMAX, MEAN, PLACE,
        )  # fmt: skip
    else:
        clear_low = low
    state = _sweep(
        state, clear_low, clear_high, q, k, v, rows, start, end, scale, softcap, window, stride_kn,
        stride_vn, dims, values, D, DV, N, False, EVEN, CAUSAL, WINDOW, SOFTCAP, EXACT,
        OUTPUT, ENTROPY, ARGMAX, MEAN, PLACE,
    )  # fmt: skip
    state = _sweep(
        state, clear_high, high, q, k, v, rows, start, end, scale, softcap, window, stride_kn,
        stride_vn, dims, values, D, DV, N, True, EVEN, CAUSAL, WINDOW, SOFTCAP, EXACT,
        OUTPUT, ENTROPY, ARGMAX, MEAN, PLACE,
    )  # fmt: skip
    m, length, acc, spent, best, best_tile, total, centre, moment = state
    seen, length = _settled(length, rows, start, end, CAUSAL, SPLIT)
    if ARGMAX:
        place = best_tile
        if not EXACT:
            place = best_tile + (best.to(tl.int32, bitcast=True) & (N - 1))
    out = (wide * heads + head) * queries + row
    if SPLIT:
        out += split.to(tl.int64) * tl.num_programs(1) // lanes * heads * queries
        inverse = tl.where(seen, 1.0, 0.0)
        _write_state(
            LSE + out, REAL + out, ENT + out, CENTRE + out, SPREAD + out, MEANS + out, m, length, spent, centre, moment,
            total, rows, seen, inside, ENTROPY, PLACE, MEAN,
        )  # fmt: skip
    else:
        sink = zero
        if SINK:
            sink = tl.load(SINKS + head) / LN2
        inverse = _write_rows(
            LSE + out, REAL + out, ENT + out, CENTRE + out, SPREAD + out, MEANS + out, m, length, spent, centre, moment,
            total, sink, rows, seen, inside, start, end, window, ENTROPY, PLACE, MEAN, SINK, CAUSAL, WINDOW,
        )  # fmt: skip
    if ARGMAX:
        place = tl.where(seen & (length == length), place, -1)
        tl.store(ARG + out, place.to(tl.int64), mask=inside)
    if MAXIMUM:
        top = m
        if ARGMAX and not EXACT:
            # The maximum was rounded to make room for its column: take that one logit again.
            picked = k + tl.maximum(place, 0).to(tl.int64)[:, None] * stride_kn + dims[None, :]
            chosen = tl.load(picked, mask=(dims[None, :] < D) & (place[:, None] >= 0), other=0.0)
            top = capped(tl.sum(q.to(tl.float32) * chosen.to(tl.float32), 1), scale, SOFTCAP, softcap)
        if not SPLIT:
            top = tl.where(length == length, top, length)
        tl.store(MAX + out, tl.where(seen, top * LN2, HIDDEN if SPLIT else 0.0), mask=inside)
    if OUTPUT:
        acc = tl.where(seen[:, None], acc * inverse[:, None], 0.0)
        tl.store(OUT + out[:, None] * DV + values[None, :], acc, mask=inside[:, None] & (values[None, :] < DV))
