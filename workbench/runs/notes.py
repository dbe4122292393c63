"""Notes that people leave with a run, by what they are about; they lie beside its files and change none of them."""

from __future__ import annotations

import json
from pathlib import Path

from workbench.errors import RunError

from .disk import write_atomically

NOTES = "notes.json"


def read_notes(run: Path) -> dict[str, str]:
    """Texts by what they are about (a head such as "L1H2", or "run"); none where nobody wrote any."""
    file = run / NOTES
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}); move it away to start new notes") from error
    if not isinstance(found, dict):
        raise RunError(f"{file} holds no notes; move it away to start new ones")
    return {str(key): str(value) for key, value in found.items()}


def write_note(run: Path, about: str, text: str) -> None:
    """Leave a text, or with an empty one remove it."""
    notes = {key: value for key, value in {**read_notes(run), about: text}.items() if value}
    write_atomically(run / NOTES, json.dumps(notes, ensure_ascii=True, indent=1) + "\n")
