"""Runs of a model without some heads: what is recorded, what is refused, and which heads can answer."""

from __future__ import annotations

import numpy as np
import pytest

import workbench
from workbench.errors import RequestError
from workbench.heads import Settings, detect
from workbench.runs import compare_runs
from workbench.runs.compare import removed_heads
from workbench.studies import SurveySettings, survey
from workbench.studies.without import STANDING, able_detectors, without

SMALL = Settings(text_prompts=6, text_length=24, repeat_prompts=6, repeat_length=10)


@pytest.fixture(scope="module")
def model(model_folder):
    found = workbench.load(model_folder)
    yield found
    found.detach()


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = SurveySettings(detectors=("entropy", "first_token"), verify=(), detection=SMALL)
    clean = survey(model, folder / "clean", settings=settings)
    return clean, survey(without(model, ["L1H1"], "zero", SMALL), folder / "ablated", settings=settings)


def test_the_run_says_which_heads_it_does_without(runs):
    clean, ablated = runs
    assert "ablate" not in clean.manifest["settings"]
    assert ablated.manifest["settings"]["ablate"] == {"heads": ["L1H1"], "how": "zero"}
    assert ablated.manifest["fingerprint"]["settings"]["ablate"]["how"] == "zero"
    assert ablated.manifest["model"]["weights_sha256"] == clean.manifest["model"]["weights_sha256"]
    assert removed_heads(clean, ablated) == ["L1H1"] and removed_heads(clean, clean) == []


def test_only_later_heads_answer(runs):
    found = compare_runs(*runs)
    assert set(found["method"]) == {"paired"}
    early = found[found["layer"] <= 1]
    np.testing.assert_allclose(early["difference"], 0, atol=1e-6)
    assert found.loc[found["layer"] == 2, "difference"].abs().max() > 1e-5
    assert "without L1H1 (zero ablation)" in " ".join(found.attrs["notes"])


@pytest.mark.parametrize("how", STANDING)
def test_every_standing_form_measures(model, how):
    found = detect(without(model, ["L0H0", "L1H3"], how, SMALL), ["entropy"], settings=SMALL)
    assert found.table["value"].notna().all()


def test_what_makes_no_sense_is_refused(model):
    with pytest.raises(RequestError, match="keeps every head's pattern"):
        without(model, ["L0H0"], "frozen_zero")
    with pytest.raises(RequestError, match="on another prompt"):
        without(model, ["L0H0"], "resample")
    with pytest.raises(RequestError, match="No heads"):
        without(model, [], "zero")
    with pytest.raises(RequestError, match="ov_copying: these read weights"):
        able_detectors(["entropy", "ov_copying"])
    assert "retrieval_greedy" not in able_detectors(None) and "sink" in able_detectors(None)
    with pytest.raises(RequestError, match="the ablation of L0H0 would not be seen"):
        detect(without(model, ["L0H0"]), ["ov_copying"], settings=SMALL)
