"""Facts that nobody can guess, each with a question and the words of the fact that answer it.

The answer stands inside the needle word for word and behind a space, and is long enough that most of its
tokens can be followed from the needle to the copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.errors import RequestError


@dataclass(frozen=True)
class Needle:
    """A sentence (or two) to hide, a question about it and the part of it that answers the question.

    `reply` is what a chat model's answer begins with; the needle's own words before the answer by default.
    """

    name: str
    text: str
    question: str
    answer: str
    reply: str = ""

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

# Of Wu et al. 2024, word for word; where the answer began with a capital, it has the needle's small letter here.
PUBLISHED_NEEDLES: tuple[Needle, ...] = (
    Needle(
        "report",
        "A new report from the WMO shows that records were once again broken, and in some cases smashed, for "
        "greenhouse gas levels, surface temperatures, ocean heat and acidification.",
        "What does a new report from WMO shows ?",
        "records were once again broken, and in some cases smashed, for greenhouse gas levels, surface temperatures, "
        "ocean heat and acidification.",
    ),
    Needle(
        "beijing",
        "The best thing to do in Beijing is to take a walk in Chaoyang Park and have a cup of Espresso in the evening.",
        "What is the best thing to do in Beijing ?",
        "take a walk in Chaoyang Park and have a cup of Espresso in the evening",
    ),
    Needle(
        "green",
        "Mr Green is disliked by everyone because he is a mean person and also he can't ride a horse or dive a car.",
        "Why does everyone dislikes Mr Green ?",
        "because he is a mean person and also he can't ride a horse or dive a car.",
    ),
)

# Two facts each, of which neither answers alone: a name leads from the one to the other, or two are compared.
REASONING_NEEDLES: tuple[Needle, ...] = (
    Needle(
        "baker",
        "Edda Fairholt is 61 years old. The baker of Lorn is called Edda Fairholt.",
        "How old is the baker of Lorn?",
        "61 years old",
        "The baker of Lorn is ",
    ),
    Needle(
        "cousins",
        "Bruno Keel is older than Hana Voss. Hana Voss is older than her cousin Ludo Marsh.",
        "Who is the youngest of Bruno Keel, Hana Voss and her cousin?",
        "Ludo Marsh",
        "The youngest of the three is ",
    ),
    Needle(
        "trades",
        "Tessa Brandt, a weaver of linen, is 34 years old. Ivor Quill, a maker of barrels, is 47 years old.",
        "What is the trade of the older of Tessa Brandt and Ivor Quill?",
        "maker of barrels",
        "The older of the two is a ",
    ),
    Needle(
        "geese",
        "The clockmaker of Perrin has a daughter named Sela Anwar. Sela Anwar keeps eleven white geese.",
        "What does the daughter of the clockmaker of Perrin keep?",
        "eleven white geese",
        "The daughter of the clockmaker of Perrin keeps ",
    ),
)
