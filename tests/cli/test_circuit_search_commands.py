"""`workbench circuits attribute`, `discover` and `evaluate`, end to end on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workbench.runs import Run

TASK = ("--task", "lag_induction", "--pairs", 4)


@pytest.fixture(scope="module")
def scored(call, model_folder, tmp_path_factory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("runs") / "scores"
    result = call("circuits", "attribute", model_folder, *TASK, "--method", "eap", "--out", path)
    assert result.exit_code == 0, result.output
    return path, result.stdout


@pytest.fixture(scope="module")
def found(call, model_folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "found"
    result = call(
        "circuits", "discover", model_folder, *TASK, "--method", "edge-pruning", "--set", "steps=4",
        "--out", path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return path


def test_scores_come_back_as_they_were(scored, model_folder):
    from workbench.circuits import Graph
    from workbench.circuits.attribution import attribute
    from workbench.studies.circuit_scores import read_scores
    from workbench.studies.pairs import find_pairs
    from workbench.tracing import load

    model = load(model_folder)
    graph = Graph.of(model)
    read = read_scores(Run.open(scored[0]), graph)
    fresh = attribute(model, find_pairs(model, "lag_induction", 4), "eap")
    assert np.allclose(read.edges, fresh.edges, atol=1e-5, equal_nan=True)
    assert np.allclose(read.per_prompt, fresh.per_prompt, atol=1e-5, equal_nan=True)
    assert (read.method, read.task, read.n, read.direction) == ("eap", "lag_induction", 4, "noising")
    table = Run.open(scored[0]).table("edge_scores")
    assert len(table) == graph.count and table["score"].abs().is_monotonic_decreasing
    assert "largest of" in scored[1] and "circuits evaluate" in scored[1]


def test_scores_of_another_model_are_refused(scored, model_folder):
    from workbench.circuits import Graph
    from workbench.errors import RunError
    from workbench.studies.circuit_scores import read_scores
    from workbench.tracing import load

    graph = Graph.of(load(model_folder))
    other = replace(graph, writers=(*graph.writers[:-1], "L9.mlp"))
    with pytest.raises(RunError, match="another model's graph"):
        read_scores(Run.open(scored[0]), other)


def test_a_search_keeps_its_circuit(found, model_folder):
    from workbench.circuits import Graph
    from workbench.studies.circuit_scores import read_scores
    from workbench.tracing import load

    run = Run.open(found)
    edges = run.table("circuit_edges")
    read = read_scores(run, Graph.of(load(model_folder)))
    assert (
        read.circuit is not None and 0 < read.circuit.size == len(edges) == run.manifest["circuits"]["circuit"]["edges"]
    )
    assert {(e.source, e.target, e.through) for e in read.circuit.edges} == set(
        edges[["source", "target", "through"]].itertuples(index=False, name=None)
    )
    assert run.manifest["settings"]["steps"] == 4


def test_direct_contributions_add_up(call, model_folder, tmp_path):
    result = call("circuits", "attribute", model_folder, *TASK, "--method", "direct", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    run = Run.open(tmp_path / "run")
    total = run.table("contributions")["value"].sum()
    # This model's norm and unembedding have no bias.
    assert total == pytest.approx(run.manifest["circuits"]["clean"], abs=1e-3)
    page = call("report", tmp_path / "run", "--out", tmp_path / "r.html")
    assert page.exit_code == 0 and 'data-figure="contributions"' in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("kind", ["attribute", "discover"])
def test_methods_are_listed_without_a_model(call, kind):
    from workbench.studies.searches import method_names

    result = call("circuits", kind, "--list")
    assert result.exit_code == 0, result.output
    assert {name.replace(" ", "-") for name in method_names(kind)} <= set(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attribute"], "Name a model"),
        (["attribute", "m", "--method", "epa"], "'epa' is unknown"),
        (["attribute", "m", "--method", "direct", "--steps", 3], "takes no gradient"),
        (["discover", "m", "--method", "acdc", "--set", "tau=1"], "has no setting 'tau'"),
        (["discover", "m", "--set", "threshold"], "NAME=VALUE"),
        (["discover", "m", "--task", "none.jsonl"], "There is no file"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_loads(call, arguments, message):
    result = call("circuits", *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_settings_have_the_type_they_look_like():
    from workbench.cli.circuit_search import settings_from

    found = settings_from(["steps=20", "rate=.5", "edges=true", "keep=none", "threshold=0.1,0.2", "loss=kl"])
    assert found == {"steps": 20, "rate": 0.5, "edges": True, "keep": None, "threshold": (0.1, 0.2), "loss": "kl"}


@pytest.fixture(scope="module")
def evaluated(call, scored, found, tmp_path_factory) -> tuple[Path, str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    result = call(
        "circuits", "evaluate", scored[0], found, "--fractions", "0.1,0.5,1", "--random", 2, "--json",
        folder / "c.json", "--graphml", folder / "c.graphml", "--out", folder / "evaluated",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder / "evaluated", result.stdout, folder


def test_an_evaluation_equals_the_library_on_other_prompts(evaluated, scored, model_folder):
    from workbench.circuits import Graph
    from workbench.circuits.evaluation import evaluate
    from workbench.studies.circuit_scores import read_scores
    from workbench.studies.pairs import find_pairs
    from workbench.tracing import load

    model = load(model_folder)
    run = Run.open(evaluated[0])
    scores = read_scores(Run.open(scored[0]), Graph.of(model))
    task = find_pairs(model, "lag_induction", 4, 1000)
    made = evaluate(model, task, {"eap": scores}, fractions=(0.1, 0.5, 1.0), random=2, seed=1000)
    curve = run.table("faithfulness").query("method == 'eap'")
    assert np.allclose(curve["value"], made.curve()["value"], atol=1e-5, equal_nan=True)
    assert run.manifest["prompts"][0]["sha256"] == task.hash != Run.open(scored[0]).manifest["prompts"][0]["sha256"]
    assert {"cpr", "cmd", "stability_jaccard"} <= set(run.table("measures")["measure"])
    assert len(run.table("random_circuits").query("method == 'eap'")) == 6
    assert set(run.table("faithfulness")["method"]) > {"eap"}
    for text in ("ranked by sign", "random circuits", "CPR", "no ROC curve", "With 4 pairs the intervals say little"):
        assert text in evaluated[1]
    kept = run.manifest["circuits"]["circuit"]
    assert ("Kept:" in evaluated[1]) == (kept["faithfulness"] >= 0.8)
    assert (f"No circuit of {kept['method']} below the whole model" in evaluated[1]) == (kept["faithfulness"] < 0.8)


def test_two_pairs_have_no_intervals(call, scored, tmp_path):
    words = ("--pairs", 2, "--fractions", "0.5,1", "--random", 1, "--out", tmp_path / "run")
    result = call("circuits", "evaluate", scored[0], *words)
    assert result.exit_code == 0 and "With 2 pairs there are no intervals" in result.stdout, result.output
    run = Run.open(tmp_path / "run")
    assert run.table("faithfulness")[["low", "high"]].isna().all(axis=None)
    measures = run.table("measures").set_index("measure")
    assert measures.loc[["cpr", "cmd"], ["low", "high"]].isna().all(axis=None)
    # Stability is over the four pairs of the scores.
    assert measures.loc["stability_jaccard", ["low", "high"]].notna().all()


@pytest.mark.parametrize(
    ("edges", "value", "said"),
    [
        (0, -4e-8, "at any size that was tried; none does better than having no edge at all (faithfulness 0.00)."),
        (90, 0.55, "the best, at 10 % of the edges (90 of which lead somewhere), reaches 0.55 [0.40 to 0.60]."),
        (90, 0.85, "Kept: 90 of 900 edges of eap, faithfulness 0.85."),
    ],
)
def test_what_was_kept_is_not_called_faithful_where_it_is_not(edges, value, said):
    from workbench.cli.circuit_tables import chosen_sentence

    kept = {
        "method": "eap", "ranking": "absolute", "fraction": 0.1, "edges": edges, "of": 900, "faithfulness": value,
    }  # fmt: skip
    row = {"method": "eap", "ranking": "absolute", "fraction": 0.1, "edges": edges, "value": value}
    assert chosen_sentence(kept, pd.DataFrame([row | {"low": 0.4, "high": 0.6}])).endswith(said)


def test_a_known_circuit_of_another_model_is_told_as_in_reports(evaluated, capsys):
    from workbench.cli.circuit_tables import show_evaluation
    from workbench.cli.session import Session
    from workbench.reports.circuits import circuits_view

    run = Run.open(evaluated[0])
    run.manifest["circuits"]["known_circuit"] = {"model": "gpt2", "paper": "Wang et al. 2022"}
    show_evaluation(Session(()), run)
    said = (
        "A circuit of this task is known in gpt2 (Wang et al. 2022); this run is not held against it, so that there is "
        "no ROC curve."
    )
    assert said in capsys.readouterr().out and said in circuits_view(run).notes


def test_rounding_is_zero_beside_its_bounds():
    from workbench.cli.tables import estimate

    assert estimate(-4e-8, 0.0, 3e-8) == "0.00 [0.00, 0.00]"
    assert estimate(-4e-8, -0.1, 0.2, sign=True) == "0.00 [-0.10, 0.20]"
    assert estimate(5e-5, 4e-5, 6e-5) == "5.0e-05 [0.0000, 0.0001]"


def test_the_kept_circuit_is_exported_and_read_back(evaluated, call, model_folder, tmp_path):
    from workbench.circuits import Graph
    from workbench.circuits.exchange import read_graphml, read_mib
    from workbench.studies.evaluations import kept_circuit
    from workbench.tracing import load

    path, _, folder = evaluated
    graph = Graph.of(load(model_folder))
    kept = kept_circuit(Run.open(path), graph)
    assert kept.size == Run.open(path).manifest["circuits"]["circuit"]["edges"] > 0
    assert np.array_equal(read_mib(graph, folder / "c.json").kept, kept.kept)
    assert np.array_equal(read_graphml(graph, folder / "c.graphml").kept, kept.kept)
    words = ("circuits", "evaluate", folder / "c.json", "--random", 0, "--out", tmp_path / "again")
    alone = call(*words)
    assert alone.exit_code == 2 and "name it with --model" in alone.stderr
    again = call(*words, "--model", model_folder, "--task", "lag_induction", "--pairs", 4)
    assert again.exit_code == 0, again.output
    assert Run.open(tmp_path / "again").table("faithfulness")["ranking"].tolist() == ["given"]


def test_an_evaluation_has_a_report(evaluated, call, tmp_path):
    result = call("report", evaluated[0], "--out", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "r.html").read_text()
    assert 'data-figure="faithfulness"' in page and 'data-figure="circuit-graph"' in page and "Measures" in page


def test_runs_without_scores_are_refused(call, heads_run, tmp_path):
    for source, message in ((heads_run, "has no scores"), (tmp_path / "none.json", "There is no file")):
        result = call("circuits", "evaluate", source)
        assert result.exit_code == 2 and message in result.stderr
