from __future__ import annotations

import random
import time

import pytest
import xarray as xr

from workbench.errors import RunError, RunLocked, RunNotFound
from workbench.runs import Run, RunWriter, list_runs


def content(run: Run) -> dict[str, object]:
    """All that must not depend on interruptions."""
    own = ("id", "created", "finished", "environment", "earlier_environments", "sha256")
    return {key: value for key, value in run.manifest.items() if key not in own}


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory) -> Run:
    return job.write(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize(
    ("stop", "steps"),
    [
        ("written sink", 0),
        ("written induction", 1),
        ("done induction", 2),
        ("ready to rename", 3),
    ],
)
def test_a_killed_run_is_resumed_and_equals_an_uninterrupted_one(tmp_path, job, killed_at, whole, stop, steps):
    path = tmp_path / "run"
    killed_at(path, stop)

    assert not path.exists()
    with pytest.raises(RunNotFound, match="not finished"):
        Run.open(path)
    listed = list_runs(tmp_path)
    assert list(listed["status"]) == ["partial"]
    assert list(listed["path"]) == [str(path)]

    reached = []
    run = job.write(path, reached.append)
    assert reached == [f"{what} {step}" for step in job.STEPS[steps:] for what in ("written", "done")]
    assert content(run) == content(whole)
    run.verify()
    for name in whole.arrays:
        xr.testing.assert_identical(run.array(name).load(), whole.array(name).load())
    assert [child.name for child in tmp_path.iterdir()] == ["run"]


def test_a_kill_after_the_rename_leaves_a_complete_run(tmp_path, job, killed_at, whole):
    path = tmp_path / "run"
    killed_at(path, "renamed")

    assert content(Run.open(path)) == content(whole)
    assert list(list_runs(tmp_path)["status"]) == ["complete"]
    with pytest.raises(RunError, match="already holds a run"):
        job.write(path)
    before = Run.open(path).id
    assert job.write(path, overwrite=True).id != before
    assert [child.name for child in tmp_path.iterdir()] == ["run"]


def test_killed_at_any_time_again_and_again(tmp_path, start, job, whole):
    path = tmp_path / "run"
    delays = random.Random(0)
    for _ in range(4):
        process = start(path)
        assert process.stdout.readline() == "start\n"
        time.sleep(delays.uniform(0.02, 0.25))
        process.kill()
        process.wait()
        if path.exists():
            break
    run = Run.open(path) if path.exists() else job.write(path)
    run.verify()
    assert content(run) == content(whole)


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path, job, waiting_at):
    path = tmp_path / "run"
    with waiting_at(path, "done sink") as process:
        for overwrite in (False, True):
            with pytest.raises(RunLocked) as refusal:
                job.write(path, overwrite=overwrite)
            assert f"process {process.pid} on " in str(refusal.value)
            assert str(path) in str(refusal.value)
        assert job.write(tmp_path / "another").tables == ("detectors", "head_scores")
        assert set(list_runs(tmp_path)["status"]) == {"complete", "partial"}
    assert (tmp_path / ".run.lock").exists()
    with RunWriter.open(path, kind="heads", title="A toy", fingerprint=job.FINGERPRINT) as out:
        assert out.resumed
        assert out.has("sink")
        assert not out.has("induction")


def test_a_reader_of_a_run_that_is_being_replaced_sees_the_old_one(tmp_path, job, waiting_at):
    path = tmp_path / "run"
    old = job.write(path)
    out = RunWriter.open(path, kind="heads", title="new", fingerprint={"seed": 1}, overwrite=True)
    with out:
        out.table("head_scores", job.scores(0))
        out.done("all")
        assert Run.open(path).id == old.id
        new = out.finish()
    assert Run.open(path).id == new.id != old.id
    assert Run.open(path).arrays == ()
    assert [child.name for child in tmp_path.iterdir()] == ["run"]
