"""The tasks with clean and corrupt prompts, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.tasks.agreement import agreement
from workbench.tasks.colored_objects import colored_objects
from workbench.tasks.docstring import docstring
from workbench.tasks.facts import facts
from workbench.tasks.gender import gender
from workbench.tasks.greater_than import greater_than
from workbench.tasks.ioi import ioi
from workbench.tasks.json_pairs import json_pairs
from workbench.tasks.lag_induction import lag_induction
from workbench.tasks.mcqa import mcqa
from workbench.tasks.pairs import PairTask


class Builder(Protocol):
    """Makes a task's pairs; each has settings of its own besides."""

    def __call__(self, tokenizer: PreTrainedTokenizerBase, prompts: int = ..., seed: int = ...) -> PairTask: ...


PAIR_TASKS: Mapping[str, Builder] = MappingProxyType(
    {
        "ioi": ioi,
        "colored_objects": colored_objects,
        "greater_than": greater_than,
        "docstring": docstring,
        "gender": gender,
        "agreement": agreement,
        "mcqa": mcqa,
        "facts": facts,
        "lag_induction": lag_induction,
        "json_pairs": json_pairs,
    }
)


def pair_task(name: str, tokenizer: PreTrainedTokenizerBase, prompts: int = 50, seed: int = 0) -> PairTask:
    """The named task with its default settings."""
    if name not in PAIR_TASKS:
        raise RequestError(f"Task {name!r} is unknown; choose from {', '.join(PAIR_TASKS)}.")
    return PAIR_TASKS[name](tokenizer, prompts, seed)
