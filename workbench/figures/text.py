"""Texts in figures: numbers written briefly, tokens made visible and harmless, captions carried as data.

Plotly reads a small HTML in every text, links included, and token texts come from prompts. So every text that
was not written here goes through `safe` before it enters a figure.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

# a difference or an interval below this is rounding, whatever its unit
_NEGLIGIBLE = 1e-6
# what `workbench.heads.verify` calls a set of heads that no detector named
BY_HAND = "chosen"

_VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}
# marks, embeddings, overrides and isolates: all that changes the direction of the text behind it
_REORDERING = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def safe(text: object) -> str:
    """The text with HTML taken out of action and its control characters visible, for any plotly label."""
    return html.escape(visible(str(text)), quote=False)


def visible(text: str) -> str:
    """A token's text with line ends, tabs and a lone or leading space shown as signs."""
    shown = "".join(_VISIBLE.get(c, c if c.isprintable() else _escape(c)) for c in text)
    if shown.startswith(" "):
        shown = "␣" + shown[1:]
    return shown or "∅"


def in_order(text: str) -> str:
    """The text with every control that could reorder the page around it as a visible escape, `\\u202e`.

    Everything else stays, so this may be applied to any text, also twice.
    """
    return _REORDERING.sub(lambda found: _escape(found[0]), text)


def form(row: Mapping[str, Any]) -> str:
    """How heads of a row of `verification` were ablated, to stand before the word "ablation": `mean`, `50 % mean`."""
    strength = row.get("strength")
    if not isinstance(strength, Real) or math.isnan(strength) or strength == 1:
        return str(row["how"])
    return f"{float(strength) * 100:.3g} % {row['how']}"


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def decimals(*values: float, digits: int = 2) -> int:
    """How many decimals show the largest of the values with at least two figures."""
    size = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if size >= 100:
        return max(digits - 1, 0) if size < 1000 else 0
    if size < _NEGLIGIBLE or size >= 10.0 ** (1 - digits):
        return digits
    return digits + 1 if size >= 10.0**-digits else digits + 2


def number(value: object, digits: int = 2, places: int | None = None, beside: Sequence[float] = ()) -> str:
    """A number as text: `0.93`, `12,400`, `1.2e−05`, `–` for a missing one; `places` fixes its decimals.

    Far below the last decimal of the numbers that it stands `beside`, it is zero and has their decimals.
    """
    if not isinstance(value, Real) or math.isnan(value):
        return "–"
    plain = float(value)
    size = abs(plain)
    if beside and places is None and size < 10.0 ** -(decimals(*beside, digits=digits) + 2):
        plain, places = 0.0, decimals(*beside, digits=digits)
    if math.isinf(plain):
        text = "∞" if plain > 0 else "-∞"
    elif places is not None:
        text = f"{plain:,.{places}f}"
        text = text.lstrip("-") if float(text.replace(",", "")) == 0 else text
    elif plain == 0:
        text = "0"
    elif size >= 1e7 or size < 1e-4:
        text = f"{plain:.1e}"
    else:
        text = f"{plain:,.{decimals(plain, digits=digits)}f}"
    return text.replace("-", "−")


def signed(value: object, digits: int = 2, beside: Sequence[float] = ()) -> str:
    """A difference as text, with its sign unless it is zero beside the numbers that it is between."""
    if isinstance(value, Real) and abs(float(value)) < _NEGLIGIBLE:
        return number(0.0, places=digits)
    text = number(value, digits, beside=beside)
    positive = isinstance(value, Real) and float(value) > 0
    return f"+{text}" if positive and any(c in text for c in "123456789∞") else text


def interval(low: object, high: object, digits: int = 2, places: int | None = None) -> str:
    """`0.91 to 0.95`, both with the same decimals; an empty string where a bound is missing."""
    if not isinstance(low, Real) or not isinstance(high, Real) or math.isnan(low) or math.isnan(high):
        return ""
    if places is None:
        places = decimals(float(low), float(high), digits=digits)
    return f"{number(low, places=places)} to {number(high, places=places)}"


def probability(value: object) -> str:
    """A p or q value: `0.03`, `0.002`, `< 0.001`."""
    if not isinstance(value, Real) or math.isnan(value):
        return "–"
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}" if value < 0.01 else f"{value:.2f}"


_STATISTICS = {
    "first": "first {} tokens",
    "recent": "last {} tokens",
    "offset": "token at offset {}",
    "column_last": "column sum, last {} queries",
}
_PLAIN = {
    "first_1": "first token",
    "offset_-1": "previous token",
    "max_prob": "largest weight",
    "lse": "log-sum-exp",
    "needle_key": "needle token due",
    "induction_key": "token after the earlier copy",
    "duplicate_key": "same token in the first copy",
    "echo_keys": "same token in all earlier copies",
    "answer_log_prob": "answer log-probability",
    "answer_log_probability": "answer log-probability",
    "held_out_loss": "held-out loss",
}


def readable(name: object) -> str:
    """The name of a statistic or metric for readers: `first_1, code` as `first token, code`.

    Names that are not known lose their underscores.
    """
    stem, comma, sample = str(name).partition(", ")
    if comma:
        return f"{readable(stem)}, {sample}"
    if stem in _PLAIN:
        return _PLAIN[stem]
    kind, _, count = stem.rpartition("_")
    if kind in _STATISTICS and count.lstrip("-").isdigit():
        return _STATISTICS[kind].format(count.replace("-", "−"))
    return stem.replace("_", " ")


def with_caption(figure: Any, caption: str) -> Any:
    """The same figure, its caption (plain text: what was measured, on what) kept in `layout.meta`."""
    figure.update_layout(meta={"caption": caption})
    return figure


def caption_of(figure: Any) -> str:
    """The caption that a figure carries; empty where it has none."""
    meta = figure.layout.meta
    return str(meta.get("caption", "")) if isinstance(meta, dict) else ""
