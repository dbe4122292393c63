"""What every fused kernel shares: which keys a row block sees, logits of a tile, and base-2 arithmetic.

Logits are kept in base 2 (`scale` already holds the factor 1/ln 2), masked ones at a finite `HIDDEN`, so that no
kernel ever computes inf - inf. A tile is masked only where it touches an edge of the visible region.

Kernels are compiled from their source, so nothing may wrap them: `no_type_check` keeps shape checks of tests away.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1.0e30)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def key_bounds(first, last, start, end, WINDOW: tl.constexpr, window, CAUSAL: tl.constexpr, N: tl.constexpr):
    """Key tiles seen by rows with key indices [first, last): (low, clear_low, clear_high, high), in keys.

    Tiles of [low, clear_low) and [clear_high, high) touch an edge; those between need no mask.
    """
    high = end
    whole = end
    if CAUSAL:
        high = tl.minimum(end, last)
        whole = tl.minimum(end, first + 1)
    low = start
    clear = start
    if WINDOW:
        low = tl.maximum(start, first - window + 1)
        clear = tl.maximum(start, last - window)
    low = low // N * N
    clear_low = tl.cdiv(clear, N) * N
    clear_high = tl.maximum(whole // N * N, low)
    clear_low = tl.minimum(tl.maximum(clear_low, low), clear_high)
    return low, clear_low, clear_high, tl.maximum(high, low)


@triton.jit
@no_type_check
def query_bounds(first, last, start, end, offset, queries, WINDOW: tl.constexpr, window, CAUSAL: tl.constexpr,
                 M: tl.constexpr):  # fmt: skip
    """Query tiles that see any key of [first, last), as `key_bounds`, in queries (key index less `offset`)."""
    low = tl.maximum(start - offset, 0)
    if not CAUSAL:
        # Queries before the first key see all keys.
        low = tl.where(offset < 0, 0, low)
    clear = low
    if CAUSAL:
        low = tl.maximum(low, first - offset)
        clear = tl.maximum(clear, last - 1 - offset)
    high = tl.minimum(end - offset, queries)
    whole = high
    if WINDOW:
        high = tl.minimum(high, last - 1 + window - offset)
        whole = tl.minimum(whole, first + window - offset)
    low = low // M * M
    clear_low = tl.cdiv(clear, M) * M
    clear_high = tl.maximum(whole // M * M, low)
    clear_low = tl.minimum(tl.maximum(clear_low, low), clear_high)
    return low, clear_low, clear_high, tl.maximum(high, low)


@triton.jit
@no_type_check
def real_rows(rows, start, end, CAUSAL: tl.constexpr):
    """Queries (their key indices) that are not padding; without causality those before the first key are real too."""
    real = (rows >= start) & (rows < end)
    if not CAUSAL:
        real = real | (rows < 0)
    return real


@triton.jit
@no_type_check
def visible(rows, keys, start, end, WINDOW: tl.constexpr, window, CAUSAL: tl.constexpr):
    """The mask of a tile; `rows` are key indices of queries, and both broadcast."""
    seen = (keys >= start) & (keys < end) & real_rows(rows, start, end, CAUSAL)
    if CAUSAL:
        seen = seen & (keys <= rows)
    if WINDOW:
        seen = seen & (keys > rows - window)
    return seen


@triton.jit
@no_type_check
def capped(logits, scale, SOFTCAP: tl.constexpr, softcap):
    """Base-2 logits from q.k: scaled, and soft-capped where the model does that."""
    if SOFTCAP:
        # tanh by its exponential: saturates without overflow, and is odd by construction.
        x = logits * (scale / softcap)
        e = tl.exp2(-2.0 * tl.abs(x))
        # Near zero 1 - e cancels; two terms of the series are exact to float32 there.
        y = tl.abs(x) * LN2
        t = tl.where(y < 0.02, y - y * y * y / 3.0, (1.0 - e) / (1.0 + e))
        return tl.where(x < 0, -t, t) * (softcap / LN2)
    else:
        return logits * scale


@triton.jit
@no_type_check
def product(a, b, EXACT: tl.constexpr):
    """A matrix product accumulated in float32; float32 inputs stay float32."""
    if EXACT:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b)
