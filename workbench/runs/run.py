"""A finished run, read-only: what its manifest says, its tables, its arrays and its mapped tensors.

Opening checks the format, the manifest's digest and that every file is there with the size it had; `verify`
reads all of them once more and compares digests. Nothing in a run is executed or unpickled, and no path in a
manifest leads out of its folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from workbench.errors import RequestError, RunCorrupt, RunNotFound

from .arrays import read_array
from .disk import sha256, size
from .manifest import check_name, read_manifest
from .tables import read_table
from .tensors import Tensors


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run."""

    path: Path
    manifest: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Run:
        """Read a run; with `verify`, after comparing every file with its checksum."""
        folder = Path(path).expanduser().resolve()
        if not folder.is_dir():
            raise RunNotFound(_nothing_at(folder))
        run = cls(folder, read_manifest(folder))
        run._check(verify)
        return run

    @property
    def id(self) -> str:
        """Identifier: day, kind and six random hexadecimal digits."""
        return str(self.manifest["id"])

    @property
    def kind(self) -> str:
        """What made the run: `demo`, `heads`, `verify`, `trace` ..."""
        return str(self.manifest["kind"])

    @property
    def title(self) -> str:
        """The title for readers."""
        return str(self.manifest["title"])

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables."""
        return tuple(self.manifest["tables"])

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self.manifest["arrays"])

    def has_table(self, name: str) -> bool:
        """Whether the run has a table of that name."""
        return name in self.manifest["tables"]

    def has_array(self, name: str) -> bool:
        """Whether the run has an array of that name."""
        return name in self.manifest["arrays"]

    def table(self, name: str) -> pd.DataFrame:
        """A table, read anew at each call."""
        if not self.has_table(name):
            raise RequestError(self._unknown("table", name, self.tables))
        return read_table(self.path / table_file(name))

    def array(self, name: str) -> xr.Dataset:
        """An array; its numbers are loaded when they are used."""
        if not self.has_array(name):
            raise RequestError(self._unknown("array", name, self.arrays))
        return read_array(self.path / array_file(name))

    @property
    def tensor_files(self) -> tuple[str, ...]:
        """Names of the files of tensors."""
        return tuple(self.manifest.get("tensors", {}))

    def tensors(self, name: str) -> Tensors:
        """A file of tensors, mapped: only what is asked of it is read."""
        if name not in self.tensor_files:
            raise RequestError(self._unknown("tensors", name, self.tensor_files))
        return Tensors(self.path / tensors_file(name))

    def _repr_html_(self) -> str:
        """What the run is and holds, for notebooks."""
        # Reading a run needs no torch, which stands behind that package.
        from workbench.models.snippet import snippet

        model = self.manifest.get("model") or {}
        facts = [("kind", self.kind), ("identifier", self.id), ("model", model.get("name", "")),
                 ("created", self.manifest.get("created", "")), ("command", self.manifest.get("command", "")),
                 ("arrays", ", ".join((*self.arrays, *self.tensor_files)))]  # fmt: skip
        facts += [
            (f"table {name}", f"{entry.get('rows', '?')} rows") for name, entry in self.manifest["tables"].items()
        ]
        return snippet(self.title, pd.DataFrame(facts, columns=["", "run"]), str(self.path))

    def verify(self) -> None:
        """Compare every file with its checksum; `RunCorrupt` names those that differ."""
        self._check(digests=True)

    def _unknown(self, what: str, name: str, known: tuple[str, ...]) -> str:
        return f"the run {self.path} has no {what} {name!r}; it has: {', '.join(known) or 'none'}"

    def _check(self, digests: bool) -> None:
        problems = []
        places = (("tables", "file", table_file), ("arrays", "path", array_file), ("tensors", "path", tensors_file))
        for what, key, locate in places:
            for name, entry in self.manifest.get(what, {}).items():
                try:
                    valid = entry[key] == locate(check_name(name, what)) and isinstance(entry["sha256"], str)
                except (KeyError, TypeError, RequestError):
                    valid = False
                problem = _problem(self.path / entry[key], entry, digests) if valid else "has no valid entry"
                if problem:
                    problems.append(f"{what}/{name} {problem}")
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise RunCorrupt(
                f"the run {self.path} is damaged: {'; '.join(problems[:5])}{more}. "
                "Take it from a copy, or make it again"
            )


def table_file(name: str) -> str:
    """Where a table lies in its run."""
    return f"tables/{name}.parquet"


def array_file(name: str) -> str:
    """Where an array lies in its run."""
    return f"arrays/{name}.zarr"


def tensors_file(name: str) -> str:
    """Where tensors lie in their run."""
    return f"tensors/{name}.safetensors"


def partial_path(path: Path) -> Path:
    """Where a run lies until it is finished."""
    return path.with_name(f".{path.name}.partial")


def _problem(file: Path, entry: dict[str, Any], digests: bool) -> str:
    if not file.exists():
        return "is missing"
    found = size(file)
    if found != entry.get("bytes", found):
        return f"has {found} bytes instead of {entry['bytes']}"
    if digests and sha256(file) != entry["sha256"]:
        return "differs from its checksum"
    return ""


def _nothing_at(path: Path) -> str:
    if partial_path(path).is_dir():
        return (
            f"the run {path} is not finished (its part is {partial_path(path)}); "
            "repeat the command that made it, and it goes on from there"
        )
    return f"there is no run at {path}; `workbench runs list FOLDER` shows those in a folder"
