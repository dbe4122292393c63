"""The oracle: every statistic read off the full attention matrix in float64.

Memory is O(B H Q K): for tests and small displays. Written to be read, not to be fast.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.kernels.geometry import Geometry
from workbench.kernels.request import AttentionStatistics, StatisticsRequest


def attention_pattern(
    q: Float[Tensor, "batch head query dim"],
    k: Float[Tensor, "batch kv_head key dim"],
    geometry: Geometry,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch head query"]]:
    """The full attention pattern and its log-sum-exp; rows without a visible key are zero."""
    group = q.shape[1] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(group, dim=1)
    logits = torch.einsum("b h i d, b h j d -> b h i j", q.to(dtype), keys) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    visible = geometry.visible(q.device)[:, None]
    logits = logits.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    lse = lse.masked_fill(~torch.isfinite(lse), float("nan"))
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(dtype)[None, :, None].expand_as(lse))
    seen = visible.any(-1).expand_as(lse)
    pattern = torch.exp(logits - lse.masked_fill(~seen, 0.0)[..., None]).masked_fill(~visible, 0.0)
    return pattern, lse.masked_fill(~seen, 0.0)


def reference_statistics(
    q: Float[Tensor, "batch head query dim"],
    k: Float[Tensor, "batch kv_head key dim"],
    v: Float[Tensor, "batch kv_head key value_dim"],
    request: StatisticsRequest,
    geometry: Geometry,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    key_features: Float[Tensor, "batch key feature"] | None = None,
    value_features: Float[Tensor, "batch kv_head key value_feature"] | None = None,
    query_keys: Int[Tensor, "batch query slot"] | None = None,
    query_weights: Float[Tensor, "batch weighting query"] | None = None,
) -> AttentionStatistics:
    """All requested statistics from the explicit matrix; the contract of `attention_statistics`."""
    a, lse = attention_pattern(q, k, geometry, scale=scale, softcap=softcap, sinks=sinks)
    v, key_features, value_features, query_weights = _real(geometry, v, key_features, value_features, query_weights)
    values = v.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    visible = geometry.visible(q.device)[:, None]
    seen = visible.any(-1)
    rows = torch.arange(a.shape[2], device=q.device) + geometry.query_offset
    columns = torch.arange(a.shape[3], device=q.device)
    distance = (rows[:, None] - columns[None, :]).double()
    start = torch.zeros(a.shape[0], device=q.device) if geometry.start is None else geometry.start
    end = torch.full_like(start, a.shape[3]) if geometry.end is None else geometry.end
    from_start = columns[None] - start[:, None]

    top_keys, top_mass = _top(a, visible & ~lse.isnan()[..., None], lse, request.top_k)
    statistics = {
        "output": torch.einsum("b h i j, b h j d -> b h i d", a, values) if request.output else None,
        "lse": lse if request.lse else None,
        "max_prob": a.amax(-1) if request.max_prob else None,
        "entropy": torch.special.entr(a).sum(-1) if request.entropy else None,
        "distance": (a * distance).sum(-1) if request.distance else None,
        "first": _stack([torch.einsum("b h i j, b j -> b h i", a, (from_start < s).double()) for s in request.first]),
        "recent": _stack([(a * (distance < w)).sum(-1) for w in request.recent]),
        "offsets": _stack([(a * (distance == -o)).sum(-1) for o in request.offsets]),
        "features": None if key_features is None else a @ key_features.double()[:, None],
        "at_keys": None if query_keys is None else _gather(a, query_keys),
        "top_mass": top_mass,
        "column_sum": a.sum(2) if request.column_sum else None,
        "column_max": a.amax(2) if request.column_max else None,
        "column_last": _stack(
            [(a * (rows >= (end - w)[:, None])[:, None, :, None]).sum(2) for w in request.column_last], dim=2
        ),
    }
    argmax = torch.where(seen & ~lse.isnan(), a.argmax(-1), -1) if request.argmax else None
    statistics |= _logits(q, k, request, visible, seen, scale, softcap) | _pooled(a, request, end)
    statistics |= _given(a, value_features, query_weights)
    statistics |= _beside(a, lse, distance, request, seen, sinks)
    column_above = _stack([_first_above(a, level) for level in request.column_above], dim=2)
    for name in ("max_logit", "mean_logit", "first_logit", "entropy", "above"):
        # A NaN or infinite logit leaves nothing of its row.
        value = statistics.get(name)
        if value is not None:
            statistics[name] = value + (lse * 0.0 if value.ndim == 3 else lse[..., None] * 0.0)
    floats = {name: None if value is None else value.float() for name, value in statistics.items()}
    return AttentionStatistics(argmax=argmax, top_keys=top_keys, column_above=column_above, **floats)


def _beside(
    a: Tensor, lse: Tensor, distance: Tensor, request: StatisticsRequest, seen: Tensor, sinks: Tensor | None
) -> dict[str, Tensor | None]:
    """Mass on the learned sink, and the spread of the distance over real keys."""
    found: dict[str, Tensor | None] = {}
    if request.sink_mass:
        found["sink_mass"] = lse * 0.0
        if sinks is not None:
            found["sink_mass"] = torch.where(seen, torch.exp(sinks.double()[:, None] - lse), 0.0)
    if request.spread:
        share = a / a.sum(-1, keepdim=True).clamp(min=1e-300)
        mean = (share * distance).sum(-1, keepdim=True)
        found["spread"] = (share * (distance - mean) ** 2).sum(-1).sqrt()
    return found


def _logits(
    q: Tensor, k: Tensor, request: StatisticsRequest, visible: Tensor, seen: Tensor, scale: float, cap: float | None
) -> dict[str, Tensor | None]:
    """Maximum, mean and first of the visible logits."""
    if not (request.max_logit or request.mean_logit or request.first_logit):
        return {}
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.double() @ keys.transpose(-1, -2) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    top = torch.where(seen, logits.masked_fill(~visible, float("-inf")).amax(-1), 0.0)
    mean = logits.masked_fill(~visible, 0.0).sum(-1) / visible.sum(-1).clamp(min=1)
    first = logits.gather(-1, visible.int().argmax(-1, keepdim=True).expand(*logits.shape[:3], 1))[..., 0]
    first = torch.where(seen, first, 0.0)
    return {
        "max_logit": top if request.max_logit else None,
        "mean_logit": mean if request.mean_logit else None,
        "first_logit": first if request.first_logit else None,
    }


def _real(
    geometry: Geometry, v: Tensor, shared: Tensor | None, own: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Values, functions of the key and weights, zero in padding, which may hold anything (NaN too)."""
    visible = geometry.visible(v.device)
    query, key = ~visible.any(2), ~visible.any(1)
    return (
        v.masked_fill(key[:, None, :, None], 0.0),
        None if shared is None else shared.masked_fill(key[..., None], 0.0),
        None if own is None else own.masked_fill(key[:, None, :, None], 0.0),
        None if weights is None else weights.masked_fill(query[:, None], 0.0),
    )


