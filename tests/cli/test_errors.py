from __future__ import annotations

import json
import shutil

import pytest

from workbench.cli.demo import check_target
from workbench.errors import RunError


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
        (
            ["verify", "nothing", "--heads", "L0H0", "--detector", "sink"],
            "Both --heads ('L0H0') and --detector ('sink') were given; leave one of them out.",
        ),
        (["verify", "nothing", "--heads", "L0H0,L18"], "'L18' names no head"),
        (["verify", "nothing", "--heads", ","], "--heads ',' names nothing"),
        (["heads", "nothing", "--detectors", ""], "--detectors '' names nothing"),
        (["trace", "nothing"], "either --prompt"),
        (
            ["trace", "nothing", "--prompt", "a", "--file", "b.txt"],
            "Both --prompt ('a') and --file ('b.txt') were given; leave one of them out.",
        ),
        (["trace", "nothing", "--prompt", ""], "--prompt '': the text is empty"),
        (["trace", "nothing", "--file", "."], "--file .: Is a directory"),
        (["trace", "nothing", "--file", "absent.txt"], "--file absent.txt: No such file"),
        (["trace", "nothing", "--prompt", "a", "--statistics", "entropi"], "Did you mean 'entropy'?"),
        (["trace", "nothing", "--prompt", "a", "--statistics", "first_0"], "must be 1 or more"),
        (["trace", "nothing", "--prompt", "a", "--statistics", "offset_3"], "offsets go backwards"),
        (["trace", "nothing", "--prompt", "a", "--statistics", "lse,lse"], "'lse' is asked for twice"),
        (["trace", "nothing", "--prompt", "a", "--by", "lse"], "--by lse is not among"),
        (["trace", "nothing", "--prompt", "a", "--by", "entropi"], "Did you mean 'entropy'?"),
        (
            ["trace", "nothing", "--prompt", "a", "--statistics", "argmax,lse", "--by", "argmax"],
            "--by argmax: this statistic holds keys (which token, not how much), so it cannot rank heads; rank by lse.",
        ),
        (["trace", "nothing", "--prompt", "a", "--by", "argmax"], "holds keys"),
        (
            ["trace", "nothing", "--prompt", "a", "--statistics", "top_k_2", "--by", "top_k_mass"],
            "holds several numbers for each position, so it cannot rank heads; ask for one that can, such as entropy.",
        ),
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
        (["verify", "m", "--heads", "L0H0", "--strength", "1.5"], "--strength"),
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--heads", "L1H0,L9H0"], "L9H0 does not exist: layers run from 0 to 2."),
        (["--heads", "L1H4"], "L1H4 does not exist: heads of layer 1 run from 0 to 3."),
        (["--heads", ",".join(f"L{n // 4}H{n % 4}" for n in range(7))], "7 heads of 12 leave too few others"),
        (["--detector", "induction", "--k", "7"], "k=7 of 12 heads leave too few others"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_its_weights_are_read(
    call, model_folder, tmp_path, arguments, says
):
    # Without weights: loading it would be the error.
    (tmp_path / "model").mkdir()
    shutil.copy(f"{model_folder}/config.json", tmp_path / "model")
    refused(call("verify", "model", *arguments), says)


def test_what_does_not_fit_is_refused_after_loading_where_only_that_can_tell(call, model_folder, monkeypatch):
    from workbench.models import loading

    monkeypatch.setattr(loading, "stated_heads", lambda name: None)
    for arguments, says in (
        (["--heads", "L9H0"], "L9H0 does not exist"),
        (["--detector", "induction", "--k", "7"], "k=7 of 12"),
    ):
        result = call("verify", model_folder, *arguments)
        assert result.exit_code == 2
        assert says in result.stderr.splitlines()[-1]
        assert result.stdout == ""


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "config.json is not valid JSON (Expecting property name"),
        ("[]", "config.json names no model_type"),
        (None, "is no model folder: it has no config.json"),
    ],
)
def test_a_folder_that_holds_no_model_is_named_with_the_next_step(call, tmp_path, config, says):
    (tmp_path / "other").mkdir()
    if config is not None:
        (tmp_path / "other" / "config.json").write_text(config)
    for command in (["models", "check"], ["verify", "--heads", "L0H0"]):
        result = call(*command, "other")
        assert result.exit_code == 2
        assert says in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["", " "])
def test_a_model_without_a_name_is_refused(call, name):
    result = call("models", "check", name)
    assert result.exit_code == 2
    assert f"The name of the model is empty ({name!r}). Give a path, a name on the hub" in result.stderr


def test_a_device_that_is_not_there_is_refused(call, model_folder):
    result = call("models", "check", model_folder, "--device", "cuda:99")
    assert result.exit_code == 2
    assert "device='cuda:99' is not on this machine; use 'cpu'" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_place_that_is_no_run_is_left_alone_before_any_work(call, tmp_path, overwrite):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("")
    for options in (["heads"], ["trace", "--prompt", "a"], ["verify", "--heads", "L0H0"]):
        command = [*options, "nothing"]
        for place in ("file", "folder"):
            refused(call(*command, "--out", place, *overwrite), f"{place} exists and is not a run, so it is left alone")
        refused(call(*command, "--out", "file/run", *overwrite), "file is no folder that you may write to")
    refused(call("demo", "--out", "file", *overwrite), "file exists and is not a run")


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
    copy = tmp_path / "copy"
    shutil.copytree(heads_run, copy)
    table = copy / "tables" / "head_scores.parquet"
    content = bytearray(table.read_bytes())
    content[100] ^= 1
    table.write_bytes(bytes(content))
    refused(call("runs", "show", copy), "damaged", "tables/head_scores differs from its checksum", "make it again")
    refused(call("report", copy), "damaged", "tables/head_scores differs from its checksum")


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


def test_a_report_goes_only_where_a_file_can_be(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file.txt"
    folder.mkdir()
    file.write_text("")
    with pytest.raises(RunError, match="is a folder; name the HTML file"):
        check_target(folder)
    with pytest.raises(RunError, match="is no folder that you may write to"):
        check_target(file / "report.html")
    check_target(folder / "new" / "report.html")
