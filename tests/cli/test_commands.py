"""Each command end to end, on a tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workbench.runs import Run


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def good(result):
    assert result.exit_code == 0, result.output
    return result


def test_models_check_prints_the_certificate(call, model_folder):
    result = good(call("models", "check", model_folder, "--tokens", "64,4096"))
    lines = result.stdout.splitlines()
    checks = {line.split()[0]: line for line in lines if "<=" in line}
    assert {"logits", "output", "rows", "causal", "padding", "no"} <= set(checks)
    assert all(" yes " in line for line in checks.values())
    assert any(line.split()[:4] == ["layers", "x", "heads", "3"] for line in lines)
    assert any(line.split()[0:1] == ["4096"] and line.split()[-1] == "yes" for line in lines)
    assert "tiny[red]" in result.stdout


def test_models_list_names_every_architecture(call):
    from workbench.models.architectures import ARCHITECTURES

    printed = good(call("models", "list")).stdout.split()
    assert {*ARCHITECTURES, "smollm2-135m"} <= set(printed)


def test_heads_writes_a_run_and_prints_its_top_heads(call, heads_run):
    run = Run.open(heads_run)
    assert run.kind == "heads"
    assert run.manifest["settings"]["detection"]["text_prompts"] == 3
    assert run.manifest["certificate"]["passed"]
    assert run.manifest["command"].startswith("workbench heads ")
    assert not run.has_table("verification")
    shown = good(call("runs", "show", heads_run)).stdout
    scores = run.table("head_scores")
    best = scores[(scores.detector == "induction") & (scores["rank"] == 1)].iloc[0]
    line = next(line for line in shown.splitlines() if line.strip().startswith("Induction"))
    assert f"L{best.layer}H{best['head']}" in line
    assert f"{best.value:.3f} [" in line
    assert "No ablation was run" in shown


def test_heads_goes_to_a_folder_of_its_own_for_each_set_of_arguments(call, model_folder, tmp_path):
    for detectors in ("echo", "echo,induction"):
        result = good(call("heads", model_folder, "--detectors", detectors, "--prompts", 2))
        assert "Run:    runs/heads-tiny-red-" in result.stdout
    assert len(list((tmp_path / "runs").iterdir())) == 2
    result = call("heads", model_folder, "--detectors", "echo", "--prompts", 2)
    assert result.exit_code == 2
    assert "already holds a run" in result.stderr
    good(call("heads", model_folder, "--detectors", "echo", "--prompts", 2, "--overwrite"))


def test_verify_of_given_heads(call, model_folder, tmp_path):
    result = good(call("verify", model_folder, "--heads", "L1H0,L2H1", "--how", "zero", "--out", "run"))
    run = Run.open(tmp_path / "run")
    table = run.table("verification")
    assert list(table.metric) == ["induction_loss", "copy_accuracy"]
    assert set(table.heads) == {"L1H0 L2H1"}
    assert set(table.how) == {"zero"}
    assert len(run.table("verification_draws")) == 2 * 10
    assert run.manifest["prompts"][0]["name"] == "repeated_tokens"
    from workbench.figures import verdict

    for row in table.to_dict("records"):
        line = next(
            line for line in result.stdout.splitlines() if line.startswith(f"chosen, {row['metric'].replace('_', ' ')}")
        )
        assert verdict(row).sentence.replace("−", "-") in line


def test_verify_at_half_strength(call, model_folder, tmp_path):
    """By hand and by detector; the tables, the words and the run's settings say so."""
    result = good(call("verify", model_folder, "--heads", "L1H0", "--how", "zero", "--strength", 0.5, "--out", "a"))
    assert "50 % zero" in result.stdout
    assert Run.open(tmp_path / "a").manifest["settings"]["strength"] == 0.5
    arguments = ["--detector", "previous_token", "--k", 1, "--probe", "induction", "--strength", 0.5, "--out", "b"]
    good(call("verify", model_folder, *arguments))
    run = Run.open(tmp_path / "b")
    assert run.manifest["settings"]["strength"] == 0.5 and set(run.table("verification").strength) == {0.5}


def test_verify_of_a_detector_by_another_probe(call, model_folder, tmp_path):
    arguments = ["--detector", "previous_token", "--k", 2, "--probe", "held_out", "--out", "run"]
    result = good(call("verify", model_folder, *arguments))
    table = Run.open(tmp_path / "run").table("verification")
    assert list(table.metric) == ["held_out_loss"]
    assert list(table.k) == [2]
    assert "Previous token" in result.stdout
    assert "held out loss" in result.stdout


