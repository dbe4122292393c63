"""Attention patterns of any length on disk: what a viewer needs to show any part of N x N without ever making it.

Kept of a head are post-rotary q and k, the rows' log-sum-exp, and a pyramid of pooled blocks: mean and maximum over
cells of 32 x 32 entries (larger for more than 131,072 tokens), 64 x 64 and so on.  A view whose cells are that large
reads the pyramid; a finer one is computed again, exactly, from q, k and the log-sum-exp.  Everything is mapped from
the disk, so that a server holds no more than what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from workbench.errors import RequestError, RunCorrupt
from workbench.kernels import StatisticsRequest, attention_statistics, pooled
from workbench.models import Batch, Head
from workbench.tracing import Model, statistics

from .run import Run
from .tensors import Tensors
from .writer import RunWriter

How = Literal["mean", "max"]
HOWS: tuple[How, ...] = ("mean", "max")
# The finest cells of the pyramid, and how many of them stand side by side at most.
BASE, SIDE = 32, 4096
# Levels end where a map has so few cells.
COARSEST = 64
# Entries that are computed at once.
ENTRIES = 1 << 22
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Masking:
    """What a layer's softmax sees beside q and k: `scale * q k`, its soft cap, and the window of keys."""

    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As arguments of the kernels."""
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}


def pattern_tensors(
    q: Float[Tensor, "token dim"],
    k: Float[Tensor, "token dim"],
    masking: Masking,
    rows: Mapping[str, Float[Tensor, " token"]] | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, NDArray[Any]]:
    """Everything that is stored of one head, from its q and k after rotation.

    `rows` are `lse`, `entropy`, `sink` (mass on the first key) and `column_mean` where a trace has them already
    (needed for learned sink logits, which q and k do not hold); otherwise they are computed. Costs one pass over the
    visible entries.
    """
    given = dict(rows) if rows is not None else _row_statistics(q, k, masking)
    kept = {"q": _floats(q), "k": _floats(k), **{name: _floats(value) for name, value in given.items()}}
    base = base_of(len(q))
    sums, tops = _base_maps(q, k, given["lse"].float(), masking, base, progress)
    cell = base
    while True:
        seen = visible(len(q), cell, masking.window)
        kept[f"mean_{cell}"] = (sums.numpy() / np.maximum(seen, 1)).astype(np.float16)
        kept[f"max_{cell}"] = tops.numpy().astype(np.float16)
        if len(sums) <= COARSEST:
            return kept
        sums, tops, cell = pooled(sums, 2, "sum"), pooled(tops, 2, "max"), 2 * cell


def base_of(tokens: int) -> int:
    """The finest cells of the pyramid of so many tokens."""
    base = BASE
    while tokens > base * SIDE:
        base *= 2
    return base


def visible(tokens: int, cell: int, window: int | None = None) -> NDArray[np.float64]:
    """How many entries of each cell a causal mask (and window) shows, `[row_cell, key_cell]`."""
    edges = np.minimum(np.arange(-(-tokens // cell) + 1) * cell, tokens).astype(np.float64)
    # Entries with key <= row (or <= row - window) in the corner of all rows below r and keys below c.
    corner = _below(edges[:, None], edges[None], 0.0)
    if window is not None:
        corner = corner - _below(edges[:, None], edges[None], float(window))
    counts: NDArray[np.float64] = np.diff(np.diff(corner, axis=0), axis=1)
    return counts


def _below(rows: NDArray[np.float64], keys: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Pairs (i < rows, j < keys) with j <= i - gap."""
    reach = np.maximum(rows - gap, 0.0)
    inside = np.minimum(reach, keys)
    pairs: NDArray[np.float64] = inside * (inside + 1) / 2 + (reach - inside) * keys
    return pairs


