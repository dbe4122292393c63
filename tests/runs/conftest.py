from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

import workbench
from workbench.runs import RunWriter

SCRIPT = Path(__file__).with_name("job.py")


@pytest.fixture(scope="session")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("runs_test_job", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def frame() -> pd.DataFrame:
    """A small table with what is hard to keep: a missing number, a missing text, line breaks, markup."""
    return pd.DataFrame({"layer": [0, 1], "value": [0.5, np.nan], "text": ["é\n<b>", None]})


@pytest.fixture
def begin() -> Callable[..., RunWriter]:
    """`begin(path, fingerprint)`: open a writer, or go on with what is there."""

    def open_writer(path: Path, fingerprint: dict[str, object] | None = None, **options: bool | str) -> RunWriter:
        return RunWriter.open(path, kind="heads", title="T", fingerprint=fingerprint or {"seed": 0}, **options)

    return open_writer


@pytest.fixture
def interrupted(begin: Callable[..., RunWriter], frame: pd.DataFrame) -> Callable[..., None]:
    """`interrupted(path)`: leave a run after its step a, in the middle of b."""

    def leave(path: Path, fingerprint: dict[str, object] | None = None) -> None:
        with suppress(KeyboardInterrupt), begin(path, fingerprint) as out:
            out.table("scores/a", frame)
            out.manifest["settings"] = {"seed": 0}
            out.done("a")
            out.table("scores/b", frame)
            raise KeyboardInterrupt

    return leave


@pytest.fixture
def names() -> Callable[[Path], list[str]]:
    """`names(folder)`: what lies in a folder, sorted."""
    return lambda folder: sorted(child.name for child in folder.iterdir())


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the job in a process of its own; whatever happens, it does not outlive the test."""
    root = str(Path(workbench.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[str]] = []

    def run(path: Path, stop: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(path), stop],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def killed_at(start: Callable[..., subprocess.Popen[str]]) -> Callable[[Path, str], int]:
    """Run the job up to a point, and kill it there; its process id."""

    def kill(path: Path, stop: str) -> int:
        with waiting(start(path, stop)) as process:
            pass
        return process.pid

    return kill


@pytest.fixture
def waiting_at(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., object]:
    """A context in which the job waits at a point; it is killed at the end."""
    return lambda path, stop: waiting(start(path, stop))


@contextmanager
def waiting(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    assert process.stdout
    assert process.stderr
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert lines == ["start\n", "here\n"], process.stderr.read()
    yield process
    process.kill()
    assert process.wait() == -9