def test_trace_writes_statistics_and_says_what_they_will_take(call, model_folder, tmp_path):
    text = "The [bold]grey[/bold] heron\x1b[31m watched."
    result = good(
        call(
            "trace",
            model_folder,
            "--prompt",
            text,
            "--statistics",
            "entropy,first_1,argmax,column_mean",
            "--out",
            "run",
        )
    )
    first, second = result.stdout.splitlines()[:2]
    assert first.startswith("Tokens: ")
    assert second.startswith("Memory: predicted peak ")
    run = Run.open(tmp_path / "run")
    found = run.array("statistics").load()
    assert set(found.data_vars) == {"entropy", "first_1", "argmax", "column_mean"}
    assert found["entropy"].dims == ("prompt", "layer", "head", "query")
    tokens = run.table("tokens")
    assert len(tokens) == found.sizes["query"] == int(first.split()[1])
    assert "".join(tokens.text) == text
    means = run.table("statistic_means")
    assert set(means.statistic) == {"entropy", "first_1", "column_mean"}
    own = means[(means.statistic == "entropy") & (means.layer == 1) & (means["head"] == 2)]["mean"].item()
    np.testing.assert_allclose(own, float(found["entropy"][0, 1, 2].mean()), rtol=1e-5)
    assert "\x1b" not in result.stdout
    good(call("report", "run"))


def test_trace_of_a_file_equals_that_of_its_text(call, model_folder, tmp_path):
    (tmp_path / "text.txt").write_text("One sentence. Another one.\n", encoding="utf-8")
    good(call("trace", model_folder, "--file", "text.txt", "--top", 2, "--out", "a"))
    given = good(call("trace", model_folder, "--file", "-", "--out", "b", input="One sentence. Another one.\n"))
    a, b = Run.open("a"), Run.open("b")
    pd.testing.assert_frame_equal(a.table("statistic_means"), b.table("statistic_means"))
    assert a.manifest["prompts"] == b.manifest["prompts"]
    assert "Highest entropy" in given.stdout


def test_report_lies_beside_the_run(call, heads_run):
    result = good(call("report", heads_run))
    page = heads_run.with_name("heads.html")
    assert page.is_file()
    assert result.stdout.startswith(str(page))
    assert "tiny[red]" in page.read_text(encoding="utf-8")
    good(call("report", heads_run, "--out", "elsewhere/own.html"))
    assert 'id="difference"' not in page.read_text(encoding="utf-8")


def test_a_report_tells_how_another_run_differs(call, heads_run, model_folder):
    good(call("heads", model_folder, "--prompts", 3, "--seed", 1, "--detectors", "sink,echo", "--out", "other"))
    good(call("report", heads_run, "--against", "other", "--out", "both.html"))
    page = Path("both.html").read_text(encoding="utf-8")
    assert 'id="difference"' in page and Run.open("other").id in page
    refused = call("report", heads_run, "--against", "nowhere", "--out", "none.html")
    assert refused.exit_code and not Path("none.html").exists()


def test_runs_are_listed_shown_and_compared(call, heads_run, model_folder):
    listed = good(call("runs", "list", heads_run.parent)).stdout
    assert str(heads_run) in listed
    assert "complete" in listed
    manifest = json.loads(good(call("runs", "show", heads_run, "--json")).stdout)
    assert manifest == Run.open(heads_run).manifest
    good(call("heads", model_folder, "--prompts", 3, "--seed", 1, "--detectors", "sink,echo", "--out", "other"))
    compared = good(call("runs", "compare", heads_run, "other", "--top", 3)).stdout
    assert "Note: " in compared
    assert "Agreement" in compared
    rows = [line for line in compared.split("Largest differences")[1].splitlines() if " L" in line]
    assert len(rows) == 3


def test_the_list_says_what_was_checked(call, heads_run, tmp_path):
    run = tmp_path / "two words" / "run"
    shutil.copytree(heads_run, run)

    def listed(*options):
        lines = good(call("runs", "list", run.parent, *options)).stdout.splitlines()
        return next(line for line in lines if line.strip().startswith(str(run))).split(), lines[-1]

    row, last = listed()
    assert ("complete" in row, "sizes" in row) == (True, True)
    assert last == (
        f"Contents were not read; to compare them with their checksums: workbench runs list '{run.parent}' --verify"
    )
    row, last = listed("--verify")
    assert ("complete" in row, "contents" in row) == (True, True)
    assert "Contents were not read" not in last
    table = run / "tables" / "head_scores.parquet"
    content = bytearray(table.read_bytes())
    content[100] ^= 1
    table.write_bytes(bytes(content))
    assert "sizes" in listed()[0]
    row, _ = listed("--verify")
    assert ("corrupt" in row, "contents" in row) == (True, True)


