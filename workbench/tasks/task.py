"""Prompts with labelled positions: what a detector measures on and what a metric scores.

All positions are column indices of the padded batch, so that they address rows and keys of a trace directly.
The row that *produces* a token is the row of the token before it: `answer_positions` holds those rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Batch

NONE = -1
Value = str | int | float | bool | None


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts, the labels of their positions, and the tokens whose prediction counts.

    `spans`
        name -> half-open ``[prompt, 2]`` ranges of columns.
    `keys`
        name -> for each query column its key columns ``[prompt, query, m]``, -1 for none.
    `marks`
        name -> which columns belong to a class of tokens, ``[prompt, token]``.
    `answer_ids`, `answer_positions`
        the tokens whose prediction counts and the rows producing them, ``[prompt, answer]``, -1 for none.
    `answer_keys`
        where the prompt holds the same token for copying (one key an answer token), or None.
    `decoding`, `answers`
        the prompts without a reply, padded on the left for greedy decoding, and the answers as text.
    `specials`
        the special-token policy in words.
    `settings`, `info`
        how the task was made, and what is particular to each prompt.
    """

    name: str
    caption: str
    seed: int
    batch: Batch
    specials: str
    answer_ids: Int[Tensor, "prompt answer"]
    answer_positions: Int[Tensor, "prompt answer"]
    spans: Mapping[str, Int[Tensor, "prompt 2"]] = field(default_factory=dict)
    keys: Mapping[str, Int[Tensor, "prompt query key"]] = field(default_factory=dict)
    marks: Mapping[str, Bool[Tensor, "prompt token"]] = field(default_factory=dict)
    answer_keys: Int[Tensor, "prompt answer"] | None = None
    decoding: Batch | None = None
    answers: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    info: tuple[Mapping[str, Value], ...] = ()

    def __post_init__(self) -> None:
        if self.answer_ids.shape != self.answer_positions.shape or len(self.answer_ids) != len(self.batch):
            raise RequestError(
                f"answer_ids {tuple(self.answer_ids.shape)} and answer_positions "
                f"{tuple(self.answer_positions.shape)} must both be [{len(self.batch)} prompts, answers]."
            )
        there = self.answer_positions != NONE
        row = self.answer_positions.clamp(min=0)
        if not torch.equal(there, self.answer_ids != NONE) or bool((row >= self.batch.ids.shape[1] - 1).any()):
            raise RequestError("Each answer needs both an id and the row before it, within the batch.")
        if not torch.equal(self.batch.ids.gather(1, row + 1)[there], self.answer_ids[there]):
            raise RequestError(
                "answer_ids differ from the tokens behind answer_positions; "
                "a position is the row before the answer token, not the token's own."
            )

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def n_answers(self) -> Int[Tensor, " prompt"]:
        """Tokens of each prompt whose prediction counts."""
        return (self.answer_positions != NONE).sum(dim=1)

    @property
    def logit_positions(self) -> Int[Tensor, "prompt answer"]:
        """The rows whose logits score the answers, unused places set to 0, as a trace asks for logits."""
        return self.answer_positions.clamp(min=0)

    def columns(self, span: str) -> Bool[Tensor, "prompt token"]:
        """A mask of the columns inside a span."""
        if span not in self.spans:
            raise RequestError(f"{self.name} has no span {span!r}; it has {', '.join(self.spans) or 'none'}.")
        bounds = self.spans[span]
        column = torch.arange(self.batch.ids.shape[1])
        return (column >= bounds[:, :1]) & (column < bounds[:, 1:])

    @property
    def hash(self) -> str:
        """SHA-256 of the prompts, of every label and of how they were made."""
        tensors = {
            "answer_ids": self.answer_ids,
            "answer_positions": self.answer_positions,
            **{f"span {name}": value for name, value in self.spans.items()},
            **{f"keys {name}": value for name, value in self.keys.items()},
            **{f"marks {name}": value for name, value in self.marks.items()},
        }
        if self.answer_keys is not None:
            tensors["answer_keys"] = self.answer_keys
        about = {
            "name": self.name,
            "seed": self.seed,
            "specials": self.specials,
            "batch": self.batch.hash,
            "decoding": None if self.decoding is None else self.decoding.hash,
            "answers": self.answers,
            "settings": dict(self.settings),
            "info": [dict(one) for one in self.info],
            "shapes": {name: list(value.shape) for name, value in sorted(tensors.items())},
        }
        total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for _, value in sorted(tensors.items()):
            total.update(value.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
        return total.hexdigest()
