"""Patterns of one prompt of few tokens, wherever they come from: exact entries of each head, and small pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from workbench.apps.library import RunLibrary, shortened
from workbench.errors import RequestError
from workbench.figures.pattern import colour_range
from workbench.figures.text import visible
from workbench.models import Head
from workbench.reports.examples import Pattern, patterns
from workbench.runs.patterns import stored_patterns

# Longer prompts are for the zoomable map; a page of this many words can still be read.
MOST_TOKENS = 512
# Cells of a thumbnail, and letters of a token that are shown.
SIDE, MOST_TEXT = 48, 60


@dataclass(frozen=True)
class ShortPatterns:
    """Heads on one prompt. `matrix` gives a head's pattern `[query, key]`, exact, zero where the mask hides it.

    `windows` has, by layer, how many keys a query sees at most, where it does not see all before it.
    """

    texts: tuple[str, ...]
    heads: tuple[Head, ...]
    matrix: Callable[[Head], Float[np.ndarray, "query key"]]
    start: Head
    windows: Mapping[int, int] = field(default_factory=dict)

    def named(self, text: str) -> Head:
        """A head by its name; refuses those whose pattern is not here."""
        head = Head.parse(text)
        if head not in set(self.heads):
            have = ", ".join(map(str, self.heads[:12])) + (" ..." if len(self.heads) > 12 else "")
            raise RequestError(f"There is no pattern of {head} here; there are those of {have}.")
        return head

    def triangle(self, head: Head) -> bytes:
        """What the mask shows of a pattern, row by row, as little-endian float32."""
        values = self.matrix(head)
        return values[np.tril_indices(len(values))].astype("<f4").tobytes()

    def thumbnails(self, layer: int) -> bytes:
        """Small pictures of a layer's heads, one byte a cell.

        Cells have the largest entry of theirs; 255 is the head's largest attention to any key but the first, and
        bytes go with the square root, so that weak stripes show.
        """
        heads = [head for head in self.heads if head.layer == layer]
        if not heads:
            raise RequestError(f"layer={layer}: there is no pattern of that layer here.")
        return b"".join(thumbnail(self.matrix(head)).tobytes() for head in heads)


def thumbnail(values: Float[np.ndarray, "query key"]) -> NDArray[np.uint8]:
    """A pattern in at most `SIDE` x `SIDE` cells, as `ShortPatterns.thumbnails` describes."""
    cell = cell_of(len(values))
    side = -(-len(values) // cell)
    padded = np.zeros((side * cell, side * cell), dtype=np.float32)
    padded[: len(values), : len(values)] = values
    tops = padded.reshape(side, cell, side, cell).max((1, 3))
    shares = np.sqrt(np.clip(tops / colour_range(values), 0, 1))
    small: NDArray[np.uint8] = np.round(shares * 255).astype(np.uint8)
    return small


def cell_of(tokens: int) -> int:
    """Tokens along the side of a thumbnail's cell."""
    return -(-tokens // SIDE)


def shown(text: str) -> str:
    """A token as the page shows it: what prints nothing as signs, the rest of a long one left out."""
    cut = text[:MOST_TEXT]
    return (visible(cut) if cut.strip(" ") else "␣" * len(cut) or "∅") + ("…" if len(text) > MOST_TEXT else "")


def telling(values: Float[np.ndarray, "query key"]) -> float:
    """How much a head's queries differ in what they look at: the mean over queries of the largest attention to a key
    in excess of what later queries give it on average, the first and the previous key and the query itself left out."""
    count = len(values)
    means = np.tril(values).sum(0) / np.arange(count, 0, -1)
    beyond = np.tril(values - means, k=-2)[:, 1:]
    return float(beyond.max(axis=1, initial=0.0).mean())


def most_telling(heads: Sequence[Head], matrix: Callable[[Head], Float[np.ndarray, "query key"]]) -> Head:
    """The head that is shown where none is asked for."""
    return max(heads, key=lambda head: telling(matrix(head)))


def stored(library: RunLibrary, run: str, name: str) -> ShortPatterns:
    """The stored patterns of a run that are as long as the one named."""
    known = stored_patterns(library.run(run))
    tokens = library.pattern(run, name).tokens
    if tokens > MOST_TOKENS:
        raise RequestError(
            f"The pattern {shortened(name)} has {tokens:,} tokens, and {MOST_TOKENS} can be shown token by token; "
            "look at its zoomable map."
        )
    alike = {
        Head(int(known[key]["layer"]), int(known[key]["head"])): key
        for key in known
        if library.pattern(run, key).tokens == tokens
    }
    windows = {head.layer: known[key]["window"] for head, key in alike.items() if known[key].get("window")}
    every = slice(0, tokens)

    def matrix(head: Head) -> NDArray[np.float32]:
        found: NDArray[np.float32] = library.pattern(run, alike[head]).entries(every, every).numpy()
        return found

    about = known[name]
    texts = _texts(library, run, tokens)
    return ShortPatterns(texts, tuple(sorted(alike)), matrix, Head(int(about["layer"]), int(about["head"])), windows)


def _texts(library: RunLibrary, run: str, tokens: int) -> tuple[str, ...]:
    """The run's tokens; where it has none, or others, their positions."""
    if library.run(run).has_table("tokens"):
        texts = library.frame(run, "tokens")["text"]
        if len(texts) == tokens:
            return tuple(map(str, texts))
    return tuple(f" {at}" for at in range(tokens))


def has_examples(library: RunLibrary, run: str) -> bool:
    """Whether a run keeps whole patterns of short prompts beside its scores."""
    found = library.run(run)
    return "patterns" in found.arrays and found.has_table("example_tokens")


def examples(library: RunLibrary, run: str) -> dict[str, list[Pattern]]:
    """The patterns that a run keeps beside its scores, by prompt."""
    kept: list[Pattern] = library.computed(run, ("patterns",), lambda: patterns(library.run(run)))
    by_prompt: dict[str, list[Pattern]] = {}
    for one in kept:
        if len(one.tokens) <= MOST_TOKENS:
            by_prompt.setdefault(one.example, []).append(one)
    return by_prompt


def example(library: RunLibrary, run: str, name: str) -> ShortPatterns:
    """One prompt's patterns of those that a run keeps beside its scores."""
    known = examples(library, run)
    if name not in known:
        have = ", ".join(map(shortened, known)) or "none"
        raise RequestError(f"The run {shortened(run)} keeps no patterns of {shortened(name)!r}; it has: {have}.")
    by_head = {Head(one.layer, one.index): np.tril(one.values) for one in known[name]}
    heads = tuple(sorted(by_head))
    return ShortPatterns(known[name][0].tokens, heads, by_head.__getitem__, most_telling(heads, by_head.__getitem__))