def _given(a: Tensor, functions: Tensor | None, weights: Tensor | None) -> dict[str, Tensor | None]:
    """Sums of each KV head's functions of the key, and over weighted queries."""
    found: dict[str, Tensor | None] = {}
    if functions is not None:
        found["value_features"] = a @ functions.double().repeat_interleave(a.shape[1] // functions.shape[1], dim=1)
    if weights is not None:
        found["column_weighted"] = torch.einsum("b h i j, b m i -> b h m j", a, weights.double())
    return found


def _pooled(a: Tensor, request: StatisticsRequest, end: Tensor) -> dict[str, Tensor | None]:
    """Counts, diagonals and blocks."""
    queries, keys = a.shape[2:]
    place = torch.arange(queries, device=a.device) + keys - queries
    found: dict[str, Tensor | None] = {"above": _stack([(a > level).double().sum(-1) for level in request.above])}
    for name, last in (("diagonal", queries if request.diagonal else 0), ("diagonal_last", request.diagonal_last)):
        if last:
            counted = ((place >= (end - last)[:, None]) & (place < end[:, None]))[:, None, :, None]
            along = [(a * counted).diagonal(keys - queries - d, -2, -1).sum(-1) for d in range(keys)]
            found[name] = torch.stack(along, dim=-1)
    if request.block:
        b = request.block
        whole = torch.nn.functional.pad(a, (0, -keys % b, 0, -queries % b))
        parts = whole.unflatten(-1, (-1, b)).unflatten(-3, (-1, b))  # type: ignore[no-untyped-call]
        found |= {"block_sum": parts.sum((-3, -1)), "block_max": parts.amax((-3, -1))}
    return found


def _first_above(a: Tensor, level: float) -> Tensor:
    """The first query whose entry exceeds `level`, -1 where none does."""
    hit = a > level
    return torch.where(hit.any(2), hit.int().argmax(2), -1)


def _stack(parts: list[Tensor], dim: int = -1) -> Tensor | None:
    return torch.stack(parts, dim=dim) if parts else None


def _gather(a: Tensor, keys: Int[Tensor, "batch query slot"]) -> Tensor:
    there = (keys >= 0) & (keys < a.shape[3])
    index = torch.where(there, keys, 0).long()[:, None].expand(-1, a.shape[1], -1, -1)
    return torch.where(there[:, None], torch.gather(a, 3, index), 0.0)


def _top(a: Tensor, visible: Tensor, lse: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
    if not k:
        return None, None
    found = min(k, a.shape[-1])
    mass, keys = a.masked_fill(~visible, -1.0).topk(found, dim=-1)
    mass = torch.nn.functional.pad(mass, (0, k - found), value=-1.0)
    keys = torch.nn.functional.pad(keys, (0, k - found), value=-1)
    return torch.where(mass >= 0, keys, -1), mass.clamp(min=0) + lse[..., None] * 0.0
