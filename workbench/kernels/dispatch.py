"""The one entry to attention statistics, and to attention itself.

Four implementations stand behind `attention_statistics`: `reference` (float64, the full matrix, the oracle),
`blocks` (one streaming pass in torch, any device), `identities` (stock fused attention, forward and backward, for what
is linear in the pattern, with `blocks` for the rest of the request) and `triton` (our kernels: CUDA, or Triton's
interpreter). `attention_output` is attention without statistics: stock
`scaled_dot_product_attention` wherever that computes the model's attention; where it cannot (a window shorter than
the prompt, soft-capped logits, learned sinks), `triton` on CUDA and `blocks` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from workbench.errors import RequestError
from workbench.kernels.blocks import blocked_statistics
from workbench.kernels.checks import check_attention, check_given
from workbench.kernels.geometry import Geometry
from workbench.kernels.identities import is_faster, is_plain, sdpa_statistics
from workbench.kernels.reference import attention_pattern, reference_statistics
from workbench.kernels.request import MAX_FEATURES, WIDEST, AttentionStatistics, StatisticsRequest
from workbench.kernels.results import Results


def _triton_statistics(*args: Any, **options: Any) -> AttentionStatistics:
    from workbench.kernels.fused.launch import fused_statistics

    return fused_statistics(*args, **options)


Implementation = Literal["auto", "reference", "identities", "blocks", "triton"]
IMPLEMENTATIONS: dict[str, Callable[..., AttentionStatistics]] = {
    "reference": reference_statistics,
    "identities": sdpa_statistics,
    "blocks": blocked_statistics,
    "triton": _triton_statistics,
}
# Entries of the mask of one block of rows of chunked prefill.
MASK = 1 << 22


def attention_statistics(
    q: Float[Tensor, "batch head query dim"],
    k: Float[Tensor, "batch kv_head key dim"],
    v: Float[Tensor, "batch kv_head key value_dim"],
    request: StatisticsRequest,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    key_start: Int[Tensor, " batch"] | None = None,
    key_end: Int[Tensor, " batch"] | None = None,
    key_features: Float[Tensor, "batch key feature"] | None = None,
    value_features: Float[Tensor, "batch kv_head key value_feature"] | None = None,
    query_keys: Int[Tensor, "batch query slot"] | None = None,
    query_weights: Float[Tensor, "batch weighting query"] | None = None,
    lse: Float[Tensor, "batch head query"] | None = None,
    implementation: Implementation = "auto",
) -> AttentionStatistics:
    """Exact statistics of softmax attention, without an array of size Q x K (but for `reference`).

    Args:
        q, k, v: post-rotary queries, keys and values; k and v un-repeated under grouped-query attention.
        request: what is wanted; nothing else is computed.
        scale: factor on q.k; 1/sqrt(dim) by default.
        window: keys a query sees, itself included (sliding-window attention).
        softcap: logits become softcap * tanh(logit / softcap), after scaling.
        sinks: a learned logit per query head that takes part in the softmax and has no value (gpt-oss).
        key_start, key_end: the run of real keys of each prompt; padding before or after it is never seen. Lengths of
            right-padded prompts are `key_end`. Queries are right-aligned with keys (query i is at key i + K - Q): a
            chunk that begins at key o is passed with the first o + Q keys, a decoded token with all before it.
        key_features: functions of the key; their attention-weighted sums come back as `features`.
        value_features: functions of the key per KV head (|v|, v.u for a direction u), likewise as `value_features`.
        query_keys: key indices per query (-1, or any that is no key: none); the mass on them comes back as `at_keys`.
        query_weights: weights of the queries; weighted column sums come back as `column_weighted`.
        lse: the log-sum-exp from an earlier call on the same tensors; spares `triton` the row pass where only
            columns, maps or single entries are asked for.
        implementation: "auto" takes the fastest for the device. "identities" serves any request, its non-linear part
            by blocks, but only of plain causal attention: no window, cap or sinks, and a query per key.

    Without prompts, heads, queries or keys the results are empty or zero (keys: -1).

    Raises:
        RequestError: shapes, dtypes or devices that do not belong together, numbers out of range, or an
            implementation that cannot serve the request.
    """
    attention: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
    given = {
        "key_features": key_features, "value_features": value_features, "query_keys": query_keys,
        "query_weights": query_weights,
    }  # fmt: skip
    check_attention(q, k, v, **attention, key_start=key_start, key_end=key_end)
    check_given(q, k, **given, lse=lse)
    geometry = Geometry(q.shape[0], q.shape[2], k.shape[2], causal, window, key_start, key_end)
    _check(request, causal, implementation, key_features, value_features)
    if 0 in (*q.shape[:3], geometry.keys):
        return Results.empty(q, k, v, request, key_features, value_features, query_keys, query_weights).finish()
    plain = is_plain(geometry, q.dtype, q.device.type, softcap=softcap, sinks=sinks)
    faster = plain and is_faster(request, q.dtype, weighted=query_weights is not None)
    chosen = _choose(implementation, plain, faster, q, v)
    attention["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad():
        known = {"lse": lse} if chosen == "triton" else {}
        return IMPLEMENTATIONS[chosen](q, k, v, request, geometry, **attention, **given, **known)


def _check(request: StatisticsRequest, causal: bool, asked: str, shared: Tensor | None, own: Tensor | None) -> None:
    """Refuse what no implementation serves."""
    if asked not in ("auto", *IMPLEMENTATIONS):
        raise RequestError(f"No implementation {asked!r}: choose auto, {', '.join(IMPLEMENTATIONS)}.")
    columns = sum(x.shape[-1] for x in (shared, own) if x is not None)
    if columns > MAX_FEATURES:
        raise RequestError(f"{columns} key features were given; at most {MAX_FEATURES} fit one pass.")
    if (request.diagonal or request.diagonal_last) and not causal:
        raise RequestError("Diagonal sums count distances back from the query; they need causal attention.")


def _choose(asked: Implementation, plain: bool, faster: bool, q: Tensor, v: Tensor) -> Implementation:
    """On CUDA the Triton kernels, where Triton is and heads are not too wide, else identities where they are faster
    than blocks; on a CPU blocks, which cost less there than stock attention with replaced values."""
    if asked == "auto":
        if q.device.type != "cuda":
            return "blocks"
        if triton_takes(max(q.shape[-1], v.shape[-1]), q.dtype):
            return "triton"
        return "identities" if faster else "blocks"
    if asked == "identities" and not plain:
        raise RequestError(
            "The identities are those of plain causal attention with a query per key: no windows, soft caps or learned "
            "sinks (on CUDA, no float64 either); ask for implementation='blocks'."
        )
    return asked


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def triton_takes(width: int, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take heads of this width and dtype."""
    return _has_triton() and width <= WIDEST and dtype != torch.float64


