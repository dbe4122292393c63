"""Prompts as token ids, padded to one length on either side.

Every prompt is one run of real tokens with padding before or after it: what attention over a padded batch,
and every statistic over its positions, relies on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
        rows: Sequence[Sequence[int]] | Int[Tensor, "prompt token"],
        pad_id: int = 0,
        side: str = "right",
        texts: Sequence[str] | None = None,
    ) -> Batch:
        """Pad lists of token ids to the longest."""
        if side not in ("left", "right"):
            raise RequestError(f"side={side!r} is no padding side; choose 'left' or 'right'.")
        if are_texts(rows):
            raise RequestError(f"{rows[0]!r} is a text, not a list of token ids; make a batch by model.batch([...]).")
        prompts = [_token_ids(index, row) for index, row in enumerate(rows)]
        longest = max(len(row) for row in prompts)
        ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(prompts):
            place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            ids[index, place] = row.to(ids)
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


def are_texts(prompts: Any) -> bool:
    """Whether a list of prompts is one of texts or one of lists of token ids; refuses what is neither."""
    if isinstance(prompts, Mapping):
        raise RequestError(
            f"A {type(prompts).__name__} is no list of prompts; give its token ids: prompts['input_ids'], "
            "or the texts themselves."
        )
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__") or not hasattr(prompts, "__getitem__"):
        raise RequestError(
            f"{_short(prompts)} is no list of prompts; give a list of texts, e.g. ['The grey heron'], of token ids, "
            "e.g. [[5, 6, 7]], or a Batch."
        )
    if not len(prompts):
        raise RequestError("No prompts were given; a batch needs at least one prompt, a text or a list of token ids.")
    texts = [isinstance(prompt, str) for prompt in prompts]
    if any(texts) and not all(texts):
        wrong = texts.index(not texts[0])
        raise RequestError(
            f"Prompt {wrong} ({_short(prompts[wrong])}) is {'a' if texts[wrong] else 'no'} text, unlike those before "
            "it; give texts alone, or lists of token ids alone."
        )
    return all(texts)


def _token_ids(index: int, row: Any) -> Int[Tensor, " token"]:
    """One prompt's ids as a tensor; refuses what is no flat list of whole numbers."""
    try:
        found = torch.as_tensor(row) if not isinstance(row, bytes) else None
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = None
    if found is not None and found.ndim == 1 and not len(found):
        raise RequestError(f"Prompt {index} has no tokens; each prompt needs at least one.")
    if found is None or found.ndim != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise RequestError(
            f"Prompt {index} ({_short(row)}) is no list of token ids; give whole numbers, in a list for each prompt: "
            "[[5, 6, 7]]."
        )
    return found.to(torch.long)


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
