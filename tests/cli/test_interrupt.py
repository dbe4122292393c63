"""Ctrl-C in a process of its own, and the command repeated."""

from __future__ import annotations

import signal
import subprocess
import sys

import pandas as pd
import xarray as xr

from workbench.runs import Run, list_runs

ARGUMENTS = ("--prompts", "3")


def test_an_interrupted_command_goes_on_and_equals_an_uninterrupted_one(
    call, model_folder, heads_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ["heads", model_folder, *ARGUMENTS, "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job would ignore the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    told = []
    assert process.stderr is not None
    for line in process.stderr:
        told.append(line)
        if line.startswith("[2/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130, "".join(told) + rest
    assert "Traceback" not in rest
    kept, again = rest.splitlines()[-2:]
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
