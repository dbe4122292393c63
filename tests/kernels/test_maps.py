"""Tiles, pyramids and removal effects against the full matrix in float64."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import RequestError
from workbench.kernels import (
    Geometry,
    StatisticsRequest,
    attention_pattern,
    attention_statistics,
    attention_tile,
    pooled,
    removal_effects,
)
from workbench.kernels.fused.launch import fused_removal
from workbench.kernels.removal import add_heavy

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = {
    "plain": {},
    "window": {"window": 20},
    "softcap": {"softcap": 1.5},
    "padding": {"key_start": torch.tensor([0, 9]), "key_end": torch.tensor([70, 61])},
}


def draw(queries: int = 70):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, queries, 16), (2, 2, 70, 16), (2, 2, 70, 16), (2, 4, queries, 16))
    return [torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes]


def fused_effects(q, k, v, geometry, softcap, lse, gradient, output, scale=0.25):
    """As on CUDA: the fused kernel, then the heavy entries."""
    profile, heavy = fused_removal(q, k, v, geometry, scale, softcap, 16, lse, gradient, output)
    return add_heavy(profile, heavy, q, k, v, gradient, lse, geometry, scale, softcap, None, 16)


def pattern(q, k, options):
    named = {"start": options.get("key_start"), "end": options.get("key_end"), "window": options.get("window")}
    geometry = Geometry(2, q.shape[2], k.shape[2], **named)
    return attention_pattern(q, k, geometry, scale=0.25, softcap=options.get("softcap"))[0]


def on_device(options):
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("queries", [70, 33])
def test_a_tile_is_a_part_of_the_matrix(options, queries):
    q, k, v, _ = draw(queries)
    options = on_device(options)
    lse = attention_statistics(q, k, v, StatisticsRequest(lse=True), scale=0.25, **options).lse
    whole = pattern(q, k, options)
    for rows, columns in ((slice(0, 5), slice(0, 70)), (slice(10, 33), slice(3, 50)), (slice(7, 7), slice(0, 2))):
        tile = attention_tile(q, k, lse, rows, columns, scale=0.25, **options)
        torch.testing.assert_close(tile.double(), whole[:, :, rows, columns], rtol=1e-5, atol=1e-6)


def test_a_tile_outside_is_refused():
    q, k, v, _ = draw()
    lse = attention_statistics(q, k, v, StatisticsRequest(lse=True)).lse
    with pytest.raises(RequestError, match="columns 60:90 of 70"):
        attention_tile(q, k, lse, slice(0, 5), slice(60, 90))


def test_levels_of_a_pyramid_agree():
    q, k, v, _ = draw()
    fine, coarse = (attention_statistics(q, k, v, StatisticsRequest(block=b)) for b in (16, 64))
    torch.testing.assert_close(pooled(fine.block_sum, 4, "sum"), coarse.block_sum)
    torch.testing.assert_close(pooled(fine.block_max, 4, "max"), coarse.block_max)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_removal_effects_are_those_of_the_closed_form(options):
    q, k, v, gradient = draw()
    options = on_device(options)
    found = attention_statistics(q, k, v, StatisticsRequest(lse=True, output=True), scale=0.25, **options)
    profile, delta = removal_effects(q, k, v, gradient, found.output, found.lse, block=16, scale=0.25, **options)
    a, values = pattern(q, k, options), v.double().repeat_interleave(2, dim=1)
    d = torch.einsum("b h i d, b h i d -> b h i", gradient.double(), a @ values)
    gain = gradient.double() @ values.transpose(-1, -2) - d[..., None]
    alone = a == 1
    assert (alone.any(-1) <= ((a > 0).sum(-1) == 1)).all()
    effect = (a * gain / (1 - a).masked_fill(alone, 1.0)).abs().masked_fill(alone, 0.0)
    torch.testing.assert_close(delta.double(), d, rtol=1e-5, atol=1e-5)
    truth = pooled(effect, 16, "sum")
    torch.testing.assert_close(profile.double(), truth, rtol=1e-4, atol=1e-5)
    bounds = {"start": options.pop("key_start", None), "end": options.pop("key_end", None)}
    geometry = Geometry(2, 70, 70, window=options.pop("window", None), **bounds)
    fused = fused_effects(q, k, v, geometry, options.pop("softcap", None), found.lse, gradient, found.output)
    torch.testing.assert_close(fused.double(), truth, rtol=1e-4, atol=1e-5)


def test_a_removal_effect_is_what_removing_does():
    """To first order: a small loss gradient, one entry removed and its row renormalised."""
    q, k, v, direction = draw()
    a, values = pattern(q, k, {}), v.double().repeat_interleave(2, dim=1)
    row, key = 40, 17
    left = a.clone()
    left[..., row, key] = 0
    left[..., row, :] /= left[..., row, :].sum(-1, keepdim=True)
    change = ((left - a) @ values * direction.double()).sum(-1)[..., row]
    d = (direction.double() * (a @ values)).sum(-1)[..., row]
    gain = (direction.double()[..., row, :] * values[..., key, :]).sum(-1) - d
    torch.testing.assert_close(change, -a[..., row, key] * gain / (1 - a[..., row, key]))
