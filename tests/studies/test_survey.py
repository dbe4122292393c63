"""A survey writes a run that says everything, goes on where it was cut, and refuses early."""

from __future__ import annotations

import pandas as pd
import pytest

import workbench
from workbench.dynamics import handwritten_induction
from workbench.errors import RequestError, RunError
from workbench.heads import ProbeSettings, Settings
from workbench.studies import SurveySettings, survey

DETECTORS = ("previous_token", "duplicate_token", "induction", "echo")
START = 32
SETTINGS = SurveySettings(
    detectors=DETECTORS,
    verify=("previous_token",),
    k=1,
    top=1,
    how="zero",
    detection=Settings(bos_id=START, repeat_prompts=4, repeat_length=10),
    probes=ProbeSettings(bos_id=START, induction_prompts=4, induction_length=10),
)


@pytest.fixture(scope="module")
def model():
    return workbench.load(handwritten_induction(vocab=START + 1, max_positions=31))


class Cut(Exception):
    pass


class CutAt:
    """A reporter that interrupts the survey when a step begins, and notes the others."""

    def __init__(self, name: str | None = None) -> None:
        self.name, self.seen = name, {}

    def step(self, name: str, title: str, kept: bool) -> None:
        self.seen[name] = kept
        if name == self.name:
            raise Cut

    def advance(self, done: int, total: int) -> None:
        assert 0 < done <= total


def tables(run):
    return {name: run.table(name) for name in run.tables}


def test_a_survey_holds_scores_checks_and_provenance(model, tmp_path):
    run = survey(model, tmp_path / "run", settings=SETTINGS)
    assert set(run.tables) >= {"head_scores", "detectors", "position_curves", "verification", "verification_draws"}
    scores = run.table("head_scores")
    assert len(scores) == len(DETECTORS) * 2 and {"value", "low", "high", "n", "null", "p", "q", "rank"} <= set(scores)
    assert run.manifest["certificate"]["passed"] and run.manifest["model"]["weights_sha256"]
    assert run.manifest["settings"]["seed"] == 0 and run.manifest["prompts"][0]["sha256"]
    row = run.table("verification").set_index("metric").loc["copy_accuracy"]
    assert row["heads"] == "L0H0" and row["effect"] < -0.8 and row["draws"] == 10 and row["q"] >= row["p"]


def test_an_interrupted_survey_goes_on_and_ends_the_same(model, tmp_path):
    whole = survey(model, tmp_path / "whole", settings=SETTINGS)
    with pytest.raises(Cut):
        survey(model, tmp_path / "cut", settings=SETTINGS, reporter=CutAt("verify:previous_token"))
    assert not (tmp_path / "cut").exists()
    again = CutAt()
    resumed = survey(model, tmp_path / "cut", settings=SETTINGS, reporter=again)
    assert again.seen == {"detect:repeated": True, "verify:previous_token": False, "examples": False}
    for name, table in tables(whole).items():
        pd.testing.assert_frame_equal(table, resumed.table(name))


def test_other_settings_do_not_take_up_a_part(model, tmp_path):
    with pytest.raises(Cut):
        survey(model, tmp_path / "run", settings=SETTINGS, reporter=CutAt("verify:previous_token"))
    other = SurveySettings(detectors=DETECTORS, verify=(), k=2, detection=SETTINGS.detection, probes=SETTINGS.probes)
    with pytest.raises(RunError, match="settings"):
        survey(model, tmp_path / "run", settings=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detectors": ("inducton",)}, "Did you mean 'induction'"),
        ({"verify": ("sink",)}, "not among the detectors"),
        ({"k": 0}, "k=0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(model, tmp_path, change, message):
    settings = SurveySettings(**({"detectors": DETECTORS, "verify": ()} | change))
    with pytest.raises(RequestError, match=message):
        survey(model, tmp_path / "run", settings=settings)
    assert list(tmp_path.iterdir()) == []
