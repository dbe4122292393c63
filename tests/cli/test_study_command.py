"""`workbench study`: run, Ctrl-C, show, figure, and what it refuses."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from workbench.runs import Run

ROOT = Path(__file__).resolve().parents[2]
MAIN = f"import sys; sys.path.append({str(ROOT)!r}); from workbench.cli import main; main()"
TEXT = """[study]
name = "tiny"
title = "Sinks of a tiny model"
question = "Which?"
[[cells]]
measurement = "sink_rates"
set = { prompts = 3, length = 12 }
grid = { source = ["random", "repeated"], epsilon = [0.2, 0.3] }
[figure]
draw = "points"
table = "sink_rates"
options = { value = "value", label = "source", group = "epsilon" }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "study.toml").write_text(TEXT, encoding="utf-8")
    return tmp_path


def test_ctrl_c_keeps_cells_and_the_same_command_goes_on(call, model_folder, folder):
    command = ["study", "run", "tiny", "--model", model_folder, "--out", "run"]
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *command],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("[2/4]"):
                process.send_signal(signal.SIGINT)
                break
        said.append(process.stderr.read())
    told = "".join(said)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    kept, again = told.splitlines()[-2:]
    assert kept.startswith("Interrupted. The cells that are done are kept in run.cells; ")
    assert again.strip().startswith("workbench study run tiny --model")
    first = {path.name: path.stat().st_mtime_ns for path in (folder / "run.cells").iterdir() if path.is_dir()}
    assert first
    assert not (folder / "run").exists()

    shown = call("study", "show", "tiny", "--model", model_folder, "--out", "run")
    assert shown.exit_code == 0
    assert f"{len(first)} of 4 cells are measured" in shown.stdout

    resumed = call(*command)
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stderr.count("(kept from the interrupted run)") == len(first)
    for name, time in first.items():
        assert (folder / "run.cells" / name).stat().st_mtime_ns == time
    whole = call("study", "run", "tiny", "--model", model_folder, "--out", "whole")
    assert whole.exit_code == 0, whole.output
    pd.testing.assert_frame_equal(Run.open("run").table("sink_rates"), Run.open("whole").table("sink_rates"))
    assert call("runs", "show", "run").exit_code == 0

    drawn = call("study", "figure", "tiny", "--model", model_folder, "--out", "run", "--to", "f.html")
    assert drawn.exit_code == 0, drawn.output
    assert "Sinks of a tiny model" in (folder / "f.html").read_text(encoding="utf-8")


def test_a_failed_cell_makes_the_exit_code_three(call, model_folder, folder):
    text = TEXT.split("[figure]")[0]
    # A head that the model has not: only the model itself can tell.
    text += '[[cells]]\nmeasurement = "verify"\nset = { heads = ["L99H0"], probe = "induction" }\n'
    (folder / "tiny" / "study.toml").write_text(text, encoding="utf-8")
    result = call("study", "run", "tiny", "--model", model_folder, "--out", "run")
    assert result.exit_code == 3, result.output
    assert "Failed: verify" in result.stdout
    assert "L99H0" in result.stdout
    assert "1 cell failed; " in result.stdout
    assert list(Run.open("run").table("cells")["state"]) == ["done"] * 4 + ["failed"]
    shown = call("study", "show", "tiny", "--model", model_folder, "--out", "run")
    assert "failed" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nowhere"], "There is no study at"),
        (["run", "tiny", "--only", "nothing"], "No cell 'nothing'"),
        (["run", "tiny", "--address", "ray://a:1"], "engine 'ray'"),
        (["figure", "tiny", "--to", "x.html"], "there is no run at"),
    ],
)
def test_what_cannot_be_done_is_said(call, folder, arguments, says):
    result = call("study", *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert not list(folder.glob("*.cells"))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium on the path")
def test_a_picture_is_a_png(tmp_path):
    import plotly.graph_objects as go

    from workbench.reports.study import write_figure

    made = write_figure(go.Figure(layout={"height": 200}), "T", tmp_path / "f.png")
    assert made.read_bytes().startswith(b"\x89PNG")
