"""A long prompt in chunks over one KV cache: the same trace, in the memory of the cache and one chunk.

Each chunk's queries meet the keys of all chunks so far, so that what belongs to a query (entropy, masses, argmax, z) is
final at once. What is summed over queries (columns, diagonals, blocks) is carried from chunk to chunk, layer by layer,
and read off behind the last one: sums add, maxima are compared, the first query above a probability is the earliest.
Nothing is approximated. Prompts run one by one, without padding.

The cache holds every key also of windowed layers; the window is kept by attention itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels import AttentionStatistics, Geometry, StatisticsRequest
from workbench.kernels.results import earliest
from workbench.models import Attachment, AttentionCall
from workbench.tracing.edits import Ablation, Patch
from workbench.tracing.measured import Statistic, computed, shared_out
from workbench.tracing.plan import Plan
from workbench.tracing.watch import SiteSink, StatisticSink, Watch

if TYPE_CHECKING:
    from workbench.tracing.trace import Collector

# Summed over queries, and their number of queries alone; the others are handled by name.
_SUMS = ("column_sum", "column_weighted", "diagonal")
_ONE = slice(0, 1)


@dataclass(frozen=True)
class Chunk:
    """Queries `first` to `last` of a prompt of `length` tokens, which begins in column `start` of its batch."""

    row: int
    start: int
    length: int
    first: int
    last: int

    @property
    def queries(self) -> slice:
        """Columns of the batch."""
        return slice(self.start + self.first, self.start + self.last)

    @property
    def keys(self) -> slice:
        """Columns of all keys that the chunk can see."""
        return slice(self.start, self.start + self.last)

    @property
    def ends(self) -> bool:
        """Whether the prompt ends here."""
        return self.last == self.length

    def among_last(self, size: int) -> int:
        """How many of the chunk's queries are among the prompt's last `size`; they are the chunk's last ones."""
        return max(0, self.last - max(self.first, self.length - size))


def check_chunk(chunk: int | None, plan: Plan) -> None:
    """`RequestError` for what cannot be done in chunks."""
    if chunk is None:
        return
    if chunk < 1:
        raise RequestError(f"chunk = {chunk}: a chunk has 1 token or more; 4096 is a good size.")
    if any(site == "pattern" for site, _ in plan.sites) or any(patch.site == "pattern" for patch in plan.patches):
        raise RequestError(
            f"chunk = {chunk}: explicit patterns belong to short prompts, which need no chunks; leave chunk out, or "
            "ask for statistics."
        )
    if plan.request.block and chunk % plan.request.block:
        raise RequestError(
            f"chunk = {chunk} is no multiple of the blocks of {plan.request.block}; choose "
            f"{-(-chunk // plan.request.block) * plan.request.block}."
        )


def cut(plan: Plan, chunk: Chunk) -> Plan:
    """The plan for one chunk: what is given for tokens of the batch, cut to the chunk's own and the keys it sees."""
    row = slice(chunk.row, chunk.row + 1)

    def statistic(one: Statistic) -> Statistic:
        features, keys, weights = one.key_features, one.query_keys, one.query_weights
        return replace(
            one,
            key_features=None if features is None else features[row, chunk.keys],
            query_keys=None if keys is None else keys[row, chunk.queries] - chunk.start,
            query_weights=None if weights is None else weights[row, chunk.queries],
        )

    def ablation(one: Ablation) -> Ablation:
        values, frozen = one.values, one.frozen
        if values is not None and one.takes_values:
            values = {head: value[row, chunk.queries] for head, value in values.items()}
        if frozen is not None:
            frozen = {layer: (q[row, chunk.queries], k[row, chunk.keys]) for layer, (q, k) in frozen.items()}
        positions = None if one.positions is None else one.positions[row, chunk.queries]
        return replace(one, values=values, frozen=frozen, positions=positions)

    def patch(one: Patch) -> Patch:
        # The cache holds keys and values as the model made them: those of earlier chunks are replaced again.
        columns = chunk.keys if one.site in ("k", "v") else chunk.queries
        positions = None if one.positions is None else one.positions[row, columns]
        return replace(one, value=one.value[row, columns], positions=positions)

    return replace(
        plan,
        statistics=tuple(map(statistic, plan.statistics)),
        ablations=tuple(map(ablation, plan.ablations)),
        patches=tuple(map(patch, plan.patches)),
    )


