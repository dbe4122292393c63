"""One block of attention in plain torch: logits, then probabilities, then every functional read off them."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kernels.request import StatisticsRequest
from workbench.kernels.results import earliest

# Keys are searched for maxima in groups of this many.
GROUP = 64
# Finite, so that a masked probability times its logit is zero instead of NaN.
MASKED = -1e30
LN2 = log(2.0)


def round_up(keys: int) -> int:
    """Keys padded to whole groups."""
    return -(-keys // GROUP) * GROUP


@runtime_checkable
class Call(Protocol):
    """What a tile asks of the call that it is part of."""

    request: StatisticsRequest
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    sinks: Tensor | None
    first_key: int
    first_query: int


@dataclass(frozen=True)
class Span:
    """A row block and the keys it can see; `offset` is the key index of query 0."""

    rows: slice
    columns: slice
    offset: int
    keys: int

    @staticmethod
    def of(first: int, last: int, queries: int, keys: int, causal: bool, window: int | None) -> Span:
        offset = keys - queries
        end = min(keys, last + offset) if causal else keys
        start = 0 if window is None else max(0, first + offset - window + 1) // GROUP * GROUP
        return Span(slice(first, last), slice(start, round_up(end)), offset, keys)


class Tile:
    """One block: logits (in base 2), then probabilities, then every functional read off them."""

    def __init__(self, call: Call, span: Span, q: Tensor, k: Tensor, buffers: Tensor) -> None:
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
        top = self.maxima.amax(-1)
        # Every row sees a key: a maximum that low is an infinite logit, of which a softmax knows nothing.
        self.top = torch.where(top < MASKED / 2, torch.nan, top)
        shift = self.top if sinks is None else torch.maximum(self.top, sinks)
        self.logits.sub_(shift[..., None])
        torch.exp2(self.logits, out=self.p)
        real = self.p.sum(-1)
        total = real if sinks is None else real + torch.exp2(sinks - shift)
        self.log_total, self.total_real = torch.log2(total), real / total
        self.lse, self.shift, self.sinks = shift + self.log_total, shift, sinks
        self.p.mul_(total.reciprocal()[..., None])

    def write_rows(self, out: dict[str, Tensor], columns: Tensor | None) -> None:
        rows = self.span.rows
        if "lse" in out:
            out["lse"][..., rows] = self.lse * LN2
        if "max_prob" in out:
            out["max_prob"][..., rows] = torch.exp2(self.top - self.lse)
        if "max_logit" in out:
            out["max_logit"][..., rows] = self.top * LN2
        if "sink_mass" in out and self.sinks is not None:
            out["sink_mass"][..., rows] = torch.exp2(self.sinks - self.lse)
        if columns is not None:
            prompts, heads, group, count, width = self.shape
            product = torch.bmm(
                self.p.view(prompts * heads, group * count, width), columns.reshape(prompts * heads, width, -1)
            ).view(prompts, heads, group, count, -1)
            value_width = out["output"].shape[-1] if "output" in out else 0
            if value_width:
                out["output"][..., rows, :] = product[..., :value_width]
            if "features" in out:
                shared = value_width + out["features"].shape[-1]
                out["features"][..., rows, :] = product[..., value_width:shared]
            if "value_features" in out:
                out["value_features"][..., rows, :] = product[..., -out["value_features"].shape[-1] :]
        self._write_place(out)
        self._write_bands(out)
        self._write_maxima(out)
        self._write_logits(out)
        if "entropy" in out:
            # Last: it spends the logits. Relative to the maximum, so that peaked rows lose no digits.
            spent = torch.mul(self.p, self.logits, out=self.logits).sum(-1)
            out["entropy"][..., rows] = (self.log_total * self.total_real - spent).clamp_(min=0.0) * LN2

    def _write_place(self, out: dict[str, Tensor]) -> None:
        """Mean and standard deviation of the distance."""
        if not ("distance" in out or "spread" in out):
            return
        # Counted from the block's first row, so that short distances keep their digits at any position.
        origin = self.row_index[0]
        columns = torch.arange(self.span.columns.start, self.span.columns.stop, device=origin.device)
        away = (origin - columns).float()
        mean = self.p @ away
        if "distance" in out:
            out["distance"][..., self.span.rows] = mean + (self.row_index - origin) * self.total_real
        if "spread" in out:
            real = self.total_real.clamp(min=1e-37)
            moment = (self.p * (away - (mean / real)[..., None]).square()).sum(-1)
            out["spread"][..., self.span.rows] = (moment / real).sqrt()

    def _write_logits(self, out: dict[str, Tensor]) -> None:
        rows = self.span.rows
        if "mean_logit" in out:
            seen = self.logits > MASKED / 2
            mean = torch.where(seen, self.logits, 0.0).sum(-1) / seen.sum(-1).clamp(min=1)
            out["mean_logit"][..., rows] = (mean + self.shift) * LN2
        if "first_logit" in out:
            first = torch.zeros_like(self.row_index)
            if self.call.window is not None:
                first = (self.row_index - self.call.window + 1).clamp(min=0)
            index = (first - self.span.columns.start).clamp(min=0)[:, None].expand(*self.shape[:-1], 1)
            out["first_logit"][..., rows] = (torch.gather(self.logits, -1, index)[..., 0] + self.shift) * LN2

    def _write_bands(self, out: dict[str, Tensor]) -> None:
        rows, start = self.span.rows, self.span.columns.start
        for slot, size in enumerate(self.request.first):
            out["first"][..., rows, slot] = self.p[..., : max(0, size - start)].sum(-1)
        for slot, size in enumerate(self.request.recent):
            low = max(0, rows.start + self.span.offset - size + 1 - start)
            band = torch.arange(start + low, self.span.columns.stop, device=self.p.device)
            near = (band > self.row_index[:, None] - size).to(self.p.dtype)
            out["recent"][..., rows, slot] = (self.p[..., low:] * near).sum(-1)
        for slot, level in enumerate(self.request.above):
            # A NaN is above nothing, and its row no count.
            out["above"][..., rows, slot] = (self.p > level).sum(-1).float() + self.lse * 0.0

    def _write_maxima(self, out: dict[str, Tensor]) -> None:
        rows, start = self.span.rows, self.span.columns.start + self.call.first_key
        if "top_keys" in out:
            wanted = min(self.request.top_k, self.shape[-1])
            values, keys = self._top(wanted)
            keys = keys + start
            real = values > MASKED / 2
            out["top_keys"][..., rows, :wanted] = torch.where(real, keys, -1)
            if "argmax" in out:
                out["argmax"][..., rows] = out["top_keys"][..., rows, 0]
            mass = torch.where(real, torch.exp2(values - self.log_total[..., None]), (self.lse * 0.0)[..., None])
            out["top_mass"][..., rows, :wanted] = mass
        elif "argmax" in out:
            best = self.maxima.argmax(-1, keepdim=True)
            inside = self._groups(best).argmax(-1)
            out["argmax"][..., rows] = torch.where(self.lse.isnan(), -1, best[..., 0] * GROUP + inside + start)

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

    def write_columns(self, out: dict[str, Tensor], weights: Tensor | None) -> None:
        """What keys receive from this block; `weights` `[prompt, weighting, row]`."""
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
        if weights is not None:
            out["column_weighted"][..., keys] += weights[:, None, None] @ p
        for slot, level in enumerate(self.request.column_above):
            hit = p > level
            first = hit.int().argmax(-2) + self.span.rows.start + self.call.first_query
            found = out["column_above"][..., slot, keys]
            found.copy_(earliest(found, torch.where(hit.any(-2), first, -1)))

    def write_maps(self, out: dict[str, Tensor]) -> None:
        """Sums along diagonals and over blocks of entries."""
        rows, width = self.shape[-2:]
        if "diagonal" in out:
            self._diagonal(out["diagonal"], self.p, 0)
        if "diagonal_last" in out:
            low = self.span.keys - self.request.diagonal_last - self.span.offset - self.span.rows.start
            if low < rows:
                self._diagonal(out["diagonal_last"], self.p[..., max(0, low) :, :], max(0, low))
        if self.request.block:
            device, b = self.p.device, self.request.block
            row = (torch.arange(rows, device=device) + self.span.rows.start + self.call.first_query) // b
            column = (torch.arange(width, device=device) + self.span.columns.start + self.call.first_key) // b
            # Columns of the last group may lie beyond the map, with nothing on them.
            inside = column < out["block_sum"].shape[-1]
            p, column = self.p[..., inside], column[inside]
            sums = p.new_zeros(*p.shape[:-1], out["block_sum"].shape[-1]).index_add_(-1, column, p)
            out["block_sum"].index_add_(-2, row, sums)
            tops = torch.zeros_like(sums).scatter_reduce_(-1, column.expand_as(p), p, "amax")
            out["block_max"].scatter_reduce_(-2, row[:, None].expand_as(tops), tops, "amax")

    def _diagonal(self, out: Tensor, p: Tensor, skipped: int) -> None:
        """Add each diagonal's sum to its distance: in an array one column wider, a diagonal is a column."""
        rows, width = p.shape[-2:]
        flat = pad(p.flip(-1), (0, rows)).flatten(-2)
        skewed = flat[..., : rows * (width + rows - 1)].unflatten(-1, (rows, width + rows - 1)).sum(-2)  # type: ignore[no-untyped-call]
        # Column c of the skewed array holds the entries with j - i = width - 1 - c within the block.
        origin = int(self.span.rows.start) + skipped + self.span.offset - self.span.columns.start
        distance = torch.arange(width + rows - 1, device=p.device) + origin - (width - 1)
        inside = (distance >= 0) & (distance < out.shape[-1])
        out[..., distance[inside]] += skewed[..., inside]
