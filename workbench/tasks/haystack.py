"""What a fact is hidden in: prose cut to tokens, a place behind a sentence, and the frame of question and answer.

Shared by the tasks that hide something in a long text; see `needle` for the order of things.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.tasks import corpus
from workbench.tasks.encoding import Encoded, Prefix, default_prefix, encode

PLAIN = "{context}\n\nBased on the content of the book, Question: {question}\nAnswer:"
CHAT = "<book>{context}</book>\nBased on the content of the book, Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Frame:
    """What stands around the user's words, and what each prompt begins with."""

    before: str
    after: str
    prefix: Prefix
    chat: bool

    def prompt(self, context: str, question: str) -> str:
        """What the model is asked about a book."""
        return self.turn((CHAT if self.chat else PLAIN).format(context=context, question=question))

    def turn(self, words: str) -> str:
        """The words as the model reads them."""
        return self.before + words + self.after


def frame_of(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> Frame:
    """``chat``: None uses the tokenizer's chat template if there is one, False never, True insists on it."""
    template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not template:
        raise RequestError(
            f"chat=True, but {type(tokenizer).__name__} has no chat template; pass chat=False or nothing."
        )
    if chat is False or not template:
        return Frame("", "", default_prefix(tokenizer), chat=False)
    mark = "\u2063workbench\u2063"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = str(rendered).partition(mark)
    if not found:
        raise RequestError("The chat template does not repeat the user's words; pass chat=False.")
    return Frame(before, after, Prefix((), "chat template: the special tokens that it writes"), chat=True)


class Haystack:
    """Prose from a random start on, tokenised once and as long as it was asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self._tokenizer = tokenizer
        self._text = corpus.prose_text(start)
        self._encoded = Encoded("", (), ())

    def first(self, tokens: int) -> str:
        """The text of about so many tokens."""
        while len(self._encoded.ids) < tokens:
            wanted = max(2 * len(self._encoded.text), 8 * tokens)
            while len(self._text) < wanted:
                self._text += "\n\n" + self._text
            self._encoded = encode(self._tokenizer, self._text[:wanted])
        return self._text[: self._encoded.offsets[tokens - 1][1]] if tokens else ""


def hidden(tokenizer: PreTrainedTokenizerBase, hay: str, needle: str, percent: float) -> str:
    """The haystack with a needle at a depth, moved left until it stands behind a sentence."""
    target = _characters(tokenizer, hay, percent)
    at = max(end for end in [0, *corpus.sentence_ends(hay)] if end <= target)
    # At full depth nothing stands behind the needle, not even the beginning of a sentence.
    left, right = hay[:at], "" if percent == 100 else hay[at:]
    return f"{left} {needle}{right}" if left else f"{needle} {right}".rstrip()


def _characters(tokenizer: PreTrainedTokenizerBase, hay: str, percent: float) -> int:
    """The character at a share of the tokens."""
    offsets = encode(tokenizer, hay).offsets
    token = int(len(offsets) * percent / 100)
    return offsets[token][0] if token < len(offsets) else len(hay)


def refuse_straddling(whole: Encoded, token: int, start: int) -> None:
    """Nothing can be decoded from a prompt that ends within a token."""
    if whole.offsets[token][0] < start:
        first, last = whole.offsets[token]
        raise RequestError(
            f"The tokenizer joins the answer's start to what stands before it in one token "
            f"({whole.text[first:last]!r}), so nothing can be decoded from the prompt alone; pass the other "
            "setting of chat."
        )
