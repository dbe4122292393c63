"""Pattern map of one head."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from workbench.errors import RequestError
from workbench.figures import caption_of, pattern_map

PATTERN = np.array([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.7, 0.1, 0.2]])


def test_weights_land_in_their_cells_and_the_future_is_empty() -> None:
    z = pattern_map(PATTERN, ["a", "b", "c"]).data[0].z
    np.testing.assert_allclose(z[2], PATTERN[2], atol=1e-7)
    assert np.isnan(z[np.triu_indices(3, 1)]).all()


def test_position_0_is_left_out_of_the_colour_range() -> None:
    figure = pattern_map(PATTERN, ["a", "b", "c"])
    assert figure.layout.coloraxis.cmin == 0
    assert figure.layout.coloraxis.cmax == pytest.approx(0.2)
    assert figure.data[0].z[1, 0] == pytest.approx(0.9), "its values stay in the hover"


def test_one_token_and_all_on_the_first_still_have_a_range() -> None:
    assert pattern_map([[1.0]], ["a"]).layout.coloraxis.cmax == 1
    assert pattern_map([[1.0, 0.0], [1.0, 0.0]], ["a", "b"]).layout.coloraxis.cmax == 1


def test_equal_tokens_keep_places_of_their_own_and_are_escaped() -> None:
    figure = pattern_map(PATTERN, ["<b>", " x", "<b>"])
    assert list(figure.data[0].x) == ["0 &lt;b&gt;", "1 ␣x", "2 &lt;b&gt;"]
    assert "%{x}" in figure.data[0].hovertemplate
    assert "%{y}" in figure.data[0].hovertemplate


def test_labelled_array_and_padding() -> None:
    padded = xr.DataArray(np.pad(PATTERN, (0, 2)), dims=("query", "key"))
    figure = pattern_map(padded, ["a", "b", "c"], head=(18, 6))
    assert figure.data[0].z.shape == (3, 3)
    assert figure.layout.title.text == "L18H6"
    assert "L18H6 on a prompt of 3 tokens" in caption_of(figure)


def test_pattern_smaller_than_its_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="4 tokens"):
        pattern_map(PATTERN, list("abcd"))