def test_a_text_beyond_the_models_positions_is_warned_of_once(call, model_folder):
    result = good(call("trace", model_folder, "--prompt", "word " * 600, "--statistics", "lse"))
    (line,) = (line for line in result.output.splitlines() if "512 positions" in line)
    assert line in result.stderr
    assert "tiny[red] was made for 512 positions, and a prompt reaches " in line
    assert "positions" not in good(call("models", "check", model_folder, "--tokens", "4096")).stderr


def test_an_empty_folder_has_no_runs(call, tmp_path):
    assert good(call("runs", "list", tmp_path)).stdout == f"There are no runs in {tmp_path}.\n"


@pytest.fixture
def small_demo(monkeypatch, model_folder):
    """The demo on the tiny model, with one detector a kind and two tests."""
    import workbench.cli.demo
    import workbench.studies
    from workbench.heads import Settings

    settings = workbench.studies.SurveySettings(
        detectors=("sink", "previous_token", "induction", "duplicate_token", "retrieval"),
        verify=("sink", "induction"),
        k=2,
        detection=replace(Settings(), text_prompts=3, repeat_prompts=3),
    )
    monkeypatch.setattr(workbench.cli.demo, "MODEL", model_folder)
    monkeypatch.setattr(workbench.studies, "SurveySettings", lambda: settings)


def test_the_demo_ends_with_findings_and_a_report_and_is_not_made_twice(call, small_demo, tmp_path, monkeypatch):
    first = good(call("demo"))
    run = Run.open("runs/demo")
    assert run.kind == "demo"
    order = [
        first.stdout.index(text)
        for text in ("Certificate", "Memory: predicted peak", "Top heads", "Ablation", "Report: ", "Analysis: ")
    ]
    assert order == sorted(order)
    assert "Report:   runs/demo.html" in first.stdout
    for title in ("Attention sink", "Previous token", "Induction", "Duplicate token", "Retrieval"):
        assert title in first.stdout
    assert "Position 0 draws more than 0.3" in first.stdout
    steps = [line for line in first.stderr.splitlines() if line.startswith("[")]
    assert [line[:5] for line in steps] == [f"[{n}/6]" for n in range(1, 7)]
    report = tmp_path / "runs" / "demo.html"
    report.unlink()

    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    again = good(call("demo", "--open"))
    assert "is a complete run already" in again.stdout
    assert first.stdout.split("Top heads")[1] == again.stdout.split("Top heads")[1]
    assert opened == [report.resolve().as_uri()]
    assert report.is_file()
    assert Run.open("runs/demo").id == run.id


def test_the_demo_leaves_another_run_alone(call, heads_run):
    result = call("demo", "--out", heads_run)
    assert result.exit_code == 2
    assert "holds a run of kind heads, not a demo" in result.stderr


def test_heads_and_traces_are_measured_without_some_heads(call, heads_run, model_folder):
    good(call("heads", model_folder, "--prompts", 3, "--ablate", "L0H1,L1H0", "--out", "without"))
    run = Run.open("without")
    assert run.manifest["settings"]["ablate"] == {"heads": ["L0H1", "L1H0"], "how": "zero"}
    assert "retrieval_greedy" not in set(run.table("head_scores")["detector"])
    compared = good(call("runs", "compare", heads_run, "without", "--top", 3)).stdout
    assert "without L0H1, L1H0 (zero ablation)" in " ".join(compared.split())
    text = ("--prompt", "The class statement defines a class.")
    good(call("trace", model_folder, *text, "--out", "intact"))
    good(call("trace", model_folder, *text, "--ablate", "L0H1", "--how", "mean", "--out", "ablated"))
    assert Run.open("ablated").manifest["settings"]["ablate"]["how"] == "mean"
    assert "one text has no interval" in " ".join(good(call("runs", "compare", "intact", "ablated")).stdout.split())
    for wrong, words in (
        (("--how", "mean"), "name them too"),
        (("--ablate", "L9H9"), "L9H9"),
        (("--ablate", "L0H1", "--patterns", "L0H0"), "leave it out with --ablate"),
    ):
        refused = call("trace", model_folder, *text, *wrong, "--out", "none")
        assert refused.exit_code == 2 and words in " ".join(refused.stderr.split())
