"""A study goes on where it was stopped, keeps its faults apart, and gives the same numbers on Ray."""

from __future__ import annotations

import json
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

import workbench
from workbench.dynamics import handwritten_induction
from workbench.errors import MissingExtra, RequestError, RunError, RunLocked
from workbench.models.testing import TINY
from workbench.runs import Run
from workbench.studies import engine as engines
from workbench.studies import run_study
from workbench.studies.engine import Local, OnRay, make_engine
from workbench.studies.measurements import MEASUREMENTS, Measurement, Parameters
from workbench.studies.spec import Study
from workbench.studies.store import Store

START = 32


class Counted(Parameters):
    """One number, or an error."""

    value: int = 0
    wrong: bool = False


class Stop(BaseException):
    """What Ctrl-C raises, told apart from it."""


@pytest.fixture(scope="module")
def model():
    return workbench.load(handwritten_induction(vocab=START + 1, max_positions=31))


@pytest.fixture
def calls(monkeypatch):
    """A measurement that counts its calls, and stops everything at the number in `calls.stop`."""
    made: list[int] = []

    def run(bench, asked, progress):
        if asked.value in stops:
            raise Stop
        made.append(asked.value)
        if asked.wrong and asked.value not in mended:
            raise RequestError(f"value = {asked.value} is wrong;\n choose another.")
        return {"numbers": pd.DataFrame({"square": [asked.value**2], "p": [0.01 * (1 + asked.value)], "q": [9.0]})}

    stops: set[int] = set()
    mended: set[int] = set()
    counted = Measurement("counted", 1, "numbers", Counted, run, ("numbers",), ("numbers",))
    monkeypatch.setitem(MEASUREMENTS, "counted", counted)
    return made, stops, mended


def study(values, wrong=(), name="try") -> Study:
    text = f'[study]\nname = "{name}"\ntitle = "T"\nquestion = "Q"\n'
    for some, flag in ((list(values), "false"), (list(wrong), "true")):
        if some:
            text += f'[[cells]]\nmeasurement = "counted"\nset = {{ wrong = {flag} }}\ngrid = {{ value = {some} }}\n'
    return Study.model_validate(tomllib.loads(text))


@pytest.fixture
def local(model):
    loads = []

    def load(name, dtype, device):
        loads.append(name)
        return model

    return Local(load=load), loads


class Seen:
    def __init__(self) -> None:
        self.steps: list[tuple[str, bool]] = []

    def step(self, name, title, kept):
        self.steps.append((title.split(",")[0], kept))

    def advance(self, done, total):
        return None


def test_stopping_after_some_cells_repeats_none_of_them(tmp_path, calls, local):
    made, stops, _ = calls
    engine, loads = local
    stops.add(3)
    with pytest.raises(Stop):
        run_study(study([1, 2, 3, 4]), tmp_path / "run", engine=engine)
    assert made == [1, 2]
    assert not (tmp_path / "run").exists()
    stops.clear()
    seen = Seen()
    out = run_study(study([1, 2, 3, 4]), tmp_path / "run", engine=engine, reporter=seen)
    assert made == [1, 2, 3, 4]
    assert seen.steps == [(f"counted value={n}", n < 3) for n in (1, 2, 3, 4)]
    assert list(out.run.table("numbers")["square"]) == [1, 4, 9, 16]
    # One load for consecutive cells of one model.
    assert loads == ["smollm2-135m"] * 2


def test_adding_and_removing_cells_measures_only_what_is_new(tmp_path, calls, local):
    made, _, _ = calls
    run_study(study([1, 2]), tmp_path / "run", engine=local[0])
    more = run_study(study([5, 2, 1, 4]), tmp_path / "run", engine=local[0])
    assert made == [1, 2, 5, 4]
    # In the order of the file, whatever the order of measuring.
    assert list(more.run.table("numbers")["square"]) == [25, 4, 1, 16]
    fewer = run_study(study([2]), tmp_path / "run", engine=local[0])
    assert made == [1, 2, 5, 4]
    assert list(fewer.run.table("cells")["state"]) == ["done"]
    assert local[1] == ["smollm2-135m"] * 2


def test_only_some_cells(tmp_path, calls, local):
    made, _, _ = calls
    out = run_study(study([1, 2, 3]), tmp_path / "run", engine=local[0], only=["value=2"])
    assert made == [2]
    assert list(out.run.table("cells")["state"]) == ["open", "done", "open"]


