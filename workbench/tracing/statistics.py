"""What to measure of every head while the model runs: functionals of attention, asked for by name.

Each function returns a `Statistic` for `Model.trace(statistics=[...])`. Row statistics come back as
`[prompt, layer, head, query]`, column statistics as `[prompt, layer, head, key]`; those with several columns
have one more axis. Destination = query = row, source = key = column. All are exact, need no N x N array, and
accumulate in float32 whatever the model's dtype. Keys are named by their column in the batch, padding counted,
so that under left padding the first token of a prompt is not key 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels import AttentionStatistics, StatisticsRequest
from workbench.models import AttentionCall

Axis = Literal["query", "key"]


class Measured(NamedTuple):
    """What a statistic is read from: the kernel's results of one layer, the merged request
    behind them, and the attention call itself.

    `features` and `at_keys` are this statistic's own columns; `result_factor` turns z into vectors of the
    norm that z W_O has.
    """

    found: AttentionStatistics
    request: StatisticsRequest
    call: AttentionCall
    features: Tensor | None
    at_keys: Tensor | None
    result_factor: Float[Tensor, "head dim dim"] | None


@dataclass(frozen=True, eq=False)
class Statistic:
    """A functional of attention: its name, what the kernel must compute, and how it is read off.

    `key_features` are functions of the key per prompt, `query_keys` lists of keys per query; both are indexed
    like the batch that is traced. `integer` results are keys.
    """

    name: str
    request: StatisticsRequest
    read: Callable[[Measured], Tensor]
    axis: Axis = "query"
    columns: int | None = None
    key_features: Float[Tensor, "prompt key column"] | None = None
    query_keys: Int[Tensor, "prompt query slot"] | None = None
    needs_result_factor: bool = False
    integer: bool = False

    def __repr__(self) -> str:
        return f"<statistic {self.name}>"


# What a trace takes: one statistic, or several, of which some come in pairs (`top_k`).
Statistics = Statistic | Iterable[Statistic | tuple[Statistic, ...]]


def _field(name: str) -> Callable[[Measured], Tensor]:
    def read(measured: Measured) -> Tensor:
        value: Tensor = getattr(measured.found, name)
        return value

    return read


def _entry(name: str, sizes: str, size: float, dim: int = -1) -> Callable[[Measured], Tensor]:
    """One entry of a result that holds several sizes, at its place in the merged request."""

    def read(measured: Measured) -> Tensor:
        value: Tensor = getattr(measured.found, name)
        return value.select(dim, getattr(measured.request, sizes).index(size))

    return read


def _norm(vectors: Float[Tensor, "*place dim"]) -> Float[Tensor, "*place"]:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norm


def lse() -> Statistic:
    """Log-sum-exp of the row's logits (nats), a learned sink included."""
    return Statistic("lse", StatisticsRequest(lse=True), _field("lse"))


def entropy() -> Statistic:
    """Entropy of the row over real keys (nats)."""
    return Statistic("entropy", StatisticsRequest(entropy=True), _field("entropy"))


def max_prob() -> Statistic:
    """The row's largest probability."""
    return Statistic("max_prob", StatisticsRequest(max_prob=True), _field("max_prob"))


def max_logit() -> Statistic:
    """The row's largest logit (scaled, soft-capped; nats)."""
    return Statistic("max_logit", StatisticsRequest(max_logit=True), _field("max_logit"))


def mean_logit() -> Statistic:
    """Mean logit over the keys that the query sees (nats)."""
    return Statistic("mean_logit", StatisticsRequest(mean_logit=True), _field("mean_logit"))


def first_logit() -> Statistic:
    """Logit of the first key that the query sees (nats); less `mean_logit`, it is the sink logit gap."""
    return Statistic("first_logit", StatisticsRequest(first_logit=True), _field("first_logit"))


def above(probability: float) -> Statistic:
    """How many keys have more than a probability."""
    request = StatisticsRequest(above=(probability,))
    return Statistic(f"above_{probability:g}", request, _entry("above", "above", probability))


def argmax() -> Statistic:
    """A key with the row's largest probability, as a column of the batch (-1 at padding)."""
    return Statistic("argmax", StatisticsRequest(argmax=True), _field("argmax"), integer=True)


def top_k(k: int) -> tuple[Statistic, Statistic]:
    """The k heaviest keys ("top_k", -1 where fewer are visible) and their probabilities ("top_k_mass")."""
    if k < 1:
        raise RequestError(f"top_k({k}): ask for 1 key or more.")
    request = StatisticsRequest(top_k=k)

    def first(name: str) -> Callable[[Measured], Tensor]:
        def read(measured: Measured) -> Tensor:
            value: Tensor = getattr(measured.found, name)
            return value[..., :k]

        return read

    return (
        Statistic("top_k", request, first("top_keys"), columns=k, integer=True),
        Statistic("top_k_mass", request, first("top_mass"), columns=k),
    )


