"""What an unfinished run has reached: a file of JSON lines, one appended when a step is complete.

The first line says what is being made. A step's line is written after its files are on the disk, so a step
either counts with all its files or not at all. A last line that a kill cut short is ignored, and cut off on
resumption; files that no line names are removed then.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import RunCorrupt

from .disk import sha256, sync, sync_tree, write_atomically
from .manifest import FORMAT, check_format, new_id, utc_now

_FILE = "state.jsonl"
_PARTS = "parts"
_START_AGAIN = "delete the unfinished run {}, or overwrite it, to start again"


@dataclass(frozen=True)
class Part:
    """One written file (or zarr folder): a part of a table, or an array."""

    kind: str
    name: str
    label: str
    file: str
    sha256: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the part: a second one with the same key takes its place."""
        return self.kind, self.name, self.label


@dataclass
class State:
    """An unfinished run on disk; changed by the one writer that holds its lock."""

    folder: Path
    id: str
    kind: str
    title: str
    created: str
    fingerprint: dict[str, Any]
    environments: list[dict[str, Any]]
    steps: dict[str, float] = field(default_factory=dict)
    parts: dict[tuple[str, str, str], Part] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    length: int = 0

    @classmethod
    def create(
        cls, folder: Path, kind: str, title: str, fingerprint: dict[str, Any], environment: dict[str, Any]
    ) -> State:
        """Begin: the folder and the first line."""
        state = cls(folder, new_id(kind), kind, title, utc_now(), fingerprint, [environment])
        header = {
            "format": FORMAT,
            "id": state.id,
            "kind": kind,
            "title": title,
            "created": state.created,
            "fingerprint": fingerprint,
            "environment": environment,
        }
        folder.mkdir(exist_ok=True)
        line = _to_line(header)
        write_atomically(folder / _FILE, line)
        state.length = len(line.encode())
        state.parts_folder.mkdir()
        sync_tree(folder)
        return state

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """What the folder holds; None where a kill came before the first line."""
        file = folder / _FILE
        try:
            content = file.read_bytes()
        except OSError as error:
            if folder.is_dir() and {child.name for child in folder.iterdir()} <= {f"{_FILE}.tmp"}:
                return None
            raise RunCorrupt(f"{file} cannot be read ({error.strerror}); {_START_AGAIN.format(folder)}") from error
        complete = content[: content.rfind(b"\n") + 1]
        records = [_from_line(line, file) for line in complete.splitlines()]
        if not records:
            raise RunCorrupt(f"{file} is empty; {_START_AGAIN.format(folder)}")
        check_format(records[0], file)
        try:
            header = records[0]
            state = cls(
                folder,
                id=header["id"],
                kind=header["kind"],
                title=header["title"],
                created=header["created"],
                fingerprint=header["fingerprint"],
                environments=[header["environment"]],
                length=len(complete),
            )
            for record in records[1:]:
                state._apply(record)
        except (KeyError, TypeError) as error:
            raise RunCorrupt(f"{file} lacks {error}; {_START_AGAIN.format(folder)}") from error
        return state

    @property
    def parts_folder(self) -> Path:
        """Where the parts lie."""
        return self.folder / _PARTS

    def verify(self) -> None:
        """Compare the files of the finished steps with their checksums; `RunCorrupt` names the first that differs."""
        for part in self.parts.values():
            file = self.parts_folder / part.file
            if not file.exists() or sha256(file) != part.sha256:
                raise RunCorrupt(
                    f"{file}, a part of the unfinished run {self.folder}, is missing or damaged; "
                    "delete that folder, or overwrite the run, to start again"
                )

    def resume(self, title: str, environment: dict[str, Any]) -> None:
        """Check the files of the finished steps, and clear away what belongs to none."""
        self.verify()
        os.truncate(self.folder / _FILE, self.length)
        kept = {part.file for part in self.parts.values()}
        self.parts_folder.mkdir(exist_ok=True)
        for child in self.parts_folder.iterdir():
            if child.name not in kept:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        self.title = title
        if environment != self.environments[-1]:
            self._append({"environment": environment})

    def finish_step(
        self, step: str, seconds: float, parts: Mapping[tuple[str, str, str], Part], manifest: dict[str, Any]
    ) -> None:
        """Make the step and its files count."""
        for part in parts.values():
            sync_tree(self.parts_folder / part.file)
        sync(self.parts_folder)
        self._append(
            {
                "step": step,
                "seconds": seconds,
                "parts": [asdict(part) for part in parts.values()],
                "manifest": manifest,
            }
        )

    def differences(self, kind: str, fingerprint: Mapping[str, Any]) -> list[str]:
        """What was asked for then and now, where the two differ: `settings.seed (was 0, now 1)`."""
        then = _flatten({"kind": self.kind, **self.fingerprint})
        now = _flatten({"kind": kind, **fingerprint})
        return [
            f"{key} (was {_short(then, key)}, now {_short(now, key)})"
            for key in {**then, **now}
            if key not in then or key not in now or then[key] != now[key]
        ]

    def _append(self, record: dict[str, Any]) -> None:
        line = _to_line(record).encode()
        file = self.folder / _FILE
        try:
            with file.open("ab") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            # Half a line would be glued to the next one.
            os.truncate(file, self.length)
            raise
        self.length += len(line)
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        if "environment" in record:
            self.environments.append(record["environment"])
            return
        self.steps[record["step"]] = record["seconds"]
        self.parts.update({part.key: part for part in (Part(**entry) for entry in record["parts"])})
        self.manifest = record["manifest"]


def _to_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n"


def _from_line(line: bytes, file: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise RunCorrupt(f"{file} has a line that is no JSON object; {_START_AGAIN.format(file.parent)}")
    return record


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _short(flat: Mapping[str, object], key: str) -> str:
    if key not in flat:
        return "absent"
    text = json.dumps(flat[key])
    return text if len(text) <= 40 else text[:37] + "..."
