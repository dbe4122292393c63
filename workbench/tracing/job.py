"""A trace as it will run: its pieces, in which order, and whether long prompts run in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tracing.plan import Plan
from workbench.tracing.preflight import Piece

Logits = Literal["last", "all"] | Int[Tensor, "prompt kept"] | None
# Tokens of a chunk, where advice is given.
CHUNK = 4096


@dataclass(frozen=True)
class Job:
    """A trace as it will run: `pieces` are consecutive prompts, cut on the right to the longest among them."""

    batch: Batch
    plan: Plan
    pieces: list[tuple[slice, Batch]]
    wanted: Tensor | None
    loss: bool
    chunk: int | None = None

    def in_chunks(self, piece: Batch) -> bool:
        """Whether a piece's prompts run in chunks."""
        return self.chunk is not None and piece.ids.shape[1] > self.chunk

    def steps(self, piece: Batch) -> int:
        """What a piece counts for in the progress: prompts, or chunks."""
        if not self.in_chunks(piece):
            return len(piece)
        return sum(-(-length // (self.chunk or 1)) for length in piece.lengths.tolist())

    @property
    def advice(self) -> str:
        """What to do where memory is short."""
        width = max(piece.ids.shape[1] for _, piece in self.pieces)
        shorter = f"lower tokens_at_once (now {self.pieces[0][1].ids.numel()} tokens)"
        if self.in_chunks(self.pieces[0][1]):
            shorter = f"lower chunk (now {self.chunk})"
        elif width > CHUNK:
            shorter = f"read long prompts in chunks (chunk={CHUNK})"
        return f"Cut the prompts, trace fewer of them, or {shorter}."

    def measured(self, rows: slice, piece: Batch) -> Piece:
        """What the forecast looks at: the piece, or the last chunk of its longest prompt."""
        if not self.in_chunks(piece):
            return Piece(piece, len(self.kept(rows, piece)))
        assert self.chunk is not None
        longest = int(piece.lengths.max())
        ids = torch.zeros(1, min(self.chunk, longest), dtype=torch.long)
        kept = ids.shape[1] if self.loss else 1
        if self.wanted is not None:
            kept = max(kept, min(ids.shape[1], self.wanted.shape[1]))
        return Piece(Batch(ids, torch.ones_like(ids, dtype=torch.bool)), kept, longest)

    def own(self, rows: slice, width: int) -> Tensor | None:
        """Columns of a piece whose logits are wanted, prompt by prompt."""
        return None if self.wanted is None else self.wanted[rows].clamp(max=width - 1)

    def kept(self, rows: slice, piece: Batch) -> Int[Tensor, " kept"]:
        """Columns whose logits the model computes: all that some prompt of the piece wants, or the last."""
        width = piece.ids.shape[1]
        own = self.own(rows, width)
        if self.loss:
            return torch.arange(width)
        return torch.tensor([width - 1]) if own is None else torch.unique(own)


def wanted_positions(batch: Batch, logits: Logits) -> Tensor | None:
    """Columns whose logits are wanted, prompt by prompt."""
    if logits is None:
        return None
    if isinstance(logits, Tensor):
        shape, columns = tuple(logits.shape), batch.ids.shape[1]
        if logits.ndim != 2 or len(logits) != len(batch) or logits.shape[1] == 0:
            raise RequestError(f"logits: positions of shape {shape} for {len(batch)} prompts; give [prompt, kept].")
        wrong = logits[(logits < 0) | (logits >= columns)].tolist()
        if wrong:
            raise RequestError(f"logits: position {wrong[0]} is outside the batch of {columns} columns.")
        return logits.cpu()
    if logits == "last":
        return (batch.starts + batch.lengths - 1)[:, None].cpu()
    if logits == "all":
        return torch.arange(batch.ids.shape[1]).expand(len(batch), -1)
    raise RequestError(f"logits={logits!r}: choose 'last', 'all' or positions [prompt, kept].")
