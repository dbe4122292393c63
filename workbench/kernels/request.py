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


@dataclass(frozen=True)
class StatisticsRequest:
    """The functionals of attention that are wanted; all are off by default.

    Per query (row): `output`, `lse` (natural log-sum-exp of the scaled, soft-capped logits, learned sink
    included), `max_prob`, `argmax` (a key that attains it), `top_k` keys with their probabilities, `entropy`
    (nats, over real keys: a learned sink's own term is left out), `distance` (mean of i - j), mass on the
    `first` s and the `recent` w visible keys, mass at `offsets` (0 = the query itself, -1 = the previous key),
    `sink_mass` on a learned sink. Per key (column): `column_sum`, `column_max`, and `column_last`, the sum over
    the last w queries.
    """

    output: bool = False
    lse: bool = False
    max_prob: bool = False
    argmax: bool = False
    top_k: int = 0
    entropy: bool = False
    distance: bool = False
    first: tuple[int, ...] = ()
    recent: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    sink_mass: bool = False
    column_sum: bool = False
    column_max: bool = False
    column_last: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise RequestError(f"top_k = {self.top_k}: choose 0 to {MAX_TOP_K}.")
        if len(self.offsets) > MAX_OFFSETS:
            raise RequestError(f"{len(self.offsets)} offsets were asked for; at most {MAX_OFFSETS} fit one pass.")
        for offset in self.offsets:
            if offset > 0:
                raise RequestError(f"Offset {offset} looks ahead of the query; causal attention has offsets <= 0.")
        for name in ("first", "recent", "column_last"):
            for size in getattr(self, name):
                if size < 1:
                    raise RequestError(f"{name} of {size} tokens is empty; ask for 1 or more.")

    def __or__(self, other: StatisticsRequest) -> StatisticsRequest:
        """The union: one pass then serves both."""
        merged: dict[str, object] = {}
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            if isinstance(a, tuple):
                merged[field.name] = tuple(dict.fromkeys(a + b))
            else:
                merged[field.name] = max(a, b)
        return StatisticsRequest(**merged)  # type: ignore[arg-type]

    @property
    def needs_maxima(self) -> bool:
        """Whether a max-type functional is asked for, which no linear identity reaches."""
        return bool(self.max_prob or self.argmax or self.top_k or self.column_max)

    @property
    def needs_columns(self) -> bool:
        return bool(self.column_sum or self.column_max or self.column_last)

    @property
    def only_output(self) -> bool:
        return self == StatisticsRequest(output=True)


@dataclass(frozen=True)
class AttentionStatistics:
    """The functionals that were asked for, float32 (keys: int64); the others are None.

    Rows that see no key are zero (keys: -1), never NaN. Key indices count from the first entry of `k`.
    """

    output: Float[Tensor, "batch head query value_dim"] | None = None
    lse: Float[Tensor, "batch head query"] | None = None
    max_prob: Float[Tensor, "batch head query"] | None = None
    argmax: Int[Tensor, "batch head query"] | None = None
    top_keys: Int[Tensor, "batch head query rank"] | None = None
    top_mass: Float[Tensor, "batch head query rank"] | None = None
    entropy: Float[Tensor, "batch head query"] | None = None
    distance: Float[Tensor, "batch head query"] | None = None
    first: Float[Tensor, "batch head query leading"] | None = None
    recent: Float[Tensor, "batch head query trailing"] | None = None
    offsets: Float[Tensor, "batch head query offset"] | None = None
    features: Float[Tensor, "batch head query feature"] | None = None
    at_keys: Float[Tensor, "batch head query slot"] | None = None
    sink_mass: Float[Tensor, "batch head query"] | None = None
    column_sum: Float[Tensor, "batch head key"] | None = None
    column_max: Float[Tensor, "batch head key"] | None = None
    column_last: Float[Tensor, "batch head rows key"] | None = None
