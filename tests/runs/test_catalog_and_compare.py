from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RunError, RunNotFound
from workbench.runs import RunWriter, compare_runs, list_runs


def make(path, frame=None, kind="heads", **manifest):
    with RunWriter.open(path, kind=kind, title=f"<{path.name}>", fingerprint={}) as out:
        out.manifest.update(manifest)
        if frame is not None:
            out.table("head_scores", frame)
        return out.finish()


def scores(*rows):
    return pd.DataFrame(rows, columns=["detector", "layer", "head", "value", "low", "high"]).assign(model="m")


def test_list_tells_complete_partial_corrupt_and_newer_apart(tmp_path):
    passed = {"passed": True, "checks": []}
    make(tmp_path / "a", model={"name": "toy"}, certificate=passed)
    make(tmp_path / "b", certificate={"passed": False})
    make(tmp_path / "missing", scores(("sink", 0, 0, 1, 0, 1)))
    (tmp_path / "missing" / "tables" / "head_scores.parquet").unlink()
    make(tmp_path / "no_manifest")
    (tmp_path / "no_manifest" / "manifest.json").unlink()
    make(tmp_path / "new")
    (tmp_path / "new" / "manifest.json").write_text('{"format": 2}')
    with RunWriter.open(tmp_path / "part", kind="verify", title="P", fingerprint={}) as out:
        out.manifest.update(model={"name": "toy"}, certificate=passed)
        out.done("a")
    with RunWriter.open(tmp_path / "torn", kind="verify", title="P", fingerprint={}) as out:
        out.done("a")
    (tmp_path / ".torn.partial" / "state.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file").write_text("")

    found = list_runs(tmp_path)
    assert list(found.columns) == [*("id", "kind", "title", "model", "created", "status", "path", "certificate")]
    rows = {row.path.removeprefix(f"{tmp_path}/"): row for row in found.itertuples()}
    assert {name: row.status for name, row in rows.items()} == {
        "a": "complete",
        "b": "complete",
        "missing": "corrupt",
        "no_manifest": "corrupt",
        "new": "newer",
        "part": "partial",
        ".torn.partial": "corrupt",
    }
    assert (rows["a"].kind, rows["a"].title, rows["a"].model) == ("heads", "<a>", "toy")
    assert (rows["part"].kind, rows["part"].title, rows["part"].model) == ("verify", "P", "toy")
    assert rows["part"].id.split("-")[1] == "verify"
    assert {name for name, row in rows.items() if row.certificate} == {"a", "part"}


def test_list_reads_checksums_only_when_asked(tmp_path):
    run = make(tmp_path / "a", scores(("sink", 0, 0, 1, 0, 1)))
    table = run.path / "tables" / "head_scores.parquet"
    content = bytearray(table.read_bytes())
    content[20] ^= 1
    table.write_bytes(content)
    assert list(list_runs(tmp_path)["status"]) == ["complete"]
    assert list(list_runs(tmp_path, verify=True)["status"]) == ["corrupt"]


def test_list_reads_the_parts_of_an_unfinished_run_when_asked(tmp_path, interrupted):
    interrupted(tmp_path / "run")
    assert list(list_runs(tmp_path, verify=True)["status"]) == ["partial"]
    part = next((tmp_path / ".run.partial" / "parts").glob("00000-*"))
    content = bytearray(part.read_bytes())
    content[20] ^= 1
    part.write_bytes(content)
    assert list(list_runs(tmp_path)["status"]) == ["partial"]
    assert list(list_runs(tmp_path, verify=True)["status"]) == ["corrupt"]


def test_list_of_nothing(tmp_path):
    empty = list_runs(tmp_path)
    assert len(empty) == 0
    assert empty["certificate"].dtype == bool
    with pytest.raises(RunNotFound, match="there is no folder"):
        list_runs(tmp_path / "nowhere")


