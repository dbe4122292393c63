"""Which sparse pattern a head's attention fits (MInference), and how many of its blocks matter (SeerAttention).

MInference (Jiang et al. 2024, arXiv 2407.02490). From the last 64 queries of a text: the sums of attention along
columns and along diagonals; from means of queries and keys over blocks of 32: which blocks matter. Each candidate
keeps some keys of every query (the first and the recent ones; the heaviest columns and diagonals; the heaviest
blocks), and its score is the attention that it recalls: the mean, over later queries, of the mass on the keys that it
keeps. The head's pattern is the candidate that recalls most.

The published budgets (100 first and 800 recent keys, and so on) and the first query that counts, 2500, are those of
a sample of 30 000 tokens. In a shorter text every count is scaled by its length over 30 000 and rounded up; the block
pattern keeps one block in eight at any length, and the pattern is always estimated from the last 64 queries. Recalled
mass is exact for the queries that are looked at: all that count, or `EVALUATED` of them at equal distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.heads.detector import Array, Detector, Part, PromptScores, prompts, traced
from workbench.kernels import StatisticsRequest
from workbench.models import Batch
from workbench.tasks import Task
from workbench.tracing import Statistic
from workbench.tracing import statistics as S
from workbench.tracing.statistics import Measured

Family = Literal["a_shape", "vertical_slash", "block_sparse"]
# The text that the published budgets are for, and its first query that counts.
PUBLISHED_LENGTH, FIRST_QUERY = 30_000, 2500
LAST_QUERIES = 64
# Leading columns and nearest diagonals that are kept whatever their sums.
FORCED = 30
BLOCK, BLOCK_RATIO = 32, 8
EVALUATED = 256
SEER_BLOCK, SEER_SMALL, SEER_THRESHOLD = 64, 16, 5e-4
# Entries of attention that are held at once.
ENTRIES = 1 << 25


class Candidate(NamedTuple):
    """A pattern with its published budget: columns (first keys) and diagonals (recent keys)."""

    family: Family
    columns: int = 0
    diagonals: int = 0

    @property
    def name(self) -> str:
        return self.family if self.family == "block_sparse" else f"{self.family}_{self.columns}_{self.diagonals}"


CANDIDATES = (
    Candidate("a_shape", 100, 800),
    Candidate("vertical_slash", 30, 800),
    Candidate("vertical_slash", 100, 750),
    Candidate("vertical_slash", 500, 700),
    Candidate("vertical_slash", 3500, 100),
    Candidate("block_sparse"),
)


def scaled(count: int, tokens: int) -> int:
    """A published count for a text of so many tokens."""
    return ceil(count * min(1.0, tokens / PUBLISHED_LENGTH))


def evaluated_rows(tokens: int) -> Int[Tensor, " row"]:
    """The queries whose recalled mass is taken."""
    first = min(scaled(FIRST_QUERY, tokens), tokens - 1)
    places = torch.linspace(first, tokens - 1, min(EVALUATED, tokens - first), dtype=torch.float64)
    return places.round().long()


@dataclass(frozen=True)
class Prompt:
    """One layer's attention over one prompt, its padding cut off.

    `columns` and `diagonals` are the sums over the last 64 queries of the attention to each key and at each distance.
    """

    q: Float[Tensor, "head token dim"]
    k: Float[Tensor, "kv_head token dim"]
    lse: Float[Tensor, "head token"]
    columns: Float[Tensor, "head token"]
    diagonals: Float[Tensor, "head token"]
    scale: float
    softcap: float | None
    window: int | None

    @property
    def tokens(self) -> int:
        return self.q.shape[1]

    def logits(self, q: Float[Tensor, "head row dim"], k: Float[Tensor, "kv_head key dim"]) -> Tensor:
        queries = q.float().unflatten(0, (len(k), -1))  # type: ignore[no-untyped-call]
        found = torch.einsum("k g i d, k j d -> k g i j", queries, k.float()).flatten(0, 1) * self.scale
        return found if self.softcap is None else self.softcap * torch.tanh(found / self.softcap)

    def visible(self, rows: Int[Tensor, " row"]) -> tuple[Bool[Tensor, "row key"], Int[Tensor, "row key"]]:
        """Which keys these queries see, and how far back each is (0 for those ahead)."""
        back = rows[:, None] - torch.arange(self.tokens, device=rows.device)
        seen = back >= 0
        return (seen if self.window is None else seen & (back < self.window)), back.clamp(min=0)

    def pattern(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "head row key"]:
        """Attention of some queries, exact; a learned sink's share is left out, so that rows sum to 1."""
        seen, _ = self.visible(rows)
        mass = torch.exp(self.logits(self.q[:, rows], self.k) - self.lse[:, rows, None]).masked_fill(~seen, 0.0)
        return mass / mass.sum(-1, keepdim=True).clamp(min=1e-37)


