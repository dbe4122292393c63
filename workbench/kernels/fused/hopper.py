"""Row and column passes written for Hopper: one warpgroup loads, two compute, products and softmax overlap.

The same mathematics as `rows.py` and `columns.py`, for plain attention (half precision, no window, cap, learned sink
or padding). A program owns two blocks of 64 rows (or keys), one for each computing warpgroup; a third one feeds tiles
through a ring in shared memory by the copy engine. Each computing warpgroup has its next product of queries and keys
in flight while it takes the softmax of the last (and the product with the values beside it), so that the tensor cores
never wait for exponentials.

After Shah et al. 2024, FlashAttention-3 (https://arxiv.org/abs/2407.08608), in Triton's Gluon dialect.
"""

from __future__ import annotations

from typing import no_type_check

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

HIDDEN = gl.constexpr(-1.0e30)
LN2 = gl.constexpr(0.6931471805599453)
# Rows (or keys) of one computing warpgroup, and how many of those a program has.
M = gl.constexpr(64)
GROUPS = gl.constexpr(2)
# Registers a thread of a computing and of the loading warpgroup gets; the program starts with `START_REGISTERS`.
REGISTERS = gl.constexpr(240)
LOADER_REGISTERS = gl.constexpr(24)
START_REGISTERS = 168


@gluon.jit
@no_type_check
def begin(a, b, ready, slot, phase, W: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """Start the product a b^T once tile `slot` is there: `[M, N]`, not to be read before it is waited for."""
    mbarrier.wait(ready.index(slot), phase)
    tile = b.index(slot).reshape([N, W]).permute((1, 0))
    return warpgroup_mma(a, tile, gl.zeros([M, N], gl.float32, S), use_acc=False, is_async=True)


@gluon.jit
@no_type_check
def feed(desc, batch, head, first, bufs, ready, free, slot, phase):
    """One tile into its place of the ring, as soon as both readers are done with what was there."""
    mbarrier.wait(free.index(slot), phase ^ 1)
    mbarrier.expect(ready.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, first, 0], ready.index(slot), bufs.index(slot))


