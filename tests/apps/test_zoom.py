"""Tiles and values that the zoomable pattern is served, against exact entries."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from workbench.apps.library import RunLibrary
from workbench.apps.server import create_app
from workbench.apps.settings import AppSettings
from workbench.apps.zoom.tiles import PIXELS, Look, automatic_top, levels, tile
from workbench.errors import RequestError

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


def test_the_next_entry_strips_and_tokens_are_served(ask):
    found = ask("next?row=2000&key=0&above=0.9").json["found"]
    assert (found["row"], found["key"]) == (2500, 1234)
    assert ask("next?row=2501&key=0&above=0.999").json == {"found": None}
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
    ],
)
def test_wrong_questions_are_answered_with_the_reason(ask, path):
    answer = ask(path)
    assert answer.status_code == 400 and answer.json["error"]
