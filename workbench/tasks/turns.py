"""What stands around a question: a chat turn where the tokenizer has a template, nothing where it has none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.tasks.encoding import Prefix, default_prefix

# Stands for the user's words while the template is rendered; occurs in no text.
_MARK = "\u2063workbench\u2063"
# Names of models that were trained to answer in a chat turn (gemma-2-2b-it, Llama-3.1-8B-Instruct, Qwen1.5-14B-Chat).
_CHAT_NAME = re.compile(r"(?:^|[-_./])(?:instruct|chat|it)(?:[-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Turn:
    """Text before and after the user's words, and the ids that each prompt begins with."""

    before: str
    after: str
    prefix: Prefix
    chat: bool

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, chat: bool | None = None) -> Turn:
        """``chat``: None uses the tokenizer's chat template if there is one, False never, True insists on it."""
        template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not template:
            raise RequestError(
                f"chat=True, but {type(tokenizer).__name__} has no chat template; pass chat=False or nothing."
            )
        name = str(getattr(tokenizer, "name_or_path", ""))
        if chat is None and not template and _CHAT_NAME.search(name.rstrip("/").rpartition("/")[2]):
            raise RequestError(
                f"By its name {name!r} is a chat model, but its tokenizer has no chat template, and a plain prompt "
                "would measure something else: give it its template (tokenizer.chat_template, or chat_template.jinja "
                "in the model's folder), or pass chat=False to ask in plain text all the same."
            )
        if chat is False or not template:
            return Turn("", "", default_prefix(tokenizer), chat=False)
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        before, found, after = str(rendered).partition(_MARK)
        if not found:
            raise RequestError("The chat template does not repeat the user's words; pass chat=False.")
        return Turn(before, after, Prefix((), "chat template: the special tokens that it writes"), chat=True)

    def around(self, words: str) -> str:
        """The prompt that asks these words."""
        return self.before + words + self.after


def check_counts(what: str, counts: Sequence[tuple[str, int, int]]) -> None:
    """`RequestError` for a size below its least, by name."""
    for name, value, least in counts:
        if value < least:
            raise RequestError(f"{what}: {name}={value} is too small; the least is {least}.")
