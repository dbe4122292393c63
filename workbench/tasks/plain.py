"""Prompts without natural text: random tokens, and one token over and over.

An attention sink that follows from position alone survives both; one that needs a first token that is unlike the
others does not survive the second, where a model with relative positions gives every token the same hidden state
(Gu et al. 2025, arXiv 2410.10781: Sink_1 of Llama-2-7B falls from 92 % on text and 90 % on random tokens to 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.encoding import Prefix, default_prefix, start_token
from workbench.tasks.repeats import ordinary_ids
from workbench.tasks.task import Task

SHORTEST = 2


def random_tokens(
    tokenizer: PreTrainedTokenizerBase | int,
    prompts: int = 100,
    length: int = 64,
    seed: int = 0,
    bos: bool | None = None,
    *,
    bos_id: int | None = None,
) -> Task:
    """Prompts of ``length`` tokens drawn independently from the ordinary vocabulary, a start token included.

    ``bos``: None does what the tokenizer does by default, True puts a start token before each prompt, False none.
    In place of a tokenizer the size of the vocabulary will do, with ``bos_id`` as the start token (None for none).
    """
    prefix, allowed = _made_of(tokenizer, bos, bos_id)
    wanted = _room(prompts, length, prefix)
    generator = torch.Generator().manual_seed(seed)
    rows = allowed[torch.randint(len(allowed), (prompts, wanted), generator=generator)].tolist()
    caption = f"{prompts} prompts of {length} random tokens; {prefix.policy}."
    return _task("random_tokens", caption, prefix, rows, seed)


def one_token(
    tokenizer: PreTrainedTokenizerBase | int,
    prompts: int = 100,
    length: int = 64,
    seed: int = 0,
    bos: bool | None = False,
    *,
    bos_id: int | None = None,
) -> Task:
    """Prompts of ``length`` tokens that are all the same, each prompt its own token drawn from the vocabulary.

    No start token by default, unlike elsewhere: it would be a first token unlike the others, which is what these
    prompts do without.
    """
    prefix, allowed = _made_of(tokenizer, bos, bos_id)
    wanted = _room(prompts, length, prefix)
    generator = torch.Generator().manual_seed(seed)
    drawn = allowed[torch.randint(len(allowed), (prompts,), generator=generator)].tolist()
    caption = f"{prompts} prompts of one token {length - len(prefix.ids)} times; {prefix.policy}."
    return _task("one_token", caption, prefix, [[token] * wanted for token in drawn], seed)


def _made_of(
    tokenizer: PreTrainedTokenizerBase | int, bos: bool | None, bos_id: int | None
) -> tuple[Prefix, torch.Tensor]:
    """What stands before the tokens, and those to draw from."""
    if isinstance(tokenizer, int):
        return ordinary_ids(tokenizer, bos_id is not None if bos is None else bos, bos_id)
    _, allowed = ordinary_ids(tokenizer, False, bos_id)
    if bos is None:
        return default_prefix(tokenizer), allowed
    return start_token(tokenizer) if bos else Prefix((), "nothing before the text"), allowed


def _room(prompts: int, length: int, prefix: Prefix) -> int:
    """Tokens of a prompt behind what stands before them."""
    least = len(prefix.ids) + SHORTEST
    if prompts < 1 or length < least:
        raise RequestError(f"prompts={prompts}, length={length}: ask for at least one prompt of {least} tokens.")
    return length - len(prefix.ids)


def _task(name: str, caption: str, prefix: Prefix, rows: Sequence[Sequence[int]], seed: int) -> Task:
    batch = Batch.from_ids([[*prefix.ids, *row] for row in rows])
    length = batch.ids.shape[1]
    begins = torch.full((len(batch),), len(prefix.ids))
    return Task(
        name=name,
        caption=caption,
        seed=seed,
        batch=batch,
        specials=prefix.policy,
        answer_ids=batch.ids[:, 1:].clone(),
        answer_positions=torch.arange(length - 1).expand(len(batch), -1).contiguous(),
        spans={"text": torch.stack([begins, torch.full_like(begins, length)], dim=1)},
        settings={"domain": name, "prompts": len(batch), "length": length},
    )