@gluon.jit
@no_type_check
def barriers(STAGES: gl.constexpr):
    """For each place of a ring: it is full (one loader says so), it is free (every reader says so)."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    return ready, free


@gluon.jit
@no_type_check
def _fold(raw, state, n0, rows, keys, scale, MASKED: gl.constexpr, CAUSAL: gl.constexpr, ENTROPY: gl.constexpr,
          ARGMAX: gl.constexpr, N: gl.constexpr, S: gl.constexpr):  # fmt: skip
    """One tile of logits into the online softmax: its weights, the factor of what came before, the new state."""
    m, length, spent, best, best_tile = state
    step = gl.arange(0, N, layout=gl.SliceLayout(0, S))
    if MASKED:
        column = gl.expand_dims(n0 + step, 0)
        seen = (column < keys) & gl.expand_dims(rows < keys, 1)
        if CAUSAL:
            seen = seen & (column <= gl.expand_dims(rows, 1))
        raw = gl.where(seen, raw, HIDDEN)
    if ARGMAX:
        # The low bits of a logit make room for its column, as in `rows.py`.
        bits = (raw.to(gl.int32, bitcast=True) & -N) | gl.expand_dims(step, 0)
        tile_best = gl.max(bits.to(gl.float32, bitcast=True), 1)
        better = tile_best > best
        best = gl.where(better, tile_best, best)
        best_tile = gl.where(better, n0, best_tile)
    else:
        tile_best = gl.max(raw, 1)
    m_new = gl.maximum(m, tile_best * scale)
    x = raw * scale - gl.expand_dims(m_new, 1)
    p = gl.exp2(x)
    if MASKED:
        p = gl.where(seen, p, 0.0)
    alpha = gl.exp2(m - m_new)
    if ENTROPY:
        spent = alpha * (spent + length * (m - m_new)) + gl.sum(p * x, 1)
    length = length * alpha + gl.sum(p, 1)
    return p, alpha, (m_new, length, spent, best, best_tile)


@gluon.jit
@no_type_check
def _attend(state, p, acc, first, last, q, bufs, bars, rows, keys, scale,
            MASKED: gl.constexpr, CAUSAL: gl.constexpr, ENTROPY: gl.constexpr, ARGMAX: gl.constexpr, N: gl.constexpr,
            STAGES: gl.constexpr, W: gl.constexpr, S: gl.constexpr, Z: gl.constexpr, P: gl.constexpr):  # fmt: skip
    """Key tiles [first, last): the product with the values is one tile behind the softmax."""
    k_bufs, v_bufs = bufs
    k_ready, k_free, v_ready, v_free = bars
    for t in range(first, last):
        slot, before = t % STAGES, (t - 1) % STAGES
        raw = begin(q, k_bufs, k_ready, slot, (t // STAGES) & 1, W, N, S)
        mbarrier.wait(v_ready.index(before), ((t - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_bufs.index(before).reshape([N, W]), acc, is_async=True)
        raw = warpgroup_mma_wait(1, deps=[raw])
        mbarrier.arrive(k_free.index(slot), count=1)
        weights, alpha, state = _fold(raw, state, t * N, rows, keys, scale, MASKED, CAUSAL, ENTROPY, ARGMAX, N, S)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, Z)), 1)
        p = gl.convert_layout(weights.to(v_bufs.dtype), P)
    return state, p, acc


@gluon.jit
@no_type_check
def _step(state, raw, t, q, bufs, bars, rows, keys, scale, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
          ENTROPY: gl.constexpr, ARGMAX: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr,
          S: gl.constexpr):  # fmt: skip
    """Key tile t without values: the next product runs under its softmax."""
    slot = (t + 1) % STAGES
    following = begin(q, bufs[0], bars[0], slot, ((t + 1) // STAGES) & 1, W, N, S)
    _, _, state = _fold(raw, state, t * N, rows, keys, scale, MASKED, CAUSAL, ENTROPY, ARGMAX, N, S)
    raw = warpgroup_mma_wait(0, deps=[following])
    mbarrier.arrive(bars[1].index(slot), count=1)
    return state, raw


@gluon.jit
@no_type_check
def _read(state, raw, first, last, q, bufs, bars, rows, keys, scale, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
          ENTROPY: gl.constexpr, ARGMAX: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr,
          S: gl.constexpr):  # fmt: skip
    """Key tiles [first, last), in pairs: the two products then take turns in two sets of registers."""
    for t in range(first, last - 1, 2):
        state, raw = _step(state, raw, t, q, bufs, bars, rows, keys, scale, MASKED, CAUSAL, ENTROPY, ARGMAX, N, STAGES,
                           W, S)  # fmt: skip
        state, raw = _step(state, raw, t + 1, q, bufs, bars, rows, keys, scale, MASKED, CAUSAL, ENTROPY, ARGMAX, N,
                           STAGES, W, S)  # fmt: skip
    if (last > first) & ((last - first) % 2 == 1):
        state, raw = _step(state, raw, last - 1, q, bufs, bars, rows, keys, scale, MASKED, CAUSAL, ENTROPY, ARGMAX, N,
                           STAGES, W, S)  # fmt: skip
    return state, raw


@gluon.jit
@no_type_check
def _write(arrays, state, out, inside, ENTROPY: gl.constexpr, MAXIMUM: gl.constexpr, ARGMAX: gl.constexpr,
           N: gl.constexpr):  # fmt: skip
    """What a row sums up to; returns the factor that turns sums of p into probabilities."""
    LSE, MAX, ARG, ENT = arrays
    m, length, spent, best, best_tile = state
    # Every row sees a key here: one that sums up to nothing, or to no number, has NaN or infinite logits.
    norm = gl.where((length > 0) & (length < 3.0e38), length, float("nan"))
    known, inverse = norm == norm, 1.0 / norm
    gl.store(LSE + out, (gl.log2(norm) + m) * LN2, mask=inside)
    if ENTROPY:
        entropy = (gl.log2(norm) - spent * inverse) * LN2
        gl.store(ENT + out, gl.where(known, gl.maximum(entropy, 0.0), norm), mask=inside)
    if ARGMAX:
        place = best_tile + (best.to(gl.int32, bitcast=True) & (N - 1))
        gl.store(ARG + out, gl.where(known, place, -1).to(gl.int64), mask=inside)
    if MAXIMUM:
        gl.store(MAX + out, gl.where(known, m * LN2, norm), mask=inside)
    return inverse


@gluon.jit
@no_type_check
def _rows(q_bufs, q_ready, bufs, bars, arrays, place, sizes, scale, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
          OUTPUT: gl.constexpr, ENTROPY: gl.constexpr, MAXIMUM: gl.constexpr, ARGMAX: gl.constexpr, N: gl.constexpr,
          STAGES: gl.constexpr, W: gl.constexpr):  # fmt: skip
    """One computing warpgroup of the row pass."""
    OUT, LSE, MAX, ARG, ENT = arrays
    lane, row0, clear, count = place
    queries, keys = sizes
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    Z: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, Z, 2)
    R: gl.constexpr = gl.SliceLayout(1, S)
    index = row0 + GROUP * M + gl.arange(0, M, layout=R)
    rows, inside = index + (keys - queries), index < queries
    zero = gl.zeros([M], gl.float32, R)
    state = (zero + HIDDEN, zero, zero, zero + 2 * HIDDEN, gl.zeros([M], gl.int32, R))
    out = lane.to(gl.int64) * queries + index
    q = q_bufs.index(GROUP).reshape([M, W])
    mbarrier.wait(q_ready, 0)
    raw = warpgroup_mma_wait(0, deps=[begin(q, bufs[0], bars[0], 0, 0, W, N, S)])
    mbarrier.arrive(bars[1].index(0), count=1)
    if OUTPUT:
        weights, _, state = _fold(raw, state, 0, rows, keys, scale, True, CAUSAL, ENTROPY, ARGMAX, N, S)
        p, acc = gl.convert_layout(weights.to(bufs[1].dtype), P), gl.zeros([M, W], gl.float32, Z)
        middle = gl.maximum(clear, 1)
        state, p, acc = _attend(state, p, acc, 1, middle, q, bufs, bars, rows, keys, scale, False, CAUSAL, ENTROPY,
                                ARGMAX, N, STAGES, W, S, Z, P)  # fmt: skip
        state, p, acc = _attend(state, p, acc, middle, count, q, bufs, bars, rows, keys, scale, True, CAUSAL, ENTROPY,
                                ARGMAX, N, STAGES, W, S, Z, P)  # fmt: skip
        slot = (count - 1) % STAGES
        mbarrier.wait(bars[2].index(slot), ((count - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, bufs[1].index(slot).reshape([N, W]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    else:
        middle = gl.minimum(clear, count - 1)
        state, raw = _read(state, raw, 0, middle, q, bufs, bars, rows, keys, scale, False, CAUSAL, ENTROPY, ARGMAX, N,
                           STAGES, W, S)  # fmt: skip
        state, raw = _read(state, raw, middle, count - 1, q, bufs, bars, rows, keys, scale, True, CAUSAL, ENTROPY,
                           ARGMAX, N, STAGES, W, S)  # fmt: skip
        _, _, state = _fold(raw, state, (count - 1) * N, rows, keys, scale, True, CAUSAL, ENTROPY, ARGMAX, N, S)
    inverse = _write((LSE, MAX, ARG, ENT), state, out, inside, ENTROPY, MAXIMUM, ARGMAX, N)
    if OUTPUT:
        T: gl.constexpr = gl.SliceLayout(1, Z)
        acc = acc * gl.expand_dims(gl.convert_layout(inverse, T), 1)
        where = gl.expand_dims(gl.convert_layout(out, T), 1) * W
        columns = gl.expand_dims(gl.arange(0, W, layout=gl.SliceLayout(0, Z)), 0)
        gl.store(OUT + where + columns, acc, mask=gl.expand_dims(gl.convert_layout(inside, T), 1))


@gluon.jit
@no_type_check
def _load_rows(descs, q_bufs, q_ready, bufs, bars, place, OUTPUT: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):
    """The loading warpgroup of the row pass."""
    q_desc, k_desc, v_desc = descs
    k_ready, k_free, v_ready, v_free = bars
    batch, head, kv_head, row0, count = place
    mbarrier.expect(q_ready, GROUPS * q_desc.block_type.nbytes)
    for i in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q_desc, [batch, head, row0 + i * M, 0], q_ready, q_bufs.index(i))
    for t in range(count):
        slot, phase = t % STAGES, (t // STAGES) & 1
        feed(k_desc, batch, kv_head, t * N, bufs[0], k_ready, k_free, slot, phase)
        if OUTPUT:
            feed(v_desc, batch, kv_head, t * N, bufs[1], v_ready, v_free, slot, phase)


# A size of one, made a constant, is more than this compiler can take (Triton 3.6).
@gluon.jit(do_not_specialize=["heads", "queries", "keys"])
@no_type_check
def hopper_row_kernel(
    q_desc, k_desc, v_desc, OUT, LSE, MAX, ARG, ENT, heads, queries, keys, scale,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr, CAUSAL: gl.constexpr,
    OUTPUT: gl.constexpr, ENTROPY: gl.constexpr, MAXIMUM: gl.constexpr, ARGMAX: gl.constexpr,
):  # fmt: skip
    """Two blocks of rows of one head; descriptors of q `[1, 1, M, W]`, of k and v `[1, 1, N, W]`."""
    block, lane = gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(1)
    batch, head, row0 = lane // heads, lane % heads, block * GROUPS * M
    high, clear = keys, keys
    if CAUSAL:
        high = gl.minimum(keys, row0 + GROUPS * M + keys - queries)
        clear = gl.minimum(keys, row0 + keys - queries + 1)
    count = gl.cdiv(high, N)
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, 1, M, W], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, N, W], k_desc.layout)
    v_bufs = k_bufs
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    k_ready, k_free = barriers(STAGES)
    v_ready, v_free = k_ready, k_free
    if OUTPUT:
        v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, N, W], v_desc.layout)
        v_ready, v_free = barriers(STAGES)
    bufs, bars = (k_bufs, v_bufs), (k_ready, k_free, v_ready, v_free)
    arrays, place, sizes = (OUT, LSE, MAX, ARG, ENT), (lane, row0, clear // N, count), (queries, keys)
    gl.warp_specialize(
        [
            (_rows, (q_bufs, q_ready, bufs, bars, arrays, place, sizes, scale, 0, CAUSAL, OUTPUT, ENTROPY, MAXIMUM,
                     ARGMAX, N, STAGES, W)),
            (_rows, (q_bufs, q_ready, bufs, bars, arrays, place, sizes, scale, 1, CAUSAL, OUTPUT, ENTROPY, MAXIMUM,
                     ARGMAX, N, STAGES, W)),
            (_load_rows, ((q_desc, k_desc, v_desc), q_bufs, q_ready, bufs, bars, (batch, head, head // GROUP, row0,
                          count), OUTPUT, N, STAGES)),
        ],
        [4, 1], [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
