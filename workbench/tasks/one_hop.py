"""A needle that answers only by inference: retrieval that cannot be done by copying.

After NoLiMa (Modarressi et al. 2025), on which LOCOS (arXiv 2607.01002) finds its heads. A sentence in a long text and
a question meet in no telling word; one step of common knowledge joins them. Two sorts, both our own:

* `INFERRED`: the answer stands nowhere in the prompt ("looks at the Eiffel Tower from her kitchen" - "Paris");
* `NAMED`: as in NoLiMa, the answer is a name in the sentence, and the question shares no other word with it.

The gold reply follows (words that lead up to the answer, the answer, a full stop), so that one pass scores the rows
that produce it. Each prompt can be given with its corrupt twin, whose needle is filler of as many tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks import corpus
from workbench.tasks.encoding import encode, padding_id
from workbench.tasks.haystack import Haystack, sentence_before, shifted
from workbench.tasks.task import NONE, Task, Value
from workbench.tasks.turns import Turn, check_counts

LEAST_HAYSTACK = 32
_TEMPLATE = (
    "Answer a question about the following text. The answer may follow from it without being written there.\n\n"
    "{context}\n\nQuestion: {question} Return only the answer."
)
# Other parts of the prose are tried so often when one happens to hold the answer.
_TRIES = 50


@dataclass(frozen=True)
class OneHop:
    """A sentence, a question, and a reply that ends in the answer (and a full stop)."""

    name: str
    text: str
    question: str
    lead: str
    answer: str

    @property
    def literal(self) -> bool:
        """Whether the answer stands in the sentence."""
        return _holds(self.text, self.answer)

    def __post_init__(self) -> None:
        if _holds(self.question, self.answer) or _holds(self.lead, self.answer):
            raise RequestError(f"Needle {self.name!r}: question or lead give the answer {self.answer!r} away.")


def _holds(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _inferred(name: str, text: str, question: str, lead: str, answer: str) -> OneHop:
    needle = OneHop(name, text, question, lead, answer)
    if needle.literal:
        raise RequestError(f"Needle {name!r}: the answer {answer!r} must not stand in its text.")
    return needle


INFERRED: tuple[OneHop, ...] = (
    _inferred(
        "kitchen",
        "Every morning Marta looks at the Eiffel Tower from her kitchen window.",
        "In which city does Marta live?",
        "Marta lives in",
        "Paris",
    ),
    _inferred(
        "desk",
        "From his desk Henrik can hear Big Ben strike the hour.",
        "In which city does Henrik work?",
        "Henrik works in",
        "London",
    ),
    _inferred(
        "birth",
        "Yuki was born a short walk from the Colosseum.",
        "In which city was Yuki born?",
        "Yuki was born in",
        "Rome",
    ),
    _inferred(
        "music",
        "Every Sunday Omar sits down at the eighty-eight black and white keys.",
        "Which musical instrument does Omar play?",
        "Omar plays the",
        "piano",
    ),
    _inferred(
        "pet",
        "For her birthday Lena was given a puppy that barks at the postman.",
        "What kind of animal does Lena have?",
        "Lena has a",
        "dog",
    ),
    _inferred(
        "fence",
        "Pavel painted the garden fence in the colour of a ripe banana.",
        "What is the colour of the fence?",
        "The fence is",
        "yellow",
    ),
    _inferred(
        "language",
        "At home Ines and her mother speak the language of Cervantes.",
        "Which language does Ines speak at home?",
        "At home Ines speaks",
        "Spanish",
    ),
    _inferred(
        "shop",
        "The shop of Tariq opens on the day that follows Monday.",
        "On which day does the shop of Tariq open?",
        "The shop of Tariq opens on",
        "Tuesday",
    ),
)
NAMED: tuple[OneHop, ...] = (
    OneHop(
        "tower",
        "Actually, Veronica lives next to the Eiffel Tower.",
        "Which person has been to France?",
        "The person is",
        "Veronica",
    ),
    OneHop(
        "pyramid",
        "In those years Gregor drove a taxi around the pyramids of Giza.",
        "Which person has been to Egypt?",
        "The person is",
        "Gregor",
    ),
    OneHop(
        "milk",
        "Since childhood Amina cannot drink any milk.",
        "Which person should not eat cheese?",
        "The person is",
        "Amina",
    ),
    OneHop(
        "vegan",
        "For ten years Ruben has been a strict vegan.",
        "Which person would refuse a slice of ham?",
        "The person is",
        "Ruben",
    ),
)


@dataclass(frozen=True)
class _Cell:
    ids: tuple[int, ...]
    text: str
    spans: dict[str, tuple[int, int]]


def one_hop(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 8,
    length: int = 192,
    seed: int = 0,
    needles: Sequence[OneHop] = INFERRED,
    *,
    corrupt: bool = False,
    chat: bool | None = None,
) -> Task:
    """Prompts of at most `length` tokens, reply included; the needles in turn, at depths spread over the text.

    Spans: `context`, `needle`, `elsewhere` (as many tokens of the text around it, drawn at random), `question`,
    `reply`, `answer`. With `corrupt` every prompt is followed by its twin, whose needle's tokens are filler; `info`
    says which is which under "role". ``chat`` as in `needle_grid`.
    """
    check_counts("one_hop", [("prompts", prompts, 1), ("needles", len(needles), 1)])
    turn, rng = Turn.of(tokenizer, chat), np.random.default_rng(seed)
    cells, info, answers = [], [], []
    for prompt in range(prompts):
        needle = needles[prompt % len(needles)]
        share = (prompt + 0.5) / prompts
        cell, hay = _fit(tokenizer, turn, needle, length, share, rng)
        about: dict[str, Value] = {"needle": needle.name, "depth": round(share, 3), "literal": needle.literal}
        cells.append(cell)
        info.append({**about, "role": "clean"})
        answers.append(needle.answer)
        if corrupt:
            cells.append(_corrupt(tokenizer, cell, hay))
            info.append({**about, "role": "corrupt"})
            answers.append(needle.answer)
    return _assemble(
        tokenizer,
        turn,
        cells,
        answers=tuple(answers),
        info=tuple(info),
        seed=seed,
        settings={
            "prompts": prompts,
            "length": length,
            "needles": [needle.name for needle in needles],
            "corrupt": corrupt,
            "chat": turn.chat,
            "corpus_sha256": corpus.digest(cell.text for cell in cells),
        },
    )


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    needle: OneHop,
    length: int,
    share: float,
    rng: np.random.Generator,
) -> tuple[_Cell, Haystack]:
    """Prose without the answer in it, cut until the whole prompt fits; joints can cost a token or two."""
    bare = _prompt(turn, needle, needle.text) + _reply(turn, needle)
    room = length - len(turn.prefix.ids) - len(encode(tokenizer, bare).ids)
    if room < LEAST_HAYSTACK:
        raise RequestError(
            f"A length of {length} tokens is too short for needle {needle.name!r}; the minimum with this tokenizer is "
            f"{length - room + LEAST_HAYSTACK}."
        )
    for _ in range(_TRIES):
        hay = Haystack(tokenizer, int(rng.integers(2**31)))
        if _holds(hay.first(room), needle.answer):
            continue
        budget = room
        while True:
            cell = _build(tokenizer, turn, hay.first(budget), needle, share, rng)
            excess = len(cell.ids) - length
            if excess <= 0:
                return cell, hay
            budget -= excess
    raise RequestError(f"Prose without the word {needle.answer!r} was not found; use another needle.")


def _prompt(turn: Turn, needle: OneHop, context: str) -> str:
    asked = turn.around(_TEMPLATE.format(context=context, question=needle.question))
    return asked if turn.chat else f"{asked}\nAnswer:"


def _reply(turn: Turn, needle: OneHop) -> str:
    return f"{'' if turn.chat else ' '}{needle.lead} {needle.answer}."


def _build(
    tokenizer: PreTrainedTokenizerBase, turn: Turn, hay: str, needle: OneHop, share: float, rng: np.random.Generator
) -> _Cell:
    at = sentence_before(hay, share * len(hay))
    left, right = hay[:at], hay[at:]
    context = f"{left} {needle.text}{right}" if left else f"{needle.text} {right}"
    prompt = _prompt(turn, needle, context)
    text = prompt + _reply(turn, needle)
    whole = encode(tokenizer, text)
    context_at, question_at = prompt.index(context), prompt.rindex(needle.question)
    needle_at, answer_at = prompt.index(needle.text, context_at), len(text) - len(needle.answer) - 1
    spans = {
        "context": whole.tokens_in(context_at, context_at + len(context)),
        "needle": whole.tokens_in(needle_at, needle_at + len(needle.text)),
        "question": whole.tokens_in(question_at, question_at + len(needle.question)),
        "reply": (whole.tokens_in(len(prompt), len(text))[0], len(whole.ids)),
        "answer": whole.tokens_in(answer_at, answer_at + len(needle.answer)),
    }
    spans["elsewhere"] = _elsewhere(spans["context"], spans["needle"], rng)
    return _Cell((*turn.prefix.ids, *whole.ids), text, shifted(spans, len(turn.prefix.ids)))


def _elsewhere(context: tuple[int, int], needle: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """A run of as many tokens of the context as the needle has, none of them the needle's."""
    size = needle[1] - needle[0]
    starts = [*range(context[0], needle[0] - size + 1), *range(needle[1], context[1] - size + 1)]
    if not starts:
        raise RequestError(f"No {size} tokens in a row stand before or after the needle; ask for longer prompts.")
    first = starts[int(rng.integers(len(starts)))]
    return first, first + size


