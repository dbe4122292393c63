"""First-order effects of removing single entries of attention (MoA's influence)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels.checks import check_attention, check_given, expect
from workbench.kernels.dispatch import triton_takes
from workbench.kernels.geometry import Geometry
from workbench.kernels.maps import tile_logits
from workbench.kernels.pyramid import pooled
from workbench.kernels.request import BLOCKS, HEAVY

# Rows whose effects are computed at once, without a fused kernel.
ROWS = 256
# Entries of a block of rows that hold a heavy key.
ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def removal_effects(
    q: Float[Tensor, "batch head query dim"],
    k: Float[Tensor, "batch kv_head key dim"],
    v: Float[Tensor, "batch kv_head key value_dim"],
    gradient: Float[Tensor, "batch head query value_dim"],
    output: Float[Tensor, "batch head query value_dim"],
    lse: Float[Tensor, "batch head query"],
    *,
    block: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    key_start: Int[Tensor, " batch"] | None = None,
    key_end: Int[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch head block_row block_column"], Float[Tensor, "batch head query"]]:
    """How much the loss would change, to first order, if single entries of attention were removed.

    Removing entry (i, j) and renormalising the row changes the loss by `-A_ij (dO_i . v_j - D_i) / (1 - A_ij)` with
    `D_i = dO_i . o_i` (MoA, arXiv 2406.14909). Returns the sums of its absolute value over blocks, and D. A row's
    only key cannot be removed and counts zero (with a learned sink, the sink remains).

    Where A_ij is near one, both differences cancel: there `(dO_i . v_j - D_i) / (1 - A_ij)` is taken as
    `dO_i . v_j` less its mean over the row's other keys, under the softmax of those keys alone. In half precision
    the fused kernel rounds each row of the gradient (scaled by a power of two) to that precision: relative errors of
    2^-11 (float16) or 2^-8 (bfloat16) of the row's largest component.

    Args:
        gradient: of the loss by the attention output.
        output, lse: of `attention_statistics` on the same tensors.
        block: a power of two, 16 to 1024.
        sinks: the learned sinks that `lse` includes, if any.

    Raises:
        RequestError: shapes that do not belong together, or another block size.
    """
    if block not in BLOCKS:
        raise RequestError(f"Blocks of {block}: choose one of {', '.join(map(str, BLOCKS))}.")
    check_attention(
        q, k, v, scale=scale, softcap=softcap, sinks=sinks, key_start=key_start, key_end=key_end
    )  # fmt: skip
    check_given(q, k, lse=lse)
    for name, x in (("gradient", gradient), ("output", output)):
        expect(name, x, (*q.shape[:3], v.shape[-1]), "batch, head, query, width of v", q)
    geometry = Geometry(q.shape[0], q.shape[2], k.shape[2], True, window, key_start, key_end)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    delta = (gradient.float() * output.float()).sum(-1)
    rows, columns = -(-geometry.queries // block), -(-geometry.keys // block)
    if 0 in (*q.shape, geometry.keys):
        return delta.new_zeros(*q.shape[:2], rows, columns), delta
    if q.device.type == "cuda" and triton_takes(max(q.shape[-1], v.shape[-1]), q.dtype):
        from workbench.kernels.fused.launch import fused_removal

        profile, heavy = fused_removal(q, k, v, geometry, factor, softcap, block, lse, gradient, output)
    else:
        profile, heavy = _blocked(q, k, v, geometry, factor, softcap, block, lse, gradient, delta)
    return add_heavy(profile, heavy, q, k, v, gradient, lse, geometry, factor, softcap, sinks, block), delta


def _blocked(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float, softcap: float | None, block: int, lse: Tensor,
    gradient: Tensor, delta: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Block sums without heavy entries, and each row's heavy key (-1: none)."""
    values = v.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    profile = delta.new_zeros(*q.shape[:2], -(-geometry.queries // block), -(-geometry.keys // block))
    heavy = torch.full(q.shape[:3], -1, dtype=torch.int64, device=q.device)
    step = max(block, ROWS // block * block)
    for first in range(0, geometry.queries, step):
        rows = slice(first, min(first + step, geometry.queries))
        logits, seen = tile_logits(q, k, geometry, rows, slice(0, geometry.keys), scale, softcap)
        a = torch.exp((logits - lse[:, :, rows, None]).masked_fill(~seen, float("-inf")))
        gain = gradient[:, :, rows].float() @ values.transpose(-1, -2) - delta[:, :, rows, None]
        top, key = a.max(-1)
        heavy[:, :, rows] = torch.where(top > HEAVY, key, -1)
        # Unseen values may be anything, NaN too.
        none = (a > HEAVY) | (a == 0)
        part = pooled(((a * gain).abs() / (1.0 - a)).masked_fill(none, 0.0), block, "sum")
        profile[:, :, first // block : first // block + part.shape[2]] = part
    return profile, heavy


def add_heavy(
    profile: Tensor, heavy: Tensor, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, lse: Tensor, geometry: Geometry,
    scale: float, softcap: float | None, sinks: Tensor | None, block: int,
) -> Tensor:  # fmt: skip
    """`profile` with the effects of each row's heavy key: one more pass over the keys, for those rows only."""
    effects = torch.zeros(heavy.shape, dtype=torch.float64, device=q.device)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    size = max(1, ELEMENTS.get(q.device.type, ELEMENTS["cuda"]) // geometry.keys)
    for prompt, (first, last) in enumerate(geometry.real_ranges()):
        for kv_head in range(kv_heads):
            lane = slice(kv_head * group, (kv_head + 1) * group)
            keys, values = (x[prompt, kv_head, first:last].float() for x in (k, v))
            for place in torch.split((heavy[prompt, lane] >= 0).nonzero(), size):
                head, row = place.unbind(1)
                at = (prompt, kv_head * group + head, row)
                effects[at] = _heavy_effects(
                    q[at].float(), keys, values, gradient[at].float(), lse[at], heavy[at] - first,
                    row + geometry.query_offset - first, geometry.window, scale, softcap,
                    None if sinks is None else sinks[at[1]].float(),
                ).double()  # fmt: skip
    column = heavy.clamp(min=0) // block
    short = profile.shape[2] * block - heavy.shape[2]
    column, effects = (torch.nn.functional.pad(x, (0, short)) for x in (column, effects))
    # In float64, whose sums round to the same float32 whatever their order.
    sums = torch.zeros(profile.shape, dtype=torch.float64, device=q.device)
    sums.scatter_add_(3, column.unflatten(2, (-1, block)), effects.unflatten(2, (-1, block)))  # type: ignore[no-untyped-call]
    return profile + sums.float()


def _heavy_effects(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, lse: Tensor, heavy: Tensor, place: Tensor, window: int | None,
    scale: float, softcap: float | None, sinks: Tensor | None,
) -> Float[Tensor, " row"]:  # fmt: skip
    """A_ij |dO_i . (v_j - the output of the row's other keys)| for rows `q` `[row, dim]` and their keys `heavy`."""
    keys = torch.arange(len(k), device=k.device)
    logits = q @ k.T * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mass = torch.exp(logits.gather(1, heavy[:, None])[:, 0] - lse)
    others = (keys <= place[:, None]) & (keys != heavy[:, None])
    if window is not None:
        others &= keys > place[:, None] - window
    logits = logits.masked_fill(~others, float("-inf"))
    top = logits.amax(-1) if sinks is None else torch.maximum(logits.amax(-1), sinks)
    alone = top == float("-inf")
    shift = top.masked_fill(alone, 0.0)
    weights = torch.exp(logits - shift[:, None])
    total = weights.sum(-1) if sinks is None else weights.sum(-1) + torch.exp(sinks - shift)
    gains = gradient @ v.T
    rest = (weights * gains).sum(-1) / total.masked_fill(alone, 1.0)
    return (mass * (gains.gather(1, heavy[:, None])[:, 0] - rest).abs()).masked_fill(alone, 0.0)
