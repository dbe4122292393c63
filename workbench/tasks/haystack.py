"""What a fact is hidden in: prose cut to tokens, a place behind a sentence, and the question about it.

Shared by the tasks that hide something in a long text; see `needle` for the order of things.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.tasks import corpus
from workbench.tasks.encoding import Encoded, encode
from workbench.tasks.turns import Turn

PLAIN = "{context}\n\nBased on the content of the book, Question: {question}\nAnswer:"
CHAT = "<book>{context}</book>\nBased on the content of the book, Question: {question}\nAnswer:"


def about_book(turn: Turn, context: str, question: str) -> str:
    """The prompt that asks about a book."""
    return turn.around((CHAT if turn.chat else PLAIN).format(context=context, question=question))


class Haystack:
    """Prose from a random start on, tokenised once and as long as it was asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self._tokenizer = tokenizer
        self._text = corpus.prose_text(start)
        self._encoded = Encoded("", (), ())

    def first(self, tokens: int) -> str:
        """The text of about so many tokens."""
        if tokens < 1:
            return ""
        while len(self._encoded.ids) < tokens:
            wanted = max(2 * len(self._encoded.text), 8 * tokens)
            while len(self._text) < wanted:
                self._text += "\n\n" + self._text
            self._encoded = encode(self._tokenizer, self._text[:wanted])
        return self._text[: self._encoded.offsets[tokens - 1][1]]


def sentence_before(hay: str, at: float) -> int:
    """The character behind the last sentence that ends at or before one; 0 if none does."""
    return max(end for end in [0, *corpus.sentence_ends(hay)] if end <= at)


def hidden(tokenizer: PreTrainedTokenizerBase, hay: str, needle: str, percent: float) -> str:
    """The haystack with a needle at a depth, moved left until it stands behind a sentence."""
    at = sentence_before(hay, _characters(tokenizer, hay, percent))
    # At full depth nothing stands behind the needle, not even the beginning of a sentence.
    left, right = hay[:at], "" if percent == 100 else hay[at:]
    return f"{left} {needle}{right}" if left else f"{needle} {right}".rstrip()


def _characters(tokenizer: PreTrainedTokenizerBase, hay: str, percent: float) -> int:
    """The character at a share of the tokens."""
    offsets = encode(tokenizer, hay).offsets
    token = int(len(offsets) * percent / 100)
    return offsets[token][0] if token < len(offsets) else len(hay)


def shifted(spans: dict[str, tuple[int, int]], by: int) -> dict[str, tuple[int, int]]:
    """Half-open token runs, moved behind a prefix."""
    return {name: (first + by, last + by) for name, (first, last) in spans.items()}


def refuse_straddling(whole: Encoded, token: int, start: int) -> None:
    """Nothing can be decoded from a prompt that ends within a token."""
    if whole.offsets[token][0] < start:
        first, last = whole.offsets[token]
        raise RequestError(
            f"The tokenizer joins the answer's start to what stands before it in one token "
            f"({whole.text[first:last]!r}), so nothing can be decoded from the prompt alone; pass the other "
            "setting of chat."
        )