def test_compare_joins_on_detector_layer_and_head(tmp_path):
    nan = np.nan
    model = {"name": "toy", "weights_sha256": "a" * 64}
    a = make(
        tmp_path / "a",
        scores(
            ("sink", 1, 0, 0.5, 0.4, 0.6),
            ("sink", 0, 1, 0.9, 0.8, 1.0),
            ("echo", 0, 1, 0.2, nan, nan),
            ("only_a", 0, 0, 1, 1, 1),
        ),
        model=model,
        prompts=[{"name": "x", "sha256": "1"}],
    )
    b = make(
        tmp_path / "b",
        scores(
            ("echo", 0, 1, 0.1, 0.0, 0.2),
            ("sink", 0, 1, 0.7, 0.6, 0.8),
            ("sink", 1, 0, 0.8, 0.7, 0.9),
        ),
        model=model,
        prompts=[{"name": "x", "sha256": "1"}],
    )
    found = compare_runs(a, b)
    assert list(found.columns) == [
        *("detector", "layer", "head", "value_a", "value_b", "difference"),
        *("low_a", "high_a", "low_b", "high_b", "overlap", "low", "high", "p", "q", "method"),
    ]
    assert list(found["method"]) == ["none", "intervals", "intervals"]
    assert list(found["detector"]) == ["echo", "sink", "sink"]
    assert list(found["layer"]) == [0, 0, 1]
    np.testing.assert_allclose(found["difference"], [-0.1, -0.2, 0.3])
    # Touching intervals overlap; an interval that is missing says nothing.
    assert found["overlap"].astype(object).tolist() == [pd.NA, True, False]
    assert found.attrs["same_weights"] is True
    assert found.attrs["same_prompts"] is True
    ways = (
        "Differences by 2 detectors: 1 from the two intervals alone, taken as independent; 1 without an interval to "
        "compare, as a run has one prompt, reads weights, or scores all prompts the same."
    )
    only, told, why = found.attrs["notes"]
    # By the folder's name, as users know it.
    assert (only, told) == ("1 scores are in a only.", ways)
    assert why.startswith("a and b keep no scores of single prompts") and "run again to pair" in why
    assert (found.attrs["a"], found.attrs["b"]) == (a.id, b.id)


def test_compare_notes_other_models_and_prompts(tmp_path):
    frame = scores(("sink", 0, 0, 0.5, 0.4, 0.6))
    a = make(tmp_path / "a", frame, model={"name": "x", "weights_sha256": "a" * 64}, prompts=[{"sha256": "1"}])
    b = make(tmp_path / "b", frame, model={"name": "y", "weights_sha256": "b" * 64}, prompts=[{"sha256": "2"}])
    c = make(tmp_path / "c", frame)
    attributes = compare_runs(a, b).attrs
    assert (attributes["same_weights"], attributes["same_prompts"]) == (False, False)
    assert attributes["notes"][0] == "The model's weights differ: x (aaaaaaaaaaaa) against y (bbbbbbbbbbbb)."
    assert "prompts differ" in attributes["notes"][1] and "1 in a only" in attributes["notes"][1]
    attributes = compare_runs(a, c).attrs
    assert (attributes["same_weights"], attributes["same_prompts"]) == (None, None)
    assert "does not record" in attributes["notes"][0]


def test_compare_says_when_nothing_differs(tmp_path):
    frame = scores(("sink", 0, 0, 0.5, 0.4, 0.6), ("echo", 0, 0, np.nan, np.nan, np.nan))
    a, more = make(tmp_path / "a", frame), make(tmp_path / "b", frame.head(1))
    alike = compare_runs(a, a).attrs
    assert alike["identical"]
    assert alike["notes"][-1] == "The scores are identical: all 2, with their intervals."
    assert not compare_runs(a, more).attrs["identical"]
    moved = make(tmp_path / "c", frame.assign(low=[0.3, np.nan]))
    assert not compare_runs(a, moved).attrs["identical"]


def test_compare_refuses_what_cannot_be_compared(tmp_path):
    a = make(tmp_path / "a", scores(("sink", 0, 0, 0.5, 0.4, 0.6)))
    other = make(tmp_path / "b", scores(("echo", 3, 1, 0.5, 0.4, 0.6)))
    trace = make(tmp_path / "c", kind="trace")
    double = make(tmp_path / "d", scores(*[("sink", 0, 0, 0.5, 0.4, 0.6)] * 2))
    bare = make(tmp_path / "e", scores(("sink", 0, 0, 0.5, 0.4, 0.6)).drop(columns="low"))
    with pytest.raises(RunError, match="no head score in common: sink on 1 layers of 1 heads against echo"):
        compare_runs(a, other)
    with pytest.raises(RunError, match="of kind trace and has no head scores"):
        compare_runs(a, trace)
    with pytest.raises(RunError, match="more than one sink score for L0H0"):
        compare_runs(double, a)
    with pytest.raises(RunError, match="lack low"):
        compare_runs(a, bare)
