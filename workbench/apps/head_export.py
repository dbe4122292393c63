"""What a head's card adds to the report of its run: the report opens at that head, and has its readings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from workbench.apps.library import RunLibrary
from workbench.apps.live import Live
from workbench.apps.readings import asked_of, kept_reading
from workbench.figures.text import in_order, number, probability
from workbench.models import Head
from workbench.runs.readings import TABLE, stored_directions

_BEFORE = '<section id="certificate">'


def at_head(page: str, library: RunLibrary, live: Live, run: str, name: str, tokens: str, most: int) -> str:
    """The report of a run, opened at a head; its readings are left out where they exceed `most` bytes."""
    head = Head.parse(name)
    page = page.replace('<html lang="en">', f'<html lang="en" data-open="{head}">', 1)
    section = _section(library, live, run, head, tokens)
    longer = page.replace(_BEFORE, f"{section}\n{_BEFORE}", 1)
    return longer if len(longer.encode()) <= most else page


def _section(library: RunLibrary, live: Live, run: str, head: Head, tokens: str) -> str:
    opened = library.run(run)
    found = kept_reading(live.folder, asked_of(opened, head, tokens))
    if found is None and opened.has_table(TABLE):
        found = {"directions": stored_directions(opened.table(TABLE), *head)}
    if not found:
        return ""
    parts = [
        _table("Measures", ("Circuit", "Measure", "Value", "Random matrices (95 %)", "p"), [
            (row["circuit"].upper(), row["measure"], number(row["value"], 3),
             f"{number(row['null_low'], 3)} to {number(row['null_high'], 3)}", probability(row["p"]))
            for row in found.get("summary", [])
        ]),
        _table("Tokens", ("Circuit", "Token", "Raised most", "Lowered most"), [
            (row["circuit"].upper(), _words([row["token"]]), _words(row["raised"]), _words(row["lowered"]))
            for row in found.get("tokens", [])
        ]),
        _table("Strongest directions", ("Circuit", "Direction", "Share of its power", "One side", "The other"), [
            (row["circuit"].upper(), f"{int(row['direction']) + 1}{'+' if int(row['sign']) > 0 else '−'}",
             f"{100 * float(row['share']):.1f} %", _words(row["reads"]), _words(row["writes"]))
            for row in found.get("directions", [])
        ]),
    ]  # fmt: skip
    words = (
        "From the weights alone: OV is what the head reads and writes, QK which keys a query looks for (without "
        "rotation). Orders of tokens count and sizes do not."
    )
    title = Markup('<h2>What the weights of {} read and write</h2><p class="intro">{}</p>').format(head, words)
    return f'<section id="readings">{title}{"".join(parts)}</section>'


def _words(tokens: Sequence[Any]) -> str:
    return " ".join(repr(str(token))[:44] for token in tokens)


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    row = Markup("<tr>{}</tr>").format
    head = row(Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in names))
    body = Markup("").join(
        row(Markup("").join(Markup("<td>{}</td>").format(in_order(str(cell))) for cell in cells)) for cells in rows
    )
    frame = '<h3 class="sub">{}</h3><div class="scroll"><table class="plain"><thead>{}</thead><tbody>{}</tbody></table>'
    return str(Markup(frame + "</div>").format(title, head, body))
