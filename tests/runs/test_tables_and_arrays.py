from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.errors import RequestError
from workbench.runs import Run, RunWriter


@pytest.fixture
def out(tmp_path):
    with RunWriter.open(tmp_path / "run", kind="heads", title="T", fingerprint={}) as writer:
        yield writer


ROW = st.tuples(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.none() | st.text(), st.text(max_size=3)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.lists(ROW, max_size=8), min_size=1, max_size=3))
def test_tables_round_trip(tmp_path_factory, parts):
    dtypes = {"i": "int64", "x": "float64", "b": "bool", "s": "str", "t": "str"}
    frames = [pd.DataFrame(rows, columns=list(dtypes)).astype(dtypes) for rows in parts]
    path = tmp_path_factory.mktemp("trip") / "run"
    with RunWriter.open(path, kind="heads", title="T", fingerprint={}) as writer:
        for number, frame in enumerate(frames):
            writer.table(f"rows/{number}", frame)
        writer.finish()
    found = Run.open(path).table("rows")
    pd.testing.assert_frame_equal(found, pd.concat(frames, ignore_index=True))


def test_special_columns(out):
    frame = pd.DataFrame(
        {
            "category": pd.Categorical(["a", "b", "a"]),
            "objects": pd.Series(["x", None, "y"], dtype=object),
            "time": pd.to_datetime(["2026-01-01T00:00:00Z"] * 3),
            "small": np.array([1, 2, 3], dtype=np.float32),
            "whole": pd.array([1, None, 3], dtype="Int64"),
        }
    )
    frame.index = [5, 3, 1]
    frame.attrs = {"notes": object()}
    out.table("odd", frame)
    found = out.finish().table("odd")
    assert list(found["category"]) == ["a", "b", "a"]
    assert list(found["objects"].fillna("?")) == ["x", "?", "y"]
    assert found["time"].equals(frame["time"].reset_index(drop=True))
    assert found["small"].dtype == np.float32
    assert found["whole"].isna().tolist() == [False, True, False]
    # Whatever pandas called the column, a reader gets the same plain type.
    assert found["whole"].dtype == np.float64
    assert list(found.index) == [0, 1, 2]


def test_a_file_depends_on_the_rows_alone(out):
    frame = pd.DataFrame({"x": [1, 2, 3], "s": pd.Series(["a", "b", "c"], dtype=object)})
    out.table("one", frame[1:])
    out.table("two", pd.DataFrame({"x": [2, 3], "s": pd.Series(["b", "c"], dtype=object)}))
    tables = out.finish().manifest["tables"]
    assert tables["one"]["sha256"] == tables["two"]["sha256"]


def test_a_folder_name_is_no_column(tmp_path):
    frame = pd.DataFrame({"layer": [1, 2]})
    with RunWriter.open(tmp_path / "layer=3" / "head=4", kind="heads", title="", fingerprint={}) as writer:
        writer.table("t/0", frame)
        writer.table("t/1", frame)
        found = writer.finish().table("t")
    assert found.to_dict("list") == {"layer": [1, 2, 1, 2]}


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (pd.DataFrame({"x": [1, "a"]}), "mixed or unknown type"),
        (pd.DataFrame({"x": [object()]}), "mixed or unknown type"),
        (pd.DataFrame({"x": [[1, 2]]}), "'x' holds list"),
        (pd.DataFrame({"x": [{"a": 1}]}), "'x' holds struct"),
        (pd.DataFrame({"x": [b"a"]}), "'x' holds binary"),
        (pd.DataFrame({1: [2]}), "columns need names"),
        (pd.DataFrame([[1, 2]], columns=["x", "x"]), "columns need names"),
        (pd.DataFrame(), "columns need names"),
        (pd.DataFrame({"x": [1]}).rename_axis("layer"), r"reset_index\(\)"),
        (pd.DataFrame({"x": [1]}, index=pd.MultiIndex.from_tuples([(0, 1)])), r"reset_index\(\)"),
    ],
)
def test_refused_tables(out, frame, reason):
    with pytest.raises(RequestError, match=f"table bad.*{reason}"):
        out.table("bad", frame)
    assert out.finish().tables == ()