def attention_output(
    q: Float[Tensor, "batch head query dim"],
    k: Float[Tensor, "batch kv_head key dim"],
    v: Float[Tensor, "batch kv_head key value_dim"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    key_start: Int[Tensor, " batch"] | None = None,
    key_end: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch head query value_dim"]:
    """Causal attention in O(N) memory, in the dtype of `q`; rows that see no key (padding) are zero.

    Differentiable: with gradients on, what SDPA cannot do goes through the full pattern.
    """
    check_attention(
        q, k, v, scale=scale, softcap=softcap, sinks=sinks, key_start=key_start, key_end=key_end
    )  # fmt: skip
    geometry = Geometry(q.shape[0], q.shape[2], k.shape[2], True, window, key_start, key_end)
    plain = softcap is None and sinks is None and geometry.window_of(k.shape[2]) is None
    if plain or 0 in (*q.shape[:3], geometry.keys):
        return _sdpa(q, k, v, geometry, scale)
    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        pattern, _ = attention_pattern(
            q, k, geometry, scale=scale, softcap=softcap, sinks=sinks, dtype=torch.promote_types(q.dtype, torch.float32)
        )
        return pattern.to(q.dtype) @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    fused = q.device.type == "cuda" and triton_takes(max(q.shape[-1], v.shape[-1]), q.dtype)
    found = (_triton_statistics if fused else blocked_statistics)(
        q, k, v, StatisticsRequest(output=True), geometry, scale=scale, softcap=softcap, sinks=sinks
    )
    assert found.output is not None
    return found.output.to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float) -> Tensor:
    groups = list(geometry.slices())
    whole = len(groups) == 1 and groups[0] == (slice(0, len(q)), slice(0, q.shape[2]), slice(0, k.shape[2]))
    if whole:
        return causal_sdpa(q, k, v, scale)
    output = q.new_zeros(*q.shape[:3], v.shape[-1])
    for prompts, rows, columns in groups:
        part = causal_sdpa(q[prompts, :, rows], k[prompts, :, columns], v[prompts, :, columns], scale)
        output[prompts, :, rows] = part
    return output


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """SDPA with right-aligned causality, in O(N) memory.

    Fused operators on CUDA align to the right themselves; for chunked prefill (1 < Q < K) elsewhere, rows go in
    blocks with a mask of at most `MASK` entries each, computed again for a gradient.
    """
    queries, keys = q.shape[2], k.shape[2]
    if q.device.type == "cuda" and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:
        # The memory-efficient backend has no grouped heads; without this, SDPA falls back to the full matrix.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    if not 1 < queries < keys:
        return scaled_dot_product_attention(q, k, v, is_causal=queries == keys, scale=scale, enable_gqa=grouped)
    if q.device.type == "cuda" and q.dtype != torch.float64:
        mask = causal_lower_right(queries, keys)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    step, parts = max(1, MASK // keys), []
    for first in range(0, queries, step):
        part = q[:, :, first : first + step]
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            parts.append(checkpoint(_masked_sdpa, part, k, v, first, queries, scale, use_reentrant=False))
        else:
            parts.append(_masked_sdpa(part, k, v, first, queries, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _masked_sdpa(part: Tensor, k: Tensor, v: Tensor, first: int, queries: int, scale: float) -> Tensor:
    """Attention of the queries `part`, of which `first` come before, with a mask as wide as the keys they see."""
    place = torch.arange(first, first + part.shape[2], device=part.device) + k.shape[2] - queries
    seen = first + part.shape[2] + k.shape[2] - queries
    mask = torch.arange(seen, device=part.device) <= place[:, None]
    return scaled_dot_product_attention(
        part, k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale, enable_gqa=part.shape[1] != k.shape[1]
    )
