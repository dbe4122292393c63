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
    query_keys: Int[Tensor, "batch query slot"] | None = None,
) -> AttentionStatistics:
    """All requested statistics from the explicit matrix; the contract of `attention_statistics`."""
    a, lse = attention_pattern(q, k, geometry, scale=scale, softcap=softcap, sinks=sinks)
    values = v.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    visible = geometry.visible(q.device)[:, None]
    seen = visible.any(-1)
    rows = torch.arange(a.shape[2], device=q.device) + geometry.query_offset
    columns = torch.arange(a.shape[3], device=q.device)
    distance = (rows[:, None] - columns[None, :]).double()
    start = torch.zeros(a.shape[0], device=q.device) if geometry.start is None else geometry.start
    end = torch.full_like(start, a.shape[3]) if geometry.end is None else geometry.end
    from_start = columns[None] - start[:, None]
    top_keys, top_mass = _top(a, visible, request.top_k)
    sink = None
    if request.sink_mass:
        sink = torch.where(seen, 1.0 - a.sum(-1), 0.0) if sinks is not None else torch.zeros_like(lse)

    def at_offset(offset: int) -> Tensor:
        hit = (columns[None, :] == rows[:, None] + offset).double()
        return torch.einsum("b h i j, i j -> b h i", a, hit)

    def last(size: int) -> Tensor:
        recent_rows = rows[None] >= (end - size)[:, None]
        return torch.einsum("b h i j, b i -> b h j", a, recent_rows.double())

    statistics = {
        "output": torch.einsum("b h i j, b h j d -> b h i d", a, values) if request.output else None,
        "lse": lse if request.lse else None,
        "max_prob": a.amax(-1) if request.max_prob else None,
        "entropy": torch.special.entr(a).sum(-1) if request.entropy else None,
        "distance": (a * distance).sum(-1) if request.distance else None,
        "first": _stack([torch.einsum("b h i j, b j -> b h i", a, (from_start < s).double()) for s in request.first]),
        "recent": _stack([(a * (distance < w)).sum(-1) for w in request.recent]),
        "offsets": _stack([at_offset(o) for o in request.offsets]),
        "features": None
        if key_features is None
        else torch.einsum("b h i j, b j c -> b h i c", a, key_features.double()),
        "at_keys": None if query_keys is None else _gather(a, query_keys),
        "sink_mass": sink,
        "top_mass": top_mass,
        "column_sum": a.sum(2) if request.column_sum else None,
        "column_max": a.amax(2) if request.column_max else None,
        "column_last": _stack([last(w) for w in request.column_last], dim=2),
    }
    argmax = torch.where(seen, a.argmax(-1), -1) if request.argmax else None
    floats = {name: None if value is None else value.float() for name, value in statistics.items()}
    return AttentionStatistics(argmax=argmax, top_keys=top_keys, **floats)


def _stack(parts: list[Tensor], dim: int = -1) -> Tensor | None:
    return torch.stack(parts, dim=dim) if parts else None


def _gather(a: Tensor, keys: Int[Tensor, "batch query slot"]) -> Tensor:
    index = keys.clamp(min=0)[:, None].expand(-1, a.shape[1], -1, -1)
    return torch.gather(a, 3, index) * (keys >= 0)[:, None]


def _top(a: Tensor, visible: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
    if not k:
        return None, None
    found = min(k, a.shape[-1])
    mass, keys = a.masked_fill(~visible, -1.0).topk(found, dim=-1)
    mass = torch.nn.functional.pad(mass, (0, k - found), value=-1.0)
    keys = torch.nn.functional.pad(keys, (0, k - found), value=-1)
    return torch.where(mass >= 0, keys, -1), mass.clamp(min=0)
