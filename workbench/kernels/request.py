"""What is wanted of one attention call, and what comes back.

A `StatisticsRequest` names functionals of the attention matrix `A[h, i, j] = softmax_j(s q_i . k_j)`; an
implementation computes those and nothing else, and returns them in an `AttentionStatistics`. Neither knows a
model: tensors are bare, positions are indices into the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import RequestError

MAX_TOP_K = 64
MAX_FEATURES = 64
MAX_OFFSETS = 32
# Numbers of a head that the Triton kernels take at most.
WIDEST = 256
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
# From this probability on, 1 - A is not taken by subtraction.
HEAVY = 0.9


def is_whole(value: object) -> bool:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class StatisticsRequest:
    """The functionals of attention that are wanted; all are off by default.

    Per query (row): `output`, `lse` (natural log-sum-exp of the scaled, soft-capped logits, learned sink
    included), `max_logit` and `max_prob`, `argmax` (a key that attains it), `top_k` keys with their probabilities,
    `entropy` (nats, over real keys: a learned sink's own term is left out; a sum in float32, so that of a peaked row
    keeps an absolute error of a few 1e-7, not a relative one), `distance` (mean of i - j) and `spread`
    (standard deviation of the distance, over real keys), `mean_logit` over visible keys and `first_logit` of the
    first of them, mass on the `first` s and the `recent` w visible keys, mass at `offsets` (0 = the query itself,
    -1 = the previous key), how many keys are `above` each probability, `sink_mass` on a learned sink.

    Per key (column): `column_sum`, `column_max`, `column_last`, the sum over the last w queries, and
    `column_above`, the first query that gives the key more than each probability.

    Pooled: `diagonal`, the sum over queries of the mass at each distance i - j, and `diagonal_last`, that over the
    last w queries; `block`, the sum and the maximum over blocks of b x b entries (b a power of two, 16 to 1024).
    """

    output: bool = False
    lse: bool = False
    max_logit: bool = False
    max_prob: bool = False
    argmax: bool = False
    top_k: int = 0
    entropy: bool = False
    distance: bool = False
    spread: bool = False
    mean_logit: bool = False
    first_logit: bool = False
    first: tuple[int, ...] = ()
    recent: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    above: tuple[float, ...] = ()
    sink_mass: bool = False
    column_sum: bool = False
    column_max: bool = False
    column_last: tuple[int, ...] = ()
    column_above: tuple[float, ...] = ()
    diagonal: bool = False
    diagonal_last: int = 0
    block: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "diagonal_last", "block"):
            if not is_whole(getattr(self, name)):
                raise RequestError(f"{name} = {getattr(self, name)!r}: give a whole number.")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise RequestError(f"top_k = {self.top_k}: choose 0 to {MAX_TOP_K}.")
        if len(self.offsets) > MAX_OFFSETS:
            raise RequestError(f"{len(self.offsets)} offsets were asked for; at most {MAX_OFFSETS} fit one pass.")
        for offset in self.offsets:
            if not is_whole(offset):
                raise RequestError(f"Offset {offset!r}: give a whole number of tokens, 0 or below.")
            if offset > 0:
                raise RequestError(f"Offset {offset} looks ahead of the query; causal attention has offsets <= 0.")
        for name in ("first", "recent", "column_last"):
            for size in getattr(self, name):
                if not is_whole(size):
                    raise RequestError(f"{name} of {size!r} tokens: give a whole number.")
                if size < 1:
                    raise RequestError(f"{name} of {size} tokens is empty; ask for 1 or more.")
        for name in ("above", "column_above"):
            for level in getattr(self, name):
                if not 0 < level < 1:
                    raise RequestError(f"{name} {level}: a probability between 0 and 1 is needed.")
        if self.block and (self.block not in BLOCKS):
            raise RequestError(f"Blocks of {self.block}: choose one of {', '.join(map(str, BLOCKS))}.")
        if self.diagonal_last < 0:
            raise RequestError(f"diagonal_last = {self.diagonal_last}: a number of queries is needed.")

    def __or__(self, other: StatisticsRequest) -> StatisticsRequest:
        """The union: one pass then serves both."""
        merged: dict[str, object] = {}
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            if isinstance(a, tuple):
                merged[field.name] = tuple(dict.fromkeys(a + b))
            elif field.name in ("block", "diagonal_last") and a and b and a != b:
                raise RequestError(f"{field.name} of {a} and of {b}: one pass serves one size; ask in two calls.")
            else:
                merged[field.name] = max(a, b)
        return StatisticsRequest(**merged)  # type: ignore[arg-type]

    @property
    def needs_maxima(self) -> bool:
        """Whether a max-type functional is asked for, which no linear identity reaches."""
        return bool(
            self.max_logit or self.max_prob or self.argmax or self.top_k or self.column_max or self.above
            or self.column_above or self.diagonal or self.diagonal_last or self.block
        )  # fmt: skip

    @property
    def needs_columns(self) -> bool:
        return bool(self.column_sum or self.column_max or self.column_last or self.column_above)

    @property
    def needs_rows(self) -> bool:
        """Whether a sweep over whole rows is asked for, beside what follows from a known log-sum-exp."""
        return bool(
            self.output or self.lse or self.max_logit or self.max_prob or self.argmax or self.entropy or self.distance
            or self.spread or self.mean_logit or self.sink_mass
        )  # fmt: skip

    @property
    def only_output(self) -> bool:
        return self == StatisticsRequest(output=True)


@dataclass(frozen=True)
class AttentionStatistics:
    """The functionals that were asked for, float32 (keys: int64); the others are None.

    Rows that see no key are zero (keys: -1), never NaN. Key indices count from the first entry of `k`.

    A NaN or infinity in a query, or in a key that it sees, makes the row's scalars, output, top masses and counts NaN
    (keys: -1), and NaN what is summed over such rows; maxima over rows may leave them out. One in a value reaches all
    rows that see it and may reach others of the prompt (a product with zero), as in any attention; the identities'
    entropy takes keys as values. In padding, they reach no real row. Hopper's own kernels report a row of NaN logits as
    one that sees nothing (log-sum-exp 0, key -1), though with an output of NaN.
    """

    output: Float[Tensor, "batch head query value_dim"] | None = None
    lse: Float[Tensor, "batch head query"] | None = None
    max_logit: Float[Tensor, "batch head query"] | None = None
    max_prob: Float[Tensor, "batch head query"] | None = None
    argmax: Int[Tensor, "batch head query"] | None = None
    top_keys: Int[Tensor, "batch head query rank"] | None = None
    top_mass: Float[Tensor, "batch head query rank"] | None = None
    entropy: Float[Tensor, "batch head query"] | None = None
    distance: Float[Tensor, "batch head query"] | None = None
    spread: Float[Tensor, "batch head query"] | None = None
    mean_logit: Float[Tensor, "batch head query"] | None = None
    first_logit: Float[Tensor, "batch head query"] | None = None
    first: Float[Tensor, "batch head query leading"] | None = None
    recent: Float[Tensor, "batch head query trailing"] | None = None
    offsets: Float[Tensor, "batch head query offset"] | None = None
    above: Float[Tensor, "batch head query level"] | None = None
    features: Float[Tensor, "batch head query feature"] | None = None
    value_features: Float[Tensor, "batch head query value_feature"] | None = None
    at_keys: Float[Tensor, "batch head query slot"] | None = None
    sink_mass: Float[Tensor, "batch head query"] | None = None
    column_sum: Float[Tensor, "batch head key"] | None = None
    column_max: Float[Tensor, "batch head key"] | None = None
    column_last: Float[Tensor, "batch head rows key"] | None = None
    column_weighted: Float[Tensor, "batch head weighting key"] | None = None
    column_above: Int[Tensor, "batch head column_level key"] | None = None
    diagonal: Float[Tensor, "batch head distance"] | None = None
    diagonal_last: Float[Tensor, "batch head distance"] | None = None
    block_sum: Float[Tensor, "batch head block_row block_column"] | None = None
    block_max: Float[Tensor, "batch head block_row block_column"] | None = None
