"""An atlas runs what can run, names what cannot, goes on where it was cut, and compares what it found."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

import workbench
from workbench.dynamics import handwritten_induction
from workbench.errors import RequestError
from workbench.heads import DETECTORS, KINDS, Kind, Settings
from workbench.heads.agreement import agreement
from workbench.heads.sets import SETS, is_costly, members
from workbench.models.testing import build
from workbench.studies import atlas, atlas_settings, measuring, survey
from workbench.studies.measuring import measure

START = 32
REPEATED = ("previous_token", "duplicate_token", "induction", "echo")
DETECTION = Settings(bos_id=START, repeat_prompts=4, repeat_length=10)
SETTINGS = atlas_settings((*REPEATED, "sink"), detection=DETECTION)


@pytest.fixture(scope="module")
def model():
    """Sixteen heads of random weights, and no tokenizer."""
    return workbench.load(
        build("llama", num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    )


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return atlas(model, tmp_path_factory.mktemp("atlas") / "run", settings=SETTINGS)


class Cut(Exception):
    pass


class CutAt:
    def __init__(self, name: str | None = None) -> None:
        self.name, self.seen = name, {}

    def step(self, name: str, title: str, kept: bool) -> None:
        self.seen[name] = kept
        if name == self.name:
            raise Cut

    def advance(self, done: int, total: int) -> None:
        assert 0 < done <= total


def test_what_cannot_run_is_listed_with_its_reason_and_the_rest_runs(run):
    assert run.kind == "atlas"
    assert set(run.table("head_scores").detector) == set(REPEATED)
    (row,) = run.table("skipped").to_dict("records")
    assert (row["detector"], row["kind"]) == ("sink", "text") and "tokenizer" in row["reason"]
    assert set(run.manifest["seconds"]) == {"detect:text", "detect:repeated", "examples", "agreement", "clusters"}


def test_agreement_and_map_are_those_of_the_written_scores(run):
    wanted = agreement(run.table("head_scores"), run.table("detectors"))
    pd.testing.assert_frame_equal(run.table("agreement"), wanted.correlations)
    pd.testing.assert_frame_equal(run.table("overlap"), wanted.overlaps)
    assert len(run.table("agreement")) == 6
    heads, clusters = run.table("head_clusters"), run.table("cluster_info")
    assert len(heads) == 16 and heads[["x", "y"]].notna().all(axis=None)
    assert clusters["size"].sum() == 16 and set(heads.cluster) == set(clusters.cluster)
    assert {"method", "axes", "silhouette", "null_highest", "structured"} <= set(run.manifest["atlas"])


def test_an_interrupted_atlas_goes_on_and_ends_the_same(model, run, tmp_path):
    with pytest.raises(Cut):
        atlas(model, tmp_path / "cut", settings=SETTINGS, reporter=CutAt("clusters"))
    again = CutAt()
    resumed = atlas(model, tmp_path / "cut", settings=SETTINGS, reporter=again)
    assert [name for name, kept in again.seen.items() if not kept] == ["clusters"]
    assert set(resumed.tables) == set(run.tables)
    for name in run.tables:
        pd.testing.assert_frame_equal(run.table(name), resumed.table(name))
    assert resumed.manifest["atlas"] == run.manifest["atlas"]


def test_a_model_too_small_for_clusters_says_so(tmp_path):
    small = workbench.load(handwritten_induction(vocab=START + 1, max_positions=31))
    found = atlas(small, tmp_path / "run", settings=atlas_settings(REPEATED, detection=DETECTION))
    assert "2 heads" in found.manifest["atlas"]["no_map"] and not found.has_table("head_clusters")
    assert found.table("agreement").rho.isna().all()


def test_nothing_to_run_is_an_error_and_makes_no_run(model, tmp_path):
    with pytest.raises(RequestError, match=r"No detector can run on .*tokenizer"):
        atlas(model, tmp_path / "run", settings=atlas_settings(("sink", "retrieval"), detection=DETECTION))
    assert not (tmp_path / "run").exists()


def test_a_survey_that_is_not_tolerant_stops(model, tmp_path):
    with pytest.raises(RequestError, match="tokenizer"):
        survey(model, tmp_path / "run", settings=replace(SETTINGS, tolerant=False))


@pytest.mark.parametrize("where", ["run", "score"])
def test_one_that_cannot_run_does_not_take_those_of_its_kind_along(model, where):
    repeated, bad = KINDS["repeated"], DETECTORS["echo"]

    def refuse(*_: object) -> None:
        raise RequestError("not on this model")

    def run_all(model, task, detectors, settings, progress):
        if any(one.name == "bad" for one in detectors) and where == "run":
            refuse()
        return repeated.run(model, task, detectors, settings, progress)

    kind = Kind("repeated", "", repeated.tasks, run_all)
    spoilt = replace(bad, name="bad", score=refuse if where == "score" else bad.score)
    detectors = [DETECTORS["induction"], spoilt, DETECTORS["previous_token"]]
    found = measure(model, kind, detectors, DETECTION, tolerant=True)
    assert [one.name for one in found.detectors] == ["induction", "previous_token"]
    assert [(row["detector"], row["reason"]) for row in found.skipped] == [("bad", "not on this model")]
    with pytest.raises(RequestError, match="not on this model"):
        measure(model, kind, detectors, DETECTION)


def test_a_fault_is_not_taken_for_a_model_that_cannot(model, monkeypatch):
    monkeypatch.setattr(measuring, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(model, KINDS["repeated"], [DETECTORS["echo"]], DETECTION, tolerant=True)


def test_sets_of_detectors():
    assert set(members("core")) <= set(members("fast")) <= set(members("all")) == set(DETECTORS)
    assert not any(is_costly(DETECTORS[name]) for name in members("fast"))
    assert is_costly(replace(DETECTORS["echo"], costly=True)) and not is_costly(DETECTORS["echo"])
    with pytest.raises(RequestError, match="No set of detectors 'most'"):
        members("most")
    assert set(SETS) == {"core", "fast", "all"}
