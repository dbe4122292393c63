"""The predicted peak of a trace: the model's own layers, attention, and what is stored, in the order of the pass.

Each place of the pass holds what the model has alive there (`BodyCost`, measured), what has been stored until
then, and what our own code takes at that place, which follows from shapes as listed in the functions below.
Results are kept in the computer's memory: on another device they do not count towards its peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.kernels import Geometry, StatisticsRequest
from workbench.kernels.blocks import TilePlan, plan_tiles
from workbench.kernels.dispatch import MASK, triton_takes
from workbench.kernels.identities import MOST_PAIRS, is_exact, is_faster, is_plain, reached, remainder
from workbench.kernels.tile import GROUP, Span
from workbench.models import Attachment, Batch, LayerSpec
from workbench.models.memory import BodyCost, Mark, Prediction
from workbench.tracing.plan import Plan
from workbench.tracing.sites import Site, site_shape
from workbench.tracing.trace import LOSS_ROWS

FLOAT = 4


@dataclass
class Forecast:
    """What is stored so far, and the most that was ever held."""

    on_device: bool
    peak: int = 0
    place: str = "nowhere"
    stored: int = 0
    carried: int = 0
    _kept: set[object] = field(default_factory=set)

    def reach(self, held: float, place: str) -> None:
        """`held` bytes besides what is stored."""
        total = int(held) + self.carried + (self.stored if self.on_device else 0)
        if total > self.peak:
            self.peak, self.place = total, place

    def keep(self, what: object, size: int) -> None:
        """Store an array from here on; each is made whole when its first piece comes in."""
        if what not in self._kept:
            self._kept.add(what)
            self.stored += size


@dataclass(frozen=True)
class Piece:
    """Prompts that run together, and the columns of them whose logits are computed.

    `cached` is the length of a prompt whose last chunk this is; its keys and values are held from the start.
    """

    batch: Batch
    kept: int
    cached: int | None = None

    @property
    def prompts(self) -> int:
        return len(self.batch)

    @property
    def tokens(self) -> int:
        return int(self.batch.ids.shape[1])

    @property
    def keys(self) -> int:
        """Keys that the last query sees."""
        return self.tokens if self.cached is None else self.cached

    @property
    def shape(self) -> tuple[int, int, bool]:
        return self.prompts, self.tokens, self.batch.padded


@dataclass
class Preflight:
    """One trace: the model, the plan, and the whole batch that results are stored for."""

    attachment: Attachment
    cost: BodyCost
    plan: Plan
    batch: Batch
    wanted: Int[Tensor, "prompt kept"] | None
    loss: bool

    def __post_init__(self) -> None:
        self.spec = self.attachment.spec
        self.element = torch.finfo(self.attachment.dtype).bits // 8
        self.device = self.attachment.device.type
        self.forecast = Forecast(self.device == "cpu")

    def predict(self, pieces: Sequence[Piece]) -> Prediction:
        """The first piece, before which nothing is stored, and the largest after it."""
        later = pieces[1:]
        largest = [max(later, key=lambda piece: piece.prompts * piece.keys)] if later else []
        for piece in [*pieces[:1], *largest]:
            self.forecast.carried = self._carried(piece)
            for mark in self.cost.marks:
                self._pass(mark, piece)
        return Prediction(self.forecast.peak, self.forecast.stored, self.forecast.place)

    def _carried(self, piece: Piece) -> int:
        """What is held from chunk to chunk: keys and values, those of one layer twice while they grow, and what is
        summed over queries."""
        if piece.cached is None:
            return 0
        request, weights = self.plan.request, self._columns("query_weights")
        cache = [2 * layer.kv_heads * layer.head_dim * piece.keys * self.element for layer in self.spec.layers]
        sums = piece.keys * (_summed(request) + weights) + _maps(request, piece.keys, piece.keys)
        return sum(cache) + max(cache) + sum(layer.heads for layer in self.spec.layers) * sums * FLOAT

    def _pass(self, mark: Mark, piece: Piece) -> None:
        alive, where = mark.alive(*piece.shape), f"{mark.place} of layer {mark.layer}"
        if mark.place == "end":
            self._logits(piece)
            return
        self.forecast.reach(mark.peak(*piece.shape), where)
        if mark.place == "logits":
            rows = piece.prompts * piece.kept
            # The rows that are kept are copied out of the residual stream.
            hidden = rows * self.spec.d_model * self.element
            self.forecast.reach(alive + hidden + rows * self.cost.logit_row, "the logits")
        elif mark.place == "attention":
            self._attention(mark.layer, alive, piece)
        else:
            self._residual(mark, alive, piece)

    def _residual(self, mark: Mark, alive: int, piece: Piece) -> None:
        layer, one = mark.layer, piece.prompts * piece.tokens * self.spec.d_model * self.element
        for site in self.plan.captured(layer):
            if site == mark.place:
                self._store(site, layer)
            elif site == "resid_mid" and mark.place == "attn_out":
                # A sum of its own: the model adds in place, or later.
                self._store(site, layer)
                self.forecast.reach(alive + one, f"resid_mid of layer {layer}")
        if mark.place == "attn_out" and (patches := self.plan.patches_at(layer, "result")):
            # As it was, and the difference; as it is patched, too, unless that is the given value itself.
            copies = 3 if any(patch.heads or patch.positions is not None for patch in patches) else 2
            result = prod(site_shape("result", self.spec, layer, piece.prompts, piece.tokens)) * self.element
            modules, shape = self.attachment.layers[layer], self.spec.layers[layer]
            if modules.attention_write is not modules.projection:
                # A norm comes after: inside the projection its input, its output, z and their change are still held.
                alive += piece.prompts * piece.tokens * shape.heads * shape.head_dim * self.element + 3 * one
            self.forecast.reach(alive + copies * result, f"the patched result of layer {layer}")

    def _store(self, site: Site, layer: int) -> None:
        shape = site_shape(site, self.spec, layer, *self.batch.ids.shape)
        # Patterns are float32 in any model.
        self.forecast.keep((site, layer), prod(shape) * (FLOAT if site == "pattern" else self.element))

    def _attention(self, layer: int, alive: int, piece: Piece) -> None:
        plan, shape, reach = self.plan, self.spec.layers[layer], self.forecast.reach
        where = f"attention of layer {layer}"
        captured = plan.captured(layer)
        for site in ("q", "k", "v"):
            if site in captured:
                self._store(site, layer)
        rows = piece.prompts * shape.heads * piece.tokens
        pattern = rows * piece.tokens * FLOAT
        if "pattern" in captured or plan.patches_at(layer, "pattern"):
            # Three while it is made: logits, their exponential, and that with its masked part set to zero.
            keys = 2 * rows * shape.head_dim * FLOAT
            reach(alive + 3 * pattern + keys, f"the pattern of layer {layer}")
        if "pattern" in captured:
            self._store("pattern", layer)
            reach(alive + pattern, f"the pattern of layer {layer}")
        if plan.patches_at(layer, "pattern"):
            alive += pattern
        z = rows * shape.head_dim * self.element
        if plan.statistics:
            reach(alive + self._statistics(piece, layer), where)
            self._store_statistics()
            reach(alive + self._readings(piece, layer), where)
        else:
            reach(alive + self._plain(piece, shape), where)
        if "z" in captured:
            self._store("z", layer)
        if "result" in captured and not plan.patches_at(layer, "result"):
            result = prod(site_shape("result", self.spec, layer, piece.prompts, piece.tokens)) * self.element
            self._store("result", layer)
            reach(alive + z + result, f"the result of layer {layer}")

    def _store_statistics(self) -> None:
        heads = max(layer.heads for layer in self.spec.layers)
        for statistic in self.plan.statistics:
            entries = len(self.batch) * self.spec.n_layers * heads * prod(statistic.shape(self.batch.ids.shape[1]))
            size = entries * (statistic.columns or 1) * (8 if statistic.integer else FLOAT)
            self.forecast.keep(statistic.name, size)

    def _columns(self, name: str) -> int:
        """How many columns of one kind all statistics together give."""
        given = [getattr(statistic, name) for statistic in self.plan.statistics]
        return sum(int(part.shape[-1]) for part in given if part is not None)

    @property
    def _functions(self) -> int:
        """Functions of the values."""
        return sum(statistic.of_values is not None for statistic in self.plan.statistics)

    def _results(self, piece: Piece, shape: LayerSpec) -> int:
        """The kernel's results of one layer, z among them, in float32."""
        request = self.plan.request
        given, weights = self._columns("key_features") + self._columns("query_keys"), self._columns("query_weights")
        per_row = (
            sum([request.lse, request.max_prob, request.entropy, request.distance, request.sink_mass])
            + sum([request.max_logit, request.mean_logit, request.first_logit, request.spread]) + len(request.above)
            + 2 * request.argmax + 3 * request.top_k + len(request.first) + len(request.recent)
            + len(request.offsets) + given + self._functions
        )  # fmt: skip
        entries = piece.tokens * (per_row + shape.head_dim) + piece.keys * (_summed(request) + weights)
        entries += _maps(request, piece.tokens, piece.keys)
        return piece.prompts * shape.heads * entries * FLOAT

    def _statistics(self, piece: Piece, layer: int) -> int:
        """While the kernel runs: what it is given, its results, and its own work."""
        shape, tokens = self.spec.layers[layer], piece.prompts * piece.tokens
        keys, weights = piece.prompts * piece.keys, self._columns("query_weights")
        given = tokens * (weights * FLOAT + self._columns("query_keys") * 8)
        given += keys * self._columns("key_features") * FLOAT
        features = self._columns("key_features") + self._functions
        if self._functions:
            # One after the other, then side by side.
            given += keys * shape.kv_heads * 2 * self._functions * FLOAT
        request, first = self.plan.request, self.plan.request
        moved = 0
        if request.block and bool((piece.batch.starts % request.block != 0).any()):
            # Blocks in a pass of their own, from each prompt's first token.
            first = replace(request, block=0)
            moved = tokens * (shape.heads + 2 * shape.kv_heads) * shape.head_dim * self.element
            moved += self._work(piece, shape, StatisticsRequest(block=request.block), 0, 0)
        return given + self._results(piece, shape) + max(self._work(piece, shape, first, features, weights), moved)

    def _work(self, piece: Piece, shape: LayerSpec, request: StatisticsRequest, features: int, weights: int) -> int:
        """What one call of the kernel takes beside its inputs and results."""
        if self.device == "cuda" and triton_takes(shape.head_dim, self.attachment.dtype):
            return self._fused(piece, shape, request, features, weights)
        if (
            self.device == "cuda"
            and self._plain_call(piece, shape)
            and is_faster(request, self.attachment.dtype, weighted=weights > 0)
        ):
            return self._identities(piece, shape, request, features, weights)
        return _blocks(piece, shape, request, features, weights, self.element, self.device)

    def _plain_call(self, piece: Piece, shape: LayerSpec) -> bool:
        """Whether stock operators compute the layer's attention."""
        geometry = Geometry(piece.prompts, piece.tokens, piece.keys, True, _window(shape, piece))
        dtype = self.attachment.dtype
        return not shape.sinks and is_plain(geometry, dtype, self.device, softcap=shape.softcap, sinks=None)

    def _fused(self, piece: Piece, shape: LayerSpec, request: StatisticsRequest, features: int, weights: int) -> int:
        """Beside results: the log-sum-exp and what maxima are read from, lists of top-k as wide as a power of two,
        and functions of the key in two halves."""
        rows = piece.prompts * shape.heads * piece.tokens
        wide = 1 << (request.top_k - 1).bit_length() if request.top_k else 0
        stacked = 2 * (len(request.column_last) + weights + len(request.column_above))
        keys = piece.prompts * piece.keys
        return (rows * (4 + 3 * wide) + shape.heads * keys * stacked) * FLOAT + keys * features * 2 * self.element

    def _identities(
        self, piece: Piece, shape: LayerSpec, request: StatisticsRequest, features: int, weights: int
    ) -> int:
        """Keys and values repeated for all heads, an output, and three float32 products for the entropy; or the three
        gradients, their repeated inputs and weights, from which columns are read; or blocks, for the remainder."""
        dtype = self.attachment.dtype
        served = reached(request, dtype)
        output = piece.prompts * shape.heads * piece.tokens * shape.head_dim
        wide = served.distance or features > 0 or any(size > MOST_PAIRS for size in served.first)
        work = output * (3 * self.element + (4 + 3 * wide) * FLOAT)
        if served.needs_columns or (weights and is_exact(dtype)):
            work = max(work, output * (3 * self.element + 8 * FLOAT))
        left, blocked = remainder(request, served), 0 if is_exact(dtype) else features
        if left != StatisticsRequest() or not is_exact(dtype):
            # Its results, too, before the two halves are put together.
            blocks = _blocks(piece, shape, left, blocked, 0 if is_exact(dtype) else weights, self.element, self.device)
            work = max(work, blocks + self._results(piece, shape))
        return work

    def _readings(self, piece: Piece, layer: int) -> int:
        """While statistics are read off the results: some factor W_O, or make arrays of z's size."""
        shape, extra = self.spec.layers[layer], 0
        if any(statistic.needs_result_factor for statistic in self.plan.statistics):
            z = piece.prompts * shape.heads * piece.tokens * shape.head_dim
            weight = shape.heads * shape.head_dim * self.spec.d_model
            factor = shape.heads * shape.head_dim**2
            # The factored copy (of a float32 copy) with its factor, twice; then z in another order, and its product.
            copies = 1 if self.element == FLOAT else 2
            extra = max(copies * weight + 2 * factor, factor + 2 * z) * FLOAT
        return self._results(piece, shape) + extra

    def _plain(self, piece: Piece, shape: LayerSpec) -> int:
        """Attention without statistics: z, and the part that is being computed."""
        rows = piece.prompts * shape.heads * piece.tokens
        if shape.softcap is None and not shape.sinks and _window(shape, piece) is None:
            parts = 2 if piece.batch.padded else 1
            if self.device == "cuda" and self.element == FLOAT and shape.group > 1:
                # k and v, repeated for the backend that has no grouped heads.
                parts += 2
            # A chunk's rows against all keys, in parts: the mask, and that as numbers.
            masked = 0
            if piece.cached is not None and self.device != "cuda":
                masked = max(1, min(piece.tokens, MASK // piece.keys)) * piece.keys
            return rows * (parts * shape.head_dim * self.element + FLOAT) + masked * (1 + self.element)
        if self.device == "cuda" and triton_takes(shape.head_dim, self.attachment.dtype):
            # The log-sum-exp.
            work = rows * FLOAT
        else:
            work = _blocks(piece, shape, StatisticsRequest(output=True), 0, 0, self.element, self.device)
        return rows * shape.head_dim * FLOAT + work

    def _logits(self, piece: Piece) -> None:
        """After the pass: the rows that it computed, those that are kept, and the loss a few rows at a time."""
        vocabulary = self.spec.vocab_size
        logits = piece.prompts * piece.kept * vocabulary * self.element
        if self.wanted is not None:
            each = self.wanted.shape[1] * vocabulary
            # Each prompt's own rows, made float32 where they are not, and then stored.
            if self.element != FLOAT:
                self.forecast.reach(logits + piece.prompts * each * (self.element + FLOAT), "the logits")
            self.forecast.keep("logits", len(self.batch) * each * FLOAT)
            self.forecast.reach(logits + piece.prompts * each * FLOAT, "the logits")
        if self.loss:
            # In float32, and their log-probabilities.
            copies = FLOAT if self.element == FLOAT else 2 * FLOAT
            chunk = min(piece.tokens, LOSS_ROWS) * vocabulary * copies
            self.forecast.reach(logits + chunk, "the loss")


def _window(shape: LayerSpec, piece: Piece) -> int | None:
    return shape.window if shape.window is not None and shape.window < piece.keys else None


def _summed(request: StatisticsRequest) -> int:
    """Numbers for each key or distance, the query that is the first above a probability taking two."""
    sums = request.column_sum + request.column_max + len(request.column_last) + 2 * len(request.column_above)
    return sums + request.diagonal + bool(request.diagonal_last)


def _maps(request: StatisticsRequest, queries: int, keys: int) -> int:
    """Entries of the two block maps."""
    return 2 * -(-queries // request.block) * -(-keys // request.block) if request.block else 0


def _copied(request: StatisticsRequest, tiles: TilePlan, queries: int, keys: int, window: int | None) -> int:
    """Copies of one block, as wide as the keys it sees: turned and then skewed for diagonals, cut to the map for block
    sums, compared and counted for the first query above a probability."""
    firsts = range(0, queries, tiles.rows)
    spans = (Span.of(first, min(first + tiles.rows, queries), queries, keys, True, window).columns for first in firsts)
    width = max(columns.stop - columns.start for columns in spans)
    block = tiles.elements // tiles.width * width
    diagonal = request.diagonal or request.diagonal_last > 0
    skewed = 2 * block + block // width * tiles.rows if diagonal else 0
    pooled = block + 2 * block // request.block if request.block else 0
    compared = block + block // 4 if request.column_above else 0
    return max(skewed, pooled, compared) * FLOAT


def _blocks(
    piece: Piece, shape: LayerSpec, request: StatisticsRequest, features: int, weights: int, element: int, device: str
) -> int:
    """The work of `kernels.blocks`, for the largest group of prompts of one length.

    Keys are copied to whole groups of 64, values and features side by side, column results once for each part;
    then, for each worker, two block buffers and, of one tile at a time, its scaled queries (twice), its product
    with the values, or the groups of keys that maxima are searched in.
    """
    batch, most = piece.batch, 0
    start, end = (batch.starts, batch.starts + batch.lengths) if batch.padded else (None, None)
    for prompts, rows, columns in Geometry(len(batch), piece.tokens, piece.keys, True, None, start, end).slices():
        count, queries, keys = prompts.stop - prompts.start, rows.stop - rows.start, columns.stop - columns.start
        window = shape.window if shape.window is not None and shape.window < keys else None
        q_shape = torch.Size([count, shape.heads, queries, shape.head_dim])
        k_shape = torch.Size([count, shape.kv_heads, keys, shape.head_dim])
        tiles = plan_tiles(q_shape, k_shape, window, device)
        padded, lanes = -(-keys // GROUP) * GROUP, count * shape.kv_heads
        width = shape.head_dim + features
        sums = keys * (_summed(request) + weights) + _maps(request, queries, keys)
        shares = shape.group * sums * (tiles.parts - 1)
        copies = lanes * (padded * (shape.head_dim + width) + shares) * FLOAT
        # While values and features are put side by side, and in half precision made float32.
        joining = lanes * keys * (width + (shape.head_dim if element < FLOAT else 0)) * FLOAT
        # A narrow block is searched as a whole.
        few = request.top_k > 0 and tiles.width // GROUP < 2 * request.top_k
        searched = 0 if few else GROUP * max(request.top_k, int(request.argmax))
        tile = tiles.elements // tiles.width * max(2 * shape.head_dim, width, searched) * FLOAT
        tile = max(tile, _copied(request, tiles, queries, keys, window))
        most = max(most, copies + max(joining, tiles.workers * (2 * tiles.elements * FLOAT + tile)))
    return most
