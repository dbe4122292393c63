from __future__ import annotations

import json

import pytest


def refused(result, *says: str) -> None:
    """Exit code 2 and one readable line."""
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    for text in says:
        assert text in line


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["heads", "nothing", "--detectors", "sink,inductoin"], "Did you mean 'induction'?"),
        (["verify", "nothing", "--detector", "sinc"], "Did you mean 'sink'?"),
        (["verify", "nothing"], "either --heads L18H6,L17H3 or --detector induction"),
        (["verify", "nothing", "--heads", "L0H0", "--detector", "sink"], "either --heads"),
        (["trace", "nothing"], "either --prompt"),
        (["trace", "nothing", "--file", "absent.txt"], "--file absent.txt: No such file"),
        (["trace", "nothing", "--prompt", "a", "--statistics", "entropi"], "Did you mean 'entropy'?"),
        (["trace", "nothing", "--prompt", "a", "--statistics", "first_0"], "must be 1 or more"),
        (["trace", "nothing", "--prompt", "a", "--statistics", "offset_3"], "offsets go backwards"),
        (["trace", "nothing", "--prompt", "a", "--by", "lse"], "--by lse is not among"),
        (["models", "check", "smollm2", "--tokens", "many"], "give lengths"),
        (["report", "nothing"], "there is no run at"),
        (["runs", "show", "nothing"], "there is no run at"),
        (["runs", "list", "nothing"], "there is no folder"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(call, arguments, says):
    refused(call(*arguments), says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["verify", "m", "--heads", "L0H0", "--draws", "3"], "--draws"),
        (["verify", "m", "--heads", "L0H0", "--how", "nothing"], "--how"),
        (["heads", "m", "--dtype", "int8"], "--dtype"),
        (["heads"], "MODEL"),
    ],
)
def test_a_wrong_option_is_named(call, arguments, says):
    result = call(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_that_cannot_be_found_is_refused(call):
    result = call("models", "check", "smollm2")
    assert result.exit_code == 2
    assert "Did you mean 'smollm2-135m'?" in result.stderr.splitlines()[-1]


def test_a_model_that_cannot_be_reproduced_is_refused_by_name(call, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    result = call("models", "check", "other")
    assert result.exit_code == 2
    assert "'bert' (not causal) is not supported" in result.stderr.splitlines()[-1]


def test_a_head_that_the_model_lacks_is_refused(call, model_folder):
    result = call("verify", model_folder, "--heads", "L1H0,L9H0")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "Error: L9H0 does not exist: layers run from 0 to 2."


def test_a_file_that_is_no_text_is_refused(call, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    refused(call("trace", "m", "--file", "latin.txt"), "byte 1 is not UTF-8")


def test_a_trace_over_the_memory_is_refused_behind_its_prediction(call, model_folder, monkeypatch, tmp_path):
    import workbench.tracing.model

    monkeypatch.setattr(workbench.tracing.model, "free_memory", lambda device: 1000)
    result = call("trace", model_folder, "--prompt", "A long text. " * 40)
    assert result.exit_code == 2
    assert "Memory: predicted peak" in result.stdout
    assert "but 0.977 KiB are allowed" in result.stderr.splitlines()[-1]
    assert [child.name for child in (tmp_path / "runs").iterdir()] == []


def test_a_run_is_not_replaced_unasked(call, heads_run, model_folder):
    refused(call("heads", model_folder, "--out", heads_run), "already holds a run", "--overwrite")


def test_a_damaged_run_is_named(call, heads_run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(heads_run, copy)
    table = copy / "tables" / "head_scores.parquet"
    content = bytearray(table.read_bytes())
    content[100] ^= 1
    table.write_bytes(bytes(content))
    refused(call("runs", "show", copy), "damaged", "head_scores")


@pytest.mark.parametrize("arguments", [["--debug", "runs", "list", "none"], ["runs", "list", "none", "--debug"]])
def test_debug_shows_the_traceback_before_and_behind_the_command(call, arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "RunNotFound" in result.stderr


def test_debug_behind_a_double_dash_is_an_argument(call):
    result = call("runs", "list", "--", "--debug")
    refused(result, "there is no folder", "--debug")


def test_an_unexpected_error_is_short_and_points_to_debug(call, monkeypatch, tmp_path):
    import workbench.runs

    def broken(*args, **kwargs):
        raise RuntimeError("[bold]odd[/bold]\x1b[31m\nthing")

    monkeypatch.setattr(workbench.runs, "list_runs", broken)
    result = call("runs", "list", tmp_path)
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first == "Unexpected RuntimeError: [bold]odd[/bold]\\x1b[31m thing."
    assert second.endswith(f"workbench --debug runs list {tmp_path}")
    assert "Traceback" in call("--debug", "runs", "list", tmp_path).stderr


def test_an_interruption_says_what_to_do(call, monkeypatch, tmp_path):
    import workbench.runs

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(workbench.runs, "list_runs", interrupted)
    result = call("runs", "list", "two words")
    assert result.exit_code == 130
    assert result.stderr.split("\n")[-3:] == [
        "Interrupted. To start again:",
        "  workbench runs list 'two words'",
        "",
    ]


def test_an_interruption_before_the_first_step_keeps_nothing(call, monkeypatch, model_folder, tmp_path):
    import workbench.tracing

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(workbench.tracing, "load", interrupted)
    result = call("heads", model_folder)
    assert result.exit_code == 130
    assert "No step was finished, so nothing is kept." in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_settings_of_the_process_are_as_before(call, model_folder, monkeypatch):
    import logging
    import os

    from transformers.utils import logging as transformers_logging

    def state():
        own = logging.getLogger("workbench.models")
        return (
            dict(os.environ),
            transformers_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
            own.level,
            list(own.handlers),
        )

    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    before = state()
    assert call("models", "check", model_folder, "--tokens", "8").exit_code == 0
    assert state() == before
