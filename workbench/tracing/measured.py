"""What a statistic is, and what it is read from: the vocabulary behind `workbench.statistics`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels import AttentionStatistics, Geometry, StatisticsRequest
from workbench.models import AttentionCall, Batch

# Of blocks there are two axes: of queries, then of keys.
Axis = Literal["query", "key", "distance", "block"]
# A function of value vectors, `[prompt, kv_head, key, dim]` to `[prompt, kv_head, key]`.
OfValues = Callable[[Tensor], Tensor]


class Measured(NamedTuple):
    """What a statistic is read from: the kernel's results of one layer, the merged request
    behind them, and the attention call itself.

    `features`, `at_keys`, `weighted` and `of_values` are this statistic's own columns; `result_factor` turns z into
    vectors of the norm that z W_O has. `whole` is the geometry of the results where the call is their last part.
    """

    found: AttentionStatistics
    request: StatisticsRequest
    call: AttentionCall
    features: Tensor | None
    at_keys: Tensor | None
    result_factor: Float[Tensor, "head dim dim"] | None
    weighted: Tensor | None = None
    of_values: Tensor | None = None
    whole: Geometry | None = None

    @property
    def geometry(self) -> Geometry:
        """Which queries and keys the results are of."""
        return self.call.geometry if self.whole is None else self.whole


@dataclass(frozen=True, eq=False)
class Statistic:
    """A functional of attention: its name, what the kernel must compute, and how it is read off.

    `key_features` are functions of the key per prompt, `query_keys` lists of keys per query, `query_weights` weights
    of the queries; all are indexed like the batch that is traced. `of_values` is a function of the value vectors.
    `integer` results are keys or queries.
    """

    name: str
    request: StatisticsRequest
    read: Callable[[Measured], Tensor]
    axis: Axis = "query"
    columns: int | None = None
    key_features: Float[Tensor, "prompt key column"] | None = None
    query_keys: Int[Tensor, "prompt query slot"] | None = None
    query_weights: Float[Tensor, "prompt query column"] | None = None
    of_values: OfValues | None = None
    needs_result_factor: bool = False
    integer: bool = False

    def __repr__(self) -> str:
        return f"<statistic {self.name}>"

    @property
    def given(self) -> list[Tensor]:
        """What was made for one batch, `[prompt, token, column]`."""
        return [x for x in (self.key_features, self.query_keys, self.query_weights) if x is not None]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes after prompt, layer and head."""
        return ("query_block", "key_block") if self.axis == "block" else (self.axis,)

    def shape(self, tokens: int) -> tuple[int, ...]:
        """Sizes of the axes after prompt, layer and head, columns left out, for prompts of up to `tokens`."""
        return (-(-tokens // self.request.block),) * 2 if self.axis == "block" else (tokens,)

    def real(self, batch: Batch) -> Bool[Tensor, "prompt place *places"]:
        """Where each prompt has such a token, distance or block; distances and blocks count from its first token."""
        if self.axis in ("query", "key"):
            return batch.mask.cpu()
        size, lengths = self.request.block or 1, batch.lengths.cpu()[:, None]
        inside = torch.arange(self.shape(batch.ids.shape[1])[0]) * size < lengths
        return inside[:, :, None] & inside[:, None, :] if self.axis == "block" else inside


# What a trace takes: one statistic, or several, of which some come in pairs (`top_k`).
Statistics = Statistic | Iterable[Statistic | tuple[Statistic, ...]]


def field(name: str) -> Callable[[Measured], Tensor]:
    """Read a result as it is."""

    def read(measured: Measured) -> Tensor:
        value: Tensor = getattr(measured.found, name)
        return value

    return read


def entry(name: str, sizes: str, size: float, dim: int = -1) -> Callable[[Measured], Tensor]:
    """Read one entry of a result that holds several sizes, at its place in the merged request."""

    def read(measured: Measured) -> Tensor:
        value: Tensor = getattr(measured.found, name)
        return value.select(dim, getattr(measured.request, sizes).index(size))

    return read


def computed(
    statistics: Sequence[Statistic], request: StatisticsRequest, call: AttentionCall, rows: slice, tokens: int
) -> AttentionStatistics:
    """What all statistics of one layer need, in one pass, for the prompts `rows` of the batch that is traced, `tokens`
    wide."""
    parts = {name: [getattr(s, name) for s in statistics] for name in ("key_features", "query_keys", "query_weights")}
    cut = {name: _cut(given, rows, tokens, call.q.device) for name, given in parts.items()}
    weights = cut["query_weights"]
    functions = [_applied(s, call) for s in statistics if s.of_values is not None]
    shifted = request.block > 0 and call.key_start is not None and bool((call.key_start % request.block != 0).any())
    found = call.statistics(
        replace(request, block=0) if shifted else request,
        key_features=cut["key_features"],
        query_keys=cut["query_keys"],
        query_weights=None if weights is None else weights.transpose(1, 2).float(),
        value_features=torch.stack(functions, dim=-1) if functions else None,
    )
    if shifted:
        # Kernels count blocks from the first column; statistics from the prompt's own first token.
        maps = _from_first_token(call).statistics(StatisticsRequest(block=request.block))
        found = replace(found, block_sum=maps.block_sum, block_max=maps.block_max)
    return found


def shared_out(
    statistics: Sequence[Statistic],
    found: AttentionStatistics,
    request: StatisticsRequest,
    call: AttentionCall,
    result_factor: Float[Tensor, "head dim dim"] | None,
    whole: Geometry | None = None,
) -> list[Measured]:
    """What each statistic is read from."""
    weighted = None if found.column_weighted is None else found.column_weighted.transpose(2, 3)
    columns = {
        "key_features": found.features,
        "query_keys": found.at_keys,
        "query_weights": weighted,
        "of_values": found.value_features,
    }
    taken = dict.fromkeys(columns, 0)
    measured = []
    for statistic in statistics:
        own: dict[str, Tensor | None] = {}
        for name, all_columns in columns.items():
            count = _width(getattr(statistic, name))
            first, last = taken[name], taken[name] + count
            own[name] = None if all_columns is None or not count else all_columns[..., first:last]
            taken[name] = last
        measured.append(
            Measured(
                found, request, call, own["key_features"], own["query_keys"], result_factor,
                own["query_weights"], own["of_values"], whole,
            )
        )  # fmt: skip
    return measured


def _width(given: Tensor | OfValues | None) -> int:
    if given is None:
        return 0
    return int(given.shape[-1]) if isinstance(given, Tensor) else 1


def _cut(given: Sequence[Tensor | None], rows: slice, tokens: int, device: torch.device) -> Tensor | None:
    parts = [part[rows, :tokens] for part in given if part is not None]
    return torch.cat(parts, dim=-1).to(device) if parts else None


def _applied(statistic: Statistic, call: AttentionCall) -> Float[Tensor, "prompt kv_head key"]:
    assert statistic.of_values is not None
    result = statistic.of_values(call.v.float())
    if result.shape != call.v.shape[:3]:
        raise RequestError(
            f"{statistic.name!r}: its function made {tuple(result.shape)} of values {tuple(call.v.shape)}; it must "
            f"return one number for each, {tuple(call.v.shape[:3])}."
        )
    return result.float()


def _from_first_token(call: AttentionCall) -> AttentionCall:
    """The same call with each prompt's padding behind it."""
    assert call.key_start is not None
    start, keys = call.key_start.to(call.q.device), call.k.shape[2]
    place = (torch.arange(keys, device=call.q.device) + start[:, None]) % keys

    def moved(x: Tensor) -> Tensor:
        return torch.gather(x, 2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))

    end = torch.full_like(start, keys) if call.key_end is None else call.key_end.to(start)
    return replace(
        call, q=moved(call.q), k=moved(call.k), v=moved(call.v), key_start=torch.zeros_like(start), key_end=end - start
    )