def test_parts_must_fit(out):
    out.table("t/0", pd.DataFrame({"x": [1], "s": ["a"]}))
    out.table("t/1", pd.DataFrame({"s": pd.Series([None], dtype=object), "x": [0.5]}))
    out.table("t/2", pd.DataFrame({"x": pd.Series([], dtype=object), "s": pd.Series([], dtype=object)}))
    with pytest.raises(RequestError, match=r"missing: \['s'\], new: \['y'\]"):
        out.table("t/3", pd.DataFrame({"x": [1], "y": [1]}))
    with pytest.raises(RequestError, match="another type"):
        out.table("t/4", pd.DataFrame({"x": ["text"], "s": ["a"]}))
    found = out.finish().table("t")
    assert list(found["x"]) == [1, 0.5]
    assert list(found["s"].fillna("?")) == ["a", "?"]
    assert found["x"].dtype == np.float64


def test_arrays_round_trip(out):
    dataset = xr.Dataset(
        {
            "pattern": (("example_head", "query", "key"), np.arange(18, dtype=np.float32).reshape(2, 3, 3)),
            "zeros": (("example_head",), np.array([0, 0])),
            "flags": (("example_head",), np.array([True, False]), {"unit": "é"}),
            "half": (("query",), np.array([0.5, np.nan, np.inf], np.float16)),
            "title": ((), np.array("a title")),
            "empty": (("none",), np.array([], dtype="U3")),
        },
        coords={
            "example": ("example_head", ["prose", "code é\n"]),
            "example_head": ["L1H2", "L10H11"],
            "layer": ("example_head", [1, 10]),
            "when": ("query", np.array(["2026-01-01", "2026-01-02", "NaT"], "M8[ns]")),
        },
        attrs={"note": "n", "size": np.int64(3)},
    )
    before = dataset.copy(deep=True)
    out.array("patterns", dataset)
    xr.testing.assert_identical(dataset, before)
    found = out.finish().array("patterns").load()
    xr.testing.assert_identical(found, dataset)
    assert {name: v.dtype.kind for name, v in found.variables.items()} == {
        name: v.dtype.kind for name, v in dataset.variables.items()
    }
    assert found["pattern"].dtype == np.float32
    assert found.sel(example_head="L10H11")["layer"] == 10


def test_arrays_of_text_objects_become_fixed_text(out):
    out.array("texts", xr.Dataset({"t": ("x", np.array(["a", "bcd"], dtype=object))}))
    found = out.finish().array("texts")["t"]
    assert found.dtype.kind == "U"
    assert list(found.values) == ["a", "bcd"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([{"a": 1}, None], dtype=object), "Python objects \\(NoneType, dict\\)"),
        (np.array(["a", 1], dtype=object), "Python objects \\(int\\)"),
        (np.array([b"a", b"b"]), "dtype \\|S1"),
        (np.array([(1, 2.0)] * 2, dtype="i4,f4"), "dtype"),
    ],
)
def test_refused_arrays(out, values, reason):
    with pytest.raises(RequestError, match=f"array bad: 'v' .*{reason}"):
        out.array("bad", xr.Dataset({"v": ("x", values)}))
    with pytest.raises(RequestError, match=f"array bad: 'c' .*{reason}"):
        out.array("bad", xr.Dataset(coords={"c": ("x", values)}))
    assert out.finish().arrays == ()


def test_no_pickle_in_any_file(out):
    out.array("a", xr.Dataset({"t": ("x", np.array(["a", "b"], dtype=object))}))
    out.table("t", pd.DataFrame({"s": pd.Series(["a"], dtype=object)}))
    run = out.finish()
    metadata = [path.read_text() for path in run.path.rglob("zarr.json")]
    assert metadata
    assert not any("pickle" in text or "object" in text for text in metadata)
    assert {path.suffix for path in run.path.rglob("*") if path.is_file()} <= {".json", ".parquet", ""}


def test_numbers_are_read_when_used(out):
    out.array("a", xr.Dataset({"v": ("x", np.arange(4.0))}))
    found = out.finish().array("a")
    assert not found["v"]._in_memory
    assert found["v"].sum() == 6


def test_an_encoding_from_elsewhere_does_not_round_numbers(out):
    dataset = xr.Dataset({"v": ("x", np.array([0.123, 0.456]))})
    dataset["v"].encoding = {"dtype": "int16", "scale_factor": 0.1, "_FillValue": -1}
    out.array("a", dataset)
    assert list(out.finish().array("a")["v"].values) == [0.123, 0.456]
    assert dataset["v"].encoding["dtype"] == "int16"
