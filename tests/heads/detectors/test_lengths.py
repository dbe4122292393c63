"""Change with length, against float64 patterns of each shorter prompt and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.errors import RequestError
from workbench.heads.detectors import lengths
from workbench.models import Batch


def batch_of(*counts: int) -> Batch:
    return Batch.from_ids([[1] * count for count in counts])


def line(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(x, y, 1)[0])


def slope_by_hand(values: np.ndarray) -> float:
    """numpy's line through the means of half-octave bins from 8 keys on."""
    keys = np.arange(len(values)) + 1
    x, y, low = [], [], 8.0
    while low <= len(values):
        high = low * np.sqrt(2)
        inside = (keys >= low - 1e-6) & (keys < high - 1e-6)
        if inside.any():
            x.append(np.log(keys[inside]).mean())
            y.append(values[inside].mean())
        low = high
    return line(np.array(x), np.array(y))


def test_the_slope_is_that_of_a_line_through_logarithmic_bins():
    noise = torch.rand(2, 3, 4, 200, dtype=torch.float64)
    noise[1, ..., 77:] = torch.nan
    found = lengths.slopes(noise, batch_of(200, 77))
    for prompt, count in enumerate((200, 77)):
        for layer in range(3):
            expected = [slope_by_hand(noise[prompt, layer, head, :count].numpy()) for head in range(4)]
            np.testing.assert_allclose(found[prompt, layer].numpy(), expected, atol=1e-12)


def test_uniform_attention_has_slope_one_and_a_fixed_number_of_keys_slope_zero():
    keys = torch.arange(4096).double() + 1
    rows = torch.stack([keys.log(), torch.full_like(keys, 1.5), 2 * keys.log() + 3])
    found = lengths.slopes(rows[None, None], batch_of(4096))[0, 0]
    np.testing.assert_allclose(found.numpy(), [1.0, 0.0, 2.0], atol=1e-9)


def test_short_prompts_have_no_slope():
    with pytest.raises(RequestError, match="20 tokens"):
        lengths.slopes(torch.zeros(1, 1, 1, 20), batch_of(20))


@pytest.mark.parametrize(("name", "side"), [("llama", "right"), ("mistral", "left"), ("gpt_oss", "right")])
def test_the_low_pass_ratio_of_every_prefix(tiny, name, side):
    """Against A and V cut to the first n tokens, in float64."""
    model, part, patterns = tiny(name, lengths.LENGTHS, side=side)
    task = part.task
    for prompt, layers in enumerate(patterns):
        columns = torch.arange(task.batch.ids.shape[1])[task.batch.mask[prompt]]
        for layer, one in enumerate(layers):
            window = model.spec.layers[layer].window
            v = one.call.v[0].double().repeat_interleave(one.a.shape[0] // one.call.v.shape[1], dim=0)
            for n in (2, 9, 40, len(columns)):
                i, j = torch.arange(n)[:, None], torch.arange(n)[None]
                even = ((i >= j) & (i - j < (window or n))).double()
                even = even / even.sum(-1, keepdim=True)
                values = v[:, :n]
                for a, statistic in ((one.a[:, :n, :n], "low_pass"), (even.expand(len(v), -1, -1), "low_pass_uniform")):
                    output = a @ values
                    above, below = (x - x.mean(1, keepdim=True) for x in (output, values))
                    expected = above.flatten(1).norm(dim=1) / below.flatten(1).norm(dim=1)
                    found = part.found[statistic][prompt, layer, :, columns[n - 1]]
                    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=3e-4)
    scores = lengths.LOW_PASS.score([part])
    last = part.found["low_pass"][0, 0, :, 89 if side == "right" else -1]
    np.testing.assert_allclose(scores.values[0, 0], last.numpy())


@pytest.mark.parametrize(("name", "side"), [("llama", "right"), ("mistral", "left"), ("gemma2", "right")])
def test_the_largest_logit_is_that_of_the_explicit_matrix(tiny, name, side):
    _, part, patterns = tiny(name, lengths.LENGTHS, side=side)
    scores = lengths.LARGEST_LOGIT.score([part])
    for prompt, layers in enumerate(patterns):
        for layer, one in enumerate(layers):
            call, n = one.call, one.a.shape[-1]
            k = call.k[0].double().repeat_interleave(one.a.shape[0] // call.k.shape[1], dim=0)
            s = call.q[0].double() @ k.transpose(-1, -2) * call.scale
            s = s if call.softcap is None else call.softcap * torch.tanh(s / call.softcap)
            i, j = torch.arange(n)[:, None], torch.arange(n)[None]
            s = s.masked_fill((j > i) | (i - j >= (call.window or n)), 0.0)
            np.testing.assert_allclose(scores.values[prompt, layer], s.abs().flatten(1).amax(1), rtol=1e-4)


def test_growth_scores_are_slopes_of_the_statistics_and_rows_in_random_order_have_none(tiny):
    _, part, patterns = tiny("llama", lengths.LENGTHS)
    scores = lengths.ENTROPY_GROWTH.score([part])
    for prompt, layers in enumerate(patterns):
        for layer, one in enumerate(layers):
            entropy = torch.special.entr(one.a).sum(-1).numpy()
            np.testing.assert_allclose(scores.values[prompt, layer], [slope_by_hand(row) for row in entropy], atol=1e-4)
    assert abs(scores.null.mean()) < 0.3 < scores.values.mean()
    peak = lengths.DILUTION.score([part])
    expected = slope_by_hand(-patterns[0][0].a[2].amax(-1).log().numpy())
    assert peak.values[0, 0, 2] == pytest.approx(expected, abs=1e-4)


def test_curves_are_means_in_bins(tiny):
    _, part, patterns = tiny("llama", lengths.LENGTHS)
    table = lengths.length_curves(part.found, "first_1")
    assert (table.low >= 8).all() and set(table.statistic) == {"first_1"}
    low, high = table.low.min(), table.low.min() * np.sqrt(2)
    rows = [index for index in range(90) if low <= index + 1 < high]
    expected = np.mean([layers[1].a[3, rows, 0].mean() for layers in patterns])
    own = table.query("layer == 1 and head == 3").sort_values("keys").iloc[0]
    assert own.value == pytest.approx(float(expected), abs=1e-5)
