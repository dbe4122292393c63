"""Recalled mass of sparse patterns, against masks built entry by entry on float64 patterns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from workbench.heads.detectors import patterns

LENGTHS = (150, 97)


def keep_by_hand(candidate, raw, q, k, scale, softcap, window):
    """The candidate's keys as a full `[head, query, key]` mask, loop by loop."""
    heads, n = raw.shape[:2]
    share = min(1.0, n / 30_000)
    columns, diagonals, forced = (math.ceil(count * share) for count in (*candidate[1:], 30))
    mask = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        if candidate.family == "a_shape":
            for i in range(n):
                mask[h, i, :columns] = True
                mask[h, i, max(0, i - diagonals + 1) : i + 1] = True
        elif candidate.family == "vertical_slash":
            vertical = raw[h, max(0, n - 64) :].sum(0)
            slash = torch.stack([raw[h].diagonal(-d)[max(0, n - 64 - d) :].sum() for d in range(n)])
            vertical[:forced] = slash[:forced] = math.inf
            mask[h][:, vertical.topk(columns).indices] = True
            for d in slash.topk(diagonals).indices.tolist():
                mask[h].diagonal(-d)[:] = True
        else:
            blocks = math.ceil(n / 32)
            kv = h // (heads // len(k))
            for row in range(blocks):
                mean = q[h, 32 * row : 32 * row + 32].mean(0)
                scores = torch.stack([mean @ k[kv, 32 * c : 32 * c + 32].mean(0) for c in range(row + 1)]) * scale
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                for column in scores.topk(min(max(1, blocks // 8), row + 1)).indices.tolist():
                    mask[h, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = True
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return mask & (j <= i) & (i - j < (window or n))


@pytest.mark.parametrize(("name", "side"), [("llama", "right"), ("gemma2", "left"), ("gpt_oss", "right")])
def test_recalled_mass_of_every_candidate(tiny, make_task, name, side):
    model, part, layers_of = tiny(name, patterns.PATTERNS, make_task(LENGTHS, side=side))
    table = patterns.minference_patterns([part])
    by_hand = np.zeros((2, model.spec.n_layers, model.spec.layers[0].heads, 2, len(patterns.CANDIDATES)))
    for prompt, layers in enumerate(layers_of):
        for layer, one in enumerate(layers):
            a = one.a / one.a.sum(-1, keepdim=True)
            n, call = a.shape[-1], one.call
            rows = torch.arange(math.ceil(2500 * n / 30_000), n)
            seen = torch.arange(n).add(1).clamp(max=call.window or n)
            for slot, candidate in enumerate(patterns.CANDIDATES):
                mask = keep_by_hand(
                    candidate, one.a, call.q[0].double(), call.k[0].double(), call.scale, call.softcap, call.window
                )
                by_hand[prompt, layer, :, 0, slot] = (a * mask).sum(-1)[:, rows].mean(-1)
                by_hand[prompt, layer, :, 1, slot] = (mask.sum(-1) / seen)[:, rows].mean(-1)
    for row in table.itertuples():
        expected = by_hand[:, row.layer, row.head].mean(0)
        np.testing.assert_allclose([getattr(row, c.name) for c in patterns.CANDIDATES], expected[0], atol=1e-4)
        best = int(expected[0].argmax())
        assert row.recalled == pytest.approx(expected[0, best], abs=1e-4)
        if sorted(expected[0])[-1] - sorted(expected[0])[-2] > 1e-3:
            assert row.pattern == patterns.CANDIDATES[best].name
            assert row.density == pytest.approx(expected[1, best], abs=1e-4)
    scores = patterns.A_SHAPE.score([part])
    np.testing.assert_allclose(scores.values, by_hand[:, :, :, 0, 0], atol=1e-4)
    np.testing.assert_allclose(scores.null, by_hand[:, :, :, 1, 0], atol=1e-5)
    best = patterns.MINFERENCE.score([part]).values.mean(0)
    np.testing.assert_allclose(best, by_hand[:, :, :, 0].mean(0).max(-1), atol=1e-4)


def test_few_rows_of_many_are_taken_at_equal_distances():
    rows = patterns.evaluated_rows(40_000)
    assert len(rows) == patterns.EVALUATED and rows[0] == 2500 and rows[-1] == 39_999
    steps = rows.diff()
    assert steps.max() - steps.min() <= 1
    assert patterns.evaluated_rows(120).tolist() == list(range(10, 120))
    assert patterns.evaluated_rows(1).tolist() == [0]


def test_published_budgets_hold_from_thirty_thousand_tokens_on():
    assert [patterns.scaled(count, 30_000) for count in (100, 800, 3500)] == [100, 800, 3500]
    assert patterns.scaled(800, 100_000) == 800 and patterns.scaled(800, 512) == 14 and patterns.scaled(30, 10) == 1


def test_attention_in_pieces_is_the_same(monkeypatch, tiny, make_task):
    _, part, _ = tiny("llama", patterns.PATTERNS, make_task(LENGTHS))
    monkeypatch.setattr(patterns, "ENTRIES", 6 * 150 * 7)
    _, again, _ = tiny("llama", patterns.PATTERNS, make_task(LENGTHS))
    torch.testing.assert_close(part.found["minference"], again.found["minference"], equal_nan=True)


@pytest.mark.parametrize(("name", "side"), [("llama", "right"), ("mistral", "left")])
def test_share_of_negligible_blocks(tiny, make_task, name, side):
    """Against maxima of explicit blocks; a threshold of 5e-4 and one that splits the blocks."""
    _, part, layers_of = tiny(name, patterns.PATTERNS, make_task(LENGTHS, side=side))
    maxima = part.found["block_max_16"]
    for threshold in (5e-4, 0.05):
        share, depth = patterns.negligible_blocks(maxima, threshold)
        for prompt, layers in enumerate(layers_of):
            for layer, one in enumerate(layers):
                n = one.a.shape[-1]
                tops = torch.stack(
                    [
                        one.a[:, r : r + 16, c : c + 16].flatten(1).amax(1)
                        for r in range(0, n, 16)
                        for c in range(0, r + 1, 16)
                    ],
                    dim=1,
                )
                np.testing.assert_allclose(share[prompt, layer], (tops <= threshold).double().mean(1), atol=1e-9)
                expected = -tops.clamp(min=1e-30).log10().mean(1)
                np.testing.assert_allclose(depth[prompt, layer], expected, atol=1e-3)
    scores = patterns.BLOCK_SPARSITY.score([part])
    np.testing.assert_allclose(scores.values, patterns.negligible_blocks(maxima, 5e-4)[0])


def test_uniform_attention_has_negligible_blocks_only_in_long_texts():
    from workbench.models import Batch

    for tokens, size in ((512, 16), (8192, 64)):
        even = patterns._uniform_maxima(Batch.from_ids([[1] * tokens]), size)
        share = float(patterns.negligible_blocks(even, 5e-4)[0])
        i = torch.arange(tokens // size) * size
        blocks = [1 / (row + 1) <= 5e-4 for row in i.tolist() for _ in range(row // size + 1)]
        assert share == pytest.approx(sum(blocks) / len(blocks))
        assert (share > 0) == (tokens > 2000)
    assert patterns.seer_block(2048) == 64 and patterns.seer_block(2047) == 16
