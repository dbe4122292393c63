"""Text to token ids with a stated policy for special tokens, and characters to tokens and back.

Whether a prompt begins with a start token moves sink numbers by tens of points, and tokenizers differ
(Llama's adds one, GPT-2's and Qwen's do not), so each task records in words what was put before its
prompts.  Anything a tokenizer would put *after* a text is left out: the prompts are to be continued.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text; `offsets` are the characters of each token, its leading white space left out."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]

    def tokens_in(self, first: int, last: int) -> tuple[int, int]:
        """The half-open run of tokens that hold the characters ``[first, last)``."""
        inside = [
            index for index, (start, end) in enumerate(self.offsets) if start < last and end > first and end > start
        ]
        if not inside:
            raise RequestError(f"No token holds the characters {first} to {last} of the text.")
        return inside[0], inside[-1] + 1


@dataclass(frozen=True)
class Prefix:
    """The ids before each prompt and the policy in words."""

    ids: tuple[int, ...]
    policy: str


def default_prefix(tokenizer: PreTrainedTokenizerBase) -> Prefix:
    """What the tokenizer puts before a text when left to itself."""
    plain = _ids(tokenizer, "a", special=False)
    full = _ids(tokenizer, "a", special=True)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            if not start:
                return Prefix((), "tokenizer default: nothing before the text")
            added = tuple(full[:start])
            return Prefix(added, f"tokenizer default: {_names(tokenizer, added)} before the text")
    raise RequestError(
        f"{type(tokenizer).__name__} changes the text itself when it adds special tokens; "
        "pass a tokenizer that only puts tokens around it."
    )


def start_token(tokenizer: PreTrainedTokenizerBase) -> Prefix:
    """A start token whether or not the tokenizer adds one: its own, else its end token."""
    for kind in ("bos", "eos"):
        found: int | None = getattr(tokenizer, f"{kind}_token_id")
        if found is not None:
            why = "start token" if kind == "bos" else "end token, for want of a start token,"
            return Prefix((found,), f"{why} {_names(tokenizer, (found,))} before the text")
    raise RequestError(f"{type(tokenizer).__name__} has neither a start nor an end token; ask for bos=False.")


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with; masks say what is padding."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    return 0


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that stand for no ordinary text."""
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Tokenise without adding special tokens."""
    if not tokenizer.is_fast:
        raise RequestError(
            f"{type(tokenizer).__name__} cannot say which characters a token covers; load the fast tokenizer "
            "(use_fast=True), which has a tokenizer.json."
        )
    found: Any = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
        return_attention_mask=False,
    )
    offsets = []
    for start, end in found["offset_mapping"]:
        piece = text[start:end]
        offsets.append((end - len(piece.lstrip()), end))
    return Encoded(text, tuple(found["input_ids"]), tuple(offsets))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    found: Any = tokenizer(text, add_special_tokens=special, verbose=False)
    return list(found["input_ids"])


def _names(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return " ".join(str(name) for name in tokenizer.convert_ids_to_tokens(list(ids)))
