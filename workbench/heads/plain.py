"""Random tokens, and one token over and over, for a model that may have no tokenizer."""

from __future__ import annotations

from workbench.heads.settings import Settings
from workbench.tasks import Task, one_token, random_tokens
from workbench.tracing import Model


def random_prompts(model: Model, settings: Settings) -> list[Task]:
    """With what the tokenizer puts before a text; without one behind `bos_id`, if given."""
    size = (settings.plain_prompts, settings.text_length, settings.seed)
    if model.tokenizer is not None:
        return [random_tokens(model.tokenizer, *size)]
    return [random_tokens(model.spec.vocab_size, *size, bos_id=settings.bos_id)]


def one_token_prompts(model: Model, settings: Settings) -> list[Task]:
    """Never behind a start token, which would be unlike the others."""
    size = (settings.plain_prompts, settings.text_length, settings.seed)
    if model.tokenizer is not None:
        return [one_token(model.tokenizer, *size)]
    return [one_token(model.spec.vocab_size, *size, bos_id=settings.bos_id)]
