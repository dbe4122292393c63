"""Rows that a window keeps from seeing position 0 count neither for nor against a head that rests there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from workbench.heads.detectors.lengths import FIRST_TOKEN_GROWTH
from workbench.heads.detectors.text import ACTIVE_DORMANT, ENTROPY, FIRST_TOKEN, random_visible_keys

each = pytest.mark.parametrize("name", ["mistral", "gemma3", "llama"])
sides = pytest.mark.parametrize("side", ["right", "left"])


def windows(model, tokens):
    return [min(layer.window or tokens, tokens) for layer in model.spec.layers]


def shares(model, part, full, prompt):
    """[layer][head] -> mean attention to position 0, and to the key drawn, over the rows that see position 0."""
    batch = part.task.batch
    drawn = random_visible_keys(part.task)[prompt][batch.mask[prompt]] - batch.starts[prompt]
    found = []
    for window, one in zip(windows(model, len(drawn)), full[prompt], strict=True):
        first, other = one.a[:, 1:window, 0].mean(1), one.a[:, 1:window]
        rows = [other[:, row - 1, drawn[row]] if drawn[row] >= 0 else first * 0 for row in range(1, window)]
        found.append((first.numpy(), (sum(rows) / (window - 1)).numpy()))
    return found


@each
@sides
def test_the_first_token_is_averaged_where_it_is_seen(tiny, name, side):
    model, part, full = tiny(name, (FIRST_TOKEN,), side=side)
    scores = FIRST_TOKEN.score([part])
    for prompt in range(len(full)):
        for layer, (first, other) in enumerate(shares(model, part, full, prompt)):
            np.testing.assert_allclose(scores.values[prompt, layer], first, atol=5e-6)
            np.testing.assert_allclose(scores.null[prompt, layer], other, atol=5e-6)
    if name != "llama":
        assert min(windows(model, 90)) < 90


@each
def test_the_contrast_is_that_of_the_seen_share(tiny, name):
    model, part, full = tiny(name, (ACTIVE_DORMANT,))
    parts = [
        part._replace(task=replace(part.task, settings={"domain": domain})) for domain in ("code", "prose")
    ]  # fmt: skip
    found = ACTIVE_DORMANT.score(parts)
    truth = [[first for first, _ in shares(model, part, full, prompt)] for prompt in range(len(full))]
    np.testing.assert_allclose(found.values, truth, atol=5e-6)
    np.testing.assert_allclose(found.null, truth, atol=5e-6)


@each
def test_uniform_entropy_is_that_over_visible_keys(tiny, name):
    model, part, full = tiny(name, (ENTROPY,))
    scores = ENTROPY.score([part])
    for prompt, layers in enumerate(full):
        for layer, one in enumerate(layers):
            n = one.a.shape[-1]
            seen = np.minimum(np.arange(n) + 1, windows(model, n)[layer])
            np.testing.assert_allclose(scores.null[prompt, layer], np.log(seen[1:]).mean(), rtol=1e-5)
            own = -(one.a * one.a.clamp(min=1e-300).log()).sum(-1)[:, 1:].mean(1)
            np.testing.assert_allclose(scores.values[prompt, layer], own.numpy(), rtol=1e-5)


def test_a_windowed_layer_has_no_growth_from_rows_that_cannot_see(tiny):
    model, part, _ = tiny("mistral", (FIRST_TOKEN_GROWTH,))
    window = min(windows(model, 90))
    part.found.values["first_1"][..., window:] = 7.0
    spoilt = FIRST_TOKEN_GROWTH.score([part]).values
    part.found.values["first_1"][..., window:] = 0.0
    np.testing.assert_array_equal(FIRST_TOKEN_GROWTH.score([part]).values, spoilt)
