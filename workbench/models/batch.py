"""Prompts as token ids, padded to one length on either side.

Every prompt is one run of real tokens with padding before or after it: what attention over a padded batch,
and every statistic over its positions, relies on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import RequestError


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids and which of them are real; `texts` are the prompts they came from, where known."""

    ids: Int[Tensor, "prompt token"]
    mask: Bool[Tensor, "prompt token"]
    texts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.mask.shape != self.ids.shape or self.mask.dtype != torch.bool:
            raise RequestError(
                f"A batch needs ids [prompt, token] and a boolean mask of the same shape; got ids "
                f"{tuple(self.ids.shape)} and a {self.mask.dtype} mask {tuple(self.mask.shape)}."
            )
        if self.ids.shape[0] == 0:
            raise RequestError("A batch needs at least one prompt.")
        if self.texts is not None and len(self.texts) != len(self):
            raise RequestError(f"{len(self.texts)} texts for {len(self)} prompts; give one text for each.")
        # A run of real tokens begins where a real token follows padding or the edge: once per prompt.
        begins = self.mask.clone()
        begins[:, 1:] &= ~self.mask[:, :-1]
        wrong = (begins.sum(dim=1) != 1).nonzero().flatten().tolist()
        if wrong:
            raise RequestError(
                f"Prompt {wrong[0]} has {int(begins[wrong[0]].sum())} runs of real tokens in its mask; "
                "each prompt needs exactly one, with padding before or after it."
            )

    @classmethod
    def from_ids(
        cls,
        rows: Sequence[Sequence[int]],
        pad_id: int = 0,
        side: str = "right",
        texts: Sequence[str] | None = None,
    ) -> Batch:
        """Pad lists of token ids to the longest."""
        if side not in ("left", "right"):
            raise RequestError(f"side={side!r} is no padding side; choose 'left' or 'right'.")
        empty = [index for index, row in enumerate(rows) if len(row) == 0]
        if empty:
            raise RequestError(f"Prompt {empty[0]} has no tokens; each prompt needs at least one.")
        longest = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            ids[index, place] = torch.tensor(row, dtype=torch.long)
            mask[index, place] = True
        return cls(ids, mask, None if texts is None else tuple(texts))

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Real tokens of each prompt."""
        return self.mask.sum(dim=1)

    @property
    def starts(self) -> Int[Tensor, " prompt"]:
        """Column of each prompt's first real token."""
        return self.mask.to(torch.uint8).argmax(dim=1)

    @property
    def positions(self) -> Int[Tensor, "prompt token"]:
        """Position of each token in its own prompt, 0 at padding.

        What learned position embeddings need under left padding: GPT-2 otherwise counts columns.
        """
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0) * self.mask

    @property
    def padded(self) -> bool:
        return not bool(self.mask.all())

    @property
    def hash(self) -> str:
        """SHA-256 of the mask and of the real ids; what stands in the padding does not count."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.mask.cpu().numpy().tobytes())
        digest.update((self.ids * self.mask).to(torch.int64).cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def select(self, rows: Sequence[int]) -> Batch:
        """The named prompts, in that order; columns stay as they are."""
        wrong = [row for row in rows if not 0 <= row < len(self)]
        if wrong:
            raise RequestError(f"Prompt {wrong[0]} does not exist: prompts run from 0 to {len(self) - 1}.")
        index = torch.as_tensor(rows, dtype=torch.long, device=self.ids.device)
        texts = None if self.texts is None else tuple(self.texts[row] for row in rows)
        return Batch(self.ids[index], self.mask[index], texts)

    def split(self, size: int) -> list[Batch]:
        """Consecutive pieces of at most `size` prompts; columns stay as they are."""
        if size < 1:
            raise RequestError(f"size={size}: a piece needs at least one prompt.")
        return [self.select(range(first, min(first + size, len(self)))) for first in range(0, len(self), size)]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))
