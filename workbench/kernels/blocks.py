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
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from workbench.kernels.geometry import Geometry
from workbench.kernels.request import AttentionStatistics, StatisticsRequest
from workbench.kernels.results import Results
from workbench.kernels.workers import run_all, worker_count

# Keys are searched for maxima in groups of this many.
GROUP = 64
# Finite, so that a masked probability times its logit is zero instead of NaN.
MASKED = -1e30
LN2 = log(2.0)
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
    padded = _round_up(keys)
    rows = min(queries, max(GROUP, padded // 8 // GROUP * GROUP))
    width = padded if window is None else min(padded, _round_up(window + rows) + GROUP)
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
    query_keys: Int[Tensor, "batch query slot"] | None = None,
) -> AttentionStatistics:
    """All requested statistics, accumulated in float32; the contract of `attention_statistics`."""
    results = Results.empty(q, k, v, request, key_features, query_keys)
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
            query_keys=None if query_keys is None else query_keys[prompts, rows],
            first_key=columns.start,
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
    query_keys: Tensor | None
    first_key: int

    def run(self, results: dict[str, Tensor]) -> None:
        plan = plan_tiles(self.q.shape, self.k.shape, self.window, self.q.device.type)
        batch, kv_heads, keys = *self.k.shape[:2], self.k.shape[2]
        padding = _round_up(keys) - keys
        inputs = _Inputs(
            q=self.q.unflatten(1, (kv_heads, plan.group)),  # type: ignore[no-untyped-call]
            k=pad(self.k.float(), (0, 0, 0, padding)).contiguous(),
            columns=self._columns(kv_heads, padding),
            sinks=None if self.sinks is None else self.sinks.float().view(1, kv_heads, plan.group, 1) / LN2,
        )
        outputs = {name: array.unflatten(1, (kv_heads, plan.group)) for name, array in results.items()}  # type: ignore[no-untyped-call]
        sums = {name: array for name, array in outputs.items() if name.startswith("column")}
        shares = [outputs] + [outputs | {n: torch.zeros_like(a) for n, a in sums.items()} for _ in range(1, plan.parts)]
        tasks: list[Callable[[], None]] = []
        for low in range(0, batch, plan.prompts):
            for head in range(0, kv_heads, plan.kv_heads):
                lanes = slice(low, low + plan.prompts), slice(head, head + plan.kv_heads)
                tasks += [partial(self._rows, plan, inputs, *lanes, part, shares[part]) for part in range(plan.parts)]
        run_all(tasks, parallel=self.q.device.type == "cpu")
        for share in shares[1:]:
            for name, array in sums.items():
                if name == "column_max":
                    torch.maximum(array, share[name], out=array)
                else:
                    array.add_(share[name])

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
            span = _Span.of(row, min(row + plan.rows, queries), queries, keys, self.causal, self.window)
            tile = _Tile(self, span, q[..., span.rows, :], k[:, :, span.columns], buffers)
            tile.softmax(sinks)
            tile.write_rows(out, None if columns is None else columns[:, :, span.columns])
            tile.write_lookups(out, None if self.query_keys is None else self.query_keys[prompts, span.rows])
            tile.write_columns(out)

    def _columns(self, kv_heads: int, padding: int) -> Tensor | None:
        """Values and key features side by side: one product serves both."""
        parts = [self.v.float()] if self.request.output else []
        if self.features is not None:
            parts.append(self.features.float()[:, None].expand(-1, kv_heads, -1, -1))
        return pad(torch.cat(parts, dim=-1), (0, 0, 0, padding)) if parts else None


@dataclass(frozen=True)
class _Inputs:
    """A call's tensors as tiles read them: heads grouped, keys padded to whole groups, sinks in base 2."""

    q: Tensor
    k: Tensor
    columns: Tensor | None
    sinks: Tensor | None


@dataclass(frozen=True)
class _Span:
    """A row block and the keys it can see; `offset` is the key index of query 0."""

    rows: slice
    columns: slice
    offset: int
    keys: int

    @staticmethod
    def of(first: int, last: int, queries: int, keys: int, causal: bool, window: int | None) -> _Span:
        offset = keys - queries
        end = min(keys, last + offset) if causal else keys
        start = 0 if window is None else max(0, first + offset - window + 1) // GROUP * GROUP
        return _Span(slice(first, last), slice(start, _round_up(end)), offset, keys)


class _Tile:
    """One block: logits (in base 2), then probabilities, then every functional read off them."""

    def __init__(self, call: _Group, span: _Span, q: Tensor, k: Tensor, buffers: Tensor) -> None:
        self.call, self.span, self.request = call, span, call.request
        prompts, heads, group, rows, _ = q.shape
        width = k.shape[2]
        self.shape = (prompts, heads, group, rows, width)
        size = prompts * heads * group * rows * width
        flat = buffers[:, :size].view(2, prompts * heads, group * rows, width)
        capped = call.softcap is not None
        queries = q.float().reshape(prompts * heads, group * rows, -1) * (call.scale if capped else call.scale / LN2)
        torch.bmm(queries, k.reshape(prompts * heads, width, -1).transpose(1, 2), out=flat[0])
        self.logits, self.p = flat[0].view(self.shape), flat[1].view(self.shape)
        self.row_index = torch.arange(span.rows.start, span.rows.stop, device=q.device) + span.offset
        if call.softcap is not None:
            self.logits.div_(call.softcap).tanh_().mul_(call.softcap / LN2)
        self._mask()

    def _mask(self) -> None:
        start = self.span.columns.start
        columns = torch.arange(start, self.span.columns.stop, device=self.logits.device)
        # Only the edge of the block is masked: the columns beyond its first row ...
        edge = max(
            0, (int(self.span.rows.start) + self.span.offset + 1 if self.call.causal else self.span.keys) - start
        )
        hidden = columns[edge:] >= self.span.keys
        if self.call.causal:
            hidden = hidden | (columns[edge:] > self.row_index[:, None])
        self.logits[..., edge:].masked_fill_(hidden, MASKED)
        # ... and those that have left the window of its last row.
        if self.call.window is not None:
            edge = max(0, self.span.rows.stop + self.span.offset - self.call.window - start)
            gone = columns[:edge] <= self.row_index[:, None] - self.call.window
            self.logits[..., :edge].masked_fill_(gone, MASKED)

    def softmax(self, sinks: Tensor | None) -> None:
        """Probabilities into the second buffer; the first then holds logits minus the row's maximum."""
        self.maxima = self.logits.unflatten(-1, (-1, GROUP)).amax(-1)  # type: ignore[no-untyped-call]
        self.top = self.maxima.amax(-1)
        shift = self.top if sinks is None else torch.maximum(self.top, sinks)
        self.logits.sub_(shift[..., None])
        torch.exp2(self.logits, out=self.p)
        real = self.p.sum(-1)
        total = real if sinks is None else real + torch.exp2(sinks - shift)
        self.log_total, self.total_real = torch.log2(total), real / total
        self.lse = shift + self.log_total
        self.p.mul_(total.reciprocal()[..., None])

    def write_rows(self, out: dict[str, Tensor], columns: Tensor | None) -> None:
        rows = self.span.rows
        if "lse" in out:
            out["lse"][..., rows] = self.lse * LN2
        if "max_prob" in out:
            out["max_prob"][..., rows] = torch.exp2(self.top - self.lse)
        if "sink_mass" in out and self.call.sinks is not None:
            out["sink_mass"][..., rows] = 1.0 - self.total_real
        if columns is not None:
            prompts, heads, group, count, width = self.shape
            product = torch.bmm(
                self.p.view(prompts * heads, group * count, width), columns.reshape(prompts * heads, width, -1)
            ).view(prompts, heads, group, count, -1)
            value_width = out["output"].shape[-1] if "output" in out else 0
            if value_width:
                out["output"][..., rows, :] = product[..., :value_width]
            if "features" in out:
                out["features"][..., rows, :] = product[..., value_width:]
        if "distance" in out:
            # Counted from the block's first row, so that short distances keep their digits at any position.
            origin = self.row_index[0]
            away = (
                origin - torch.arange(self.span.columns.start, self.span.columns.stop, device=origin.device)
            ).float()
            out["distance"][..., rows] = self.p @ away + (self.row_index - origin) * self.total_real
        self._write_bands(out)
        self._write_maxima(out)
        if "entropy" in out:
            # Last: it spends the logits. Relative to the maximum, so that peaked rows lose no digits.
            spent = torch.mul(self.p, self.logits, out=self.logits).sum(-1)
            out["entropy"][..., rows] = (self.log_total * self.total_real - spent).clamp_(min=0.0) * LN2

    def _write_bands(self, out: dict[str, Tensor]) -> None:
        rows, start = self.span.rows, self.span.columns.start
        for slot, size in enumerate(self.request.first):
            out["first"][..., rows, slot] = self.p[..., : max(0, size - start)].sum(-1)
        for slot, size in enumerate(self.request.recent):
            low = max(0, rows.start + self.span.offset - size + 1 - start)
            band = torch.arange(start + low, self.span.columns.stop, device=self.p.device)
            near = (band > self.row_index[:, None] - size).to(self.p.dtype)
            out["recent"][..., rows, slot] = (self.p[..., low:] * near).sum(-1)

    def _write_maxima(self, out: dict[str, Tensor]) -> None:
        rows, start = self.span.rows, self.span.columns.start + self.call.first_key
        if "top_keys" in out:
            wanted = min(self.request.top_k, self.shape[-1])
            values, keys = self._top(wanted)
            keys = keys + start
            real = values > MASKED / 2
            out["top_keys"][..., rows, :wanted] = torch.where(real, keys, -1)
            if "argmax" in out:
                out["argmax"][..., rows] = keys[..., 0]
            out["top_mass"][..., rows, :wanted] = torch.where(real, torch.exp2(values - self.log_total[..., None]), 0.0)
        elif "argmax" in out:
            best = self.maxima.argmax(-1, keepdim=True)
            inside = self._groups(best).argmax(-1)
            out["argmax"][..., rows] = best[..., 0] * GROUP + inside + start

    def _top(self, wanted: int) -> tuple[Tensor, Tensor]:
        """The largest logits and their columns; in a wide block, only the groups that can hold them are searched."""
        if self.maxima.shape[-1] < 2 * wanted:
            return self.logits.topk(wanted, dim=-1)
        groups = self.maxima.topk(wanted, dim=-1).indices
        values, where = self._groups(groups).topk(wanted, dim=-1)
        return values, torch.gather(groups, -1, where // GROUP) * GROUP + where % GROUP

    def _groups(self, index: Tensor) -> Tensor:
        """The (shifted) logits of the key groups at `index`, side by side."""
        grouped = self.logits.unflatten(-1, (-1, GROUP))  # type: ignore[no-untyped-call]
        chosen = torch.gather(grouped, -2, index[..., None].expand(*index.shape, GROUP))
        return chosen.flatten(-2)

    def write_lookups(self, out: dict[str, Tensor], slots: Tensor | None) -> None:
        """Mass at given keys: fixed offsets from the query, and one list of keys per query."""
        rows, start, width = self.span.rows, self.span.columns.start, self.shape[-1]
        if "offsets" in out:
            offsets = torch.tensor(self.request.offsets, device=self.p.device)
            out["offsets"][..., rows, :] = self._at(self.row_index[:, None] + offsets - start, width)
        if slots is not None:
            keys = torch.where(slots >= 0, slots - self.call.first_key - start, -1)
            out["at_keys"][..., rows, :] = self._at(keys[:, None, None], width)

    def _at(self, index: Tensor, width: int) -> Tensor:
        """`p` at column `index` (broadcast to `[..., row, slot]`), zero outside the block."""
        inside = (index >= 0) & (index < width)
        full = index.clamp(0, width - 1).expand(*self.shape[:-1], index.shape[-1])
        return torch.gather(self.p, -1, full) * inside

    def write_columns(self, out: dict[str, Tensor]) -> None:
        keys = slice(self.span.columns.start, min(self.span.columns.stop, self.span.keys))
        p = self.p[..., : keys.stop - keys.start]
        if "column_sum" in out:
            out["column_sum"][..., keys] += p.sum(-2)
        if "column_max" in out:
            best = out["column_max"][..., keys]
            torch.maximum(best, p.amax(-2), out=best)
        for slot, size in enumerate(self.request.column_last):
            low = self.span.keys - size - self.span.offset - self.span.rows.start
            if low < self.shape[-2]:
                out["column_last"][..., slot, keys] += p[..., max(0, low) :, :].sum(-2)


def _round_up(keys: int) -> int:
    return -(-keys // GROUP) * GROUP