def first(size: int) -> Statistic:
    """Mass on the prompt's first `size` tokens; `first(1)` is the mass on position 0."""
    return Statistic(f"first_{size}", StatisticsRequest(first=(size,)), _entry("first", "first", size))


def recent(size: int) -> Statistic:
    """Mass on the `size` most recent keys, the query's own included."""
    return Statistic(f"recent_{size}", StatisticsRequest(recent=(size,)), _entry("recent", "recent", size))


def offset(distance: int) -> Statistic:
    """Mass on the key at a fixed offset: -1 is the previous token, 0 the token itself."""
    request = StatisticsRequest(offsets=(distance,))
    return Statistic(f"offset_{distance}", request, _entry("offsets", "offsets", distance))


def mass(name: str, keys: Bool[Tensor, "prompt key *column"] | Float[Tensor, "prompt key *column"]) -> Statistic:
    """Mass on labelled keys: a boolean mask, or up to 64 columns of key weights (one result each)."""
    if keys.ndim not in (2, 3):
        raise RequestError(f"mass({name!r}): keys of shape {tuple(keys.shape)}; give [prompt, key] or [..., column].")
    features = keys[..., None] if keys.ndim == 2 else keys
    if features.is_floating_point() and not features.isfinite().all():
        raise RequestError(f"mass({name!r}): some weights are NaN or infinite; give finite ones, 0 for keys left out.")

    def read(measured: Measured) -> Tensor:
        assert measured.features is not None
        return measured.features[..., 0] if keys.ndim == 2 else measured.features

    columns = None if keys.ndim == 2 else keys.shape[-1]
    return Statistic(name, StatisticsRequest(), read, columns=columns, key_features=features.float())


def at_keys(name: str, keys: Int[Tensor, "prompt query *slot"]) -> Statistic:
    """Mass on given keys of each query (columns of the batch, -1 for none); several slots are summed.

    A key that the query cannot see has no mass.
    """
    if keys.ndim not in (2, 3):
        raise RequestError(f"at_keys({name!r}): keys of shape {tuple(keys.shape)}; give [prompt, query(, slot)].")
    slots = keys[..., None] if keys.ndim == 2 else keys

    def read(measured: Measured) -> Tensor:
        assert measured.at_keys is not None
        return measured.at_keys.sum(-1)

    return Statistic(name, StatisticsRequest(), read, query_keys=slots.long())


def distance() -> Statistic:
    """Mean distance from the query to what it attends to (tokens)."""
    return Statistic("distance", StatisticsRequest(distance=True), _field("distance"))


def spread() -> Statistic:
    """Standard deviation of the distance from the query to what it attends to (tokens), over real keys."""
    return Statistic("spread", StatisticsRequest(spread=True), _field("spread"))


def sink_mass() -> Statistic:
    """Probability that goes to a learned sink logit; zero where the model has none."""
    return Statistic("sink_mass", StatisticsRequest(sink_mass=True), _field("sink_mass"))


def column_sum() -> Statistic:
    """Sum over queries of the attention that each key receives."""
    return Statistic("column_sum", StatisticsRequest(column_sum=True), _field("column_sum"), axis="key")


def column_mean() -> Statistic:
    """Mean attention that each key receives, over the queries that can see it."""

    def read(measured: Measured) -> Tensor:
        assert measured.found.column_sum is not None
        seen = measured.call.geometry.visible_count(measured.call.q.device)
        mean: Tensor = measured.found.column_sum / seen.clamp(min=1)[:, None]
        return mean

    return Statistic("column_mean", StatisticsRequest(column_sum=True), read, axis="key")


def column_last(size: int) -> Statistic:
    """Sum over the last `size` queries of the attention that each key receives."""
    read = _entry("column_last", "column_last", size, dim=2)
    return Statistic(f"column_last_{size}", StatisticsRequest(column_last=(size,)), read, axis="key")


def column_max() -> Statistic:
    """The largest probability that any query gives to each key."""
    return Statistic("column_max", StatisticsRequest(column_max=True), _field("column_max"), axis="key")


def value_norm() -> Statistic:
    """Euclidean norm of each key's value vector, as the query head sees it."""

    def read(measured: Measured) -> Tensor:
        call = measured.call
        group = call.q.shape[1] // call.v.shape[1]
        return _norm(call.v.float()).repeat_interleave(group, dim=1)

    return Statistic("value_norm", StatisticsRequest(), read, axis="key")


def output_norm() -> Statistic:
    """Euclidean norm of the head's output z (before W_O)."""

    def read(measured: Measured) -> Tensor:
        assert measured.found.output is not None
        return _norm(measured.found.output)

    return Statistic("output_norm", StatisticsRequest(output=True), read)


def result_norm() -> Statistic:
    """Euclidean norm of z W_O: what the head writes into the residual stream."""

    def read(measured: Measured) -> Tensor:
        assert measured.found.output is not None and measured.result_factor is not None
        result = torch.einsum("b h q d, h d e -> b h q e", measured.found.output, measured.result_factor)
        return _norm(result)

    return Statistic("result_norm", StatisticsRequest(output=True), read, needs_result_factor=True)
