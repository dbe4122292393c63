"""Tiles and values that the zoomable pattern is served, against exact entries."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from workbench.apps.library import RunLibrary
from workbench.apps.server import create_app
from workbench.apps.settings import AppSettings
from workbench.apps.zoom.entries import MOST_LINES, highest_entries, view_table
from workbench.apps.zoom.tiles import FLOOR, PIXELS, Look, automatic_top, levels, tile
from workbench.errors import RequestError
from workbench.runs import RunWriter
from workbench.runs.patterns import Masking, StoredPattern, open_pattern, pattern_tensors, write_pattern

TOKENS = 3000


@pytest.fixture(scope="module")
def pattern(runs_folder):
    return RunLibrary(runs_folder).pattern("needle", "l4h2")


@pytest.fixture(scope="module")
def ask(runs_folder):
    client = create_app(AppSettings(runs_folder)).server.test_client()
    return lambda path: client.get(f"/zoom/needle/l4h2/{path}", base_url="http://127.0.0.1")


def drawn(content):
    picture = Image.open(io.BytesIO(content))
    assert picture.size == (PIXELS, PIXELS) and picture.mode == "P"
    return np.asarray(picture)


def full_matrix(pattern):
    """The pattern in float64, from the stored q and k alone."""
    q, k = (pattern.tensors.read(name).astype(np.float64) for name in "qk")
    logits = q @ k.T * pattern.masking.scale
    row, key = np.arange(len(q))[:, None], np.arange(len(q))
    seen = key <= row
    if pattern.masking.window is not None:
        seen &= key > row - pattern.masking.window
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True), seen


@pytest.fixture(scope="module", params=[None, 700], ids=["causal", "window"])
def matrix_of(request, pattern, tmp_path_factory):
    if request.param is None:
        return pattern, *full_matrix(pattern)
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2100, 8, generator=generator) for _ in range(2))
    masking = Masking(0.9, window=request.param)
    with RunWriter.open(tmp_path_factory.mktemp("run") / "run", kind="p", title="T", fingerprint={}) as writer:
        write_pattern(writer, (0, 0), pattern_tensors(q, k, masking), masking)
        found = open_pattern(writer.finish(), "l0h0")
    return found, *full_matrix(found)


@pytest.mark.parametrize(
    "part", [(0, None, 0, None), (37, 1999, 0, 1500), (1000, 1900, 1, 77), (1501, 1777, 803, 1660)]
)
@pytest.mark.parametrize("skip", [True, False])
def test_the_highest_entries_are_those_of_the_full_matrix(matrix_of, part, skip):
    """Not the first corners of blocks, and the keys beside key 0 among them."""
    pattern, matrix, _ = matrix_of
    rows, keys = (slice(part[at], part[at + 1] or pattern.tokens) for at in (0, 2))
    known = np.full(matrix.shape, -1.0)
    known[rows, keys] = matrix[rows, keys]
    if skip:
        known[:, 0] = -1
    best = np.sort(known, axis=None)[::-1][:12]
    found = highest_entries(pattern, rows, keys, 12, skip_first=skip)
    count = int((best > FLOOR * 1.01).sum())
    assert len(found) >= count and len({entry[1:] for entry in found}) == len(found)
    assert [value for value, *_ in found[:count]] == pytest.approx(best[:count], rel=1e-4)
    assert all(value == pytest.approx(known[row, key], rel=1e-4) for value, row, key in found)
    if part[0] == 0:
        assert count == 12 and (not skip or any(0 < key < 256 for _, _, key in found))


def test_a_view_is_told_entry_by_entry_or_in_cells(matrix_of):
    pattern, matrix, seen = matrix_of
    texts = ["=1+1" if at == 1010 else f" t{at}" for at in range(pattern.tokens)]
    lines = list(csv.reader(io.StringIO(view_table(pattern, slice(1000, 1040), slice(990, 1020), "max", texts))))
    assert lines[0] == ["row", "key", "probability", "row token", "key token"]
    places = [(i, j) for i in range(1000, 1040) for j in range(990, 1020) if seen[i, j]]
    assert [(int(line[0]), int(line[1])) for line in lines[1:]] == places
    expected = pytest.approx([matrix[one] for one in places], rel=1e-4, abs=1e-9)
    assert [float(line[2]) for line in lines[1:]] == expected
    assert {line[3] for line in lines[1:] if line[0] == "1010"} == {"'=1+1"}
    for how in ("max", "mean"):
        lines = list(csv.reader(io.StringIO(view_table(pattern, slice(0, 2099), slice(0, 2099), how, texts))))
        name = {"max": "maximum", "mean": "mean"}[how]
        assert lines[0] == ["first row", "last row", "first key", "last key", f"{name} of the cell"]
        assert 1000 < len(lines) <= MOST_LINES
        for line in lines[1 :: len(lines) // 50]:
            top, bottom, left, right = map(int, line[:4])
            part = matrix[top : bottom + 1, left : right + 1]
            shown = seen[top : bottom + 1, left : right + 1]
            value = part.max() if how == "max" else part.sum() / shown.sum()
            assert shown.any() and float(line[4]) == pytest.approx(value, rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("level", range(5))
def test_tiles_show_every_cell_and_hide_the_future(pattern, level):
    look = Look("max", "log", 1.0)
    matrix = pattern.entries(slice(0, TOKENS), slice(0, TOKENS)).numpy()
    cell = 1 << level
    row = min(2, (TOKENS - 1) // (PIXELS * cell))
    found = drawn(tile(pattern, level, row, row, look))
    start, stop = row * PIXELS * cell, min((row + 1) * PIXELS * cell, TOKENS)
    count = -(-(stop - start) // cell)
    assert (found[np.triu_indices(PIXELS, 1)] == 255).all() and (found[count:] == 255).all()
    if cell > 4:
        return
    part = np.zeros((count * cell, count * cell))
    part[: stop - start, : stop - start] = matrix[start:stop, start:stop]
    tops = part.reshape(count, cell, count, cell).max((1, 3))
    lower = np.tril_indices(count)
    assert np.abs(found[:count, :count][lower].astype(int) - look.shades(tops)[lower]).max() <= 1


def test_levels_between_exact_and_stored_share_the_stored_cells(pattern):
    found = drawn(tile(pattern, 4, 0, 0, Look())).astype(int)
    assert levels(pattern) == 4 and pattern.base == 32
    shown = found[100:188, 0:90]
    assert (shown[0::2] == shown[1::2]).all() and (shown[:, 0::2] == shown[:, 1::2]).all()


def test_scales_leave_position_0_out_and_end_where_they_say(pattern):
    top = automatic_top(pattern, "mean")
    with_sink = pattern.tensors.read("mean_32")[:, 0].max()
    assert 0 < top < with_sink
    values = np.array([0.0, 1e-6, 0.1, 0.2, 0.4, 1.0], dtype=np.float32)
    linear, log = Look("max", "linear", 0.4).shades(values), Look("max", "log", 1.0).shades(values)
    assert linear[0] == 0 and linear[3] == 127 and linear[4] == linear[5] == 254
    assert log[0] == log[1] == 0 and log[5] == 254 and (np.diff(log.astype(int)) >= 0).all()
    for wrong in ({"how": "sum"}, {"scale": "cubic"}, {"top": 0.0}, {"top": 2.0}, {"top": float("nan")}):
        with pytest.raises(RequestError):
            Look(**wrong)


def test_values_under_the_pointer_are_exact(ask, pattern):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        row, key = (int(torch.randint(TOKENS, (1,), generator=generator)) for _ in range(2))
        found = ask(f"value?row={row}&key={key}&level=4").json
        q, k = pattern.tensors.read("q").astype(np.float64), pattern.tensors.read("k").astype(np.float64)
        logits = q[row] @ k[: row + 1].T * pattern.masking.scale
        weights = np.exp(logits - logits.max())
        expected = weights[key] / weights.sum() if key <= row else 0.0
        assert found["value"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert found["max"] >= found["value"] * 0.998 and found["cell"] == 32
    assert ask("value?row=2500&key=1234").json["value"] > 0.9


def test_the_next_entry_strips_and_tokens_are_served(ask, monkeypatch):
    found = ask("next?row=2000&key=0&above=0.9").json["found"]
    assert (found["row"], found["key"]) == (2500, 1234)
    # Behind the last one it goes round to the first; key 0 is left out unless it is asked for.
    assert found["value"] > 0.9 and ask("next?row=2000&key=0&above=0.9").json["around"] is False
    round_ = ask("next?row=2501&key=0&above=0.9").json
    assert round_["around"] and (round_["found"]["row"], round_["found"]["key"]) <= (2500, 1234)
    assert ask("next?row=2500&key=1234&above=0.9&here=1").json["found"] == found
    first = ask("next?row=0&key=0&above=0.9&here=1&first=1").json["found"]
    assert (first["row"], first["key"]) == (0, 0) and first["value"] == pytest.approx(1, abs=1e-5)
    assert ask("next?row=0&key=0&above=0.9&here=1").json["found"]["key"] > 0
    # The only one of its height is found again, and told to be behind a round.
    alone = ask("next?row=2500&key=1234&above=0.9999").json
    assert alone["around"] and alone["found"] == found
    monkeypatch.setattr(StoredPattern, "next_high", lambda *_, **__: None)
    assert ask("next?row=0&key=0&above=1").json == {"found": None}
    about = ask("about").json
    assert about["tokens"] == TOKENS and about["levels"] == 4 and about["strips"] == ["column_mean", "entropy", "sink"]
    assert len(ask("strip/entropy?bins=100").json["values"]) == 100
    assert ask("tokens?from=5&count=2").json == {"first": 5, "tokens": [" t5", " t6"]}


@pytest.mark.parametrize(
    "path",
    [
        "value?row=-1&key=0",
        "value?row=3000&key=0",
        "value?row=١&key=0",
        "value?row=1e3&key=0",
        "tile/9/0/0.png",
        "tile/0/99/0.png",
        "tile/0/0/0.png?top=x",
        "tile/0/0/0.png?how=__class__",
        "strip/q",
        "strip/entropy?bins=1000000",
        "strip/entropy?from=20&to=10",
        "next?above=0",
        "view.csv?how=x",
        "view.csv?rows_from=20&rows_to=10",
        "view.csv?keys_to=3001",
    ],
)
def test_wrong_questions_are_answered_with_the_reason(ask, path):
    answer = ask(path)
    assert answer.status_code == 400 and answer.json["error"]
