"""Statistics from stock fused attention, forward and backward, in O(N) memory (identities of one softmax row).

With `A` the attention matrix and `F` functions of the key, `A F` is attention whose values are `F`: masses on
labelled keys, functions of the values, the mean distance. The entropy is `lse_i - s q_i.(A K)_i`: attention whose
values are the keys. `A_ij = exp(s q_i.k_j - lse_i)` for any pair that is named. With weights `w` of the queries,
`A^T w` is the gradient that attention's backward gives to its values when its output's is `w`: column sums. The mean
logit follows from running sums of the keys. The log-sum-exp comes from the backend's own operator.

What is no such sum (maxima, counts, diagonals, blocks, long bands, and the spread, whose two moments cancel) goes to
`blocks` in the same call; so does, for half-precision inputs, what the operators would return rounded (entropy,
distance, features, columns). Windows, soft caps, learned sinks and fewer queries than keys are out of reach as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from workbench.kernels.blocks import blocked_statistics
from workbench.kernels.geometry import Geometry
from workbench.kernels.request import WIDEST, AttentionStatistics, StatisticsRequest
from workbench.kernels.results import Results

# Mass on the first s tokens, or on the last w, is a sum of at most this many single entries.
MOST_PAIRS = 16
# Distances are counted from every so many queries at least.
CENTRES = 64


def is_plain(
    geometry: Geometry, dtype: torch.dtype, device: str, *, softcap: float | None, sinks: Tensor | None
) -> bool:
    """Whether stock fused operators compute this attention: causal, a query per key, no window, cap or sinks."""
    served = device == "cpu" or dtype != torch.float64
    square = geometry.causal and geometry.queries == geometry.keys
    return served and square and softcap is None and sinks is None and geometry.window_of(geometry.keys) is None


def is_exact(dtype: torch.dtype) -> bool:
    """Whether operators in this precision return what they sum to float32 accuracy."""
    return dtype in (torch.float32, torch.float64)


def reached(request: StatisticsRequest, dtype: torch.dtype) -> StatisticsRequest:
    """The part of a request that identities serve to float32 accuracy."""
    exact = is_exact(dtype)
    return StatisticsRequest(
        output=request.output,
        lse=request.lse,
        entropy=request.entropy and exact,
        distance=request.distance and exact,
        mean_logit=request.mean_logit,
        first_logit=request.first_logit,
        first=tuple(size for size in request.first if exact or size <= MOST_PAIRS),
        recent=tuple(size for size in request.recent if size <= MOST_PAIRS),
        offsets=request.offsets,
        sink_mass=request.sink_mass,
        column_sum=request.column_sum and exact,
        column_last=request.column_last if exact else (),
    )


def remainder(request: StatisticsRequest, served: StatisticsRequest) -> StatisticsRequest:
    """What of a request is not in its part `served`."""
    left: dict[str, object] = {}
    for field in fields(request):
        whole, part = getattr(request, field.name), getattr(served, field.name)
        if isinstance(whole, tuple):
            left[field.name] = tuple(size for size in whole if size not in part)
        else:
            left[field.name] = type(whole)() if part else whole
    return StatisticsRequest(**left)  # type: ignore[arg-type]


def is_faster(request: StatisticsRequest, dtype: torch.dtype, *, weighted: bool) -> bool:
    """Whether this beats blocks alone on CUDA (measured on an H100): in half precision always; in float32, whose fused
    operators are slow and their backward slower, only without columns and a remainder."""
    if not is_exact(dtype):
        return True
    served = reached(request, dtype)
    return remainder(request, served) == StatisticsRequest() and not (weighted or served.needs_columns)


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
    value_features: Float[Tensor, "batch kv_head key value_feature"] | None = None,
    query_keys: Int[Tensor, "batch query slot"] | None = None,
    query_weights: Float[Tensor, "batch weighting query"] | None = None,
) -> AttentionStatistics:
    """What identities reach by fused attention, the remainder by `blocks`; the contract of `attention_statistics`.

    The geometry must be plain (`is_plain`); `attention_statistics` refuses any other under this implementation.
    """
    served, summed = reached(request, q.dtype), (key_features, value_features, query_weights)
    ours, theirs = (summed, (None, None, None)) if is_exact(q.dtype) else ((None, None, None), summed)
    results = Results.empty(q, k, v, served, ours[0], ours[1], query_keys, ours[2])
    for prompts, rows, columns in geometry.slices() if results.arrays else ():
        views = results.view(prompts, rows, columns)
        call = _Square(
            q=q[prompts, :, rows],
            k=k[prompts, :, columns],
            v=v[prompts, :, columns],
            scale=scale,
            features=None if ours[0] is None else ours[0][prompts, columns].float(),
            value_features=None if ours[1] is None else ours[1][prompts, :, columns].float(),
            slots=None if query_keys is None else _shifted(query_keys[prompts, rows], columns.start),
            weights=None if ours[2] is None else ours[2][prompts, :, rows].float(),
        )
        for name, value in call.measure(served).items():
            views[name].copy_(value)
    found, left = results.finish(), remainder(request, served)
    if left == StatisticsRequest() and all(given is None for given in theirs):
        return found
    rest = blocked_statistics(
        q, k, v, left, geometry, scale=scale, key_features=theirs[0], value_features=theirs[1], query_weights=theirs[2]
    )
    return _merged(request, (served, found), (left, rest))


def _shifted(keys: Tensor, first: int) -> Tensor:
    return torch.where(keys >= 0, keys - first, -1)


def _merged(request: StatisticsRequest, *halves: tuple[StatisticsRequest, AttentionStatistics]) -> AttentionStatistics:
    """Both halves in one; bands of which each half has some, in the order they were asked for."""
    whole = halves[0][1]
    for field in fields(AttentionStatistics):
        parts = [getattr(found, field.name) for _, found in halves]
        if parts[1] is None:
            continue
        if parts[0] is None:
            whole = replace(whole, **{field.name: parts[1]})
            continue
        place = {
            size: part[..., at]
            for (asked, _), part in zip(halves, parts, strict=True)
            for at, size in enumerate(getattr(asked, field.name))
        }
        ordered = torch.stack([place[size] for size in getattr(request, field.name)], dim=-1)
        whole = replace(whole, **{field.name: ordered})
    return whole


@dataclass(frozen=True)
class _Square:
    """Prompts of one length, all of whose tokens are real: causal attention with a query per key."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    features: Tensor | None
    value_features: Tensor | None
    slots: Tensor | None
    weights: Tensor | None

    @cached_property
    def index(self) -> Tensor:
        return torch.arange(self.k.shape[2], device=self.q.device)

    @cached_property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @cached_property
    def keys(self) -> Tensor:
        """Keys repeated for the query heads that share them: some operators have no grouped heads."""
        return self.k.repeat_interleave(self.group, dim=1)

    @cached_property
    def forward(self) -> tuple[Tensor, Tensor]:
        return fused_attention(self.q, self.keys, self.v.repeat_interleave(self.group, dim=1), self.scale)

    @property
    def lse(self) -> Tensor:
        return self.forward[1]

    def measure(self, request: StatisticsRequest) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if request.output:
            found["output"] = self.forward[0]
        if request.lse:
            found["lse"] = self.lse
        if request.entropy:
            mean_key = fused_attention(self.q, self.keys, self.keys, self.scale)[0].float()
            found["entropy"] = (self.lse - self.scale * (self.q.float() * mean_key).sum(-1)).clamp(min=0)
        if request.sink_mass:
            found["sink_mass"] = self.q.new_zeros(self.q.shape[:3], dtype=torch.float32)
        return found | self._logits(request) | self._pairs(request) | self._sums(request) | self._columns(request)

    def _logits(self, request: StatisticsRequest) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        q = self.q.float().unflatten(1, (self.k.shape[1], self.group))  # type: ignore[no-untyped-call]
        if request.mean_logit:
            # In float64: a sum of many keys is large beside the mean of a few.
            mean = (self.k.double().cumsum(2) / (self.index + 1)[:, None]).float()
            found["mean_logit"] = self.scale * (q * mean[:, :, None]).sum(-1).flatten(1, 2)
        if request.first_logit:
            found["first_logit"] = self.scale * (q * self.k[:, :, None, :1].float()).sum(-1).flatten(1, 2)
        return found

    def _pairs(self, request: StatisticsRequest) -> dict[str, Tensor]:
        """Single entries, and bands that are sums of few."""
        found: dict[str, Tensor] = {}
        count, few = len(self.index), [size for size in request.first if size <= MOST_PAIRS]
        if request.first and len(few) == len(request.first):
            leading = self._entries(self.index[: max(few)].expand(count, -1)).cumsum(-1)
            found["first"] = leading[..., [min(size, count) - 1 for size in few]]
        if request.recent:
            trailing = self._entries(self.index[:, None] - self._row(range(max(request.recent)))).cumsum(-1)
            found["recent"] = trailing[..., [size - 1 for size in request.recent]]
        if request.offsets:
            found["offsets"] = self._entries(self.index[:, None] + self._row(request.offsets))
        if self.slots is not None:
            found["at_keys"] = self._entries(self.slots)
        return found

    def _row(self, numbers: range | tuple[int, ...]) -> Tensor:
        return torch.tensor(numbers, device=self.q.device)

    def _entries(self, keys: Int[Tensor, "*batch query slot"]) -> Float[Tensor, "batch head query slot"]:
        """`A_ij` for the listed keys of each query, one slot at a time; zero at -1 and at unseen keys."""
        q, parts = self.q.float(), []
        for slot in keys.expand(len(q), -1, -1).unbind(-1):
            valid = (slot >= 0) & (slot <= self.index)
            place = slot.clamp(0, len(self.index) - 1)[:, None, :, None]
            chosen = torch.gather(self.keys, 2, place.expand_as(self.keys))
            mass = torch.exp(self.scale * (q * chosen.float()).sum(-1) - self.lse)
            parts.append(torch.where(valid[:, None], mass, 0.0))
        return torch.stack(parts, dim=-1)

    def _sums(self, request: StatisticsRequest) -> dict[str, Tensor]:
        """Attention-weighted sums of functions of the key, side by side as its values."""
        functions: dict[str, Tensor] = {}
        step = max(CENTRES, -(-len(self.index) // self.q.shape[-1]))
        if request.distance:
            # Counted from the block of queries that a row is in, so that short distances keep their digits.
            functions["distance"] = (self.index[:, None] - self.index[::step])[None, None].float()
        if any(size > MOST_PAIRS for size in request.first):
            functions["first"] = (self.index[:, None] < self._row(request.first))[None, None].float()
        if self.features is not None:
            functions["features"] = self.features[:, None]
        if self.value_features is not None:
            functions["value_features"] = self.value_features.repeat_interleave(self.group, dim=1)
        if not functions:
            return {}
        lead = [max(values.shape[axis] for values in functions.values()) for axis in (0, 1)]
        wide = torch.cat([values.expand(*lead, -1, -1) for values in functions.values()], dim=-1)
        widths = [values.shape[-1] for values in functions.values()]
        found = dict(zip(functions, torch.split(self._weighted(wide), widths, dim=-1), strict=True))
        if "distance" in found:
            own = (self.index // step)[:, None].expand(*self.q.shape[:3], 1)
            found["distance"] = self.index % step - found["distance"].gather(-1, own)[..., 0]
        return found

    def _weighted(
        self, values: Float[Tensor, "some_batch some_head key column"]
    ) -> Float[Tensor, "batch head query column"]:
        """`A values`, in chunks as wide as a head."""
        width, parts = self.q.shape[-1], []
        for part in torch.split(values, width, dim=-1):
            columns = part.shape[-1]
            wide = pad(part, (0, width - columns)).to(self.q.dtype).expand(*self.q.shape[:2], -1, -1).contiguous()
            parts.append(fused_attention(self.q, self.keys, wide, self.scale)[0][..., :columns].float())
        return torch.cat(parts, dim=-1)

    def _columns(self, request: StatisticsRequest) -> dict[str, Tensor]:
        """Sums over weighted queries, all weightings side by side as the gradient of attention's output."""
        weights: dict[str, Tensor] = {}
        count = len(self.index)
        if request.column_sum:
            weights["column_sum"] = self.q.new_ones(1, 1, count, dtype=torch.float32)
        if request.column_last:
            last = self.index >= count - self._row(request.column_last)[:, None]
            weights["column_last"] = last[None].float()
        if self.weights is not None:
            weights["column_weighted"] = self.weights
        if not weights:
            return {}
        wide = torch.cat([rows.expand(len(self.q), -1, -1) for rows in weights.values()], dim=1)
        summed = [
            column_sums(self.q, self.keys, part.transpose(1, 2), self.scale)
            for part in torch.split(wide, self.q.shape[-1], dim=1)
        ]
        counts = [rows.shape[1] for rows in weights.values()]
        columns = torch.cat(summed, dim=-1).transpose(2, 3)
        found = dict(zip(weights, torch.split(columns, counts, dim=2), strict=True))
        if "column_sum" in found:
            found["column_sum"] = found["column_sum"][:, :, 0]
        return found


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention output and log-sum-exp (float32) from the backend's own operator; heads already repeated."""
    aten, width = torch.ops.aten, v.shape[-1]
    q, k, v = _as_operators_take(q, k, v)
    if q.device.type == "cpu":
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    elif q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1] <= WIDEST:
        output, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[:2]
    else:
        output, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)[:2]
    return output[..., :width], lse[..., : q.shape[2]].float()


def column_sums(
    q: Float[Tensor, "batch head token dim"],
    k: Float[Tensor, "batch head token dim"],
    weights: Float[Tensor, "batch token column"],
    scale: float,
) -> Float[Tensor, "batch head token column"]:
    """`A^T weights`, at most `dim` columns of them: what the backward operator returns for the values.

    That gradient depends neither on the values nor on the output, so the keys stand for the one and the weights for
    the other.
    """
    aten, columns = torch.ops.aten, weights.shape[-1]
    q, k, _ = _as_operators_take(q, k, k)
    wide = pad(weights, (0, q.shape[-1] - columns)).to(q.dtype)[:, None].expand_as(q).contiguous()
    if q.device.type == "cpu":
        lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, True, scale=scale)[1]
        summed = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            wide, q, k, k, wide, lse, 0.0, True, scale=scale
        )[2]
    else:
        _, lse, *seeds = aten._scaled_dot_product_efficient_attention(q, k, k, None, True, 0.0, True, scale=scale)
        summed = aten._scaled_dot_product_efficient_attention_backward(
            wide, q, k, k, None, wide, lse, *seeds, 0.0, [True, True, True, False], True, scale=scale
        )[2]
    result: Tensor = summed[..., :columns].float()
    return result


def _as_operators_take(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Widths that fused operators like: on a CPU one for all, on CUDA steps of eight. Zeros change no product."""
    if q.device.type == "cpu":
        widest = max(q.shape[-1], v.shape[-1])
        q, k, v = (pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    else:
        q, k, v = (pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v))
    return q, k, v
