"""Write a run step by step, so that a kill at any moment costs the step at hand and nothing else.

1. A lock beside the target keeps a second writer out (`.<name>.lock`).
2. Parts go to `.<name>.partial/parts`; `done` forces them to the disk, then adds a line to the state file.
3. `finish` joins them in `.<name>.partial/final`, hashes, forces all to the disk, and renames that folder to
   the target. The parts stay until then, so `finish` itself can be killed and repeated.

A run that is replaced waits under `.<name>.old` while the new one takes its name, and comes back if a kill
falls between the two renames. Cost: every table is written twice, arrays once (they are linked).
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from workbench.errors import RequestError, RunError

from .arrays import write_array
from .disk import is_empty_or_absent, link_tree, remove, sha256, size, sync, sync_tree, writing
from .lock import Lock
from .machine import environment
from .manifest import (
    FORMAT,
    MANIFEST,
    RESERVED,
    check_name,
    looks_like_run,
    read_manifest,
    to_json,
    to_text,
    utc_now,
)
from .run import Run, array_file, partial_path, table_file, tensors_file
from .state import Part, State
from .tables import join_parts, read_table, to_arrow, write_part
from .tensors import write_tensors


class RunWriter:
    """The one writer of a run; use it in a `with` block, which keeps what is done when it is left early."""

    manifest: dict[str, Any]
    """What the caller adds to the manifest: `model`, `certificate`, `settings`, `prompts`, any more."""
    path: Path
    resumed: bool
    """Whether steps of an interrupted writer were found and are kept."""

    def __init__(self, path: Path, lock: Lock, state: State, overwrite: bool, command: str) -> None:
        self.path = path
        self.resumed = bool(state.steps)
        self.manifest = {"settings": {}, "prompts": [], **state.manifest, "command": command}
        self._lock = lock
        self._state = state
        self._overwrite = overwrite
        self._open = True
        self._pending: dict[tuple[str, str, str], Part] = {}
        # Written by this writer, as opposed to found: writing those twice is a mistake.
        self._own: set[tuple[str, ...]] = set()
        self._count = 1 + max((int(part.file.split("-")[0]) for part in state.parts.values()), default=-1)
        self._since = time.monotonic()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        kind: str,
        title: str,
        fingerprint: Mapping[str, Any],
        overwrite: bool = False,
        command: str | None = None,
    ) -> RunWriter:
        """Begin a run at `path`, or go on with one that was interrupted there.

        The fingerprint is all that decides the results: settings, model hash, prompts hash. An interrupted
        run is taken up only if its own is equal. `overwrite` allows to drop one that differs, and to replace
        a finished run, which stays in place until `finish`. The command defaults to that of this process.
        """
        target = Path(path).expanduser().resolve()
        check_name(kind, "kind")
        wanted = to_json(dict(fingerprint), "fingerprint")
        heading: str = to_json(title, "title")
        here = environment()
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(_beside(target, "lock"), target)
        try:
            with writing(target):
                _recover(target)
                _check_target(target, overwrite)
                state = _find_state(target, kind, wanted, overwrite)
                if state is not None:
                    state.resume(heading, here)
                else:
                    state = State.create(partial_path(target), kind, heading, wanted, here)
                    sync(target.parent)
            command = command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            return cls(target, lock, state, overwrite, command)
        except BaseException:
            lock.release()
            raise

    def has(self, step: str) -> bool:
        """Whether the step was done, here or before an interruption."""
        return step in self._state.steps

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Write a table, or with `name/part` a part of it; the parts are joined in the order of writing."""
        name, _, label = name.partition("/")
        arrow = to_arrow(frame, check_name(name, "table"))
        part, file = self._begin_part("table", name, label, ".parquet")
        earlier = [self._state.parts_folder / p.file for p in self._parts("table", name) if p.key != part]
        with writing(self.path):
            write_part(arrow, file, name, earlier)
            self._end_part(part, file)

    def array(self, name: str, dataset: xr.Dataset) -> None:
        """Write a labelled array."""
        part, file = self._begin_part("array", check_name(name, "array"), "", ".zarr")
        with writing(self.path):
            write_array(dataset, file, name)
            self._end_part(part, file)

    def tensors(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Write named tensors into one file, which readers map instead of loading."""
        part, file = self._begin_part("tensors", check_name(name, "tensors"), "", ".safetensors")
        with writing(self.path):
            write_tensors(tensors, file, name)
            self._end_part(part, file)

    def written(self, name: str) -> pd.DataFrame:
        """What there is of a table so far, its parts joined: written here, or before an interruption."""
        parts = [self._state.parts_folder / part.file for part in self._parts("table", check_name(name, "table"))]
        if not parts:
            raise RequestError(f"nothing of the table {name} has been written to the run {self.path} yet")
        return pd.concat([read_table(part) for part in parts], ignore_index=True)

    def done(self, step: str, seconds: float | None = None) -> None:
        """Make everything written since the last step count as this one, also after a kill.

        `manifest` is kept as it is now. Without `seconds`, the time since the last step is noted.
        """
        self._require_open()
        if ("step", step) in self._own:
            raise RequestError(f"the step {step!r} of the run {self.path} is done twice; give it another name")
        if seconds is None:
            seconds = time.monotonic() - self._since
        noted = round(float(seconds), 3)
        with writing(self.path):
            self._state.finish_step(step, noted, self._pending, self._checked_manifest())
        self._own.add(("step", step))
        self._pending = {}
        self._since = time.monotonic()

    def finish(self) -> Run:
        """Join the parts, write the manifest, and give the run its name; what no step claimed is included."""
        self._require_open()
        final = self._state.folder / "final"
        with writing(self.path):
            if final.exists():
                shutil.rmtree(final)
            folders = ("tables", "arrays", *(["tensors"] if self._parts("tensors") else []))
            for folder in folders:
                (final / folder).mkdir(parents=True)
            text = to_text(self._complete_manifest(final))
            (final / MANIFEST).write_text(text, encoding="utf-8")
            sync_tree(final)
            _replace(final, self.path, self._overwrite)
            self._open = False
            remove(self._state.folder, _beside(self.path, "trash"))
            self._lock.release()
        return Run.open(self.path, verify=False)

    def close(self) -> None:
        """Stop here: the finished steps stay and can be taken up; without any, nothing is left behind."""
        try:
            if self._open and not self._state.steps and self._state.folder.exists():
                with writing(self.path):
                    remove(self._state.folder, _beside(self.path, "trash"))
        finally:
            self._open = False
            self._lock.release()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if not self._open:
            raise RunError(f"the writer of the run {self.path} is closed; open a new one")

    def _begin_part(self, kind: str, name: str, label: str, suffix: str) -> tuple[tuple[str, str, str], Path]:
        self._require_open()
        key = (kind, name, label)
        if key in self._own:
            shown = f"{name}/{label}" if label else name
            raise RequestError(f"the {kind} {shown} of the run {self.path} is written twice; name the parts apart")
        file = self._state.parts_folder / f"{self._count:05d}-{name}{suffix}"
        self._count += 1
        return key, file

    def _end_part(self, key: tuple[str, str, str], file: Path) -> None:
        self._pending[key] = Part(*key, file=file.name, sha256=sha256(file))
        self._own.add(key)

    def _parts(self, kind: str, name: str | None = None) -> list[Part]:
        every = {**self._state.parts, **self._pending}
        return [part for part in every.values() if part.kind == kind and name in (None, part.name)]

    def _checked_manifest(self) -> dict[str, Any]:
        taken = [key for key in RESERVED if key in self.manifest]
        if taken:
            raise RequestError(f"the manifest's {', '.join(taken)} are filled in by the writer; remove them")
        found: dict[str, Any] = to_json(self.manifest, "manifest")
        return found

    def _complete_manifest(self, final: Path) -> dict[str, Any]:
        given = self._checked_manifest()
        state = self._state
        tables: dict[str, Any] = {}
        for name in dict.fromkeys(part.name for part in self._parts("table")):
            file = final / table_file(name)
            parts = [state.parts_folder / part.file for part in self._parts("table", name)]
            rows = join_parts(parts, file, name)
            tables[name] = {
                "file": table_file(name),
                "rows": rows,
                "bytes": size(file),
                "sha256": sha256(file),
            }
        arrays = self._linked(final, "array", array_file)
        tensors = self._linked(final, "tensors", tensors_file)
        return {
            "format": FORMAT,
            "id": state.id,
            "kind": state.kind,
            "title": state.title,
            "created": state.created,
            "finished": utc_now(),
            "environment": state.environments[-1],
            **given,
            "fingerprint": state.fingerprint,
            "earlier_environments": state.environments[:-1],
            "seconds": state.steps,
            "tables": tables,
            "arrays": arrays,
            **({"tensors": tensors} if tensors else {}),
        }

    def _linked(self, final: Path, kind: str, locate: Callable[[str], str]) -> dict[str, Any]:
        """Arrays or tensors brought to their place, and their entries in the manifest."""
        found: dict[str, Any] = {}
        for part in self._parts(kind):
            place = final / locate(part.name)
            link_tree(self._state.parts_folder / part.file, place)
            found[part.name] = {"path": locate(part.name), "bytes": size(place), "sha256": sha256(place)}
        return found


def _beside(path: Path, role: str) -> Path:
    return path.with_name(f".{path.name}.{role}")


def _recover(target: Path) -> None:
    """Finish what a kill interrupted while one run took the place of another."""
    old, trash = _beside(target, "old"), _beside(target, "trash")
    if old.exists():
        if is_empty_or_absent(target):
            old.rename(target)
        else:
            remove(old, trash)
    if trash.exists():
        shutil.rmtree(trash)


def _check_target(target: Path, overwrite: bool) -> None:
    if is_empty_or_absent(target):
        return
    if not looks_like_run(target):
        raise RunError(f"{target} exists and is not a run, so it is left alone; choose another path")
    if not overwrite:
        raise RunError(f"{target} already holds a run; choose another path, or overwrite it (--overwrite)")


def _find_state(target: Path, kind: str, fingerprint: dict[str, Any], overwrite: bool) -> State | None:
    """The interrupted run to go on with; one that is of no use is removed."""
    partial, trash = partial_path(target), _beside(target, "trash")
    if not partial.exists():
        return None
    try:
        state = State.read(partial)
    except RunError:
        if not overwrite:
            raise
        state = None
    # Nothing is lost with a run that had no step done, or that was finished but for the clearing away.
    if state is not None and state.steps and not _is_finished(state, target):
        differences = state.differences(kind, fingerprint)
        if not differences:
            return state
        if not overwrite:
            raise RunError(
                f"{partial} is an interrupted run with other settings: {'; '.join(differences[:6])}. "
                "Choose another path, or drop it (--overwrite)"
            )
    remove(partial, trash)
    return None


def _is_finished(state: State, target: Path) -> bool:
    try:
        return bool(read_manifest(target)["id"] == state.id)
    except RunError:
        return False


def _replace(final: Path, target: Path, overwrite: bool) -> None:
    """Give the finished folder its name."""
    if is_empty_or_absent(target):
        final.rename(target)
        sync(target.parent)
        return
    _check_target(target, overwrite)
    old = _beside(target, "old")
    target.rename(old)
    try:
        final.rename(target)
    except BaseException:
        old.rename(target)
        raise
    sync(target.parent)
    remove(old, _beside(target, "trash"))
