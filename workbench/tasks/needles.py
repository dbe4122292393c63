"""Facts that nobody can guess, each with a question and the words of the fact that answer it.

The answer stands inside the needle word for word and behind a space, and is long enough that most of its
tokens can be followed from the needle to the copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.errors import RequestError


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, a question about it and the part of the sentence that answers the question."""

    name: str
    text: str
    question: str
    answer: str

    @property
    def lead(self) -> str:
        """The needle's words before the answer, with the space between."""
        return self.text[: self.text.index(f" {self.answer}") + 1]

    def __post_init__(self) -> None:
        if self.text.count(f" {self.answer}") != 1:
            raise RequestError(
                f"Needle {self.name!r}: the answer {self.answer!r} must stand exactly once in its text, behind a space."
            )


NEEDLES: tuple[Needle, ...] = (
    Needle(
        "place",
        "The lighthouse keeper of Varn hides her silver compass behind the third blue barrel in the old fish market.",
        "Where does the lighthouse keeper of Varn hide her silver compass?",
        "behind the third blue barrel in the old fish market",
    ),
    Needle(
        "dish",
        "The winter feast in the village of Ostrelle begins with smoked pear soup, black barley bread and a "
        "spoon of pine honey.",
        "What does the winter feast in the village of Ostrelle begin with?",
        "smoked pear soup, black barley bread and a spoon of pine honey",
    ),
    Needle(
        "password",
        "The password for the green gate of Castle Morrow is seven copper owls under a paper moon.",
        "What is the password for the green gate of Castle Morrow?",
        "seven copper owls under a paper moon",
    ),
    Needle(
        "repair",
        "Doctor Halvorsen repaired the broken clock with a violin string, two walnut shells and a drop of candle wax.",
        "What did Doctor Halvorsen repair the broken clock with?",
        "a violin string, two walnut shells and a drop of candle wax",
    ),
)
