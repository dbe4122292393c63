"""The view of a stored pattern that a reader had at hand: a picture with its strips, range and legend.

A report holds no q and k, so that the picture cannot be zoomed; what it shows is told exactly, and how to see more.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from workbench.figures.text import number, visible

SIDE = 640
_LEFT, _TOP, _STRIP = 128, 64, 24
_NAMES = {"column_mean": "mean of the column", "entropy": "entropy", "sink": "mass on key 0"}


@dataclass(frozen=True)
class Peak:
    """A high entry: its row and key, its probability, exact, and both tokens where the run has them."""

    row: int
    key: int
    value: float
    row_token: str = ""
    key_token: str = ""

    @property
    def tokens(self) -> str:
        """Both tokens, made visible."""
        return f"{visible(self.row_token)} → {visible(self.key_token)}" if self.row_token or self.key_token else ""

    @property
    def text(self) -> str:
        """The value, written briefly."""
        return number(self.value, 3)


@dataclass(frozen=True)
class PatternView:
    """Rows and keys from first to behind the last, drawn in cells of `cell` x `cell` entries.

    `pictures` are PNGs for light and dark pages, `strips` values along rows or keys in equal parts, `address` where the
    dashboard shows the same; `peaks` are the highest entries, those of key 0 among them where `first` is set.
    """

    head: str
    tokens: int
    rows: tuple[int, int]
    keys: tuple[int, int]
    cell: int
    how: str
    scale: str
    floor: float
    top: float
    pictures: Mapping[str, bytes]
    strips: Mapping[str, Sequence[float]]
    spans: tuple[tuple[int, int], ...]
    peaks: tuple[Peak, ...]
    address: str
    first: bool = False

    @property
    def caption(self) -> str:
        """What is drawn, in words."""
        (top, bottom), (left, right) = self.rows, self.keys
        shown = {"max": "maximum", "mean": "mean"}[self.how]
        drawn = "a single entry" if self.cell == 1 else f"the {shown} of {self.cell} x {self.cell} entries"
        kind = "logarithmic" if self.scale == "log" else "linear"
        strips = ", ".join(f"{_NAMES[name]} up to {number(_most(values))}" for name, values in self.strips.items())
        beside = f" Strips, position 0 left out of their range: {strips}." if strips else ""
        return (
            f"Attention of {self.head}, rows {top:,} to {bottom - 1:,} (queries) to keys {left:,} to {right - 1:,} of "
            f"{self.tokens:,} tokens. A cell is {drawn}. Colours are {kind}, from {self.low} to {self.high}; what is "
            f"above has the last colour.{beside}"
        )

    @property
    def low(self) -> str:
        """Where the colours begin."""
        return "0" if self.floor == 0 else f"{self.floor:.0e}"

    @property
    def high(self) -> str:
        """Where they end."""
        return f"{self.top:.4g}"

    @property
    def size(self) -> int:
        """Bytes that it takes in a file."""
        return sum(4 * len(picture) // 3 for picture in self.pictures.values()) + 30_000

    def drawing(self) -> Markup:
        """The picture as SVG: one map for each colour scheme, strips and axes in the page's colours."""
        width, height = _LEFT + SIDE + 12, _TOP + SIDE + 8
        inside = Markup("").join([*self._maps(), *self._spans(), *self._strips(), *self._axes()])
        return Markup(
            '<svg class="pattern-view" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{told}">'
            "{inside}</svg>"
        ).format(w=width, h=height, told=self.caption, inside=inside)

    def _maps(self) -> Iterator[Markup]:
        yield Markup('<rect class="ground" x="{}" y="{}" width="{}" height="{}"/>').format(_LEFT, _TOP, SIDE, SIDE)
        wide, high = (SIDE * self._share(part) for part in (self.keys, self.rows))
        for kind, picture in self.pictures.items():
            yield Markup(
                '<image class="{}" x="{}" y="{}" width="{:.1f}" height="{:.1f}" preserveAspectRatio="none" '
                'href="data:image/png;base64,{}"/>'
            ).format(f"{kind}-only", _LEFT, _TOP, wide, high, base64.b64encode(picture).decode())

    def _share(self, part: tuple[int, int]) -> float:
        return (part[1] - part[0]) / self._span

    @property
    def _span(self) -> int:
        return max(self.rows[1] - self.rows[0], self.keys[1] - self.keys[0])

    def _spans(self) -> Iterator[Markup]:
        for first, last in self.spans:
            for part, upright in ((self.keys, True), (self.rows, False)):
                low, high = max(first, part[0]), min(last, part[1])
                if low >= high:
                    continue
                at, size = SIDE * (low - part[0]) / self._span, max(1.0, SIDE * (high - low) / self._span)
                box = (_LEFT + at, _TOP, size, SIDE) if upright else (_LEFT, _TOP + at, SIDE, size)
                yield Markup('<rect class="span" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(*box)

    def _strips(self) -> Iterator[Markup]:
        for name, values in self.strips.items():
            along = name == "column_mean"
            most = _most(values) or 1.0
            length = SIDE * self._share(self.keys if along else self.rows)
            step, bars = length / max(1, len(values)), []
            for index, value in enumerate(values):
                size = min(1.0, max(0.0, value / most)) * _STRIP
                at = index * step
                left = _LEFT - 6 - (0 if name == "entropy" else _STRIP + 2)
                if along:
                    bars.append(f"M{_LEFT + at:.1f} {_TOP - 6}v{-size:.1f}h{step:.2f}v{size:.1f}z")
                else:
                    bars.append(f"M{left} {_TOP + at:.1f}h{-size:.1f}v{step:.2f}h{size:.1f}z")
            yield Markup('<path class="strip" d="{}"/>').format("".join(bars))

    def _axes(self) -> Iterator[Markup]:
        text = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
        for at in _ticks(*self.keys):
            place = _LEFT + SIDE * (at - self.keys[0]) / self._span
            yield text.format(place, _TOP - _STRIP - 12, "middle", f"{at:,}")
        for at in _ticks(*self.rows):
            place = _TOP + SIDE * (at - self.rows[0]) / self._span
            yield text.format(_LEFT - 2 * _STRIP - 14, place + 4, "end", f"{at:,}")
        yield text.format(_LEFT, 10, "start", "key (source); rows are queries (destinations)")


def _most(values: Sequence[float]) -> float:
    """The end of a strip; its first part, which may hold position 0, is left out."""
    return max([float(value) for value in values[1:]], default=float(values[0]) if len(values) else 0.0)


def _ticks(first: int, last: int) -> list[int]:
    span = last - first
    power = 10 ** max(0, len(str(max(1, span // 6))) - 1)
    step = next((one * power for one in (1, 2, 5, 10) if span / (one * power) <= 8), 10 * power)
    return list(range(-(-first // step) * step, last, step))
