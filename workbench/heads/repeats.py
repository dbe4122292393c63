"""Repeated random tokens for a model that may have no tokenizer."""

from __future__ import annotations

from workbench.tasks import Task, repeated_tokens
from workbench.tracing import Model


def random_repeats(model: Model, prompts: int, length: int, copies: int, seed: int, bos_id: int | None) -> Task:
    """With a tokenizer its own start token comes first; without one `bos_id`, or nothing."""
    if model.tokenizer is not None:
        return repeated_tokens(model.tokenizer, prompts, length, copies, seed)
    vocabulary = model.spec.vocab_size
    return repeated_tokens(vocabulary, prompts, length, copies, seed, bos=bos_id is not None, bos_id=bos_id)
