"""Parts of the attention matrix at their own resolution: exact tiles.

A viewer of a long prompt keeps the pooled blocks (`StatisticsRequest.block`), the log-sum-exp and post-rotary q and
k; any tile it zooms into is computed again, exactly, from these.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels.checks import check_attention, check_given
from workbench.kernels.geometry import Geometry


def attention_tile(
    q: Float[Tensor, "batch head query dim"],
    k: Float[Tensor, "batch kv_head key dim"],
    lse: Float[Tensor, "batch head query"],
    rows: slice,
    columns: slice,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    key_start: Int[Tensor, " batch"] | None = None,
    key_end: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch head row column"]:
    """Attention from queries `rows` to keys `columns`, exact, in float32, from the rows' log-sum-exp.

    Args:
        lse: of `attention_statistics` (natural, a learned sink included), for all queries.
        rows, columns: slices of the query and the key axis; negative ends and steps are refused.

    Raises:
        RequestError: a slice that leaves the tensors, or shapes that do not belong together.
    """
    check_attention(q, k, scale=scale, softcap=softcap, key_start=key_start, key_end=key_end)
    check_given(q, k, lse=lse)
    geometry = Geometry(q.shape[0], q.shape[2], k.shape[2], causal, window, key_start, key_end)
    r, c = _inside(rows, geometry.queries, "rows"), _inside(columns, geometry.keys, "columns")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    logits, seen = tile_logits(q, k, geometry, r, c, factor, softcap)
    return torch.exp((logits - lse[:, :, r, None]).masked_fill(~seen, 0.0)).masked_fill(~seen, 0.0)


def tile_logits(
    q: Tensor, k: Tensor, geometry: Geometry, rows: slice, columns: slice, scale: float, softcap: float | None
) -> tuple[Float[Tensor, "batch head row column"], Bool[Tensor, "some_batch one row column"]]:
    """Logits of a tile, and where a query sees a key."""
    group = q.shape[1] // max(1, k.shape[1])
    queries = q[:, :, rows].float().unflatten(1, (k.shape[1], group))  # type: ignore[no-untyped-call]
    logits = torch.einsum("b k g i d, b k j d -> b k g i j", queries, k[:, :, columns].float()).flatten(1, 2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits, _seen(geometry, rows, columns, q.device)


def _inside(part: slice, size: int, name: str) -> slice:
    first, last = part.start or 0, size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= first <= last <= size:
        raise RequestError(f"{name} {first}:{last} of {size}: give a slice with 0 <= first <= last <= {size}.")
    return slice(first, last)


def _seen(geometry: Geometry, rows: slice, columns: slice, device: torch.device) -> Tensor:
    place = torch.arange(rows.start, rows.stop, device=device) + geometry.query_offset
    keys = torch.arange(columns.start, columns.stop, device=device)
    seen = torch.ones(1, len(place), len(keys), dtype=torch.bool, device=device)
    if geometry.causal:
        seen = seen & (keys <= place[:, None])
    if geometry.window is not None:
        seen = seen & (keys > place[:, None] - geometry.window)
    for bound, above in ((geometry.start, True), (geometry.end, False)):
        if bound is not None:
            limit = bound.to(device)[:, None, None]
            real = (keys >= limit) & (place[:, None] >= limit) if above else (keys < limit) & (place[:, None] < limit)
            seen = seen & real
    return seen[:, None]