def _row_statistics(q: Tensor, k: Tensor, masking: Masking) -> dict[str, Tensor]:
    wanted = StatisticsRequest(lse=True, entropy=True, first=(1,), column_sum=True)
    found = attention_statistics(q[None, None], k[None, None], k[None, None], wanted, **masking.options)
    assert found.lse is not None and found.entropy is not None
    assert found.first is not None and found.column_sum is not None
    reach = torch.arange(len(q), 0, -1, device=q.device)
    if masking.window is not None:
        reach = reach.clamp(max=masking.window)
    return {
        "lse": found.lse[0, 0],
        "entropy": found.entropy[0, 0],
        "sink": found.first[0, 0, :, 0],
        "column_mean": found.column_sum[0, 0] / reach,
    }


def _base_maps(
    q: Tensor, k: Tensor, lse: Tensor, masking: Masking, base: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Sum and maximum over cells, strip by strip; what the mask hides is not computed."""
    tokens = len(q)
    side = -(-tokens // base)
    sums, tops = torch.zeros(side, side), torch.zeros(side, side)
    for rows, keys in _strips(tokens, base, masking.window):
        part = probabilities(q[rows].float(), k[keys].float(), lse[rows], rows, keys, masking)
        own = slice(rows.start // base, -(-rows.stop // base)), slice(keys.start // base, -(-keys.stop // base))
        sums[own], tops[own] = pooled(part, base, "sum").cpu(), pooled(part, base, "max").cpu()
        if progress is not None:
            progress(rows.stop, tokens)
    return sums, tops


def probabilities(
    q: Float[Tensor, "row dim"],
    k: Float[Tensor, "key dim"],
    lse: Float[Tensor, " row"],
    rows: slice,
    keys: slice,
    masking: Masking,
) -> Float[Tensor, "row key"]:
    """Probabilities of one tile, `rows` by `keys`, from their q, k and log-sum-exp.

    They are made in place of the logits: a viewer waits for this.
    """
    if masking.softcap is None:
        logits = torch.addmm(-lse[:, None], q, k.T, alpha=masking.scale)
    else:
        logits = torch.tanh_(q @ k.T * (masking.scale / masking.softcap)).mul_(masking.softcap).sub_(lse[:, None])
    if keys.stop > rows.start + 1 or masking.window is not None:
        logits.masked_fill_(~_seen(rows, keys, masking.window), -torch.inf)
    return logits.exp_()


def _seen(rows: slice, keys: slice, window: int | None) -> Bool[Tensor, "row key"]:
    row, key = torch.arange(rows.start, rows.stop)[:, None], torch.arange(keys.start, keys.stop)
    return key <= row if window is None else (key <= row) & (key > row - window)


def _strips(tokens: int, base: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    width = max(base, ENTRIES // 1024 // base * base)
    for start in range(0, tokens, 1024):
        stop = min(start + 1024, tokens)
        first = 0 if window is None else max(0, start - window + 1) // base * base
        for left in range(first, stop, width):
            yield slice(start, stop), slice(left, min(left + width, stop))


def _floats(value: Tensor) -> NDArray[Any]:
    """float16 and float32 as they are; bfloat16, which numpy lacks, as the float32 of the same value."""
    kept = value if value.dtype in (torch.float16, torch.float32) else value.float()
    return np.asarray(kept.detach().cpu().contiguous().numpy())


class StoredPattern:
    """One head's pattern on disk, read in parts."""

    def __init__(self, tensors: Tensors, about: Mapping[str, Any]) -> None:
        self.tensors, self.about = tensors, dict(about)
        window, softcap = about.get("window"), about.get("softcap")
        self.masking = Masking(float(about["scale"]), window, softcap)
        self.tokens = tensors.shape("q")[0]
        self.base = base_of(self.tokens)
        levels = [int(name.removeprefix("max_")) for name in tensors.names if name.startswith("max_")]
        if not levels or min(levels) != self.base or not isfinite(self.masking.scale):
            raise RunCorrupt(f"{tensors.file} holds no pyramid of a pattern; make the run again")
        self.cells = tuple(sorted(levels))

    @property
    def name(self) -> str:
        """The head's name, `L18H6`."""
        return f"L{self.about['layer']}H{self.about['head']}"

    def view(self, rows: slice, keys: slice, cell: int, how: str = "mean") -> Float[np.ndarray, "row_cell key_cell"]:
        """Mean (over visible entries) or maximum of the probability in cells of `cell` x `cell` tokens, float32.

        `rows` and `keys` start at multiples of `cell`, a power of two. Cells as fine as the pyramid's are read,
        finer ones computed exactly; cells that the mask hides are zero.
        """
        if how not in HOWS:
            raise RequestError(f"how={how!r}: cells show their 'mean' or their 'max'.")
        if cell < 1 or cell & (cell - 1) or rows.start % cell or keys.start % cell:
            raise RequestError(f"cells of {cell} tokens from {rows.start} and {keys.start}: give a power of two.")
        for name, part in (("rows", rows), ("keys", keys)):
            if not 0 <= part.start < part.stop <= self.tokens:
                raise RequestError(f"{name} {part.start}:{part.stop} of {self.tokens} tokens: give a part of them.")
        if cell < self.base:
            return self._exact(rows, keys, cell, how)
        level = min(cell, self.cells[-1])
        own = tuple(slice(one.start // level, -(-one.stop // level)) for one in (rows, keys))
        found = torch.from_numpy(self.tensors.read(f"{how}_{level}", *own).astype(np.float32))
        if cell > level:
            factor = cell // level
            if how == "mean":
                seen = torch.from_numpy(visible(self.tokens, level, self.masking.window)[own]).float()
                found = pooled(found * seen, factor, "sum") / pooled(seen, factor, "sum").clamp(min=1)
            else:
                found = pooled(found, factor, "max")
        return found.numpy()

    def _exact(self, rows: slice, keys: slice, cell: int, how: str) -> NDArray[np.float32]:
        found = torch.zeros(-(-(rows.stop - rows.start) // cell), -(-(keys.stop - keys.start) // cell))
        hidden = keys.start > rows.stop - 1 or self._left(rows, keys)
        if not hidden:
            stop = min(keys.stop, rows.stop)
            part = self.entries(rows, slice(keys.start, stop))
            width = -(-(stop - keys.start) // cell)
            if cell == 1:
                found[:, :width] = part
            elif how == "max":
                found[:, :width] = pooled(part, cell, "max")
            else:
                seen = _seen(rows, slice(keys.start, stop), self.masking.window).float()
                found[:, :width] = pooled(part, cell, "sum") / pooled(seen, cell, "sum").clamp(min=1)
        return found.numpy()

    def _left(self, rows: slice, keys: slice) -> bool:
        """Whether all keys have left the window of all rows."""
        return self.masking.window is not None and keys.stop - 1 <= rows.start - self.masking.window

    def entries(self, rows: slice, keys: slice) -> Float[Tensor, "row key"]:
        """Probabilities, exact, in float32."""
        q, lse = (torch.from_numpy(self.tensors.read(name, rows)).float() for name in ("q", "lse"))
        k = torch.from_numpy(self.tensors.read("k", keys)).float()
        return probabilities(q, k, lse, rows, keys, self.masking)

    def strip(self, name: str, bins: int, part: slice | None = None) -> Float[np.ndarray, " bin"]:
        """`entropy`, `sink` or `column_mean` of some tokens, as means over `bins` equal parts (fewer if there are
        fewer tokens)."""
        part = part or slice(0, self.tokens)
        values = self.tensors.read(name, part).astype(np.float64)
        edges = np.linspace(0, len(values), min(bins, len(values)) + 1).astype(int)
        return np.add.reduceat(values, edges[:-1]) / np.diff(edges)

    def next_high(self, row: int, key: int, level: float, *, skip_first: bool = True) -> tuple[int, int, float] | None:
        """The next entry, in reading order after (row, key), whose probability is `level` or more.

        The pyramid's maxima say where to look; position 0, where most heads rest, is left out unless it is asked
        for. None where there is no other.
        """
        tops = self.tensors.read(f"max_{self.base}")
        # Maxima are rounded to float16.
        candidates = tops.astype(np.float32) >= level * (1 - 1e-3)
        for block in range(row // self.base, len(tops)):
            cells = np.flatnonzero(candidates[block])
            found = self._in_rows(block, cells, (row, key), level, skip_first) if len(cells) else None
            if found is not None:
                return found
        return None

    def _in_rows(
        self, block: int, cells: NDArray[np.intp], after: tuple[int, int], level: float, skip_first: bool
    ) -> tuple[int, int, float] | None:
        """The first such entry in one row of cells."""
        rows = slice(block * self.base, min((block + 1) * self.base, self.tokens))
        best: tuple[int, int, float] | None = None
        for cell in cells:
            keys = slice(int(cell) * self.base, min((int(cell) + 1) * self.base, self.tokens))
            part = self.entries(rows, keys)
            for i, j in (part >= level).nonzero().tolist():
                place = (rows.start + i, keys.start + j)
                if place > after and not (skip_first and place[1] == 0) and (best is None or place < best[:2]):
                    best = (*place, float(part[i, j]))
        return best


class Source(NamedTuple):
    """What a head's pattern is stored from: q and k after rotation, the mask, and statistics of rows and columns."""

    q: Float[Tensor, "token dim"]
    k: Float[Tensor, "token dim"]
    masking: Masking
    rows: Mapping[str, Float[Tensor, " token"]]


def pattern_sources(
    model: Model,
    batch: Batch,
    heads: Sequence[Head],
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Source]:
    """What is stored of some heads on one prompt, from one forward pass, or in chunks as in `Model.trace`.

    The log-sum-exp is that of the model's own attention, learned sinks included.
    """
    if len(batch) != 1:
        raise RequestError(f"A pattern is stored of one prompt, and {len(batch)} were given; choose one.")
    rotated = "rot_" if model.spec.rotary else ""
    layers = sorted({head.layer for head in heads})
    names = [f"blocks.{layer}.attn.hook_{rotated}{site}" for layer in layers for site in ("q", "k")]
    wanted = [statistics.lse(), statistics.entropy(), statistics.first(1), statistics.column_mean()]
    trace = model.trace(batch, statistics=wanted, sites=names, chunk=chunk, progress=progress)
    real = slice(int(batch.starts[0]), int(batch.starts[0] + batch.lengths[0]))
    found = []
    for head in heads:
        shape = model.spec.layers[head.layer]
        q = trace.site("q", head.layer)[0, real, head.head]
        k = trace.site("k", head.layer)[0, real, model.spec.kv_head(head)]
        named = {"lse": "lse", "entropy": "entropy", "sink": "first_1", "column_mean": "column_mean"}
        rows = {key: trace.values[name][0, head.layer, head.head, real] for key, name in named.items()}
        found.append(Source(q, k, Masking(shape.scale, shape.window, shape.softcap), rows))
    return found


def pattern_name(head: tuple[int, int]) -> str:
    """What a head's pattern is stored under: `l18h6`."""
    return f"l{head[0]}h{head[1]}"


def write_pattern(
    writer: RunWriter, head: tuple[int, int], tensors: Mapping[str, NDArray[Any]], masking: Masking, **about: Any
) -> None:
    """Store one head's pattern in a run; more about it (its model, labelled spans) goes into the manifest."""
    writer.tensors(pattern_name(head), tensors)
    entry = {"layer": head[0], "head": head[1], **masking.options, **about}
    writer.manifest["patterns"] = {**writer.manifest.get("patterns", {}), pattern_name(head): entry}


def stored_patterns(run: Run) -> dict[str, dict[str, Any]]:
    """Names of the patterns that a run holds, and what is known about each."""
    entries = run.manifest.get("patterns", {})
    return {name: entry for name, entry in entries.items() if name in run.tensor_files}


def open_pattern(run: Run, name: str) -> StoredPattern:
    """A stored pattern, mapped."""
    known = stored_patterns(run)
    if name not in known:
        have = ", ".join(known) or "none"
        raise RequestError(
            f"the run {run.path} stores no pattern {name!r}; it has: {have}. "
            "`workbench trace MODEL --file TEXT --patterns L18H6` stores some"
        )
    return StoredPattern(run.tensors(name), known[name])
