"""Every statistic in one pass over row blocks, in plain torch, on any device.

A block of queries sees all of its keys at once, so no online softmax is needed: one matrix product gives the
logits of the block, a few in-place passes turn them into probabilities, a second product gives the output, and
each functional is read off the block while it is in cache. Work is that of attention itself; memory beyond inputs
and results is two block buffers a worker, O(N) in tokens (`plan_tiles` states it).

On a CPU, blocks are dealt to workers of one thread each (`workers.py`): a block then stays in its core's cache, and
no operation waits for another core. The cut depends on shapes only, and partial column sums are added in a fixed
order, so results are the same bits on any number of threads. Logits are kept in base 2, whose exponential is three
times as fast here as the natural one.

Maxima are found lazily: the maxima of 64 keys each are kept (one vectorised pass), and only the groups that can
hold the answer are searched, so argmax and top-k cost little more than a maximum.

Grouped-query attention is by index: the query heads of a group are extra rows of their KV head's product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from workbench.kernels.geometry import Geometry
from workbench.kernels.request import AttentionStatistics, StatisticsRequest
from workbench.kernels.results import Results, merge_shares, new_shares
from workbench.kernels.tile import GROUP, LN2, Span, Tile, round_up
from workbench.kernels.workers import run_all, worker_count

# Elements of one block buffer: about a core's cache on a CPU, enough to fill the device on a GPU.
TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
# On a CPU a call is cut into at least this many tasks, unless its blocks become smaller than the second number.
TASKS, SMALLEST_TILE = 8, 1 << 16


@dataclass(frozen=True)
class TilePlan:
    """How a call is cut: `prompts` x `kv_heads` lanes, `rows` queries of each head, at most `width` keys.

    The row blocks of a lane are dealt to `parts` tasks, each with column results of its own; `workers` tasks run
    at once.
    """

    prompts: int
    kv_heads: int
    group: int
    rows: int
    width: int
    parts: int
    workers: int

    @property
    def elements(self) -> int:
        return self.prompts * self.kv_heads * self.group * self.rows * self.width


def plan_tiles(q_shape: torch.Size, k_shape: torch.Size, window: int | None, device: str) -> TilePlan:
    """Blocks that fit the tile budget; a row block is at most an eighth of the keys, to skip the masked half."""
    batch, heads, queries, _ = q_shape
    kv_heads, keys = k_shape[1:3]
    group, budget = heads // kv_heads, TILE_ELEMENTS.get(device, TILE_ELEMENTS["cuda"])
    padded = round_up(keys)
    rows = min(queries, max(GROUP, padded // 8 // GROUP * GROUP))
    width = padded if window is None else min(padded, round_up(window + rows) + GROUP)
    if device == "cpu":
        budget = max(SMALLEST_TILE, min(budget, batch * heads * queries * width // TASKS))
    if group * rows * width > budget:
        fitting = budget // (group * width)
        rows = min(rows, max(16, fitting))
    lanes = max(1, budget // (group * rows * width))
    prompts, heads_at_once = min(batch, max(1, lanes // kv_heads)), min(kv_heads, lanes)
    tasks = -(-batch // prompts) * -(-kv_heads // heads_at_once)
    parts = min(-(-TASKS // tasks), -(-queries // rows)) if device == "cpu" else 1
    workers = min(worker_count(), tasks * parts) if device == "cpu" else 1
    return TilePlan(prompts, heads_at_once, group, rows, width, parts, workers)


def workspace_bytes(q_shape: torch.Size, k_shape: torch.Size, window: int | None, device: str) -> int:
    """Bytes of the two block buffers of each worker: what a call takes beyond inputs, float32 copies and results."""
    plan = plan_tiles(q_shape, k_shape, window, device)
    return 2 * 4 * plan.elements * plan.workers


def blocked_statistics(
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
    """All requested statistics, accumulated in float32; the contract of `attention_statistics`."""
    results = Results.empty(q, k, v, request, key_features, value_features, query_keys, query_weights)
    for prompts, rows, columns in geometry.slices():
        call = _Group(
            q=q[prompts, :, rows],
            k=k[prompts, :, columns],
            v=v[prompts, :, columns],
            request=request,
            causal=geometry.causal,
            window=geometry.window_of(columns.stop - columns.start),
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            features=None if key_features is None else key_features[prompts, columns],
            value_features=None if value_features is None else value_features[prompts, :, columns],
            query_keys=None if query_keys is None else query_keys[prompts, rows],
            query_weights=None if query_weights is None else query_weights[prompts, :, rows].float(),
            first_key=columns.start,
            first_query=rows.start,
        )
        call.run(results.view(prompts, rows, columns))
    return results.finish()


@dataclass
class _Group:
    """Prompts of one length: their attention call, cut into tiles."""

    q: Tensor
    k: Tensor
    v: Tensor
    request: StatisticsRequest
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    sinks: Tensor | None
    features: Tensor | None
    value_features: Tensor | None
    query_keys: Tensor | None
    query_weights: Tensor | None
    first_key: int
    first_query: int

    def run(self, results: dict[str, Tensor]) -> None:
        plan = plan_tiles(self.q.shape, self.k.shape, self.window, self.q.device.type)
        batch, kv_heads, keys = *self.k.shape[:2], self.k.shape[2]
        padding = round_up(keys) - keys
        inputs = _Inputs(
            q=self.q.unflatten(1, (kv_heads, plan.group)),  # type: ignore[no-untyped-call]
            k=pad(self.k.float(), (0, 0, 0, padding)).contiguous(),
            columns=self._columns(kv_heads, padding),
            sinks=None if self.sinks is None else self.sinks.float().view(1, kv_heads, plan.group, 1) / LN2,
        )
        outputs = {name: array.unflatten(1, (kv_heads, plan.group)) for name, array in results.items()}  # type: ignore[no-untyped-call]
        shares = new_shares(outputs, plan.parts)
        tasks: list[Callable[[], None]] = []
        for low in range(0, batch, plan.prompts):
            for head in range(0, kv_heads, plan.kv_heads):
                lanes = slice(low, low + plan.prompts), slice(head, head + plan.kv_heads)
                tasks += [partial(self._rows, plan, inputs, *lanes, part, shares[part]) for part in range(plan.parts)]
        run_all(tasks, parallel=self.q.device.type == "cpu")
        merge_shares(shares)

    def _rows(
        self, plan: TilePlan, inputs: _Inputs, prompts: slice, heads: slice, part: int, share: dict[str, Tensor]
    ) -> None:
        """Every `plan.parts`-th row block of some lanes, in order."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        q, k = inputs.q[prompts, heads], inputs.k[prompts, heads]
        columns = None if inputs.columns is None else inputs.columns[prompts, heads]
        sinks = None if inputs.sinks is None else inputs.sinks[:, heads]
        out = {name: array[prompts, heads] for name, array in share.items()}
        buffers = torch.empty(2, plan.elements, dtype=torch.float32, device=q.device)
        for row in range(part * plan.rows, queries, plan.parts * plan.rows):
            span = Span.of(row, min(row + plan.rows, queries), queries, keys, self.causal, self.window)
            tile = Tile(self, span, q[..., span.rows, :], k[:, :, span.columns], buffers)
            tile.softmax(sinks)
            tile.write_rows(out, None if columns is None else columns[:, :, span.columns])
            tile.write_lookups(out, None if self.query_keys is None else self.query_keys[prompts, span.rows])
            tile.write_columns(out, None if self.query_weights is None else self.query_weights[prompts, :, span.rows])
            tile.write_maps(out)

    def _columns(self, kv_heads: int, padding: int) -> Tensor | None:
        """Values and key features side by side: one product serves both."""
        parts = [self.v.float()] if self.request.output else []
        if self.features is not None:
            parts.append(self.features.float()[:, None].expand(-1, kv_heads, -1, -1))
        if self.value_features is not None:
            parts.append(self.value_features.float())
        return pad(torch.cat(parts, dim=-1), (0, 0, 0, padding)) if parts else None


@dataclass(frozen=True)
class _Inputs:
    """A call's tensors as tiles read them: heads grouped, keys padded to whole groups, sinks in base 2."""

    q: Tensor
    k: Tensor
    columns: Tensor | None
    sinks: Tensor | None
