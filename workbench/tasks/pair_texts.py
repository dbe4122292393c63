"""From templates to pairs of token ids with roles, for any tokenizer.

1. `fill` writes words into a template and remembers which characters are which role.
2. `Pool` keeps the words that are one token where they stand, and lists those that are not.
3. `assemble` tokenises clean, corrupt and reference texts, finds each role's column in all three, and refuses a pair
   whose columns differ; `usable` asks the same about one example, to drop a template before anything is drawn.

Nothing is cut or padded to make lengths equal: words of one token do that.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.encoding import Prefix, default_prefix, encode, padding_id, start_token
from workbench.tasks.pairs import KnownCircuit, PairTask
from workbench.tasks.task import NONE, Value

END = "END"


@dataclass(frozen=True)
class Filled:
    """A text and the characters ``[first, last)`` of each role in it."""

    text: str
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """One pair as text; answers and foils are what may follow, with their leading space, or ids."""

    clean: Filled
    corrupt: Filled
    answers: tuple[str | int, ...]
    foils: tuple[str | int, ...]
    info: Mapping[str, Value] = field(default_factory=dict)
    reference: Filled | None = None


@dataclass(frozen=True)
class Pool:
    """Words that are one token each in every context asked for, and those that are not."""

    what: str
    words: tuple[str, ...]
    dropped: tuple[str, ...]

    def at_least(self, count: int) -> Pool:
        """Itself; refused where too few words are left."""
        if len(self.words) < count:
            raise RequestError(
                f"This tokenizer takes {len(self.words)} of {len(self.words) + len(self.dropped)} {self.what} as "
                f"single tokens, and {count} are needed; use another task, or a tokenizer with a larger vocabulary "
                f"(cut into pieces: {', '.join(repr(word) for word in self.dropped[:5])})."
            )
        return self


def fill(template: str, words: Mapping[str, str]) -> Filled:
    """Put words into ``{word}`` or ``{word:ROLE}``; the latter is remembered as ROLE."""
    parts, places, length = [], {}, 0
    for literal, name, role, _ in string.Formatter().parse(template):
        written = words[name] if name is not None else ""
        length += len(literal)
        if role:
            places[role] = (length, length + len(written))
        length += len(written)
        parts += [literal, written]
    return Filled("".join(parts), places)


def continuation(tokenizer: PreTrainedTokenizerBase, text: str, answer: str) -> int | None:
    """The id of an answer behind a text, or None where it is not exactly one more token."""
    before, whole = encode(tokenizer, text).ids, encode(tokenizer, text + answer).ids
    if len(whole) != len(before) + 1 or whole[:-1] != before or whole[-1] == tokenizer.unk_token_id:
        return None
    return whole[-1]


def pool(
    tokenizer: PreTrainedTokenizerBase, what: str, words: Iterable[str], contexts: Sequence[str] = ("so ",)
) -> Pool:
    """Words that are single and distinct tokens behind each context (``"so "``: within a sentence)."""
    kept: dict[tuple[int, ...], str] = {}
    dropped = []
    for word in dict.fromkeys(words):
        # A context's last space belongs to the word, as most tokenizers have it.
        pieces = [(text[:-1], f" {word}") if text.endswith(" ") else (text, word) for text in contexts]
        ids = [continuation(tokenizer, text, piece) for text, piece in pieces]
        key = tuple(-1 if one is None else one for one in ids)
        if -1 in key or key in kept:
            dropped.append(word)
        else:
            kept[key] = word
    return Pool(what, tuple(kept.values()), tuple(dropped))


def usable(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> bool:
    """Whether this tokenizer gives both texts the same columns and each answer one token."""
    try:
        _row(tokenizer, Prefix((), ""), pair)
    except RequestError:
        return False
    return True


def templates_for(
    tokenizer: PreTrainedTokenizerBase, task: str, examples: Mapping[str, Pair]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The templates whose example is usable, and the others; refused where none is."""
    kept = tuple(name for name, pair in examples.items() if usable(tokenizer, pair))
    if not kept:
        first = next(iter(examples.values()))
        # Says what is wrong with the first one.
        _row(tokenizer, Prefix((), ""), first)
        raise RequestError(f"{task} has no templates; name at least one.")
    return kept, tuple(name for name in examples if name not in kept)


