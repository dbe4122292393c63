from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError, RunError
from workbench.runs import Run, RunWriter


def test_manifest_holds_the_provenance(tmp_path, begin, frame):
    before = datetime.now(UTC) - timedelta(seconds=1)
    with begin(tmp_path / "deep" / "run", command="workbench heads toy") as out:
        out.table("scores", frame)
        out.done("sink", seconds=1.23456)
        out.manifest["model"] = {"name": "toy", "layers": np.int64(3)}
        run = out.finish()
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest == run.manifest
    assert re.fullmatch(r"\d{8}-heads-[0-9a-f]{6}", run.id)
    created, finished = (datetime.fromisoformat(manifest[key]) for key in ("created", "finished"))
    assert before <= created <= finished <= datetime.now(UTC)
    assert created.utcoffset() == timedelta(0)
    assert manifest["format"] == 1
    assert manifest["command"] == "workbench heads toy"
    assert manifest["model"] == {"name": "toy", "layers": 3}
    assert manifest["settings"] == {}
    assert manifest["prompts"] == []
    assert manifest["seconds"] == {"sink": 1.235}
    assert manifest["fingerprint"] == {"seed": 0}
    assert manifest["environment"]["pandas"] == pd.__version__
    assert manifest["earlier_environments"] == []
    assert manifest["tables"]["scores"]["rows"] == 2
    assert manifest["tables"]["scores"]["file"] == "tables/scores.parquet"
    assert (run.kind, run.title, run.tables, run.arrays) == ("heads", "T", ("scores",), ())


def test_parts_are_joined_in_the_order_of_writing(tmp_path, begin, frame):
    with begin(tmp_path / "run") as out:
        out.table("scores/z", frame.assign(layer=1))
        out.table("other", frame)
        out.done("z")
        out.table("scores/a", frame.assign(layer=[2.5, 3.5]))
        run = out.finish()
    assert run.tables == ("scores", "other")
    assert list(run.table("scores")["layer"]) == [1, 1, 2.5, 3.5]


def test_an_exception_keeps_finished_steps_only(tmp_path, interrupted, names):
    path = tmp_path / "run"
    interrupted(path)
    assert names(tmp_path) == [".run.partial"]
    with RunWriter.open(path, kind="heads", title="a new title", fingerprint={"seed": 0}) as out:
        assert out.resumed
        assert (out.has("a"), out.has("b")) == (True, False)
        assert out.manifest["settings"] == {"seed": 0}
        run = out.finish()
    assert run.title == "a new title"
    assert run.manifest["tables"]["scores"]["rows"] == 2
    assert names(tmp_path) == ["run"]


def test_without_a_finished_step_nothing_is_left(tmp_path, begin, names, frame):
    with suppress(ZeroDivisionError), begin(tmp_path / "run") as out:
        out.table("scores", frame)
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with begin(tmp_path / "run", {"seed": 5}) as out:
        assert not out.resumed


def test_leaving_without_finish_keeps_the_steps(tmp_path, begin):
    with begin(tmp_path / "run") as out:
        out.done("a")
    with begin(tmp_path / "run") as out:
        assert out.has("a")


def test_resumption_needs_an_equal_fingerprint(tmp_path, begin, interrupted):
    path = tmp_path / "run"
    interrupted(path, {"settings": {"seed": 0, "k": 3}, "model": "ab", "gone": [1]})
    now = {"settings": {"seed": 1, "k": 3}, "model": "ab", "new": {"x": None}}
    with pytest.raises(RunError) as refusal:
        begin(path, now)
    for part in (
        "settings.seed (was 0, now 1)",
        "gone (was [1], now absent)",
        "new.x (was absent, now null)",
        "--overwrite",
        "another path",
        str(path.parent),
    ):
        assert part in str(refusal.value)
    assert "settings.k" not in str(refusal.value)
    assert "model" not in str(refusal.value)
    with (
        pytest.raises(RunError, match=r'kind \(was "heads", now "verify"\)'),
        RunWriter.open(path, kind="verify", title="T", fingerprint=now),
    ):
        pass
    with begin(path, now, overwrite=True) as out:
        assert not out.resumed
        assert not out.has("a")


def test_tuples_and_numpy_numbers_in_a_fingerprint_are_equal_after_resumption(tmp_path, begin, interrupted):
    given = {"heads": ((1, 2),), "eps": np.float32(0.5), "n": np.int64(3), "path": Path("x"), "nan": np.nan}
    interrupted(tmp_path / "run", given)
    with begin(tmp_path / "run", given, overwrite=True) as out:
        assert out.resumed


def test_a_finished_run_is_replaced_only_on_request_and_only_at_the_end(tmp_path, begin, names, frame):
    path = tmp_path / "run"
    with begin(path) as out:
        out.table("scores", frame)
        old = out.finish()
    with pytest.raises(RunError, match=r"already holds a run.*--overwrite"):
        begin(path)
    with suppress(ZeroDivisionError), begin(path, overwrite=True) as out:
        out.done("a")
        raise ZeroDivisionError
    assert Run.open(path).id == old.id
    with begin(path, overwrite=True) as out:
        assert out.resumed
        out.table("other", frame)
        new = out.finish()
    assert Run.open(path).id == new.id != old.id
    assert Run.open(path).tables == ("other",)
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, overwrite, begin, names):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(RunError, match="not a run, so it is left alone"):
        begin(tmp_path / "run", overwrite=overwrite)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="not a run, so it is left alone"):
        begin(tmp_path / "file", overwrite=overwrite)
    assert names(tmp_path) == ["file", "run"]


