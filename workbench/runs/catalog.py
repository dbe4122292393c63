"""The runs in a folder: finished, interrupted, damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from workbench.errors import RunCorrupt, RunNotFound, RunTooNew

from .run import Run
from .state import State

_COLUMNS = ("id", "kind", "title", "model", "created", "status", "path", "certificate")
_SUFFIX = ".partial"


def list_runs(folder: str | Path, *, verify: bool = False) -> pd.DataFrame:
    """One row for each run directly in the folder, the oldest first.

    `status` is "complete", "partial" (interrupted, or being written), "corrupt" or "newer" (a later format).
    Sizes are always compared with the manifest; checksums with `verify`, which reads every file, those of an
    interrupted run's finished steps included.
    `certificate` says whether the model's certificate was stored and passed.
    """
    place = Path(folder).expanduser().resolve()
    if not place.is_dir():
        raise RunNotFound(f"there is no folder {place}; give one that holds runs")
    rows = []
    for child in sorted(child for child in place.iterdir() if child.is_dir()):
        if child.name.startswith(".") and child.name.endswith(_SUFFIX):
            row = _partial_row(child, verify)
        elif not child.name.startswith("."):
            row = _row(child, verify)
        else:
            continue
        if row is not None:
            rows.append(row)
    # A kill just before the end leaves the parts of a run that is complete.
    complete = {row["id"] for row in rows if row["status"] == "complete"}
    rows = [row for row in rows if row["status"] != "partial" or row["id"] not in complete]
    frame = pd.DataFrame(rows, columns=list(_COLUMNS)).astype(dict.fromkeys(_COLUMNS[:-1], "str"))
    frame["certificate"] = frame["certificate"].astype(bool)
    return frame.sort_values(["created", "path"], ignore_index=True)


def _row(path: Path, verify: bool) -> dict[str, Any] | None:
    try:
        run = Run.open(path, verify=verify)
    except RunNotFound:
        return None
    except RunTooNew:
        return _fields(path, {}, "newer")
    except RunCorrupt:
        return _fields(path, {}, "corrupt")
    return _fields(path, run.manifest, "complete")


def _partial_row(partial: Path, verify: bool) -> dict[str, Any] | None:
    path = partial.with_name(partial.name[1 : -len(_SUFFIX)])
    try:
        state = State.read(partial)
        if verify and state is not None:
            state.verify()
    except RunTooNew:
        return _fields(partial, {}, "newer")
    except (RunCorrupt, OSError):
        # A writer that finishes meanwhile clears its parts away.
        return _fields(partial, {}, "corrupt") if partial.is_dir() else None
    if state is None or not partial.is_dir():
        return None
    known = {"id": state.id, "kind": state.kind, "title": state.title, "created": state.created}
    return _fields(path, {**state.manifest, **known}, "partial")


def _fields(path: Path, manifest: dict[str, Any], status: str) -> dict[str, Any]:
    model, certificate = manifest.get("model"), manifest.get("certificate")
    return {
        **{key: str(manifest.get(key, "")) for key in ("id", "kind", "title", "created")},
        "model": str(model.get("name", "")) if isinstance(model, dict) else "",
        "status": status,
        "path": str(path),
        "certificate": isinstance(certificate, dict) and certificate.get("passed") is True,
    }
