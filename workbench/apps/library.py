"""The runs that an app shows: found by name in one folder, and kept open while they do not change."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import pandas as pd

from workbench.errors import RequestError, RunError, RunNotFound
from workbench.runs import Run, list_runs
from workbench.runs.manifest import looks_like_run
from workbench.runs.notes import read_notes, write_note
from workbench.runs.patterns import StoredPattern, open_pattern

MOST_NOTE = 10_000
_KEPT = 64
_T = TypeVar("_T")


class NoteChanged(RequestError):
    """Somebody else saved another note in between."""

    def __init__(self, stored: str) -> None:
        super().__init__("The note was changed elsewhere since it was read; look at the stored one before saving.")
        self.stored = stored


class RunLibrary:
    """Runs by name. A name is that of a folder directly inside; nothing else can be reached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self._kept: OrderedDict[tuple[object, ...], Any] = OrderedDict()
        self._lock = Lock()

    def table(self) -> pd.DataFrame:
        """One row a run, the newest first, with its `name`; kept until the folder or a run in it changes."""
        if not self.folder.is_dir():
            raise RunNotFound(f"there is no folder {self.folder}; make a run first, as in `workbench demo`")
        stamp = tuple(sorted((child.name, child.stat().st_mtime_ns) for child in self.folder.iterdir()))

        def read() -> pd.DataFrame:
            found = list_runs(self.folder)
            found.insert(0, "name", [Path(path).name.removeprefix(".").removesuffix(".partial") for path in found.path])
            return found.iloc[::-1].reset_index(drop=True)

        return self._once(("runs", stamp), read)

    def path(self, name: str) -> Path:
        """The folder of a run; refuses names that lead anywhere else."""
        place = self.folder / name
        inside = name not in ("", ".", "..") and Path(name).name == name and "\0" not in name
        if not inside or name.startswith(".") or not place.is_dir() or place.resolve().parent != self.folder:
            raise RunNotFound(
                f"there is no run {shortened(name)!r} in {self.folder}; the page 'Runs' lists those there"
            )
        return place

    def run(self, name: str) -> Run:
        """A finished run."""
        path = self.path(name)
        return self._once(("run", *_stamp(path)), lambda: Run.open(path, verify=False))

    def frame(self, name: str, table: str) -> pd.DataFrame:
        """A table of a run; shared, so that readers must not change it."""
        path = self.path(name)
        return self._once(("table", table, *_stamp(path)), lambda: self.run(name).table(table))

    def pattern(self, name: str, pattern: str) -> StoredPattern:
        """A stored pattern, mapped."""
        path = self.path(name)
        return self._once(("pattern", pattern, *_stamp(path)), lambda: open_pattern(self.run(name), pattern))

    def computed(self, name: str, what: tuple[object, ...], make: Callable[[], _T]) -> _T:
        """Anything made from a run, kept while the run does not change."""
        return self._once((*what, *_stamp(self.path(name))), make)

    def delete(self, name: str) -> None:
        """Remove a run for good; refuses folders that are none."""
        path = self.path(name)
        if not looks_like_run(path):
            raise RunError(f"{path} is not a run, so it is left alone")
        trash = path.with_name(f".{path.name}.trash")
        path.rename(trash)
        shutil.rmtree(trash)

    def notes(self, name: str) -> dict[str, str]:
        """Texts that people left with a run, by what they are about (a head, "run")."""
        return read_notes(self.path(name))

    def write_note(self, name: str, about: str, text: str, read: str | None = None) -> None:
        """Leave a text, or with an empty one remove it. Notes lie beside the run's files and change none of them.

        `read` is the text that its writer has seen: where another one is stored by now, `NoteChanged` brings it back.
        """
        if len(text) > MOST_NOTE:
            raise RequestError(f"A note of {len(text)} characters: {MOST_NOTE} are allowed; shorten it.")
        with self._lock:
            path = self.path(name)
            stored = read_notes(path).get(about, "")
            if read is not None and stored not in (read, text):
                raise NoteChanged(stored)
            write_note(path, about, text)

    def _once(self, key: tuple[object, ...], make: Callable[[], _T]) -> _T:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                found: _T = self._kept[key]
                return found
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made


def shortened(text: str, most: int = 60) -> str:
    """A text that came from outside, fit for a message."""
    return text if len(text) <= most else text[: most - 1] + "…"


def counted(count: int, noun: str) -> str:
    """`1 head`, `2 heads`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _stamp(path: Path) -> tuple[str, int]:
    try:
        return path.name, (path / "manifest.json").stat().st_mtime_ns
    except OSError:
        return path.name, -1
