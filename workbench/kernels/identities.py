"""Linear statistics from stock attention: V replaced by functions of the key (identities of one softmax row).

With `A` the attention matrix and `F` functions of the key, `A F` is attention whose values are `F`, so any fused
backend computes it in O(N) memory. Also `A_ij = exp(s q_i.k_j - lse_i)` for any pair that is named, and the entropy
is `lse_i - s q_i.(A K)_i`: attention whose values are the keys. The log-sum-exp comes from the backend's own
operator. What is not linear (maxima, columns) or not in stock attention (windows, soft caps, learned sinks) is out
of reach here and goes to `blocks`; so is, for half-precision inputs, what would come back rounded to half precision
(entropy, distance, features).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.kernels.geometry import Geometry
from workbench.kernels.request import AttentionStatistics, StatisticsRequest

# Mass on the first s tokens is a sum of s single entries.
MOST_FIRST = 16


def identities_reach(
    request: StatisticsRequest,
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    softcap: float | None,
    sinks: Tensor | None,
    features: bool,
) -> bool:
    """Whether this module can serve the request to float32 accuracy."""
    rounded = dtype not in (torch.float32, torch.float64) and (request.entropy or request.distance or features)
    if rounded or any(size > MOST_FIRST for size in request.first):
        return False
    plain = softcap is None and sinks is None and geometry.window_of(geometry.keys) is None
    square = geometry.causal and geometry.queries == geometry.keys
    return (
        plain
        and square
        and not (
            request.needs_maxima
            or request.needs_columns
            or request.recent
            or request.spread
            or request.mean_logit
            or request.first_logit
        )
    )


def sdpa_statistics(
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
    value_features: None = None,
    query_keys: Int[Tensor, "batch query slot"] | None = None,
    query_weights: None = None,
) -> AttentionStatistics:
    """The linear statistics, each from one call of fused attention; the contract of `attention_statistics`."""
    parts: dict[str, Tensor] = {}
    for prompts, rows, columns in geometry.slices():
        found = _square(
            q[prompts, :, rows],
            k[prompts, :, columns],
            v[prompts, :, columns],
            request,
            scale,
            None if key_features is None else key_features[prompts, columns],
            None if query_keys is None else _shifted(query_keys[prompts, rows], columns.start),
        )
        for name, value in found.items():
            if name not in parts:
                parts[name] = value.new_zeros(q.shape[0], q.shape[1], q.shape[2], *value.shape[3:])
            parts[name][prompts, :, rows] = value
    return AttentionStatistics(**parts)


def _shifted(keys: Tensor, first: int) -> Tensor:
    return torch.where(keys >= 0, keys - first, -1)


def _square(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: StatisticsRequest,
    scale: float,
    features: Tensor | None,
    slots: Tensor | None,
) -> dict[str, Tensor]:
    group, keys = q.shape[1] // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    output, lse = fused_attention(q, k, v, scale)
    index = torch.arange(keys, device=q.device)
    found: dict[str, Tensor] = {}
    if request.output:
        found["output"] = output.float()
    if request.lse:
        found["lse"] = lse
    if request.entropy:
        mean_key = fused_attention(q, k, k, scale)[0].float()
        found["entropy"] = (lse - scale * (q.float() * mean_key).sum(-1)).clamp(min=0)
    if request.distance:
        found["distance"] = index - _weighted(q, k, index[None, None, :, None].float(), scale)[..., 0]
    if request.first:
        leading = index[: max(request.first)].expand(len(q), keys, -1)
        mass = _at_pairs(q, k, lse, leading, scale).cumsum(-1)
        found["first"] = torch.stack([mass[..., min(size, keys) - 1] for size in request.first], dim=-1)
    if features is not None:
        found["features"] = _weighted(q, k, features.float()[:, None], scale)
    if request.offsets:
        pairs = index[:, None] + torch.tensor(request.offsets, device=q.device)
        found["offsets"] = _at_pairs(q, k, lse, pairs[None].expand(len(q), -1, -1), scale)
    if slots is not None:
        found["at_keys"] = _at_pairs(q, k, lse, slots, scale)
    if request.sink_mass:
        found["sink_mass"] = torch.zeros_like(lse)
    return found


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention output and log-sum-exp (float32) from the backend's own operator; heads already repeated."""
    aten, width = torch.ops.aten, v.shape[-1]
    if q.device.type != "cpu" and q.shape[-1] % 8:
        # Fused CUDA kernels want widths in steps of eight; zeros change no product.
        q, k, v = (torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v))
    if q.device.type == "cpu":
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    elif q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1]:
        output, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[:2]
    else:
        output, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)[:2]
    return output[..., :width], lse[..., : q.shape[2]].float()


def _weighted(q: Tensor, k: Tensor, values: Tensor, scale: float) -> Tensor:
    """`A values` for `[batch or 1, 1, key, column]` functions of the key, in chunks as wide as a head."""
    width, columns = q.shape[-1], values.shape[-1]
    parts = []
    for low in range(0, columns, width):
        part = values[..., low : low + width]
        filled = torch.nn.functional.pad(part, (0, width - part.shape[-1])).to(q.dtype)
        wide = filled.expand(q.shape[0], q.shape[1], -1, -1).contiguous()
        parts.append(fused_attention(q, k, wide, scale)[0][..., : part.shape[-1]].float())
    return torch.cat(parts, dim=-1)


def _at_pairs(q: Tensor, k: Tensor, lse: Tensor, keys: Tensor, scale: float) -> Tensor:
    """`A_ij` for the listed keys of each query, one slot at a time; zero at -1 and at unseen keys."""
    index = torch.arange(q.shape[2], device=q.device)
    parts = []
    for slot in keys.unbind(-1):
        valid = (slot >= 0) & (slot <= index)
        chosen = torch.gather(k, 2, slot.clamp(min=0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[-1]))
        logit = scale * (q.float() * chosen.float()).sum(-1)
        parts.append(torch.exp(logit - lse) * valid[:, None])
    return torch.stack(parts, dim=-1)
