"""What to measure of every head while the model runs: functionals of attention, asked for by name.

Each function returns a `Statistic` for `Model.trace(statistics=[...])`. Row statistics come back as
`[prompt, layer, head, query]`, column statistics as `[prompt, layer, head, key]`, diagonals as `[prompt, layer, head,
distance]`, block maps as `[prompt, layer, head, query_block, key_block]`; those with several columns have one more
axis. Destination = query = row, source = key = column. All are exact, need no N x N array, and
accumulate in float32 whatever the model's dtype. Keys are named by their column in the batch, padding counted,
so that under left padding the first token of a prompt is not key 0. Distances and blocks count from the prompt's own
first token on either side of padding, and are NaN where a prompt is too short to have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels import StatisticsRequest
from workbench.tracing.measured import Measured as Measured
from workbench.tracing.measured import OfValues, entry, field
from workbench.tracing.measured import Statistic as Statistic
from workbench.tracing.measured import Statistics as Statistics


def _norm(vectors: Float[Tensor, "*place dim"]) -> Float[Tensor, "*place"]:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norm


def lse() -> Statistic:
    """Log-sum-exp of the row's logits (nats), a learned sink included."""
    return Statistic("lse", StatisticsRequest(lse=True), field("lse"))


def entropy() -> Statistic:
    """Entropy of the row over real keys (nats)."""
    return Statistic("entropy", StatisticsRequest(entropy=True), field("entropy"))


def max_prob() -> Statistic:
    """The row's largest probability."""
    return Statistic("max_prob", StatisticsRequest(max_prob=True), field("max_prob"))


def max_logit() -> Statistic:
    """The row's largest logit (scaled, soft-capped; nats)."""
    return Statistic("max_logit", StatisticsRequest(max_logit=True), field("max_logit"))


def mean_logit() -> Statistic:
    """Mean logit over the keys that the query sees (nats)."""
    return Statistic("mean_logit", StatisticsRequest(mean_logit=True), field("mean_logit"))


def first_logit() -> Statistic:
    """Logit of the first key that the query sees (nats); less `mean_logit`, it is the sink logit gap."""
    return Statistic("first_logit", StatisticsRequest(first_logit=True), field("first_logit"))


def above(probability: float) -> Statistic:
    """How many keys have more than a probability."""
    request = StatisticsRequest(above=(probability,))
    return Statistic(f"above_{probability:g}", request, entry("above", "above", probability))


def argmax() -> Statistic:
    """A key with the row's largest probability, as a column of the batch (-1 at padding)."""
    return Statistic("argmax", StatisticsRequest(argmax=True), field("argmax"), integer=True)


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
    return Statistic(f"first_{size}", StatisticsRequest(first=(size,)), entry("first", "first", size))


def recent(size: int) -> Statistic:
    """Mass on the `size` most recent keys, the query's own included."""
    return Statistic(f"recent_{size}", StatisticsRequest(recent=(size,)), entry("recent", "recent", size))


def offset(distance: int) -> Statistic:
    """Mass on the key at a fixed offset: -1 is the previous token, 0 the token itself."""
    request = StatisticsRequest(offsets=(distance,))
    return Statistic(f"offset_{distance}", request, entry("offsets", "offsets", distance))


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
    return Statistic("distance", StatisticsRequest(distance=True), field("distance"))


def spread() -> Statistic:
    """Standard deviation of the distance from the query to what it attends to (tokens), over real keys."""
    return Statistic("spread", StatisticsRequest(spread=True), field("spread"))


def sink_mass() -> Statistic:
    """Probability that goes to a learned sink logit; zero where the model has none."""
    return Statistic("sink_mass", StatisticsRequest(sink_mass=True), field("sink_mass"))


def column_sum() -> Statistic:
    """Sum over queries of the attention that each key receives."""
    return Statistic("column_sum", StatisticsRequest(column_sum=True), field("column_sum"), axis="key")


def column_mean() -> Statistic:
    """Mean attention that each key receives, over the queries that can see it."""

    def read(measured: Measured) -> Tensor:
        assert measured.found.column_sum is not None
        seen = measured.geometry.visible_count(measured.call.q.device)
        mean: Tensor = measured.found.column_sum / seen.clamp(min=1)[:, None]
        return mean

    return Statistic("column_mean", StatisticsRequest(column_sum=True), read, axis="key")


def column_last(size: int) -> Statistic:
    """Sum over the last `size` queries of the attention that each key receives."""
    read = entry("column_last", "column_last", size, dim=2)
    return Statistic(f"column_last_{size}", StatisticsRequest(column_last=(size,)), read, axis="key")


