"""What is known of the lab's trials, in files that every process sees which shares the folder of runs.

| file in `.lab` | holds |
| --- | --- |
| `<id>.json` | the outcome, written once |
| `<id>.open` | a trial that waits or runs: how far it is; touched while its worker lives |
| `<id>.stop` | nothing: whoever asked for the trial has given it up |

Plain files and not diskcache: its SQLite needs shared memory, which a network folder between a server and a Celery
worker on another machine lacks; and there is nothing here to look up but a name.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from workbench.errors import RequestError
from workbench.runs.disk import write_atomically

MOST_KEPT = 500
# A worker touches its trials this often; one that has not for so long is taken to be gone.
BEAT, GONE = 5.0, 60.0
_FORGOTTEN = 86_400.0
_ID = re.compile(r"[A-Za-z0-9_-]{16}")
_ENDED = (
    "The server or worker that had this trial ended before it was done (stopped, or out of memory: its terminal has "
    "the reason). Run it again."
)


class Ledger:
    """Trials by identifiers that cannot be guessed, so that users do not meet each other's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, facts: Mapping[str, Any]) -> str:
        """A new trial that waits."""
        name = secrets.token_urlsafe(12)
        since = time.time_ns()
        self.update(name, {"status": "waiting", "done": 0, "total": 0, "step": "waiting", "since": since, **facts})
        return name

    def update(self, name: str, state: Mapping[str, Any]) -> None:
        """How far a trial is."""
        file = self._file(name, "open")
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{name}.{secrets.token_hex(4)}")
        unfinished.write_text(json.dumps(state), encoding="utf-8")
        unfinished.replace(file)

    def touch(self, name: str) -> None:
        """Its worker lives."""
        try:
            os.utime(self._file(name, "open"))
        except FileNotFoundError:
            return

    def close(self, name: str, outcome: Mapping[str, Any]) -> None:
        """The outcome, for good."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(name, "json"), json.dumps(outcome, allow_nan=False) + "\n")
        self.forget(name)
        self._clear()

    def forget(self, name: str) -> None:
        """A trial that neither waits nor runs any more."""
        for kind in ("open", "stop"):
            self._file(name, kind).unlink(missing_ok=True)

    def stop(self, name: str) -> None:
        """Give up a trial that waits or runs; any other is left alone."""
        if self._file(name, "open").exists():
            self._file(name, "stop").touch()

    def stopped(self, name: str) -> bool:
        """Whether it was given up."""
        return self._file(name, "stop").exists()

    def state(self, name: str) -> dict[str, Any]:
        """How far a trial is, or how it ended; `age` is seconds since its worker, or whoever asked, was last heard."""
        # An outcome is written before the open file goes: what goes in between is found the second time.
        for kind in ("json", "open", "json"):
            found = self._read(name, kind)
            if found is None:
                continue
            return found if kind == "json" else self._of_open(name, found)
        raise RequestError(f"There is no trial {name[:20]!r} here; it may have been cleared away. Run it again.")

    def waiting(self) -> int:
        """How many trials wait or run."""
        found = 0
        for file in self.folder.glob("*.open"):
            if self._age(file) < GONE and not file.with_suffix(".stop").exists():
                found += 1
        return found

    def before(self, name: str) -> int:
        """How many trials run, or were asked for earlier and wait, while this one waits."""
        own = self._read(name, "open") or {}
        found = 0
        for file in self.folder.glob("*.open"):
            if file.stem == name or self._age(file) >= GONE or file.with_suffix(".stop").exists():
                continue
            other = self._read(file.stem, "open") or {}
            earlier = other.get("status") == "waiting" and other.get("since", 0) < own.get("since", 0)
            found += bool(other.get("status") == "running" or earlier)
        return found

    def _of_open(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        if found["status"] == "waiting" and self.stopped(name):
            return {"status": "cancelled", "asked": found.get("asked", {})}
        age = self._age(self._file(name, "open"))
        # What waits in a queue of Celery's has no worker yet that could touch it.
        if age > GONE and not (found["status"] == "waiting" and found.get("queue")):
            return {"status": "failed", "error": _ENDED, "asked": found.get("asked", {})}
        return {**found, "age": age}

    def _file(self, name: str, kind: str) -> Path:
        if not _ID.fullmatch(name):
            raise RequestError(f"{name[:20]!r} is no trial's identifier; take the link from the lab's history.")
        return self.folder / f"{name}.{kind}"

    def _read(self, name: str, kind: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self._file(name, kind).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RequestError(f"The trial {name} cannot be read ({error}); run it again.") from error
        return found if isinstance(found, dict) else None

    @staticmethod
    def _age(file: Path) -> float:
        try:
            return max(0.0, time.time() - file.stat().st_mtime)
        except FileNotFoundError:
            return float("inf")

    def _clear(self) -> None:
        """The oldest outcomes beyond `MOST_KEPT` go, and what nobody has touched for a day."""
        kept = sorted(self.folder.glob("*.json"), key=self._age)
        for file in kept[MOST_KEPT:]:
            file.unlink(missing_ok=True)
        for file in self.folder.glob("*.open"):
            if self._age(file) > _FORGOTTEN:
                self.forget(file.stem)


class Heart:
    """Touches the trials of a worker while that lives, in a thread of its own."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._names = ledger, set[str]()
        self._lock, self._ended = Lock(), Event()
        self._thread: Thread | None = None

    def add(self, name: str) -> None:
        """From now on."""
        with self._lock:
            self._names.add(name)
            if self._thread is None:
                self._thread = Thread(target=self._beat, name="workbench-heart", daemon=True)
                self._thread.start()

    def drop(self, name: str) -> None:
        """No longer."""
        with self._lock:
            self._names.discard(name)

    def end(self) -> list[str]:
        """Stop beating; the trials that were left."""
        self._ended.set()
        with self._lock:
            return sorted(self._names)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with self._lock:
                names = sorted(self._names)
            for name in names:
                self._ledger.touch(name)