def prompts_of(measured: Measured) -> Iterator[tuple[int, slice, Prompt]]:
    """Each prompt of a call by itself: its row in the batch, its columns, and its attention."""
    call, found, tokens = measured.call, measured.found, measured.call.k.shape[2]
    assert found.lse is not None and found.column_last is not None and found.diagonal_last is not None
    columns = found.column_last[:, :, measured.request.column_last.index(LAST_QUERIES)]
    starts = [0] * len(call.q) if call.key_start is None else call.key_start.tolist()
    ends = [tokens] * len(call.q) if call.key_end is None else call.key_end.tolist()
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        real = slice(start, end)
        q, k, lse, sums = (x[index][:, real] for x in (call.q, call.k, found.lse, columns))
        along = found.diagonal_last[index][:, : end - start]
        yield index, real, Prompt(q, k, lse, sums, along, call.scale, call.softcap, call.window)


def best_blocks(prompt: Prompt) -> Bool[Tensor, "head block_row block_column"]:
    """Blocks kept by the block-sparse pattern: one in eight of each row's, by means of queries and keys."""
    count = -(-prompt.tokens // BLOCK)
    owner = torch.arange(prompt.tokens, device=prompt.q.device) // BLOCK
    sizes = torch.bincount(owner, minlength=count)[:, None]

    def pooled(x: Tensor) -> Tensor:
        return x.new_zeros(len(x), count, x.shape[-1], dtype=torch.float32).index_add_(1, owner, x.float()) / sizes

    logits = prompt.logits(pooled(prompt.q), pooled(prompt.k))
    ahead = torch.ones(count, count, dtype=torch.bool, device=logits.device).triu(1)
    top = logits.masked_fill(ahead, -torch.inf).topk(max(1, count // BLOCK_RATIO), dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, top, True)


def _heaviest(sums: Float[Tensor, "head place"], count: int, forced: int) -> Bool[Tensor, "head place"]:
    raised = sums.clone()
    raised[:, :forced] = torch.inf
    top = raised.topk(min(count, raised.shape[1]), dim=-1).indices
    return torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, top, True)


def recalls(prompt: Prompt, rows: Int[Tensor, " row"]) -> Float[Tensor, "head row column"]:
    """Mass that each candidate recalls of each query, then the share of visible keys that it keeps."""
    n, device = prompt.tokens, prompt.q.device
    forced, blocks, place = scaled(FORCED, n), best_blocks(prompt), torch.arange(n, device=device)
    lines = {
        one: (
            _heaviest(prompt.columns, scaled(one.columns, n), forced),
            _heaviest(prompt.diagonals, scaled(one.diagonals, n), forced),
        )
        for one in CANDIDATES
        if one.family == "vertical_slash"
    }

    def kept(one: Candidate, part: Tensor, back: Tensor) -> Tensor:
        if one.family == "a_shape":
            return ((place < scaled(one.columns, n)) | (back < scaled(one.diagonals, n)))[None]
        if one.family == "block_sparse":
            return blocks[:, part // BLOCK][:, :, place // BLOCK]
        return lines[one][0][:, None] | lines[one][1][:, back]

    found = []
    for part in rows.to(device).split(max(1, ENTRIES // (len(prompt.q) * n))):  # type: ignore[no-untyped-call]
        a, (seen, back) = prompt.pattern(part), prompt.visible(part)
        keeps = [kept(one, part, back) & seen for one in CANDIDATES]
        recalled = [(a * keep).sum(-1) for keep in keeps]
        density = [(keep.sum(-1) / seen.sum(-1)).expand(len(a), -1) for keep in keeps]
        found.append(torch.stack(recalled + density, dim=-1))
    return torch.cat(found, dim=1)


def recalled() -> Statistic:
    """What `recalls` finds, a column each; NaN at queries that are not looked at."""
    width = 2 * len(CANDIDATES)
    request = StatisticsRequest(lse=True, column_last=(LAST_QUERIES,), diagonal_last=LAST_QUERIES)

    def read(measured: Measured) -> Tensor:
        lse = measured.found.lse
        assert lse is not None
        out = lse.new_full((*lse.shape, width), torch.nan)
        for index, real, prompt in prompts_of(measured):
            rows = evaluated_rows(prompt.tokens)
            out[index][:, rows.to(out.device) + real.start] = recalls(prompt, rows)
        return out

    return Statistic("minference", request, read, columns=width)


def _means(parts: Sequence[Part]) -> tuple[Array, Array]:
    """Recalled mass and density, `[prompt, layer, head, candidate]` each."""
    found = np.concatenate([traced(part).mean("minference").double().numpy() for part in parts])
    return found[..., : len(CANDIDATES)], found[..., len(CANDIDATES) :]


def _best_of(*families: Family) -> Callable[[Sequence[Part]], PromptScores]:
    """The candidate of some families that recalls most over all prompts; its density is the null."""
    chosen = [index for index, one in enumerate(CANDIDATES) if one.family in families]

    def score(parts: Sequence[Part]) -> PromptScores:
        mass, density = (side[..., chosen] for side in _means(parts))
        best = mass.mean(axis=0).argmax(axis=-1)[None, ..., None]
        values, null = (np.take_along_axis(side, best, axis=-1)[..., 0] for side in (mass, density))
        return PromptScores(values, null)

    return score


def minference_patterns(parts: Sequence[Part]) -> pd.DataFrame:
    """layer, head, pattern (the winner), family, recalled, density, and the recalled mass of every candidate.

    `density` is the share of visible keys that the winner keeps: what it would recall of uniform attention.
    """
    mass, density = (side.mean(axis=0) for side in _means(parts))
    rows = []
    for head in traced(parts[0]).spec.heads():
        own, kept = mass[head.layer, head.head], density[head.layer, head.head]
        best = int(own.argmax())
        row: dict[str, object] = {"layer": head.layer, "head": head.head, "pattern": CANDIDATES[best].name}
        row |= {"family": CANDIDATES[best].family, "recalled": own[best], "density": kept[best]}
        rows.append(row | {one.name: own[index] for index, one in enumerate(CANDIDATES)})
    return pd.DataFrame(rows)


def _detector(name: str, title: str, what: str, *families: Family) -> Detector:
    return Detector(
        name=name,
        title=title,
        kind="long_text",
        measures=f"mean attention on the keys that {what} keeps",
        null="the share of the visible keys that it keeps (what it recalls of uniform attention)",
        unit="attention mass",
        positions=f"all queries that count (from 1/12 of the text on), or {EVALUATED} of them at equal distances",
        threshold=None,
        paper="Jiang et al. 2024, MInference 1.0",
        url="https://arxiv.org/abs/2407.02490",
        statistics=lambda task: [recalled()],
        score=_best_of(*families),
        probe="held_out",
        note="Budgets are the published ones, scaled by length over 30 000 tokens in shorter texts; that the published "
        "sample had 30 000 is not confirmed. The code's later search compares outputs, not recalled mass; this is the "
        "first, as in the paper. Estimated from the last 64 queries, which are among those evaluated.",
    )


def seer_block(tokens: int) -> int:
    """The published block size, or a smaller one where a text would have few of them."""
    return SEER_BLOCK if tokens >= 32 * SEER_BLOCK else SEER_SMALL


def _seer_statistics(task: Task) -> list[Statistic]:
    return [S.block_max(seer_block(task.batch.ids.shape[1]))]


def negligible_blocks(
    maxima: Float[Tensor, "*lead query_block key_block"], threshold: float
) -> tuple[Float[Tensor, "*lead"], Float[Tensor, "*lead"]]:
    """Share of a prompt's blocks, on the diagonal and below, whose maximum is not above a threshold; and the mean of
    -log10 of the maxima."""
    count = maxima.shape[-1]
    there = torch.ones(count, count, dtype=torch.bool).tril() & ~maxima.isnan()
    blocks = there.sum((-2, -1))
    share = ((maxima <= threshold) & there).sum((-2, -1)).double() / blocks
    depth = torch.where(there, -maxima.double().clamp(min=1e-30).log10(), 0.0).sum((-2, -1)) / blocks
    return share, depth


def _uniform_maxima(batch: Batch, size: int) -> Float[Tensor, "prompt 1 1 query_block key_block"]:
    """Block maxima of uniform causal attention: 1 / i of the first query, counted from 1, that sees the block."""
    count = -(-batch.ids.shape[1] // size)
    place = torch.arange(count) * size
    maxima = 1.0 / (torch.maximum(place[:, None], place[None]) + 1.0)
    short = place[None] >= batch.lengths[:, None].cpu()
    return maxima.masked_fill(short[:, :, None] | short[:, None], torch.nan)[:, None, None]


def _seer(parts: Sequence[Part]) -> PromptScores:
    values, null, depth = [], [], []
    for part in parts:
        trace, size = traced(part), seer_block(prompts(part).batch.ids.shape[1])
        share, level = negligible_blocks(trace[f"block_max_{size}"], SEER_THRESHOLD)
        even, _ = negligible_blocks(_uniform_maxima(trace.batch, size), SEER_THRESHOLD)
        values.append(np.asarray(share.numpy()))
        null.append(np.broadcast_to(even.numpy(), values[-1].shape))
        depth.append(level.numpy())
    return PromptScores(np.concatenate(values), np.concatenate(null), ties=np.concatenate(depth).mean(axis=0))


MINFERENCE = _detector(
    "minference",
    "Best sparse pattern",
    "the head's best sparse pattern",
    "a_shape",
    "vertical_slash",
    "block_sparse",
)
A_SHAPE = _detector("a_shape", "A-shape", "the A-shape pattern (first and recent keys)", "a_shape")
VERTICAL_SLASH = _detector(
    "vertical_slash", "Vertical-slash", "the best vertical-slash pattern (heaviest columns and diagonals)",
    "vertical_slash",
)  # fmt: skip
BLOCK_SPARSE = _detector("block_sparse", "Block-sparse", "the block-sparse pattern", "block_sparse")
BLOCK_SPARSITY = Detector(
    name="block_sparsity",
    title="Negligible blocks",
    kind="long_text",
    measures="share of the blocks of attention in which no weight exceeds 5e-4",
    null="the same for uniform attention over all earlier keys",
    unit="share of blocks",
    positions="all blocks on and below the diagonal",
    threshold=None,
    paper="Gao et al. 2024, SeerAttention",
    url="https://arxiv.org/abs/2410.13276",
    statistics=_seer_statistics,
    score=_seer,
    probe=None,
    note=f"Blocks of {SEER_BLOCK} x {SEER_BLOCK} as published from {32 * SEER_BLOCK} tokens on, of {SEER_SMALL} x "
    f"{SEER_SMALL} in shorter texts. The threshold was published for the gate's estimates in long texts (5e-4 to "
    "5e-3); in a text of a few hundred tokens most blocks exceed it, so few score above zero. Equal shares are ranked "
    "by the mean order of magnitude of the maxima.",
)
PATTERNS = (MINFERENCE, A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE, BLOCK_SPARSITY)