def beginning(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> Prefix:
    """``bos``: None does what the tokenizer does, True puts a start token before each prompt, False none."""
    if bos is None:
        return default_prefix(tokenizer)
    return start_token(tokenizer) if bos else Prefix((), "nothing before the text")


def check_count(task: str, prompts: int) -> None:
    """At least one pair must be asked for."""
    if prompts < 1:
        raise RequestError(f"prompts={prompts}: {task} needs at least one pair.")


def choose(setting: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is no choice."""
    listed = list(choices)
    if value not in listed:
        raise RequestError(f"{setting}={value!r} is unknown; choose from {', '.join(repr(one) for one in listed)}.")


@dataclass(frozen=True)
class _Row:
    clean: list[int]
    corrupt: list[int]
    reference: list[int] | None
    roles: dict[str, int]
    answers: list[int]
    foils: list[int]


def assemble(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    name: str,
    caption: str,
    seed: int,
    bos: bool | None,
    metric: str = "logit_difference",
    circuit: KnownCircuit | None = None,
    dropped: Mapping[str, tuple[str, ...]] | None = None,
) -> PairTask:
    """Tokenise pairs and put them into one task; what does not fit is refused, with its text."""
    prefix, pad = beginning(tokenizer, bos), padding_id(tokenizer)
    rows = [_row(tokenizer, prefix, pair) for pair in pairs]
    texts = [pair.reference.text for pair in pairs if pair.reference is not None]
    references = [row.reference for row in rows if row.reference is not None]
    return PairTask(
        name=name,
        caption=f"{len(pairs)} pairs: {caption}; {prefix.policy}.",
        seed=seed,
        specials=prefix.policy,
        clean=Batch.from_ids([row.clean for row in rows], pad_id=pad, texts=[pair.clean.text for pair in pairs]),
        corrupt=Batch.from_ids([row.corrupt for row in rows], pad_id=pad, texts=[pair.corrupt.text for pair in pairs]),
        references=Batch.from_ids(references, pad_id=pad, texts=texts) if references else None,
        answers=together([row.answers for row in rows]),
        foils=together([row.foils for row in rows]),
        position=torch.tensor([row.roles[END] for row in rows]),
        # A role counts where all pairs have it.
        roles={
            role: torch.tensor([row.roles[role] for row in rows])
            for role in rows[0].roles
            if all(role in row.roles for row in rows)
        },
        metric=metric,
        circuit=circuit,
        info=tuple(pair.info for pair in pairs),
        dropped={what: words for what, words in (dropped or {}).items() if words},
    )


def together(rows: Sequence[Sequence[int]]) -> Int[Tensor, "prompt m"]:
    """Rows of ids as one tensor, filled up with -1."""
    found = torch.full((len(rows), max(len(row) for row in rows)), NONE)
    for index, row in enumerate(rows):
        found[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return found


def _row(tokenizer: PreTrainedTokenizerBase, prefix: Prefix, pair: Pair) -> _Row:
    clean, roles = _columns(tokenizer, prefix, pair.clean)
    others = {"corrupt": pair.corrupt} | ({} if pair.reference is None else {"reference": pair.reference})
    found = {}
    for label, filled in others.items():
        found[label], there = _columns(tokenizer, prefix, filled)
        if len(found[label]) != len(clean) or there != roles:
            moved = [f"{role} at {at} and {there.get(role)}" for role, at in roles.items() if there.get(role) != at]
            raise RequestError(
                f"The clean text {pair.clean.text!r} has {len(clean)} tokens and the {label} one {filled.text!r} "
                f"{len(found[label])}{'; ' if moved else ''}{', '.join(moved)}: roles must stand at the same "
                "columns. Replace words by others of as many tokens."
            )
    return _Row(
        clean,
        found["corrupt"],
        found.get("reference"),
        roles,
        _ids(tokenizer, pair.clean.text, pair.answers),
        _ids(tokenizer, pair.clean.text, pair.foils),
    )


def _columns(tokenizer: PreTrainedTokenizerBase, prefix: Prefix, filled: Filled) -> tuple[list[int], dict[str, int]]:
    """Ids with what stands before them, and the column of each role's last token."""
    encoded, shift = encode(tokenizer, filled.text), len(prefix.ids)
    if not encoded.ids:
        raise RequestError(f"The text {filled.text!r} has no tokens; give a longer one.")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in encoded.ids:
        first, last = encoded.offsets[encoded.ids.index(tokenizer.unk_token_id)]
        raise RequestError(
            f"The tokenizer does not know {filled.text[first:last]!r} of {filled.text!r}; use a task without it, or a "
            "tokenizer that covers it."
        )
    roles = {role: encoded.tokens_in(*place)[1] - 1 + shift for role, place in filled.places.items()}
    return [*prefix.ids, *encoded.ids], {**roles, END: len(encoded.ids) - 1 + shift}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, answers: Sequence[str | int]) -> list[int]:
    found = []
    for answer in answers:
        one = answer if isinstance(answer, int) else continuation(tokenizer, text, answer)
        if one is None:
            raise RequestError(
                f"{answer!r} is not one known token behind {text[-40:]!r}; choose a word that is, with the leading "
                "space that the tokenizer expects."
            )
        found.append(one)
    # Two words may begin alike only where one of them is not a single token, so this keeps the order.
    return list(dict.fromkeys(found))