class Carried:
    """What has been summed over the queries of a prompt so far, by layer."""

    def __init__(self) -> None:
        self._layers: dict[int, dict[str, Tensor]] = {}

    def add(self, layer: int, found: AttentionStatistics, request: StatisticsRequest, chunk: Chunk) -> None:
        """One chunk's results, of `narrowed(request, chunk)`."""
        held = self._layers.setdefault(layer, {})
        for name in _SUMS:
            self._into(held, name, getattr(found, name), chunk.length, torch.Tensor.add_)
        self._into(held, "column_max", found.column_max, chunk.length, _larger)
        above = found.column_above
        if above is not None:
            above = torch.where(above >= 0, above + chunk.first, -1)
        self._into(held, "column_above", above, chunk.length, _earlier, nothing=-1)
        if request.column_last:
            kept = [place for place, size in enumerate(request.column_last) if chunk.among_last(size)]
            own = found.column_last
            if own is not None:
                spread = own.new_zeros(*own.shape[:2], len(request.column_last), own.shape[-1])
                spread[:, :, kept] = own
                self._into(held, "column_last", spread, chunk.length, torch.Tensor.add_)
        self._into(held, "diagonal_last", found.diagonal_last, chunk.length, torch.Tensor.add_)
        for name in ("block_sum", "block_max") if request.block else ():
            self._place(held, name, getattr(found, name), request.block, chunk)

    def whole(self, layer: int) -> dict[str, Tensor]:
        """The sums of a layer, given up here."""
        return self._layers.pop(layer, {})

    @staticmethod
    def _into(
        held: dict[str, Tensor],
        name: str,
        part: Tensor | None,
        length: int,
        join: Callable[[Tensor, Tensor], object],
        nothing: int = 0,
    ) -> None:
        if part is None:
            return
        if name not in held:
            held[name] = part.new_full((*part.shape[:-1], length), nothing)
        join(held[name][..., : part.shape[-1]], part)

    @staticmethod
    def _place(held: dict[str, Tensor], name: str, part: Tensor, block: int, chunk: Chunk) -> None:
        if name not in held:
            count = -(-chunk.length // block)
            held[name] = part.new_zeros(*part.shape[:2], count, count)
        first = chunk.first // block
        held[name][:, :, first : first + part.shape[2], : part.shape[3]] = part


def _larger(held: Tensor, part: Tensor) -> None:
    torch.maximum(held, part, out=held)


def _earlier(held: Tensor, part: Tensor) -> None:
    held.copy_(earliest(held, part))


def narrowed(request: StatisticsRequest, chunk: Chunk) -> StatisticsRequest:
    """The request for one chunk: the prompt's last rows are looked for only where they are."""
    last = tuple(count for size in request.column_last if (count := chunk.among_last(size)))
    return replace(request, column_last=last, diagonal_last=chunk.among_last(request.diagonal_last))


class ChunkWatch(Watch):
    """One chunk's forward pass under its plan."""

    def __init__(
        self,
        attachment: Attachment,
        plan: Plan,
        chunk: Chunk,
        carried: Carried,
        statistic: StatisticSink,
        site: SiteSink,
    ) -> None:
        super().__init__(attachment, cut(plan, chunk), _ONE, chunk.last - chunk.first, statistic, site)
        self._chunk, self._carried = chunk, carried

    def _measure(self, call: AttentionCall) -> Tensor:
        """Rows are read at once, everything else behind the last chunk."""
        statistics, request, chunk = self.plan.statistics, self.plan.request, self._chunk
        wanted = narrowed(replace(request, output=True), chunk)
        found = computed(statistics, wanted, call, self.rows, chunk.last)
        self._carried.add(call.layer, found, request, chunk)
        if chunk.ends:
            found = replace(found, **self._carried.whole(call.layer))
        whole = Geometry(1, chunk.length, chunk.length, True, call.window)
        parts = shared_out(statistics, found, request, call, self.result_factor(call.layer), whole)
        for statistic, measured in zip(statistics, parts, strict=True):
            if statistic.axis == "query" or chunk.ends:
                self.put_statistic(statistic.name, call.layer, self._named(statistic, statistic.read(measured)))
        assert found.output is not None
        return found.output.to(call.q.dtype)

    def _named(self, statistic: Statistic, value: Tensor) -> Tensor:
        """Keys and queries by their column in the batch."""
        if not statistic.integer or not self._chunk.start:
            return value
        return torch.where(value >= 0, value + self._chunk.start, -1)


@torch.no_grad()
def run_in_chunks(
    attachment: Attachment,
    plan: Plan,
    collector: Collector,
    row: int,
    size: int,
    wanted: Tensor | None,
    loss: bool,
    done: Callable[[], None],
) -> None:
    """One prompt of the collector's batch; `wanted` are the columns of its logits, `done` is told of each chunk."""
    from transformers import DynamicCache

    batch = collector.trace.batch
    start, length = int(batch.starts[row]), int(batch.lengths[row])
    ids = batch.ids[row : row + 1, start : start + length].to(attachment.device)
    collector.rows = slice(row, row + 1)
    # Without a configuration every layer keeps all keys.
    cache: Any = DynamicCache()
    carried = Carried()
    for first in range(0, length, size):
        chunk = Chunk(row, start, length, first, min(first + size, length))
        sinks = _Sinks(plan, collector, chunk)
        watch = ChunkWatch(attachment, plan, chunk, carried, sinks.statistic, sinks.site)
        own = None if wanted is None else wanted - start - first
        slots = None if own is None else ((own >= 0) & (own < chunk.last - first)).nonzero().flatten()
        kept = torch.arange(chunk.last - first) if loss else torch.tensor([chunk.last - first - 1])
        if not loss and own is not None and slots is not None and len(slots):
            kept = torch.unique(own[slots])
        with watch.running():
            logits = attachment.hf_model(
                ids[:, first : chunk.last],
                attention_mask=torch.ones(1, chunk.last, dtype=torch.long, device=ids.device),
                position_ids=torch.arange(first, chunk.last, device=ids.device)[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=kept.to(ids.device),
            ).logits
        if own is not None and slots is not None:
            assert wanted is not None
            collector.some_logits(logits, torch.searchsorted(kept, own[slots]), slots, len(wanted))
        if loss:
            collector.loss(logits, ids[:, first + 1 : chunk.last + 1], start + first)
        done()


@dataclass(frozen=True)
class _Sinks:
    """Puts one chunk's results where they belong in the whole."""

    plan: Plan
    collector: Collector
    chunk: Chunk

    def statistic(self, name: str, layer: int, value: Tensor) -> None:
        axis = self.collector.trace.statistics[name].axis
        at = {"query": self.chunk.queries.start, "key": self.chunk.start}.get(axis, 0)
        self.collector.statistic(name, layer, value, at)

    def site(self, site: Any, layer: int, value: Tensor) -> None:
        self.collector.site(site, layer, value, self.chunk.queries.start)
