"""Memory that this process can still take: what the machine has free, or what its container still allows.

A container's limit is that of a Linux control group, and of every group around it. The kernel counts the cache of
files in a group's usage and gives it up when memory runs short, so the part of it that was not used lately counts as
free, as it does in the machine's own `MemAvailable`. Version 2 keeps one tree of groups, version 1 one for memory:
https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")


class _Files(NamedTuple):
    """What one version calls its files, and the cache of files in `memory.stat`."""

    tree: str
    limit: str
    usage: str
    cache: str


_VERSION_2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Files("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(root: Path | None = None) -> int | None:
    """Bytes that can still be allocated on the machine's own memory; None where the system does not say.

    `root` is where the files of the kernel lie.
    """
    root = ROOT if root is None else root
    machine = _machine(root)
    found = [free for free in (machine, *_groups(root)) if free is not None]
    return min(found, default=None)


def _machine(root: Path) -> int | None:
    try:
        return _fields(root / "proc/meminfo")["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None


def _groups(root: Path) -> Iterator[int]:
    """What each limited group around this process still allows."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        # "0::/path" in version 2, "5:memory:/path" (or several controllers) in version 1.
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _VERSION_1 if controllers else _VERSION_2
        tree = root / files.tree
        place = tree / path.lstrip("/")
        # Inside a container, the path may be the host's, which is not there; the container's own is the tree itself.
        for group in (place, *place.parents):
            if not group.is_relative_to(tree):
                break
            free = _group(group, files)
            if free is not None:
                yield free


def _group(group: Path, files: _Files) -> int | None:
    """Limit less usage, cache of files apart; None without a limit, which version 2 writes as "max"."""
    try:
        limit = int((group / files.limit).read_text(encoding="ascii"))
        usage = int((group / files.usage).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    try:
        cache = _fields(group / "memory.stat").get(files.cache, 0)
    except (OSError, ValueError):
        cache = 0
    return max(0, limit - usage + min(cache, usage))


def _fields(file: Path) -> dict[str, int]:
    """Lines of a name and a number: `MemAvailable: 123 kB`, `inactive_file 123`."""
    rows = (line.replace(":", " ").split() for line in file.read_text(encoding="ascii").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}
