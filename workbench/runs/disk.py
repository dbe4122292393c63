"""Files: forced to the disk, hashed, linked; and an operating system's refusal as one readable error.

Every digest is SHA-256. That of a folder covers the sorted relative names and the digests of its files, so a
missing, added, renamed or changed file shows; names that start with a dot are left out, because file managers
drop theirs wherever they look.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.errors import RunError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` raised inside into a `RunError` that names the path."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write the run {path}: {error.strerror or error}; make room there, or choose another path"
        ) from error


def sync(path: Path) -> None:
    """Force a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Force a file, or a folder and all that is in it, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync_tree(child)
    sync(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is, at any moment, either absent (or the old one) or complete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def link_tree(source: Path, target: Path) -> None:
    """Make a second file, or folder of the same files: hard links, or copies where the file system has no links."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link)
    else:
        _link(str(source), str(target))


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def remove(path: Path, trash: Path) -> None:
    """Remove a folder so that an interruption never leaves half of it under its own name."""
    if trash.exists():
        shutil.rmtree(trash)
    path.rename(trash)
    shutil.rmtree(trash)


def is_empty_or_absent(path: Path) -> bool:
    """Whether a run may be put there without touching anything."""
    return not path.exists() or (path.is_dir() and next(path.iterdir(), None) is None)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in files(path))


def sha256(path: Path) -> str:
    """Digest of a file's bytes, or of a folder as the module describes it."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in files(path):
        whole.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
    return whole.hexdigest()


def files(path: Path) -> list[Path]:
    """The file itself, or the sorted files in a folder without those that a leading dot hides."""
    if path.is_file():
        return [path]
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)
