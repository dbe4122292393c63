"""One row from the states of the programs that shared its keys: every sum is rescaled to the common maximum."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from workbench.kernels.fused.tiles import LN2


@triton.jit
@no_type_check
def merge_kernel(
    LSE_IN, REAL_IN, OUT_IN, ENT_IN, MEAN_IN, CENTRE_IN, SPREAD_IN, MAX_IN, ARG_IN, SINKS, START, END,
    LSE, REAL, OUT, ENT, MEANS, DISTANCE, SPREAD, MAX, ARG, total_rows, heads, queries, keys, window, DV,
    SPLITS: tl.constexpr, S_PAD: tl.constexpr, DV_PAD: tl.constexpr, PADDED: tl.constexpr, SINK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OUTPUT: tl.constexpr, ENTROPY: tl.constexpr, MEAN: tl.constexpr,
    PLACE: tl.constexpr, MAXIMUM: tl.constexpr, ARGMAX: tl.constexpr,
):  # fmt: skip
    """One program a row `[batch, head, query]`; states are `[split, row]`."""
    flat = tl.program_id(0)
    place = flat % queries + keys - queries
    batch, head = flat // queries // heads, flat // queries % heads
    start, end = 0, keys
    if PADDED:
        start, end = tl.load(START + batch), tl.load(END + batch)
    split = tl.arange(0, S_PAD)
    there, index = split < SPLITS, split.to(tl.int64) * total_rows + flat
    m = tl.load(LSE_IN + index, mask=there, other=-1.0e30)
    length = tl.load(REAL_IN + index, mask=there, other=0.0)
    shift = tl.max(m, 0)
    if SINK:
        sink = tl.load(SINKS + head) / LN2
        shift = tl.maximum(shift, sink)
    weight = tl.where(length == 0, 0.0, tl.exp2(m - shift))
    total = tl.sum(length * weight, 0)
    norm = total
    if SINK:
        norm += tl.exp2(sink - shift)
    seen = (place >= start) & (place < end)
    # A row that sees keys and sums up to nothing, or to no number, has NaN or infinite logits.
    bad = seen & ~((total > 0) & (total < 3.0e38))
    total = tl.where(bad, float("nan"), total)
    norm = tl.where(bad, float("nan"), tl.where(seen, norm, 1.0))
    level = tl.log2(norm) + shift
    real = total / norm
    tl.store(LSE + flat, tl.where(seen, level * LN2, 0.0))
    tl.store(REAL + flat, real)
    if OUTPUT:
        values = tl.arange(0, DV_PAD)
        near = there[:, None] & (values < DV)[None, :]
        parts = tl.load(OUT_IN + index[:, None] * DV + values[None, :], mask=near, other=0.0)
        tl.store(OUT + flat * DV + values, tl.sum(parts * weight[:, None], 0) / norm, mask=values < DV)
    if ENTROPY:
        spent = tl.load(ENT_IN + index, mask=there, other=0.0)
        # Where nothing was summed, the maximum is no number to compute with.
        spent = tl.where(length == 0, 0.0, spent + length * (m - shift))
        entropy = ((level - shift) * real - tl.sum(spent * weight, 0) / norm) * LN2
        tl.store(ENT + flat, tl.where(bad, norm, tl.where(seen, tl.maximum(entropy, 0.0), 0.0)))
    if MEAN:
        first, last = start, end
        if CAUSAL:
            last = tl.minimum(end, place + 1)
        if WINDOW:
            first = tl.maximum(start, place - window + 1)
        logits = tl.sum(tl.load(MEAN_IN + index, mask=there & (length > 0), other=0.0), 0)
        mean = logits * LN2 / tl.maximum(last - first, 1).to(tl.float32)
        tl.store(MEANS + flat, tl.where(bad, norm, tl.where(seen, mean, 0.0)))
    if PLACE:
        centre = tl.load(CENTRE_IN + index, mask=there, other=0.0)
        moment = tl.load(SPREAD_IN + index, mask=there, other=0.0)
        share = length * weight / tl.where(seen, total, 1.0)
        mean = tl.sum(centre * share, 0)
        away = centre - mean
        moment = tl.sum(moment * weight, 0) / tl.where(seen, total, 1.0) + tl.sum(share * away * away, 0)
        tl.store(DISTANCE + flat, tl.where(seen, (place.to(tl.float32) - mean) * real, 0.0))
        spread = tl.where(seen, tl.sqrt(tl.maximum(moment, 0.0)), 0.0)
        tl.store(SPREAD + flat, tl.where(bad, norm, spread))
    if MAXIMUM:
        top, best = tl.max(tl.load(MAX_IN + index, mask=there, other=-2.0e30), 0, return_indices=True)
        tl.store(MAX + flat, tl.where(bad, norm, tl.where(seen, top, 0.0)))
        if ARGMAX:
            chosen = tl.load(ARG_IN + best.to(tl.int64) * total_rows + flat)
            tl.store(ARG + flat, tl.where(seen & ~bad, chosen, -1))