def column_max() -> Statistic:
    """The largest probability that any query gives to each key."""
    return Statistic("column_max", StatisticsRequest(column_max=True), field("column_max"), axis="key")


def column_above(probability: float) -> Statistic:
    """The first query that gives each key more than a probability, as a column of the batch (-1 where none does)."""
    request = StatisticsRequest(column_above=(probability,))
    read = entry("column_above", "column_above", probability, dim=2)
    return Statistic(f"column_above_{probability:g}", request, read, axis="key", integer=True)


def column_weighted(
    name: str, weights: Bool[Tensor, "prompt query *column"] | Float[Tensor, "prompt query *column"]
) -> Statistic:
    """Weighted sum over queries of the attention that each key receives: a span of queries as a boolean mask, or
    several columns of weights (one result each)."""
    if weights.ndim not in (2, 3):
        raise RequestError(
            f"column_weighted({name!r}): weights of shape {tuple(weights.shape)}; give [prompt, query] or "
            "[prompt, query, column]."
        )
    given = (weights[..., None] if weights.ndim == 2 else weights).float()
    if not given.isfinite().all():
        raise RequestError(f"column_weighted({name!r}): some weights are NaN or infinite; give 0 to leave a query out.")

    def read(measured: Measured) -> Tensor:
        assert measured.weighted is not None
        return measured.weighted[..., 0] if weights.ndim == 2 else measured.weighted

    columns = None if weights.ndim == 2 else weights.shape[-1]
    return Statistic(name, StatisticsRequest(), read, axis="key", columns=columns, query_weights=given)


def diagonal() -> Statistic:
    """Sum over queries of the mass at each distance back from the query (0 is the token itself).

    Axis "distance"; NaN from a prompt's length on. Beyond a window it is zero.
    """
    return Statistic("diagonal", StatisticsRequest(diagonal=True), field("diagonal"), axis="distance")


def diagonal_last(size: int) -> Statistic:
    """The same over a prompt's last `size` queries; one size a trace."""
    if size < 1:
        raise RequestError(f"diagonal_last({size}): ask for 1 query or more.")
    request = StatisticsRequest(diagonal_last=size)
    return Statistic(f"diagonal_last_{size}", request, field("diagonal_last"), axis="distance")


def block_sum(size: int) -> Statistic:
    """Attention summed over blocks of `size` x `size` entries (a power of two, 16 to 1024; one size a trace).

    Axes "query_block" and "key_block", counted from the prompt's first token: zero above the diagonal, NaN beyond the
    prompt. Left padding of another size than whole blocks costs a pass of its own.
    """
    return _blocks("block_sum", size)


def block_max(size: int) -> Statistic:
    """The largest probability in each block of `size` x `size` entries; blocks as in `block_sum`."""
    return _blocks("block_max", size)


def _blocks(name: str, size: int) -> Statistic:
    if size < 1:
        raise RequestError(f"{name}({size}): a block has 16 tokens or more.")
    return Statistic(f"{name}_{size}", StatisticsRequest(block=size), field(name), axis="block")


def value_mass(name: str, of: OfValues | Sequence[Float[Tensor, "head dim"]] | Tensor | None = None) -> Statistic:
    """Attention-weighted sum of a number that each value vector has; by default its Euclidean norm.

    `of` is a function from value vectors `[prompt, kv_head, key, dim]` (float32) to `[prompt, kv_head, key]`, or one
    direction per layer and query head, `[layer, head, dim]`: then it is the sum of v.u, which is z.u (and, in half
    precision, as exact as z is).
    """
    if of is None:
        of = _norm
    if not callable(of):
        return _along(name, list(of))

    def read(measured: Measured) -> Tensor:
        assert measured.of_values is not None
        return measured.of_values[..., 0]

    return Statistic(name, StatisticsRequest(), read, of_values=of)


def _along(name: str, directions: Sequence[Tensor]) -> Statistic:
    def read(measured: Measured) -> Tensor:
        z, layer = measured.found.output, measured.call.layer
        assert z is not None
        shape = (z.shape[1], z.shape[-1])
        if layer >= len(directions) or tuple(directions[layer].shape) != shape:
            got = tuple(directions[layer].shape) if layer < len(directions) else "none"
            raise RequestError(f"{name!r}: directions of layer {layer} are {got}; give [head, dim], {shape}.")
        return torch.einsum("b h q d, h d -> b h q", z.float(), directions[layer].to(z.device, torch.float32))

    return Statistic(name, StatisticsRequest(output=True), read)


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
