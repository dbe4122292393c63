"""The manifest: the format's number, the names of its files, values made fit for JSON, and its own digest.

`"sha256"` covers all the other keys in canonical form, so that a change in the provenance shows as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import RequestError, RunCorrupt, RunNotFound, RunTooNew

FORMAT = 1
"""Number of the format written here; every lower number can be read."""

MANIFEST = "manifest.json"

RESERVED = (
    *("format", "id", "kind", "title", "created", "finished", "seconds", "tables", "arrays", "tensors", "sha256"),
    *("fingerprint", "earlier_environments"),
)
"""Keys that the writer fills in itself."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_KIND = re.compile(r"[a-z][a-z0-9]{0,31}")


def utc_now() -> str:
    """The time as ISO 8601, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_id(kind: str) -> str:
    """An identifier that sorts by day and says what it names: `20260131-heads-1f9a0c`."""
    return f"{datetime.now(UTC):%Y%m%d}-{kind}-{secrets.token_hex(3)}"


def check_name(name: str, what: str) -> str:
    """Refuse a name that is not also a file name everywhere, or that could lead out of the folder."""
    pattern = _KIND if what == "kind" else _NAME
    if not pattern.fullmatch(name):
        raise RequestError(
            f"{name!r} cannot name a {what}: use lower-case letters and digits, starting with a letter, like "
            + ("heads" if what == "kind" else "head_scores")
        )
    return name


def to_json(value: object, where: str) -> Any:
    """The value as JSON holds it; a number that is not finite becomes null, an unknown type is refused."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # A command line may hold bytes that are no UTF-8, and then has no text to write.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, np.generic):
        return to_json(value.item(), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return to_json(str(value), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RequestError(f"{where} has the key {key!r}, but JSON keys are text; write it as a string")
        return {to_json(key, where): to_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise RequestError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold; "
        "give text, numbers, lists or dictionaries of them"
    )


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its own digest."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def to_text(manifest: Mapping[str, Any]) -> str:
    """The manifest as the text of its file, digest included."""
    return json.dumps({**manifest, "sha256": digest(manifest)}, indent=2, ensure_ascii=False) + "\n"


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run, its format and digest checked."""
    file = run / MANIFEST
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if looks_like_run(run, with_manifest=False):
            raise RunCorrupt(f"{file} is missing; take the run from a copy, or make it again") from None
        raise RunNotFound(f"{run} is not a run: it has no {MANIFEST}") from None
    except (ValueError, OSError) as error:
        raise RunCorrupt(f"{file} cannot be read ({error}); take the run from a copy, or make it again") from error
    if not isinstance(found, dict):
        raise RunCorrupt(f"{file} holds no JSON object; take the run from a copy, or make it again")
    check_format(found, file)
    if found.get("sha256") != digest(found):
        raise RunCorrupt(f"{file} was changed after it was written: its checksum differs; make the run again")
    for key, kind in {"id": str, "kind": str, "title": str, "tables": dict, "arrays": dict, "tensors": dict}.items():
        # Runs without tensors do not say so.
        if not isinstance(found.get(key, {} if key == "tensors" else None), kind):
            raise RunCorrupt(f"{file} has no valid {key!r}; take the run from a copy, or make it again")
    return found


def check_format(record: Mapping[str, Any], file: Path) -> None:
    """Refuse a record of a later format, or of none."""
    number = record.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise RunCorrupt(f"{file} has no format number; it was not written by the workbench, or is damaged")
    if number > FORMAT:
        raise RunTooNew(
            f"{file} has format {number}, and this workbench reads up to {FORMAT}; "
            "install a newer one: pip install --upgrade attention-workbench"
        )


def looks_like_run(path: Path, *, with_manifest: bool = True) -> bool:
    """Whether a folder is laid out as a run, even a damaged one: only such a folder is ever replaced."""
    present = (path / "tables").is_dir() and (path / "arrays").is_dir()
    return present and (not with_manifest or (path / MANIFEST).is_file())
