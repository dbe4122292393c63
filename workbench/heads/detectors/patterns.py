"""Which sparse pattern a head's attention fits (MInference, Jiang et al. 2024, arXiv 2407.02490).

From the last 64 queries of a text: the sums of attention along columns and along diagonals; from means of queries and
keys over blocks of 32: which blocks matter. Each candidate keeps some keys of every query (the first and the recent
ones; the heaviest columns and diagonals; the heaviest blocks), and its score is the attention that it recalls: the
mean, over later queries, of the mass on the keys that it keeps. The head's pattern is the candidate that recalls most.

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

from workbench.heads.detector import Array, Detector, Part, PromptScores, traced
from workbench.kernels import StatisticsRequest
from workbench.models import AttentionCall
from workbench.tracing import Statistic
from workbench.tracing.statistics import Measured

Family = Literal["a_shape", "vertical_slash", "block_sparse"]
# The text that the published budgets are for, and its first query that counts.
PUBLISHED_LENGTH, FIRST_QUERY = 30_000, 2500
LAST_QUERIES = 64
# Leading columns and nearest diagonals that are kept whatever their sums.
FORCED = 30
BLOCK, BLOCK_RATIO = 32, 8
EVALUATED = 256
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
    return torch.linspace(first, tokens - 1, min(EVALUATED, tokens - first)).round().long().unique()


@dataclass(frozen=True)
class Prompt:
    """One layer's attention over one prompt, its padding cut off."""

    q: Float[Tensor, "head token dim"]
    k: Float[Tensor, "kv_head token dim"]
    lse: Float[Tensor, "head token"]
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


def prompts_of(call: AttentionCall, lse: Float[Tensor, "batch head query"]) -> Iterator[tuple[int, slice, Prompt]]:
    """Each prompt of a call by itself: its row in the batch, its columns, and its attention."""
    tokens = call.k.shape[2]
    starts = [0] * len(call.q) if call.key_start is None else call.key_start.tolist()
    ends = [tokens] * len(call.q) if call.key_end is None else call.key_end.tolist()
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        real = slice(start, end)
        q, k = call.q[index][:, real], call.k[index][:, real]
        yield index, real, Prompt(q, k, lse[index][:, real], call.scale, call.softcap, call.window)


def last_sums(prompt: Prompt) -> tuple[Float[Tensor, "head key"], Float[Tensor, "head distance"]]:
    """Sums over the last 64 queries of the attention to each key, and at each distance."""
    rows = torch.arange(max(0, prompt.tokens - LAST_QUERIES), prompt.tokens, device=prompt.q.device)
    a, (_, back) = prompt.pattern(rows), prompt.visible(rows)
    along = torch.zeros_like(a[:, 0])
    along.scatter_add_(1, back.flatten().expand(len(a), -1), a.flatten(1))
    return a.sum(1), along


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
    columns, diagonals = last_sums(prompt)
    forced, blocks, place = scaled(FORCED, n), best_blocks(prompt), torch.arange(n, device=device)
    lines = {
        one: (
            _heaviest(columns, scaled(one.columns, n), forced),
            _heaviest(diagonals, scaled(one.diagonals, n), forced),
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
    for part in rows.to(device).split(max(1, ENTRIES // (len(prompt.q) * n))):
        a, (seen, back) = prompt.pattern(part), prompt.visible(part)
        keeps = [kept(one, part, back) & seen for one in CANDIDATES]
        recalled = [(a * keep).sum(-1) for keep in keeps]
        density = [(keep.sum(-1) / seen.sum(-1)).expand(len(a), -1) for keep in keeps]
        found.append(torch.stack(recalled + density, dim=-1))
    return torch.cat(found, dim=1)


def recalled() -> Statistic:
    """What `recalls` finds, a column each; NaN at queries that are not looked at."""
    width = 2 * len(CANDIDATES)

    def read(measured: Measured) -> Tensor:
        call, lse = measured.call, measured.found.lse
        assert lse is not None
        out = lse.new_full((*lse.shape, width), torch.nan)
        for index, real, prompt in prompts_of(call, lse):
            rows = evaluated_rows(prompt.tokens)
            out[index][:, rows.to(out.device) + real.start] = recalls(prompt, rows)
        return out

    return Statistic("minference", StatisticsRequest(lse=True), read, columns=width)


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
        return PromptScores(*(np.take_along_axis(side, best, axis=-1)[..., 0] for side in (mass, density)))

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
PATTERNS = (MINFERENCE, A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE)
