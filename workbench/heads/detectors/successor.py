"""Successor heads: given Monday they write Tuesday. Read off the weights, for words in a fixed order.

1. Each word's effective embedding is what the first block's MLP makes of its embedding, attention silenced; a model
   without MLPs has the embedding itself.
2. It goes through a head's W_V W_O and the unembedding of the words of its list.
3. The score is the share of words whose own successor comes out on top of its list.

Gould et al. 2023 (arXiv 2312.09230). One forward pass of single tokens, then products of a list's size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Detector, Kind, Part, Progress, PromptScores
from workbench.heads.settings import Settings
from workbench.heads.weights import HeadWeights, weights_for
from workbench.models import Head
from workbench.tasks import Task
from workbench.tracing import Edit, Model, ablate, patch

_log = logging.getLogger("workbench")
_ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()

WORD_LISTS: dict[str, tuple[str, ...]] = {
    "numbers": tuple(str(number) for number in range(1, 201)),
    "number words": (*_ONES.split(), "eighteen", "nineteen", "twenty"),
    "ordinals": tuple("first second third fourth fifth sixth seventh eighth ninth tenth".split()),
    "days": (*_DAYS, _DAYS[0]),
    "months": (*_MONTHS, _MONTHS[0]),
    "short days": tuple(day[:3] for day in _DAYS),
    "short months": tuple(month[:3] for month in _MONTHS),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
# A list with fewer steps than this says nothing.
FEWEST_STEPS = 3


@dataclass(frozen=True)
class Ordered:
    """Tokens of one list and, for those whose next word is a token too, the place of that one (-1 for none)."""

    name: str
    ids: Int[Tensor, " token"]
    successor: Int[Tensor, " token"]


@dataclass(frozen=True)
class Succession:
    """What the kind found: the weights, the lists, and the effective embedding of their tokens."""

    weights: HeadWeights
    lists: tuple[Ordered, ...]
    embedded: tuple[Float[Tensor, "_ d_model"], ...]


def ordered_lists(tokenizer: Any, lists: dict[str, tuple[str, ...]] | None = None) -> tuple[Ordered, ...]:
    """The lists as single tokens: with a leading space, or without where that leaves more steps.

    Words of several tokens are left out with the steps to and from them, and lists with fewer than three steps
    altogether; some tokenizers write every number digit by digit.
    """
    found = []
    for name, words in (lists or WORD_LISTS).items():
        spaced, bare = (_ordered(tokenizer, name, [prefix + word for word in words]) for prefix in (" ", ""))
        best = max((spaced, bare), key=_steps)
        if _steps(best) >= FEWEST_STEPS:
            found.append(best)
        else:
            _log.info("successor: %r has %d steps between single tokens and is left out", name, _steps(best))
    if not found:
        raise RequestError("None of the word lists has three steps between single tokens; use another tokenizer.")
    return tuple(found)


def _steps(one: Ordered) -> int:
    return int((one.successor >= 0).sum())


def _ordered(tokenizer: Any, name: str, words: Sequence[str]) -> Ordered:
    """A list that ends where it began is a cycle; its last word then is no second token."""
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    unknown = getattr(tokenizer, "unk_token_id", None)
    single = [row[0] if len(row) == 1 and row[0] != unknown else None for row in ids]
    places = {token: place for place, token in enumerate(dict.fromkeys(t for t in single if t is not None))}
    successor = torch.full((len(places),), -1, dtype=torch.long)
    for token, following in pairwise(single):
        if token is not None and following is not None:
            successor[places[token]] = places[following]
    return Ordered(name, torch.tensor(list(places), dtype=torch.long), successor)


def effective_embedding(model: Model, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    """MLP of block 0 of the embedding, attention silenced and positions left out; the embedding if there is no MLP."""
    layer = model.attachment.layers[0]
    raw = model.attachment.hf_model.get_input_embeddings()(ids.to(model.device)).detach().cpu()
    raw = cast(Tensor, raw).float()
    if layer.mlp is None:
        return raw
    silence = ablate([Head(0, head) for head in range(model.spec.layers[0].heads)], how="zero")
    # Rotary embeddings are not part of the residual stream, and some models scale theirs: leave it alone.
    edits: list[Edit] = [silence] if model.spec.rotary else [silence, patch("resid_pre", raw[:, None], layer=0)]
    found = model.trace([[int(token)] for token in ids], sites=["blocks.0.hook_mlp_out"], edits=edits)
    return found.site("mlp_out", 0)[:, 0].float()


def succession_logits(found: Succession, layer: int) -> Iterator[Float[Tensor, "head token token"]]:
    """For each list, the logits of its tokens (last axis) given each of its tokens."""
    weights = found.weights
    heads = weights.queries(layer)
    for one, rows in zip(found.lists, found.embedded, strict=True):
        columns = weights.unembedding[:, one.ids.to(weights.device)]
        yield (rows.to(heads.value) @ heads.value) @ heads.output @ columns


def _score(parts: Sequence[Part]) -> PromptScores:
    """Share of right successors; the null shuffles which token of its list counts as right."""
    (part,) = parts
    found: Succession = part.found
    weights, rng = found.weights, np.random.default_rng(found.weights.seed)
    right = [one.successor.numpy() for one in found.lists]
    asked = [(target >= 0) for target in right]
    # The same shuffles for all heads: of the tokens that are the successor of one.
    shuffled = [
        np.stack([rng.permutation(t[a]) for _ in range(weights.draws)]) for t, a in zip(right, asked, strict=True)
    ]
    total = sum(int(a.sum()) for a in asked)
    values, null = [], []
    for layer in range(weights.spec.n_layers):
        hits: Any = 0
        drawn: Any = 0
        for at, logits in enumerate(succession_logits(found, layer)):
            best = logits.argmax(-1).cpu().numpy()[:, asked[at]]
            hits = hits + (best == right[at][asked[at]]).sum(-1)
            drawn = drawn + (best == shuffled[at][:, None]).sum(-1)
        values.append(torch.as_tensor(hits / total))
        null.append(torch.as_tensor(drawn / total))
    return PromptScores(weights.padded(values)[None], weights.padded(null), exact=True)


def _none(model: Model, settings: Settings) -> list[Task]:
    return []


def _run(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Succession:
    if model.tokenizer is None:
        raise RequestError("The successor detector is made of words and needs a tokenizer; load the model with one.")
    lists = ordered_lists(model.tokenizer)
    sizes = [len(one.ids) for one in lists]
    embedded = torch.split(effective_embedding(model, torch.cat([one.ids for one in lists])), sizes)
    return Succession(weights_for(model, settings), lists, tuple(embedded))


SUCCESSION = Kind("succession", "words in a fixed order, one token each", _none, _run)

SUCCESSOR = Detector(
    name="successor",
    title="Successor",
    kind="succession",
    measures="share of words (numbers, days, months, ordinals, letters) whose successor has the highest logit among "
    "the words of its list, after block 0's MLP and the head's OV circuit alone",
    null="the right answers of each list shuffled",
    unit="share of words",
    positions="none: single tokens through the weights",
    threshold=0.4,
    paper="Gould et al. 2023, Successor heads",
    url="https://arxiv.org/abs/2312.09230",
    score=_score,
    note="The MLP is fed as the model feeds it, through its norm; the code that the threshold of 0.4 is from feeds it "
    "the raw embedding. Words of several tokens are left out, which in some tokenizers are all numbers above 9.",
)