def test_a_failing_cell_is_kept_apart_and_tried_again(tmp_path, calls, local):
    made, _, mended = calls
    wanted = study([1, 3], wrong=[2])
    out = run_study(wanted, tmp_path / "run", engine=local[0])
    (failed,) = out.failed.items()
    assert failed[1] == "RequestError: value = 2 is wrong; choose another."
    cells = out.run.table("cells").set_index("label")
    assert list(cells["state"]) == ["done", "done", "failed"]
    assert cells.loc["counted value=2", "error"] == failed[1]
    kept = json.loads((tmp_path / "run.cells" / f"{failed[0]}.error.json").read_text())
    assert "Traceback" in kept["detail"]
    mended.add(2)
    again = run_study(wanted, tmp_path / "run", engine=local[0])
    assert made == [1, 3, 2, 2]
    assert not again.failed
    assert list(again.run.table("cells")["state"]) == ["done"] * 3
    assert not list((tmp_path / "run.cells").glob("*.error.json"))


def test_nothing_measured_is_an_error_with_the_reasons(tmp_path, calls, local):
    with pytest.raises(RequestError, match=r"No cell of try is measured: RequestError: value = 2 is wrong"):
        run_study(study([], wrong=[2]), tmp_path / "run", engine=local[0])


def test_the_run_is_tidy_and_tells_where_it_comes_from(tmp_path, calls, local, model):
    out = run_study(study([1, 3]), tmp_path / "run", engine=local[0], command="workbench study run x")
    run = Run.open(tmp_path / "run")
    numbers = run.table("numbers")
    assert list(numbers.columns) == ["cell", "model", "value", "square", "p", "q"]
    assert list(numbers["cell"]) == [cell.id for cell in out.cells]
    # Benjamini and Hochberg over both cells: 0.02 and 0.04 of two tests.
    assert list(numbers["q"]) == pytest.approx([0.04, 0.04])
    assert run.kind == "study"
    assert run.manifest["command"] == "workbench study run x"
    assert run.manifest["model"]["weights_sha256"] == model.source.weights_sha256
    assert run.manifest["certificate"]["passed"]
    assert run.manifest["settings"]["cells"][0]["grid"] == {"value": [1, 3]}
    cell = Run.open(tmp_path / "run.cells" / out.cells[0].id)
    assert cell.manifest["settings"] == out.cells[0].identity


def test_a_damaged_cell_is_measured_again(tmp_path, calls, local):
    made, _, _ = calls
    out = run_study(study([1, 2]), tmp_path / "run", engine=local[0])
    (tmp_path / "run.cells" / out.cells[0].id / "tables" / "numbers.parquet").write_bytes(b"short")
    run_study(study([1, 2]), tmp_path / "run", engine=local[0])
    assert made == [1, 2, 1]


def test_cells_of_other_weights_are_not_joined(tmp_path, calls, local):
    run_study(study([1]), tmp_path / "run", engine=local[0])
    other = Local(load=lambda *_: workbench.load(TINY["llama"]()))
    with pytest.raises(RequestError, match=r"measured with different models \(weights_sha256"):
        run_study(study([1, 2]), tmp_path / "run", engine=other)


def test_a_second_process_is_kept_out(tmp_path, calls, local):
    with Store(tmp_path / "run").locked(), pytest.raises(RunLocked, match="is writing"):
        run_study(study([1]), tmp_path / "run", engine=local[0])
    run_study(study([1]), tmp_path / "run", engine=local[0])


def test_another_run_is_left_alone(tmp_path, calls, local):
    run_study(study([1]), tmp_path / "run", engine=local[0])
    with pytest.raises(RunError, match="holds the study 'try', not the study 'other'"):
        run_study(study([1], name="other"), tmp_path / "run", engine=local[0])


def test_engines_are_refused_early(monkeypatch):
    with pytest.raises(RequestError, match="choose one of local, ray"):
        make_engine("slurm")
    with pytest.raises(RequestError, match="workers=0"):
        make_engine("local", workers=0)
    import builtins

    real = builtins.__import__

    def without_ray(name, *rest, **named):
        if name == "ray":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(MissingExtra, match=r"pip install 'attention-workbench\[ray\]'"):
        engines.make_engine("ray")


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra 'ray'")
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_numbers(tmp_path: Path):
    folder = tmp_path / "tiny"
    TINY["llama"]().save_pretrained(folder)
    text = f'[study]\nname = "try"\ntitle = "T"\nquestion = "Q"\nmodel = "{folder}"\n'
    text += (
        '[[cells]]\nmeasurement = "detect"\n'
        'set = { detectors = ["induction"], sizes = { bos_id = 1, repeat_prompts = 3, repeat_length = 9 } }\n'
        "grid = { seed = [0, 1] }\n"
        '[[cells]]\nmeasurement = "sink_rates"\nset = { prompts = 3, length = 12 }\n'
        'grid = { source = ["random", "prose"] }\n'
    )
    asked = Study.model_validate(tomllib.loads(text))
    here = run_study(asked, tmp_path / "here", engine=Local())
    there = run_study(asked, tmp_path / "there", engine=OnRay(workers=2))
    assert here.failed == there.failed
    (told,) = here.failed.values()
    assert "needs a tokenizer" in told
    assert here.run.tables == there.run.tables
    for name in here.run.tables:
        pd.testing.assert_frame_equal(here.run.table(name), there.run.table(name))
