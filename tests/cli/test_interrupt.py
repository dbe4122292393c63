"""Ctrl-C in a process of its own, and the command repeated."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import xarray as xr

from workbench.runs import Run, list_runs

ROOT = Path(__file__).resolve().parents[2]
# From any folder, installed or not.
MAIN = f"import sys; sys.path.append({str(ROOT)!r}); from workbench.cli import main; main()"


def interrupted_in_step_2(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code, and what was said until and after Ctrl-C."""
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *command],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job would ignore the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("[2/"):
                process.send_signal(signal.SIGINT)
                break
        said.append(process.stderr.read())
    return process.returncode, "".join(said)


def test_an_interrupted_command_goes_on_and_equals_an_uninterrupted_one(
    call, model_folder, heads_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ["heads", model_folder, "--prompts", "3", "--out", "run"]
    code, said = interrupted_in_step_2(command, tmp_path)
    assert code == 130, said
    assert "Traceback" not in said
    kept, again = said.splitlines()[-2:]
    assert kept == "Interrupted. The finished steps are kept in .run.partial; this goes on from there:"
    assert again.strip() == f"workbench heads '{model_folder}' --prompts 3 --out run"
    assert list(list_runs(tmp_path)["status"]) == ["partial"]
    assert "not finished" in call("runs", "show", "run").stderr

    resumed = call(*command)
    assert resumed.exit_code == 0, resumed.output
    assert "(kept from the interrupted run)" in resumed.stderr
    same(Run.open("run"), Run.open(heads_run))


def same(a: Run, b: Run) -> None:
    assert a.tables == b.tables
    for name in a.tables:
        pd.testing.assert_frame_equal(a.table(name), b.table(name))
    assert a.arrays == b.arrays
    for name in a.arrays:
        xr.testing.assert_identical(a.array(name).load(), b.array(name).load())
    for key in ("model", "settings", "prompts", "certificate"):
        assert a.manifest[key] == b.manifest[key]
