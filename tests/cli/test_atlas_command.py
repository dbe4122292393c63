"""`workbench atlas` and `workbench export`, end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from workbench.runs import Run
from workbench.runs.headvis import read_headvis
from workbench.runs.interchange import read_duo, read_retrieval_head

CHOSEN = "sink,entropy,previous_token,duplicate_token,induction,echo"


@pytest.fixture(scope="module")
def atlas_run(call, model_folder, tmp_path_factory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("runs") / "atlas"
    result = call("atlas", model_folder, "--detectors", CHOSEN, "--prompts", 3, "--length", 66, "--out", path)
    assert result.exit_code == 0, result.output
    return path, result.stdout


def test_an_atlas_is_a_run_with_a_report(call, atlas_run, tmp_path):
    path, printed = atlas_run
    run = Run.open(path)
    assert run.kind == "atlas" and set(run.table("head_scores").detector) == set(CHOSEN.split(","))
    sizes = run.manifest["settings"]["detection"]
    assert (sizes["text_length"], sizes["repeat_length"], sizes["needle_lengths"]) == (66, 22, [66])
    assert {"agreement", "overlap", "head_clusters", "cluster_info"} <= set(run.tables)
    assert {"detect:text", "detect:repeated", "agreement", "clusters"} <= set(run.manifest["seconds"])
    for title in ("Kinds of heads", "rank heads most alike", "Mean silhouette", "Report:"):
        assert title in printed
    result = call("report", path, "--out", tmp_path / "a.html")
    assert result.exit_code == 0, result.output
    assert 'data-figure="head-map"' in (tmp_path / "a.html").read_text()


def test_list_prints_every_detector_without_a_model(call):
    from workbench.heads import DETECTORS

    result = call("atlas", "--list")
    assert result.exit_code == 0
    words = set(result.stdout.split())
    assert set(DETECTORS) <= words
    assert f"{len(DETECTORS)} detectors" in result.stdout and "--set fast" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name a model"),
        (["m", "--detectors", "sink", "--set", "core"], "Both --detectors and --set"),
        (["m", "--detectors", "inducton"], "Did you mean 'induction'"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(call, arguments, message):
    result = call("atlas", *arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_export_in_every_format(call, atlas_run, tmp_path):
    path, _ = atlas_run
    scores = Run.open(path).table("head_scores")
    wanted = scores[scores.detector == "induction"].sort_values(["layer", "head"]).value.to_numpy()
    file, duo, data = tmp_path / "s.json", tmp_path / "duo", tmp_path / "data"
    for arguments in (
        ["--format", "retrieval-head", "--detector", "induction", "--out", file],
        ["--format", "duo", "--detector", "induction", "--join", "max", "--out", duo],
        ["--format", "headvis", "--out", data],
    ):
        result = call("export", path, *arguments)
        assert result.exit_code == 0, result.output
    assert np.array_equal(read_retrieval_head(file).table.value, wanted)
    read, config = read_duo(duo, 2)
    assert np.array_equal(read.table.value, np.repeat(wanted.reshape(-1, 2).max(1), 2))
    assert config["detector"] == "induction" and config["joined"] == "max"
    shown = read_headvis(data)
    assert set(shown.scores.table.detector) == set(CHOSEN.split(","))
    # The heads of the token view have their patterns: rows of a causal softmax.
    assert shown.sequences
    for found in shown.sequences.values():
        for one in found:
            assert (one.attention.sum(1) <= 1 + 1e-3 * len(one.tokens)).all() and np.triu(one.attention, 1).max() == 0
    assert json.loads((data / "config.json").read_text())["heads"][0] == [0, 0]


def test_export_refuses_what_it_cannot_write(call, atlas_run, heads_run, tmp_path):
    path, _ = atlas_run
    result = call("export", path, "--format", "retrieval-head", "--out", tmp_path / "x.json")
    assert result.exit_code == 2 and "No scores of 'retrieval'" in result.stderr
    (tmp_path / "there").mkdir()
    result = call("export", path, "--format", "headvis", "--out", tmp_path / "there")
    assert result.exit_code == 2 and "exists already" in result.stderr
    result = call("export", path, "--format", "headvis", "--detector", "sink", "--out", tmp_path / "y")
    assert result.exit_code == 2 and "takes all of them" in result.stderr
    result = call("export", path, "--format", "duo", "--detector", "entropy", "--out", tmp_path / "z")
    assert result.exit_code == 2 and "0 to 1" in result.stderr
