"""Stored patterns: every view against the full matrix in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.errors import RequestError
from workbench.runs import RunWriter
from workbench.runs.patterns import (
    Masking,
    base_of,
    open_pattern,
    pattern_tensors,
    stored_patterns,
    visible,
    write_pattern,
)

TOKENS = 2300


def full_matrix(q, k, masking):
    logits = q.double() @ k.double().T * masking.scale
    if masking.softcap is not None:
        logits = masking.softcap * torch.tanh(logits / masking.softcap)
    row, key = torch.arange(len(q))[:, None], torch.arange(len(k))
    seen = key <= row
    if masking.window is not None:
        seen &= key > row - masking.window
    return logits.masked_fill(~seen, -torch.inf).softmax(-1), seen


def cells(matrix, seen, cell, how):
    side = -(-len(matrix) // cell)
    whole, shown = np.zeros((side * cell, side * cell)), np.zeros((side * cell, side * cell))
    whole[: len(matrix), : len(matrix)] = matrix
    shown[: len(matrix), : len(matrix)] = seen
    parts = whole.reshape(side, cell, side, cell)
    if how == "max":
        return parts.max((1, 3))
    return parts.sum((1, 3)) / np.maximum(shown.reshape(side, cell, side, cell).sum((1, 3)), 1)


@pytest.fixture(params=[Masking(0.25), Masking(0.3, window=700), Masking(0.5, softcap=5.0)], ids=str, scope="module")
def stored(request, tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(TOKENS, 16, generator=generator) for _ in range(2))
    # A needle that one late row finds, and a sink.
    k[0] += 2 * q.mean(0).sign()
    k[123], q[2000] = 4.0, 4.0
    path = tmp_path_factory.mktemp("patterns") / "run"
    with RunWriter.open(path, kind="pattern", title="T", fingerprint={}) as writer:
        write_pattern(writer, (1, 2), pattern_tensors(q, k, request.param), request.param, model="toy")
        run = writer.finish()
    return open_pattern(run, "l1h2"), *full_matrix(q, k, request.param), run


def test_views_of_any_cell_are_those_of_the_full_matrix(stored):
    pattern, matrix, seen, _ = stored
    assert pattern.name == "L1H2" and pattern.base == 32 and pattern.cells[0] == 32
    for how in ("mean", "max"):
        for cell in (1, 2, 8, 32, 64, 256):
            expected = cells(matrix.numpy(), seen.numpy(), cell, how)
            rows = slice(1024 // cell * cell, TOKENS)
            keys = slice(0, 1536)
            found = pattern.view(rows, keys, cell, how)
            part = expected[rows.start // cell :, : -(-1536 // cell)]
            tolerance = 2e-5 * part + 1e-7 if cell < 32 else 1e-3 * part + 6e-8
            assert found.shape == part.shape and (np.abs(found - part) <= tolerance).all(), (how, cell)
    # Nothing is shown of the future, nor of what has left the window.
    assert not pattern.view(slice(0, 512), slice(512, 1024), 1).any()
    if pattern.masking.window:
        assert not pattern.view(slice(2048, 2300), slice(0, 1024), 4).any()


def test_strips_are_row_and_column_statistics(stored):
    pattern, matrix, seen, _ = stored
    entropy = -(matrix * matrix.clamp(min=1e-300).log()).sum(-1)
    assert np.allclose(pattern.strip("entropy", TOKENS), entropy, atol=1e-5)
    reach = seen.sum(0)
    assert np.allclose(pattern.strip("column_mean", TOKENS), matrix.sum(0) / reach, atol=1e-6)
    sink = matrix[:, 0].numpy()
    if pattern.masking.window is None:
        assert np.allclose(pattern.strip("sink", TOKENS), sink, atol=1e-6)
    assert np.allclose(pattern.strip("entropy", 23), entropy.numpy().reshape(23, 100).mean(1), atol=1e-5)
    assert len(pattern.strip("entropy", 50, slice(10, 20))) == 10


def test_the_next_high_entry_is_the_next_in_reading_order(stored):
    pattern, matrix, _, _ = stored
    level = float(matrix[1000:, 1:].max()) * 0.5
    high = [(i, j) for i, j in (matrix >= level).nonzero().tolist() if j != 0]
    place, found = (900, 0), []
    while (step := pattern.next_high(*place, level)) is not None:
        found.append(step[:2])
        assert step[2] == pytest.approx(float(matrix[step[:2]]), rel=1e-5)
        place = step[:2]
    assert found == [one for one in high if one > (900, 0)] and found


def test_visible_entries_are_counted():
    for tokens, cell, window in ((100, 32, None), (100, 32, 20), (64, 16, 64), (33, 32, 1), (70, 8, 33)):
        row, key = np.arange(tokens)[:, None], np.arange(tokens)
        seen = (key <= row) & (key > row - (window or tokens))
        expected = cells(seen, np.zeros_like(seen), cell, "mean")
        assert np.array_equal(visible(tokens, cell, window), expected), (tokens, cell, window)
    assert base_of(131_072) == 32 and base_of(131_073) == 64 and base_of(10) == 32


def test_wrong_parts_are_refused(stored):
    pattern, _, _, run = stored
    assert list(stored_patterns(run)) == ["l1h2"]
    with pytest.raises(RequestError, match="no pattern 'l9h9'; it has: l1h2"):
        open_pattern(run, "l9h9")
    for rows, cell, words in (
        (slice(0, TOKENS + 1), 1, "rows 0:2301 of 2300"),
        (slice(5, 10), 2, "power of two"),
        (slice(0, 10), 3, "power of two"),
    ):
        with pytest.raises(RequestError, match=words):
            pattern.view(rows, slice(0, 10), cell)
    with pytest.raises(RequestError, match="'mean' or their 'max'"):
        pattern.view(slice(0, 10), slice(0, 10), 1, "sum")
