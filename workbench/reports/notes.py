"""The notes that readers left with a run, as a report shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from workbench.reports.source import RunLike
from workbench.runs import Run
from workbench.runs.notes import read_notes

_HEAD = re.compile("L[0-9]{1,4}H[0-9]{1,4}")


@dataclass(frozen=True)
class Note:
    """A text and what it is about; `head` where that is a head."""

    about: str
    text: str
    head: str = ""


def notes_of(run: RunLike) -> list[Note]:
    """Those about the run first, then by head; a run that does not lie on disk has none."""
    if not isinstance(run, Run):
        return []
    found = [Note(about, text, about if _HEAD.fullmatch(about) else "") for about, text in read_notes(run.path).items()]
    return sorted(found, key=lambda note: (bool(note.head), [int(n) for n in re.findall("[0-9]+", note.head)]))
