"""Prompts with the token whose prediction is looked at, and ids that count for and against: what lenses read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.pairs import PairTask
from workbench.tasks.task import NONE
from workbench.tracing import Model

Run = Literal["clean", "corrupt"]


@dataclass(frozen=True, eq=False)
class Asked:
    """One run of prompts and what is asked of it.

    `position` is the column whose logits are read; `answers` and `foils` are ids `[prompt, m]`, -1 for none;
    `roles` are columns with a name.
    """

    name: str
    batch: Batch
    position: Int[Tensor, " prompt"]
    answers: Int[Tensor, "prompt answer"]
    foils: Int[Tensor, "prompt foil"]
    roles: Mapping[str, Int[Tensor, " prompt"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def contrast(self) -> bool:
        """Whether every prompt has a foil."""
        return bool((self.foils != NONE).any(1).all())


def asked_of(task: PairTask | Asked, run: Run = "clean") -> Asked:
    """The clean or the corrupt prompts of a task; answers and foils are those of the clean ones."""
    if isinstance(task, Asked):
        if run != "clean":
            raise RequestError(f"run={run!r}: prompts of one's own are one run; ask the others apart.")
        return task
    if run not in ("clean", "corrupt"):
        raise RequestError(f"run={run!r} is no run of a task; choose 'clean' or 'corrupt'.")
    batch = task.clean if run == "clean" else task.corrupt
    return Asked(
        task.name, batch, task.position.cpu(), task.answers.cpu(), task.foils.cpu(),
        {role: column.cpu() for role, column in task.roles.items()},
    )  # fmt: skip


def ask(
    model: Model,
    prompts: Any,
    answers: Sequence[int | str],
    foils: Sequence[int | str] = (),
    *,
    name: str = "prompts",
) -> Asked:
    """Prompts of one's own, read at their last tokens: one answer each, and one foil each or none.

    Answers and foils are token ids, or texts that are one token (most need their leading space).
    """
    batch = model.batch(prompts)
    wanted = {"answers": answers, "foils": foils}
    for label, given in wanted.items():
        if len(given) != len(batch) and (label == "answers" or given):
            raise RequestError(f"{len(given)} {label} for {len(batch)} prompts; give one for each.")
    ids = {label: [token_id(model, one) for one in given] for label, given in wanted.items()}
    last = (batch.starts + batch.lengths - 1).cpu()
    found = {label: torch.tensor(rows, dtype=torch.long).reshape(len(batch), -1) for label, rows in ids.items()}
    return Asked(name, batch, last, found["answers"], found["foils"])


def token_id(model: Model, token: int | str) -> int:
    """A token's id, given itself or a text that is exactly one token."""
    if isinstance(token, str):
        if model.tokenizer is None:
            raise RequestError(f"This model came without a tokenizer, so that {token!r} has no id; give the id itself.")
        ids = model.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            hint = "" if token.startswith(" ") else " Did you mean it with a leading space?"
            raise RequestError(f"{token!r} is {len(ids)} tokens in this tokenizer; choose a word of one token.{hint}")
        token = int(ids[0])
    if not 0 <= token < model.spec.vocab_size:
        raise RequestError(f"Token id {token} is outside the vocabulary of {model.spec.vocab_size}.")
    return token
