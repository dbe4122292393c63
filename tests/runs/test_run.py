from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from workbench.errors import RequestError, RunCorrupt, RunError, RunNotFound, RunTooNew, WorkbenchError
from workbench.runs import Run
from workbench.runs.manifest import digest


@pytest.fixture(scope="module")
def made(job, tmp_path_factory) -> Path:
    return job.write(tmp_path_factory.mktemp("made") / "run").path


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def edit(run: Path, **changes: object) -> None:
    """Change the manifest as someone would who also repairs its checksum."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= changes
    manifest["sha256"] = digest(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_run_opens(run):
    found = Run.open(str(run))
    assert found.tables == ("detectors", "head_scores")
    assert found.arrays == ("patterns_sink", "patterns_induction", "patterns_echo")
    assert found.has_table("detectors")
    assert not found.has_table("patterns_sink")
    assert found.has_array("patterns_sink")
    assert len(found.table("head_scores")) == 36
    assert found.path == run


def test_a_copy_with_file_managers_droppings_is_sound(run):
    (run / "arrays" / "patterns_sink.zarr" / ".DS_Store").write_text("x")
    (run / "report.html").write_text("x")
    Run.open(run)


def test_an_unknown_name_lists_those_there_are(run):
    found = Run.open(run)
    with pytest.raises(RequestError, match="no table 'scores'; it has: detectors, head_scores"):
        found.table("scores")
    with pytest.raises(RequestError, match="no array 'x'; it has: patterns_sink"):
        found.array("x")


def test_nothing_there(tmp_path):
    with pytest.raises(RunNotFound, match=r"there is no run at .*nowhere"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(RunNotFound, match=r"is not a run: it has no manifest\.json"):
        Run.open(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
def test_each_missing_file_is_noticed(run, verify):
    files = sorted(path for path in run.rglob("*") if path.is_file())
    assert len(files) > 20
    for file in files:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(RunCorrupt, match=r"missing|bytes instead of"):
            Run.open(run, verify=verify)
        file.write_bytes(content)
    Run.open(run)


def test_each_truncated_file_is_noticed_without_reading_checksums(run):
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(RunCorrupt):
            Run.open(run, verify=False)
        file.write_bytes(content)
    Run.open(run)


def test_a_flipped_bit_in_each_file_is_noticed(run):
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "manifest.json"]
    for file in files:
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(RunCorrupt, match="differs from its checksum"):
            Run.open(run)
        file.write_bytes(content)
    Run.open(run)


def test_any_flipped_bit_in_the_manifest_is_noticed(run):
    file = run / "manifest.json"
    content = file.read_bytes()
    # The last byte is a line end, which means nothing.
    for position in range(0, len(content) - 1, 5):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 7)
        file.write_bytes(flipped)
        with pytest.raises((RunCorrupt, RunTooNew)):
            Run.open(run, verify=False)


def test_an_added_chunk_is_noticed(run):
    (run / "arrays" / "patterns_sink.zarr" / "pattern" / "c" / "9").write_text("")
    with pytest.raises(RunCorrupt, match="arrays/patterns_sink differs"):
        Run.open(run)


def test_a_renamed_chunk_is_noticed(run):
    chunk = run / "arrays" / "patterns_sink.zarr" / "example" / "c" / "0"
    chunk.rename(chunk.with_name("1"))
    with pytest.raises(RunCorrupt, match="arrays/patterns_sink differs"):
        Run.open(run)


def test_damage_is_named_with_the_next_step(run):
    (run / "tables" / "head_scores.parquet").unlink()
    shutil.rmtree(run / "arrays" / "patterns_echo.zarr" / "pattern" / "c")
    with pytest.raises(RunCorrupt) as refusal:
        Run.open(run)
    for part in (
        str(run),
        "tables/head_scores is missing",
        "arrays/patterns_echo has",
        "make it again",
    ):
        assert part in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "1"}', '{"format": true}', "\udcff"])
def test_a_manifest_that_is_none(run, text):
    (run / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(RunCorrupt, match=r"manifest\.json"):
        Run.open(run)


def test_a_newer_format_is_refused_whatever_else_it_holds(run):
    (run / "manifest.json").write_text('{"format": 2, "new": []}')
    with pytest.raises(RunTooNew, match=r"format 2, and this workbench reads up to 1; .*pip install"):
        Run.open(run)


def test_a_manifest_without_its_tables(run):
    edit(run, tables=None)
    with pytest.raises(RunCorrupt, match="no valid 'tables'"):
        Run.open(run)


@pytest.mark.parametrize("file", ["../../outside.parquet", "/etc/passwd", "tables/other.parquet", 3, None])
def test_a_manifest_cannot_point_elsewhere(run, file):
    edit(run, tables={"head_scores": {"file": file, "rows": 1, "sha256": "0" * 64}})
    with pytest.raises(RunCorrupt, match="tables/head_scores has no valid entry"):
        Run.open(run, verify=False)
    edit(run, tables={"../../x": {"file": "tables/../../x.parquet", "rows": 1, "sha256": "0" * 64}})
    with pytest.raises(RunCorrupt, match="has no valid entry"):
        Run.open(run, verify=False)


def test_unreadable_contents_without_verification_are_corrupt_too(run):
    table = run / "tables" / "head_scores.parquet"
    table.write_bytes(bytes(table.stat().st_size))
    found = Run.open(run, verify=False)
    with pytest.raises(RunCorrupt, match=r"head_scores\.parquet cannot be read"):
        found.table("head_scores")
    with pytest.raises(RunCorrupt, match="head_scores differs from its checksum"):
        found.verify()
    group = run / "arrays" / "patterns_sink.zarr" / "example" / "zarr.json"
    group.write_bytes(b" " * group.stat().st_size)
    with pytest.raises(RunCorrupt, match=r"patterns_sink\.zarr cannot be read"):
        found.array("patterns_sink")


def test_all_errors_are_readable_by_the_command_line():
    assert issubclass(RunError, WorkbenchError)
    assert issubclass(RequestError, WorkbenchError)
