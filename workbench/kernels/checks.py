"""What belongs together in one attention call: shapes, dtypes, devices and numbers, checked before any kernel runs.

Compiled kernels read by pointer and would answer for a wrong shape with plausible numbers. Nothing here reads
values from a device: only bounds that are on the CPU are compared with the keys.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from workbench.errors import RequestError


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
) -> None:
    """Refuse queries, keys, values and options of one call that do not belong together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            continue
        if x.ndim != 4:
            raise RequestError(f"{name} is {list(x.shape)}: expected [batch, head, token, width].")
        if not x.is_floating_point() or x.dtype.itemsize < 2 or x.dtype != q.dtype or x.device != q.device:
            raise RequestError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: q, k and v share one floating dtype "
                "of 16 to 64 bits and one device."
            )
    batch, heads, _, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if (heads % kv_heads) if kv_heads else heads:
        raise RequestError(f"{heads} query heads cannot share {kv_heads} KV heads: not a multiple.")
    if dim == 0 or (v is not None and v.shape[-1] == 0):
        raise RequestError("Heads of width 0: queries, keys and values need one number or more.")
    expect("k", k, (batch, kv_heads, keys, dim), "batch and width of q", q)
    if v is not None:
        expect("v", v, (batch, kv_heads, keys, v.shape[-1]), "batch, KV heads and keys of k", q)
    if sinks is not None:
        expect("sinks", sinks, (heads,), "one logit per query head", q)
    if scale is not None and not (isfinite(scale) and scale >= 0):
        raise RequestError(f"scale = {scale}: a finite factor, zero or larger, is needed.")
    if softcap is not None and not (isfinite(softcap) and softcap > 0):
        raise RequestError(f"softcap = {softcap}: a finite number above zero is needed; None is no cap.")
    for name, bound in (("key_start", key_start), ("key_end", key_end)):
        if bound is not None:
            _check_bound(name, bound, batch, keys)


def _check_bound(name: str, bound: Tensor, batch: int, keys: int) -> None:
    if tuple(bound.shape) != (batch,) or bound.is_floating_point() or bound.dtype == torch.bool:
        raise RequestError(
            f"{name} is {bound.dtype} {list(bound.shape)}: expected one whole number per prompt, [{batch}]."
        )
    # Reading it from a device would make the host wait; there it is clamped instead.
    if bound.device.type == "cpu" and len(bound) and (int(bound.min()) < 0 or int(bound.max()) > keys):
        raise RequestError(f"{name} {bound.tolist()} leaves the {keys} keys: choose 0 to {keys}.")


def check_given(
    q: Tensor,
    k: Tensor,
    *,
    key_features: Tensor | None = None,
    value_features: Tensor | None = None,
    query_keys: Tensor | None = None,
    query_weights: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Refuse functions, lists and weights whose shape is not that of the call."""
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    rows, columns = (batch, queries, None), (batch, keys, None)
    for name, x, shape, meaning in (
        ("key_features", key_features, columns, "batch, key, feature"),
        ("value_features", value_features, (batch, kv_heads, keys, None), "batch, KV head, key, feature"),
        ("query_keys", query_keys, rows, "batch, query, slot"),
        ("query_weights", query_weights, (batch, None, queries), "batch, weighting, query"),
        ("lse", lse, (batch, heads, queries), "batch, head, query"),
    ):
        if x is not None:
            expect(name, x, shape, meaning, q)
    if query_keys is not None and (query_keys.is_floating_point() or query_keys.dtype == torch.bool):
        raise RequestError(f"query_keys are {query_keys.dtype}: key indices are whole numbers.")


def expect(name: str, x: Tensor, shape: tuple[int | None, ...], meaning: str, q: Tensor) -> None:
    """Refuse a tensor of another shape (None: any size), on another device than `q`, or of complex numbers."""
    fits = x.ndim == len(shape) and all(want in (None, size) for size, want in zip(x.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise RequestError(f"{name} is {list(x.shape)}: expected [{wanted}] ({meaning}); q is {list(q.shape)}.")
    if x.device != q.device or x.is_complex():
        raise RequestError(f"{name} is {x.dtype} on {x.device}: real numbers on {q.device}, where q is, are needed.")
