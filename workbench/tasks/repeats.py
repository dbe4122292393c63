"""Random tokens, repeated: the prompts on which duplicate, echo and induction heads are told apart.

``[BOS] + r + r (+ r ...)`` where r are distinct random tokens.  For a query in a later copy, at period p:

* duplicate (echo) keys: the same token in the earlier copies, at distances p, 2p, ...
* induction keys: the tokens *after* those, at distances p - 1, 2p - 1, ...
* null keys: one for each duplicate key, displaced at random by at most a quarter of the period (or two
  places), and neither a duplicate nor an induction key: what a head scores that only likes the distance.

With one fixed period a head can look right by attending at a fixed distance; `periods` draws one for each
prompt. Settings in use: 50 tokens twice (TransformerLens demos), 25 tokens four times (Olsson et al. 2022,
in-context learning and induction heads), 2500 tokens four times (RazorAttention, arXiv 2407.15891).
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.encoding import Prefix, special_ids, start_token
from workbench.tasks.task import NONE, Task

SHORTEST_PERIOD = 4


def repeated_tokens(
    tokenizer: PreTrainedTokenizerBase | int,
    prompts: int = 10,
    length: int = 50,
    copies: int = 2,
    seed: int = 0,
    bos: bool = True,
    *,
    periods: tuple[int, int] | None = None,
    bos_id: int | None = None,
) -> Task:
    """Draw prompts of ``length * copies`` random tokens behind a start token.

    In place of a tokenizer the size of the vocabulary will do, with ``bos_id`` as the start token.
    ``periods`` is an inclusive range: each prompt then repeats a segment of its own length, up to the same
    number of tokens.
    """
    low, high = periods or (length, length)
    _check(prompts, length, copies, low, high)
    prefix, allowed = ordinary_ids(tokenizer, bos, bos_id)
    generator = torch.Generator().manual_seed(seed)
    period = torch.randint(low, high + 1, (prompts,), generator=generator)
    rows = _rows(allowed, period, length * copies, generator)
    batch = Batch.from_ids([[*prefix.ids, *row] for row in rows])
    first = len(prefix.ids)
    duplicate = _earlier(first, batch.ids.shape[1], period)
    positions, ids = _answers(batch, first, period)
    varied = f"each prompt its own period of {low} to {high}" if periods else f"{copies} copies of {length}"
    end = torch.full_like(period, batch.ids.shape[1])
    return Task(
        name="repeated_tokens",
        caption=f"{prompts} prompts of distinct random tokens, repeated ({varied}); {prefix.policy}.",
        seed=seed,
        batch=batch,
        specials=prefix.policy,
        answer_ids=ids,
        answer_positions=positions,
        spans={
            "first_copy": torch.stack([torch.full_like(period, first), first + period], dim=1),
            "repeats": torch.stack([first + period, end], dim=1),
        },
        keys={
            "duplicate": duplicate,
            "induction": torch.where(duplicate == NONE, NONE, duplicate + 1),
            "null": _displaced(duplicate, first, period, generator),
        },
        settings={
            "prompts": prompts,
            "length": length,
            "copies": copies,
            "bos": bos,
            "periods": list(periods) if periods else None,
        },
        info=tuple({"period": p} for p in period.tolist()),
    )


def _check(prompts: int, length: int, copies: int, low: int, high: int) -> None:
    if prompts < 1 or copies < 2:
        raise RequestError(f"prompts={prompts}, copies={copies}: ask for at least one prompt and two copies.")
    if low < SHORTEST_PERIOD:
        raise RequestError(
            f"A segment of {low} tokens leaves no room for null keys; ask for at least {SHORTEST_PERIOD}."
        )
    if not low <= high <= length * copies - 2:
        raise RequestError(
            f"Periods {low} to {high} do not repeat within {length * copies} tokens; "
            f"choose low <= high <= {length * copies - 2}."
        )


def ordinary_ids(
    tokenizer: PreTrainedTokenizerBase | int, bos: bool, bos_id: int | None
) -> tuple[Prefix, Int[Tensor, " allowed"]]:
    """What stands before random tokens, and the ids that stand for ordinary text."""
    if isinstance(tokenizer, int):
        if bos and (bos_id is None or not 0 <= bos_id < tokenizer):
            raise RequestError(
                f"bos_id={bos_id}: with a vocabulary size ({tokenizer}) in place of a tokenizer, name the "
                "start token or ask for bos=False."
            )
        size, excluded = tokenizer, set() if bos_id is None else {bos_id}
        prefix = Prefix((bos_id,), f"start token {bos_id} before the text") if bos and bos_id is not None else None
    else:
        if bos_id is not None:
            raise RequestError(f"bos_id={bos_id}: a tokenizer brings its own start token; leave bos_id out.")
        size, excluded = len(tokenizer), special_ids(tokenizer)
        prefix = start_token(tokenizer) if bos else None
    allowed = torch.tensor([token for token in range(size) if token not in excluded])
    return prefix or Prefix((), "nothing before the text"), allowed


def _rows(
    allowed: Int[Tensor, " allowed"], period: Int[Tensor, " prompt"], total: int, generator: torch.Generator
) -> list[list[int]]:
    longest = int(period.max())
    if len(allowed) < longest:
        raise RequestError(
            f"{longest} distinct tokens were asked for, and the vocabulary has {len(allowed)} ordinary ones; "
            "ask for a shorter segment."
        )
    rows = []
    for p in period.tolist():
        segment = allowed[torch.randperm(len(allowed), generator=generator)[:p]]
        rows.append(segment.repeat(-(-total // p))[:total].tolist())
    return rows


def _earlier(first: int, width: int, period: Int[Tensor, " prompt"]) -> Int[Tensor, "prompt query key"]:
    """Columns of the same token in earlier copies, nearest first."""
    most = (width - first - 1) // int(period.min())
    back = period[:, None, None] * torch.arange(1, most + 1)[None, None, :]
    key = torch.arange(width)[None, :, None] - back
    return torch.where(key >= first, key, NONE)


def _displaced(
    keys: Int[Tensor, "prompt query key"],
    first: int,
    period: Int[Tensor, " prompt"],
    generator: torch.Generator,
) -> Int[Tensor, "prompt query key"]:
    """For each key another one nearby that is none of the query's duplicate or induction keys."""
    # Within so small a reach only the shifts 0 and 1 hit one of those.
    reach = (period[:, None, None] // 4).clamp(min=2)
    draw = (torch.rand(keys.shape, generator=generator) * (2 * reach - 1)).long()
    shift = torch.where(draw < reach, draw - reach, draw - reach + 2)
    # Before the first token there is nothing to attend to: go the other way.
    shift = torch.where(keys + shift < first, 2 + (-shift - 1) % (reach - 1), shift)
    return torch.where(keys == NONE, NONE, keys + shift)


def _answers(
    batch: Batch, first: int, period: Int[Tensor, " prompt"]
) -> tuple[Int[Tensor, "prompt answer"], Int[Tensor, "prompt answer"]]:
    """Rows in later copies and the tokens they predict; a copy's very first repeat cannot be foreseen."""
    row = torch.arange(first + int(period.min()), batch.ids.shape[1] - 1).expand(len(batch), -1)
    there = row >= first + period[:, None]
    ids = batch.ids.gather(1, row + 1)
    return torch.where(there, row, NONE), torch.where(there, ids, NONE)
