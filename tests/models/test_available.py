"""What is free, read from files laid out as the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workbench.models import available
from workbench.models.available import available_memory
from workbench.models.memory import free_memory

GIB = 2**30
UNLIMITED_1 = 9223372036854771712


def lay_out(root: Path, **files: str) -> Path:
    """Files below `root`; two underscores stand for a slash."""
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """16 GiB available, and no control groups."""
    meminfo = f"MemTotal: 33554432 kB\nMemAvailable: {16 * 2**20} kB\nHugePages_Total: 0\n"
    return lay_out(tmp_path, proc__meminfo=meminfo)


def limited_2(folder: Path, limit: object, usage: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file 7\ninactive_file {cache}\n")


def limited_1(folder: Path, limit: int, usage: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"inactive_file 0\ntotal_inactive_file {cache}\n")


def test_without_a_group_it_is_what_the_machine_has(machine: Path) -> None:
    assert available_memory(machine) == 16 * GIB


def test_a_container_of_version_2(machine: Path) -> None:
    lay_out(machine, proc__self__cgroup="0::/\n")
    tree = machine / "sys/fs/cgroup"
    limited_2(tree, 4 * GIB, 3 * GIB, GIB // 2)
    assert available_memory(machine) == 3 * GIB // 2
    limited_2(tree, "max", 3 * GIB, GIB // 2)
    assert available_memory(machine) == 16 * GIB
    limited_2(tree, 64 * GIB, GIB, 0)
    assert available_memory(machine) == 16 * GIB
    limited_2(tree, GIB, 2 * GIB, 0)
    assert available_memory(machine) == 0
    limited_2(tree, 4 * GIB, 3 * GIB, 0)
    (tree / "memory.stat").unlink()
    assert available_memory(machine) == GIB


def test_the_tightest_group_around_a_process_counts(machine: Path) -> None:
    lay_out(machine, proc__self__cgroup="0::/user.slice/job.scope\n")
    slice_ = machine / "sys/fs/cgroup/user.slice"
    limited_2(slice_ / "job.scope", "max", GIB, 0)
    limited_2(slice_, 5 * GIB, 3 * GIB, 0)
    limited_2(machine / "sys/fs/cgroup/other.slice", GIB, GIB, 0)
    assert available_memory(machine) == 2 * GIB
    limited_2(slice_ / "job.scope", 2 * GIB, GIB, 0)
    assert available_memory(machine) == GIB


def test_a_container_of_version_1(machine: Path) -> None:
    lay_out(machine, proc__self__cgroup="5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n1:name=systemd:/a:b\n0::/\n")
    tree = machine / "sys/fs/cgroup/memory"
    # The path is the host's; inside the container the tree itself is its group.
    limited_1(tree, 2 * GIB, 2 * GIB, GIB)
    assert available_memory(machine) == GIB
    limited_1(tree, UNLIMITED_1, 2 * GIB, GIB)
    assert available_memory(machine) == 16 * GIB
    limited_1(tree / "docker/ab", 3 * GIB, GIB, 0)
    assert available_memory(machine) == 2 * GIB


@pytest.mark.parametrize("text", ["", "0\n", "0::\n", "nothing at all\n", "0::/../..\n"])
def test_odd_files_are_no_limit(machine: Path, text: str) -> None:
    lay_out(machine, proc__self__cgroup=text, sys__fs__cgroup__memory__stat="x")
    assert available_memory(machine) == 16 * GIB


def test_free_memory_of_the_processor_is_that(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(machine, proc__self__cgroup="0::/\n")
    limited_2(machine / "sys/fs/cgroup", 4 * GIB, 3 * GIB, 0)
    monkeypatch.setattr(available, "ROOT", machine)
    assert free_memory(torch.device("cpu")) == GIB
