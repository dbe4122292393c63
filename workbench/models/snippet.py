"""A table as HTML for notebooks: every text escaped, nothing that runs, no figure (those are of a higher floor)."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

MOST_CHARACTERS = 120
# Controls, and marks that would reorder the text around them.
_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def snippet(title: str, rows: pd.DataFrame, more: str = "") -> str:
    """A heading, a table and a line below it, as a notebook shows for `_repr_html_`."""
    texts = rows.astype(object).map(_cell)
    head = "".join(f"<th>{_text(str(name))}</th>" for name in rows.columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in texts.to_numpy().tolist())
    below = f"<p>{_text(more, 1000)}</p>" if more else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div><p><strong>{_text(title)}</strong></p>{table}{below}</div>"


def _cell(value: object) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else _text(str(value))


def _text(text: str, most: int = MOST_CHARACTERS) -> str:
    short = text if len(text) <= most else text[: most - 1] + "…"
    return escape(_HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), short))
