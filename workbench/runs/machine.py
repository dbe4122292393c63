"""What a run ran on: versions of the libraries that decide its numbers, and the machine.

Versions come from the installed metadata, so nothing heavy is imported; the number of threads and the GPUs
come from torch where the caller has already loaded it, from the system otherwise.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "transformers", "numpy", "scipy", "pandas", "pyarrow", "xarray", "zarr")


def environment() -> dict[str, Any]:
    """Versions (None where not installed), platform, processor, threads and the names of the GPUs."""
    return {
        "python": platform.python_version(),
        **{library: _version(library) for library in _LIBRARIES},
        "workbench": _version("attention-workbench"),
        "platform": platform.platform(),
        "cpu": _processor(),
        "threads": _threads(),
        "gpu": _gpus(),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _threads() -> int:
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus(drivers: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None:
        if not torch.cuda.is_available():
            return []
        return [str(torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    lines: list[str] = []
    for file in sorted(drivers.glob("*/information")):
        lines += file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model")]