def test_an_empty_folder_is_used(tmp_path, begin):
    (tmp_path / "run").mkdir()
    with begin(tmp_path / "run") as out:
        out.finish()
    assert Run.open(tmp_path / "run").tables == ()


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path, begin, names):
    with begin(tmp_path / "run") as out:
        out.done("a")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine").write_text("x")
        with pytest.raises(RunError, match="left alone"):
            out.finish()
    assert names(tmp_path) == [".run.partial", "run"]
    assert names(tmp_path / "run") == ["mine"]


def test_a_damaged_run_can_be_replaced(tmp_path, begin):
    with begin(tmp_path / "run") as out:
        out.finish()
    (tmp_path / "run" / "manifest.json").write_text("{")
    with begin(tmp_path / "run", overwrite=True) as out:
        out.finish()
    Run.open(tmp_path / "run")


def test_a_kill_between_the_two_renames_gives_the_old_run_back(tmp_path, begin):
    path = tmp_path / "run"
    with begin(path) as out:
        old = out.finish()
    path.rename(tmp_path / ".run.old")
    with pytest.raises(RunError, match="already holds a run"):
        begin(path)
    assert Run.open(path).id == old.id


def test_a_rename_that_fails_gives_the_old_run_back(tmp_path, monkeypatch, begin):
    path = tmp_path / "run"
    with begin(path) as out:
        old = out.finish()
    rename = Path.rename

    def refuse(self, target):
        if self.name == "final":
            raise PermissionError(1, "no")
        return rename(self, target)

    with begin(path, overwrite=True) as out:
        out.done("a")
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(RunError, match="cannot write the run"):
            out.finish()
        monkeypatch.undo()
    assert Run.open(path).id == old.id


def test_a_mistaken_second_write_is_refused(tmp_path, begin, frame):
    with begin(tmp_path / "run") as out:
        out.table("scores/a", frame)
        with pytest.raises(RequestError, match=r"scores/a .* written twice"):
            out.table("scores/a", frame)
        out.done("a")
        with pytest.raises(RequestError, match="written twice"):
            out.table("scores/a", frame)
        with pytest.raises(RequestError, match=r"'a' .* done twice"):
            out.done("a")


def test_a_part_from_before_the_interruption_is_replaced_in_its_place(tmp_path, begin, interrupted, frame):
    interrupted(tmp_path / "run")
    with begin(tmp_path / "run") as out:
        out.table("scores/b", frame.assign(layer=2))
        out.table("scores/a", frame.assign(layer=1))
        out.done("a")
    with begin(tmp_path / "run") as out:
        run = out.finish()
    assert list(run.table("scores")["layer"]) == [1, 1, 2, 2]


@pytest.mark.parametrize("name", ["", "Scores", "../scores", "a b", "a.b", "1a", "é", "x" * 65])
def test_names_that_are_no_file_names_are_refused(tmp_path, name, begin, frame):
    with begin(tmp_path / "run") as out, pytest.raises(RequestError, match="cannot name a table"):
        out.table(name, frame)
    with pytest.raises(RequestError, match="cannot name a kind"):
        RunWriter.open(tmp_path / "run", kind=name, title="", fingerprint={})


def test_what_json_cannot_hold_is_refused_by_name(tmp_path, begin):
    @dataclass(frozen=True)
    class Certificate:
        passed: bool
        checks: tuple[float, ...]

    with begin(tmp_path / "run") as out:
        out.manifest["model"] = {"tensors": [np.zeros(2)]}
        with pytest.raises(RequestError, match=r"manifest\.model\.tensors\[0\] is a ndarray"):
            out.done("a")
        out.manifest["model"] = {1: "x"}
        with pytest.raises(RequestError, match="the key 1"):
            out.finish()
        out.manifest["model"] = {"name": "caf\udce9 é", "peak": float("inf")}
        out.manifest["certificate"] = Certificate(True, (1e-6, float("nan")))
        out.manifest["tables"] = {}
        with pytest.raises(RequestError, match="tables are filled in by the writer"):
            out.finish()
        del out.manifest["tables"]
        run = out.finish()
    assert run.manifest["model"] == {"name": "caf\\udce9 é", "peak": None}
    assert run.manifest["certificate"] == {"passed": True, "checks": [1e-6, None]}
    with pytest.raises(RequestError, match=r"fingerprint\.x is a set"):
        begin(tmp_path / "other", {"x": {1}})


def test_a_closed_writer_writes_nothing(tmp_path, begin, frame):
    with begin(tmp_path / "run") as out:
        out.finish()
        for act in (out.finish, lambda: out.done("a"), lambda: out.table("scores", frame)):
            with pytest.raises(RunError, match="is closed"):
                act()
