"""Appends measured rows to a file of recorded results, with the facts that tell what they were measured on."""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

KERNELS = Path(__file__).resolve().parents[1] / "workbench" / "kernels"


def append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows below what is there; columns that are new stay empty in older rows."""
    path.parent.mkdir(exist_ok=True)
    older: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            older = list(csv.DictReader(file))
    everything = [*older, *rows]
    names = list(dict.fromkeys(name for row in everything for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names, restval="")
        writer.writeheader()
        writer.writerows(everything)


def facts() -> dict[str, object]:
    """Date, GPU with its driver, versions, and a digest of the kernels' sources."""
    digest = hashlib.sha256()
    for source in sorted(KERNELS.rglob("*.py")):
        digest.update(source.read_bytes())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "gpu": torch.cuda.get_device_name(),
        "driver": _driver(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": sys.version.split()[0], "code": digest.hexdigest()[:12],
    }  # fmt: skip


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
