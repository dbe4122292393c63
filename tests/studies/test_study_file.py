"""Study files: what they mean, what is refused with which words, and that a cell's name is its content."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from workbench.errors import RequestError
from workbench.studies import read_study
from workbench.studies.cells import chosen, combinations
from workbench.studies.measurements import MEASUREMENTS
from workbench.studies.spec import Study

HEAD = '[study]\nname = "try"\ntitle = "T"\nquestion = "Q"\n'
BLOCK = (
    '[[cells]]\nmeasurement = "verify"\nset = { detector = "induction" }\n'
    'grid = { how = ["zero", "mean"], seed = [0, 1] }\n'
)


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> Path:
        (tmp_path / "study.toml").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def study(text: str) -> Study:
    return Study.model_validate(tomllib.loads(text))


def test_a_grid_is_every_combination_in_order():
    assert combinations({"a": [1, 2], "b": ["x", "y"]}) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    assert combinations({}) == [{}]
    cells = study(HEAD + BLOCK).cells()
    assert [cell.label for cell in cells] == [
        f"verify how={how} seed={seed}" for how in ("zero", "mean") for seed in (0, 1)
    ]
    assert {cell.model for cell in cells} == {"smollm2-135m"}


def test_the_id_of_a_cell_does_not_change():
    """Stored cells are found by it: where this fails, every study would be measured anew."""
    cells = study(HEAD + '[[cells]]\nmeasurement = "sink_rates"\nset = { prompts = 8 }\n').cells()
    assert cells[0].parameters == ('{"epsilon":0.3,"length":64,"positions":1,"prompts":8,"seed":0,"source":"prose"}')
    assert cells[0].id == "80c91efe8f96721e"


def test_ids_depend_on_content_and_on_nothing_else(monkeypatch):
    one, *_ = study(HEAD + BLOCK).cells()
    ids = {cell.id for cell in study(HEAD + BLOCK).cells()}
    assert len(ids) == 4
    # Defaults written out, another order of keys, another place in the study, another title: the same cell.
    same = study(
        HEAD.replace('"T"', '"Other"')
        + '[[cells]]\nmeasurement = "detect"\nset = { detectors = ["induction"] }\n'
        + '[[cells]]\nmeasurement = "verify"\nset = { how = "zero", k = 8, seed = 0, detector = "induction" }\n'
    ).cells()
    assert same[1].id == one.id
    for changed in (
        study(HEAD + BLOCK).cells("other")[0],
        study(HEAD + BLOCK).cells(dtype="float64")[0],
        study(HEAD + BLOCK.replace('"induction"', '"echo"')).cells()[0],
    ):
        assert changed.id not in ids
    from dataclasses import replace

    monkeypatch.setitem(MEASUREMENTS, "verify", replace(MEASUREMENTS["verify"], version=99))
    assert not ids & {cell.id for cell in study(HEAD + BLOCK).cells()}


def test_the_same_cell_in_two_blocks_is_one():
    assert len(study(HEAD + BLOCK + BLOCK).cells()) == 4


def test_blocks_without_a_grid_are_told_apart_by_what_differs():
    blocks = [
        f'[[cells]]\nmeasurement = "verify"\nset = {{ probe = "{probe}", k = 3 }}\n' for probe in ("json", "answer")
    ]
    assert [cell.label for cell in study(HEAD + "".join(blocks)).cells()] == [
        "verify probe=json",
        "verify probe=answer",
    ]


def test_a_block_may_name_several_models():
    cells = study(HEAD + BLOCK + 'models = ["a", "b"]\n').cells()
    assert [cell.model for cell in cells] == ["a"] * 4 + ["b"] * 4
    assert cells[4].label == "verify model=b how=zero seed=0"
    assert {cell.model for cell in study(HEAD + BLOCK + 'models = ["a", "b"]\n').cells("c")} == {"c"}


def test_cells_are_chosen_by_id_or_words():
    cells = study(HEAD + BLOCK).cells()
    assert chosen(cells, [cells[2].id[:6]]) == [cells[2]]
    assert chosen(cells, ["verify seed=1"]) == [cells[1], cells[3]]
    assert chosen(cells, ["how=mean", "how=zero"]) == cells
    assert chosen(cells, []) == cells
    with pytest.raises(RequestError, match=r"No cell 'how=uniform'.*study show"):
        chosen(cells, ["how=uniform"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[study", "is no TOML"),
        (HEAD, "cells is missing; write cells = ... there"),
        (HEAD.replace("title", "titel") + BLOCK, "study.title is missing"),
        (HEAD + 'modle = "x"\n' + BLOCK, "study has no key 'modle'. Did you mean 'model'?"),
        (HEAD + BLOCK + "gird = 1\n", r"cells[1] has no key 'gird'. Did you mean 'grid'? There are measurement, set"),
        (HEAD + BLOCK + '[figur]\ndraw = "dose"\n', "it has no key 'figur'. Did you mean 'figure'?"),
        (HEAD + BLOCK + '[figure]\ndraw = "dosis"\ntable = "verification"\n', "figure.draw = 'dosis': input should be"),
        (HEAD + BLOCK.replace('"verify"', '"verfy"'), "No measurement 'verfy'. Did you mean 'verify'?"),
        (HEAD + BLOCK.replace("detector =", "detectr ="), "it has no key 'detectr'. Did you mean 'detector'?"),
        (HEAD + BLOCK.replace('"zero"', '"zeroo"'), "cells[1] (verify): how = 'zeroo': input should be 'zero'"),
        (HEAD + BLOCK.replace('"induction"', '"inducton"'), "No detector 'inducton'. Did you mean 'induction'?"),
        (HEAD + BLOCK.replace("seed = [0, 1]", "seed = []"), "cells[1].grid.seed = []: list should have at least 1"),
        (HEAD + BLOCK.replace("seed =", "draws = [3], seed ="), "draws = 3: input should be greater than or equal"),
        (HEAD + BLOCK.replace("seed =", "detector = ['echo'], seed ="), "'detector' is under set and under grid"),
        (HEAD + BLOCK.replace("seed =", "sizes = [{ text_promts = 3 }], seed ="), "Did you mean 'text_prompts'?"),
        (HEAD + BLOCK.replace("seed =", "phase = ['decode'], seed ="), "the probe 'induction' does not answer"),
        (HEAD + BLOCK.replace("seed =", "dose = [[9]], seed ="), "dose 9: sets hold 1 to 8"),
        (HEAD.replace('"try"', '"No name"') + BLOCK, "study.name = 'No name': string should match pattern"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_would_do(written, text, says):
    with pytest.raises(RequestError) as refused:
        read_study(written(text))
    assert says in str(refused.value)
    assert "study.toml" in str(refused.value)


def test_a_study_is_read_from_its_folder_or_its_file(written, tmp_path):
    folder = written(HEAD + BLOCK)
    assert read_study(folder) == read_study(folder / "study.toml")
    with pytest.raises(RequestError, match="There is no study at"):
        read_study(tmp_path / "nowhere")


def test_every_measurement_has_defaults_or_says_what_it_needs():
    for name, measurement in MEASUREMENTS.items():
        assert name == measurement.name
        assert measurement.version >= 1
        assert measurement.tables
        assert set(measurement.family) <= set(measurement.tables)
        required = [one for one, info in measurement.parameters.model_fields.items() if info.is_required()]
        assert required in ([], ["detectors"])
