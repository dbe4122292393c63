from __future__ import annotations

import fcntl
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from workbench.errors import RunCorrupt, RunError, RunLocked, RunTooNew
from workbench.runs import RunWriter, writer
from workbench.runs.disk import write_atomically
from workbench.runs.lock import Lock


def test_a_second_writer_in_the_same_process_is_refused(tmp_path, begin):
    with (
        begin(tmp_path / "run"),
        pytest.raises(RunLocked, match=f"process {os.getpid()} on .*{tmp_path}/run"),
    ):
        begin(tmp_path / "run")
    with begin(tmp_path / "run"):
        pass


def test_the_lock_is_released_when_opening_fails(tmp_path, begin, interrupted):
    interrupted(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(RunError, match="other settings"):
            begin(tmp_path / "run", {"seed": 9})


def test_a_lock_that_its_holder_removed_meanwhile_is_not_enough(tmp_path, monkeypatch):
    file = tmp_path / ".run.lock"
    flock, opened = fcntl.flock, []

    def release_first(descriptor, operation):
        if not opened:
            # As if the holder had finished between our opening the file and locking it.
            file.unlink()
            opened.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", release_first)
    lock = Lock(file, tmp_path / "run")
    assert file.exists()
    with pytest.raises(RunLocked):
        Lock(file, tmp_path / "run")
    lock.release()
    lock.release()
    assert not file.exists()


def test_only_one_of_many_holds_the_lock(tmp_path, names):
    inside, most, taken = 0, 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most, taken
        for _ in range(200):
            try:
                lock = Lock(tmp_path / ".run.lock", tmp_path / "run")
            except RunLocked:
                continue
            with guard:
                inside += 1
                most = max(most, inside)
                taken += 1
            with guard:
                inside -= 1
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert taken > 1
    assert names(tmp_path) == []


def test_a_damaged_part_of_an_interrupted_run_is_named(tmp_path, begin, interrupted):
    path = tmp_path / "run"
    interrupted(path)
    part = next((tmp_path / ".run.partial" / "parts").glob("00000-*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(RunCorrupt, match=part.name):
        begin(path)


def test_a_line_cut_short_is_ignored_and_one_in_the_middle_is_not(tmp_path, begin, interrupted):
    path, state = tmp_path / "run", tmp_path / ".run.partial" / "state.jsonl"
    interrupted(path)
    with state.open("ab") as stream:
        stream.write(b'{"step": "b", "sec')
    with begin(path) as out:
        assert (out.has("a"), out.has("b")) == (True, False)
        out.done("c")
    with begin(path) as out:
        assert out.has("c")
    with state.open("ab") as stream:
        stream.write(b'{"step": "b", "sec\n')
    with pytest.raises(RunCorrupt, match=r"state\.jsonl has a line that is no JSON object; delete"):
        begin(path)
    with begin(path, overwrite=True) as out:
        assert not out.resumed


def test_an_interrupted_run_of_a_later_format(tmp_path, begin, interrupted):
    path, state = tmp_path / "run", tmp_path / ".run.partial" / "state.jsonl"
    interrupted(path)
    state.write_text(state.read_text().replace('"format": 1', '"format": 2', 1))
    with pytest.raises(RunTooNew, match="format 2"):
        begin(path)


def test_a_kill_before_the_first_line_is_no_obstacle(tmp_path, begin):
    partial = tmp_path / ".run.partial"
    partial.mkdir()
    (partial / "state.jsonl.tmp").write_text("{")
    with begin(tmp_path / "run") as out:
        assert not out.resumed
        out.finish()


def test_a_hidden_folder_of_someone_else_is_named(tmp_path, begin, names):
    partial = tmp_path / ".run.partial"
    partial.mkdir()
    (partial / "mine").write_text("x")
    with pytest.raises(RunCorrupt, match=f"delete the unfinished run {re.escape(str(partial))}"):
        begin(tmp_path / "run")
    assert names(partial) == ["mine"]


def test_other_versions_before_an_interruption_are_kept(tmp_path, monkeypatch, begin, interrupted):
    monkeypatch.setattr(writer, "environment", lambda: {"torch": "1"})
    interrupted(tmp_path / "run")
    monkeypatch.setattr(writer, "environment", lambda: {"torch": "2"})
    with begin(tmp_path / "run") as out:
        run = out.finish()
    assert run.manifest["environment"] == {"torch": "2"}
    assert run.manifest["earlier_environments"] == [{"torch": "1"}]


def test_a_full_disk_gives_a_run_error_and_keeps_the_steps(tmp_path, monkeypatch, begin, frame):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with begin(tmp_path / "run") as out:
        out.done("a")
        monkeypatch.setattr(os, "fsync", full)
        out.table("scores", frame)
        with pytest.raises(RunError, match="No space left on device; make room"):
            out.done("b")
        monkeypatch.undo()
        out.done("c")
        assert not out.has("b")
    with begin(tmp_path / "run") as out:
        assert (out.has("a"), out.has("b"), out.has("c")) == (True, False, True)
        assert out.finish().table("scores").shape == frame.shape


def test_a_step_that_could_not_be_noted_does_not_count(tmp_path, monkeypatch, begin):
    fsync, state = os.fsync, tmp_path / ".run.partial" / "state.jsonl"

    def full(descriptor):
        if os.fstat(descriptor).st_ino == state.stat().st_ino:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with begin(tmp_path / "run") as out:
        out.done("a")
        before = state.read_bytes()
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left on device"):
            out.done("b")
        monkeypatch.undo()
        assert state.read_bytes() == before
        assert not out.has("b")


def test_files_of_no_step_are_cleared_away_on_resumption(tmp_path, job, names):
    def reach(point):
        if point == "written induction":
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        job.write(tmp_path / "run", reach)
    parts = tmp_path / ".run.partial" / "parts"
    kept = ["00000-detectors.parquet", "00001-head_scores.parquet", "00002-patterns_sink.zarr"]
    left = ["00003-head_scores.parquet", "00004-patterns_induction.zarr"]
    assert names(parts) == kept + left
    with RunWriter.open(tmp_path / "run", kind="heads", title="T", fingerprint=job.FINGERPRINT):
        assert names(parts) == kept


def test_a_place_that_cannot_be_written_is_named(tmp_path, begin):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write the run .*file/run"):
        begin(tmp_path / "file" / "run")


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch, job, begin):
    synced: set[int] = set()
    at_rename: list[set[int]] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def note_rename(self, target):
        if self.name == "final":
            at_rename.append(set(synced))
            synced.clear()
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    with begin(tmp_path / "another"):
        assert {path.stat().st_ino for path in (tmp_path, tmp_path / ".another.partial")} <= synced
    run = job.write(tmp_path / "run")
    needed = {path.stat().st_ino for path in [run.path, *run.path.rglob("*")]}
    assert len(needed) > 10
    assert needed <= at_rename[0]
    assert tmp_path.stat().st_ino in synced


def test_a_replaced_text_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    order: list[object] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), order.append(os.fstat(fd).st_ino)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("rename"), replace(self, to)))
    write_atomically(tmp_path / "text", "é")
    assert order == [(tmp_path / "text").stat().st_ino, "rename", tmp_path.stat().st_ino]
    assert (tmp_path / "text").read_text(encoding="utf-8") == "é"


def test_a_step_is_noted_after_its_files_are_on_the_disk(tmp_path, monkeypatch, job, begin):
    order: list[int] = []
    fsync = os.fsync
    with begin(tmp_path / "run") as out:
        out.array("patterns", job.patterns(0))
        monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), order.append(os.fstat(fd).st_ino)))
        out.done("a")
        partial = tmp_path / ".run.partial"
        parts = {path.stat().st_ino for path in [partial / "parts", *(partial / "parts").rglob("*")]}
        assert len(parts) > 5
        assert parts == set(order[:-1])
        assert order[-1] == (partial / "state.jsonl").stat().st_ino
