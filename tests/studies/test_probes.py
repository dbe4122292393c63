"""The studies under probes/: each parses, asks for what exists, can be drawn, and says what it found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from workbench.heads import DETECTORS
from workbench.reports.study import _FIGURES, DRAWINGS
from workbench.studies import read_study
from workbench.studies.measurements import MEASUREMENTS
from workbench.studies.spec import Draw

PROBES = Path(__file__).resolve().parents[2] / "probes"
NAMES = sorted(path.parent.name for path in PROBES.glob("*/study.toml"))
WANTED = {
    "retrieval-heads-explain-factuality", "attention-sink-emerges", "active-dormant", "hidden-sinks", "inactive-heads",
    "razor-echo-induction", "semantic-retrieval", "attention-influence", "head-patterns", "ablation-forms",
    "detector-agreement", "component-reuse", "factual-recall", "greater-than", "ioi", "mcqa-letters", "saturation",
    "discrete-sae-circuits",
}  # fmt: skip
SECTIONS = ("## Question", "## Method", "## Run it", "## Result", "## Limits")


def test_the_studies_are_there():
    assert set(NAMES) >= WANTED


def test_every_way_to_draw_has_its_function():
    assert set(DRAWINGS) == set(_FIGURES) == set(get_args(Draw))


@pytest.mark.parametrize("name", NAMES)
def test_a_study_parses_and_names_what_exists(name):
    study = read_study(PROBES / name)
    assert study.name == name
    cells = study.cells()
    assert cells
    for cell in cells:
        assert cell.measurement in MEASUREMENTS
        asked = json.loads(cell.parameters)
        named = [*asked.get("detectors", []), *([asked["detector"]] if "detector" in asked else [])]
        assert set(named) <= set(DETECTORS)
    # On any larger model by one flag: no cell names heads of a certain one.
    assert not any(json.loads(cell.parameters).get("heads") for cell in cells)
    assert {cell.model for cell in study.cells("some/model")} == {"some/model"}


@pytest.mark.parametrize("name", NAMES)
def test_a_study_has_a_figure_of_a_table_that_it_makes(name):
    study = read_study(PROBES / name)
    assert study.figure is not None
    assert study.figure.table in {table for cell in study.cells() for table in MEASUREMENTS[cell.measurement].tables}


@pytest.mark.parametrize("name", NAMES)
def test_a_study_says_what_it_asks_and_what_came_of_it(name):
    text = (PROBES / name / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# ")
    for section in SECTIONS:
        assert section in text, section
    assert f"workbench study run probes/{name}" in text
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (PROBES / name / target).is_file(), target
    assert f"({name}/README.md)" in (PROBES / "README.md").read_text(encoding="utf-8")
