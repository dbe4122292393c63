"""The column pass written for Hopper: keys stay, tiles of queries stream by. See `hopper.py`."""

from __future__ import annotations

from typing import no_type_check

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from workbench.kernels.fused.hopper import (
    GROUPS,
    HIDDEN,
    LOADER_REGISTERS,
    REGISTERS,
    M,
    barriers,
    begin,
    feed,
)


@gluon.jit
@no_type_check
def _collect(raw, state, lse, n0, column, offset, scale, MASKED: gl.constexpr,
             SUM: gl.constexpr, MAXIMUM: gl.constexpr, N: gl.constexpr, S: gl.constexpr):  # fmt: skip
    """One tile `[key, query]` of logits into the sums and maxima (in base 2) of its keys."""
    total, top = state
    x = raw * scale - gl.expand_dims(lse, 0)
    if MASKED:
        query = gl.expand_dims(n0 + gl.arange(0, N, layout=gl.SliceLayout(0, S)), 0)
        x = gl.where(gl.expand_dims(column, 1) <= query + offset, x, HIDDEN)
    if MAXIMUM:
        top = gl.maximum(top, gl.max(x, 1))
    if SUM:
        total += gl.sum(gl.exp2(x), 1)
    return total, top


@gluon.jit
@no_type_check
def _step(state, raw, lse, t, low, k, LSE, bufs, bars, column, offset, scale, MASKED: gl.constexpr, SUM: gl.constexpr,
          MAXIMUM: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr,
          S: gl.constexpr):  # fmt: skip
    """Query tile t, the next product and the next log-sum-exp under way."""
    n0, slot = low + t * N, (t + 1) % STAGES
    following = begin(k, bufs, bars[0], slot, ((t + 1) // STAGES) & 1, W, N, S)
    coming = gl.load(LSE + n0 + N + gl.arange(0, N, layout=gl.SliceLayout(0, S)))
    state = _collect(raw, state, lse, n0, column, offset, scale, MASKED, SUM, MAXIMUM, N, S)
    raw = warpgroup_mma_wait(0, deps=[following])
    mbarrier.arrive(bars[1].index(slot), count=1)
    return state, raw, coming


@gluon.jit
@no_type_check
def _sweep(state, raw, lse, first, last, low, k, LSE, bufs, bars, column, offset, scale,
           MASKED: gl.constexpr, SUM: gl.constexpr, MAXIMUM: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
           W: gl.constexpr, S: gl.constexpr):  # fmt: skip
    """Query tiles [first, last), in pairs: the two products then take turns in two sets of registers."""
    for t in range(first, last - 1, 2):
        state, raw, lse = _step(state, raw, lse, t, low, k, LSE, bufs, bars, column, offset, scale, MASKED, SUM,
                                MAXIMUM, N, STAGES, W, S)  # fmt: skip
        state, raw, lse = _step(state, raw, lse, t + 1, low, k, LSE, bufs, bars, column, offset, scale, MASKED, SUM,
                                MAXIMUM, N, STAGES, W, S)  # fmt: skip
    if (last > first) & ((last - first) % 2 == 1):
        state, raw, lse = _step(state, raw, lse, last - 1, low, k, LSE, bufs, bars, column, offset, scale, MASKED, SUM,
                                MAXIMUM, N, STAGES, W, S)  # fmt: skip
    return state, raw, lse


@gluon.jit
@no_type_check
def _columns(k_bufs, k_ready, bufs, bars, arrays, place, sizes, scale, GROUP: gl.constexpr, CAUSAL: gl.constexpr,
             SUM: gl.constexpr, MAXIMUM: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
             W: gl.constexpr):  # fmt: skip
    """One computing warpgroup of the column pass."""
    LSE, SUMS, TOPS = arrays
    lane, key0, low, edge, count = place
    offset, keys = sizes
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    R: gl.constexpr = gl.SliceLayout(1, S)
    column = key0 + GROUP * M + gl.arange(0, M, layout=R)
    zero = gl.zeros([M], gl.float32, R)
    state = (zero, zero + HIDDEN)
    k = k_bufs.index(GROUP).reshape([M, W])
    mbarrier.wait(k_ready, 0)
    lse = gl.load(LSE + low + gl.arange(0, N, layout=gl.SliceLayout(0, S)))
    raw = warpgroup_mma_wait(0, deps=[begin(k, bufs, bars[0], 0, 0, W, N, S)])
    mbarrier.arrive(bars[1].index(0), count=1)
    last = count - 1
    edge = gl.minimum(edge, last)
    state, raw, lse = _sweep(state, raw, lse, 0, edge, low, k, LSE, bufs, bars, column, offset, scale, CAUSAL, SUM,
                             MAXIMUM, N, STAGES, W, S)  # fmt: skip
    state, raw, lse = _sweep(state, raw, lse, edge, last, low, k, LSE, bufs, bars, column, offset, scale, False, SUM,
                             MAXIMUM, N, STAGES, W, S)  # fmt: skip
    total, top = _collect(raw, state, lse, low + last * N, column, offset, scale, CAUSAL, SUM, MAXIMUM, N, S)
    out, inside = lane.to(gl.int64) * keys + column, column < keys
    if SUM:
        gl.store(SUMS + out, total, mask=inside)
    if MAXIMUM:
        gl.store(TOPS + out, gl.exp2(top), mask=inside)


@gluon.jit
@no_type_check
def _load_columns(q_desc, k_desc, k_bufs, k_ready, bufs, bars, place, N: gl.constexpr, STAGES: gl.constexpr):
    """The loading warpgroup of the column pass."""
    batch, head, kv_head, key0, low, count = place
    mbarrier.expect(k_ready, GROUPS * k_desc.block_type.nbytes)
    for i in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(k_desc, [batch, kv_head, key0 + i * M, 0], k_ready, k_bufs.index(i))
    for t in range(count):
        feed(q_desc, batch, head, low + t * N, bufs, bars[0], bars[1], t % STAGES, (t // STAGES) & 1)


# A size of one, made a constant, is more than this compiler can take (Triton 3.6).
@gluon.jit(do_not_specialize=["heads", "queries", "keys"])
@no_type_check
def hopper_column_kernel(
    q_desc, k_desc, LSE, SUMS, TOPS, stride_l, heads, queries, keys, scale,
    GROUP: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr, CAUSAL: gl.constexpr,
    SUM: gl.constexpr, MAXIMUM: gl.constexpr,
):  # fmt: skip
    """Two blocks of keys of one query head; descriptors of k `[1, 1, M, W]`, of q `[1, 1, N, W]`.

    `LSE` is in base 2 and goes on beyond the queries by two tiles of numbers so large that nothing remains of theirs.
    """
    block, lane = gl.program_id(0), gl.program_id(1)
    batch, head, key0 = lane // heads, lane % heads, block * GROUPS * M
    low, edge = 0, 0
    if CAUSAL:
        low = gl.maximum(key0 - keys + queries, 0) // N * N
        # From this tile on every query sees all of the program's keys.
        edge = gl.cdiv(gl.maximum(key0 + GROUPS * M - 1 - keys + queries, 0) - low, N)
    count = gl.cdiv(queries - low, N)
    lse = LSE + lane.to(gl.int64) * stride_l
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [GROUPS, 1, 1, M, W], k_desc.layout)
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, N, W], q_desc.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(k_ready, count=1)
    bars = barriers(STAGES)
    arrays, place, sizes = (lse, SUMS, TOPS), (lane, key0, low, edge, count), (keys - queries, keys)
    gl.warp_specialize(
        [
            (_columns, (k_bufs, k_ready, q_bufs, bars, arrays, place, sizes, scale, 0, CAUSAL, SUM, MAXIMUM, N, STAGES,
                        W)),
            (_columns, (k_bufs, k_ready, q_bufs, bars, arrays, place, sizes, scale, 1, CAUSAL, SUM, MAXIMUM, N, STAGES,
                        W)),
            (_load_columns, (q_desc, k_desc, k_bufs, k_ready, q_bufs, bars, (batch, head, head // GROUP, key0, low,
                             count), N, STAGES)),
        ],
        [4, 1], [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
