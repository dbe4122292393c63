"""The look: nothing global, readable colours, a scale that stays ordered without hue."""

from __future__ import annotations

import numpy as np
import plotly.io as pio
import pytest

from workbench.figures import DARK, LIGHT, Palette, template
from workbench.figures.scales import contrast, luminance

both = pytest.mark.parametrize("palette", [LIGHT, DARK], ids=lambda p: p.name)


def linear(colour: str) -> np.ndarray:
    shares = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


# Machado et al. 2009, severity 1: what a colour looks like without one kind of cone
WITHOUT = {
    "red": "0.1523 1.0526 -0.2049 0.1145 0.7863 0.0992 -0.0039 -0.0481 1.0520",
    "green": "0.3673 0.8606 -0.2280 0.2801 0.6725 0.0474 -0.0118 0.0429 0.9689",
    "blue": "1.2555 -0.0767 -0.1788 -0.0784 0.9308 0.1476 0.0047 0.6914 0.3039",
}


@both
@pytest.mark.parametrize("missing", [None, *WITHOUT])
def test_sequential_scale_runs_one_way_in_lightness_also_when_colour_blind(
    palette: Palette, missing: str | None
) -> None:
    seen = np.array([linear(colour) for colour in palette.sequential])
    if missing is not None:
        seen = np.clip(seen @ np.array(WITHOUT[missing].split(), float).reshape(3, 3).T, 0, 1)
    lightness = np.cbrt(seen @ np.array([0.2126, 0.7152, 0.0722]))
    steps = np.diff(lightness) * (1 if palette is DARK else -1)
    assert steps.min() > 0.01, steps
    assert abs(lightness[-1] - lightness[0]) > 0.5


@both
def test_texts_and_marks_stand_out_from_the_page(palette: Palette) -> None:
    page = luminance(palette.page)
    for name in ("ink", "muted", "accent", "good", "bad"):
        assert contrast(luminance(getattr(palette, name)), page) >= 4.5, name
    for colour in (*palette.series, palette.effect, palette.control):
        assert contrast(luminance(colour), page) >= 3, colour


def test_template_is_new_each_time_and_not_registered() -> None:
    before = (pio.templates.default, list(pio.templates))
    one, other = template(), template()
    one.layout.font.size = 99
    assert other.layout.font.size == 12
    assert template(dark=True).layout.font.color == DARK.ink != LIGHT.ink
    assert (pio.templates.default, list(pio.templates)) == before