def _corrupt(tokenizer: PreTrainedTokenizerBase, cell: _Cell, hay: Haystack) -> _Cell:
    """The same prompt with as many tokens of later prose in the needle's place."""
    first, last = cell.spans["needle"]
    filler = encode(tokenizer, hay.first(2 * len(cell.ids))).ids[-(last - first) :]
    ids = (*cell.ids[:first], *filler, *cell.ids[last:])
    return _Cell(ids, str(tokenizer.decode(list(ids))), cell.spans)


def _assemble(
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    cells: Sequence[_Cell],
    answers: tuple[str, ...],
    info: tuple[dict[str, Value], ...],
    seed: int,
    settings: dict[str, object],
) -> Task:
    texts = [cell.text for cell in cells]
    pad = padding_id(tokenizer)
    batch = Batch.from_ids([cell.ids for cell in cells], pad_id=pad, texts=texts)
    positions = _answer_rows(cells)
    how = "in a chat turn" if turn.chat else "as plain text"
    return Task(
        name="one_hop",
        caption=(
            f"{len(cells)} prompts whose answer follows from one sentence in prose from pydoc's topics by a step of "
            f"common knowledge, asked {how} (up to {settings['length']} tokens); {turn.prefix.policy}."
        ),
        seed=seed,
        batch=batch,
        specials=turn.prefix.policy,
        answer_ids=torch.where(positions == NONE, NONE, batch.ids.gather(1, positions.clamp(min=0) + 1)),
        answer_positions=positions,
        spans={name: torch.tensor([cell.spans[name] for cell in cells]) for name in cells[0].spans},
        decoding=Batch.from_ids([cell.ids[: cell.spans["reply"][0]] for cell in cells], pad_id=pad, side="left"),
        answers=answers,
        settings=settings,
        info=info,
    )


def _answer_rows(cells: Sequence[_Cell]) -> Tensor:
    most = max(last - first for first, last in (cell.spans["answer"] for cell in cells))
    rows = torch.full((len(cells), most), NONE)
    for at, cell in enumerate(cells):
        first, last = cell.spans["answer"]
        rows[at, : last - first] = torch.arange(first - 1, last - 1)
    return rows
