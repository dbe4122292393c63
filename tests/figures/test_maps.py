"""Layer x head maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.figures import DARK, LIGHT, caption_of, head_map, head_maps


def cells(figure: Any, index: int = 0) -> Any:
    return [trace for trace in figure.data if trace.type == "heatmap"][index]


def ring(figure: Any) -> Any:
    return next(trace for trace in figure.data if trace.name == "strongest")


def test_each_score_lands_in_its_cell_with_layer_0_on_top(scores: pd.DataFrame, grid: np.ndarray) -> None:
    figure = head_map(scores.sample(frac=1, random_state=0), "induction")
    np.testing.assert_array_equal(cells(figure).z, grid)
    assert figure.layout.yaxis.range == (3.5, -0.5)
    assert (ring(figure).x, ring(figure).y) == ((1,), (2,))


def test_hover_has_head_value_interval_null_q_and_n(scores: pd.DataFrame) -> None:
    hover = cells(head_map(scores, "induction")).customdata[2, 1]
    assert list(hover) == ["L2H1", "0.800", "0.790 to 0.820", "0.050", "0.004", "10"]


def test_threshold_is_a_tick_of_the_colour_bar(scores: pd.DataFrame) -> None:
    bar = head_map(scores, "induction", info={"threshold": 0.4}).layout.coloraxis.colorbar
    place = list(bar.tickvals).index(0.4)
    assert bar.ticktext[place] == "<b>◂ 0.40</b>"
    plain = head_map(scores, "induction", info={"threshold": float("nan")}).layout.coloraxis.colorbar
    assert not any("◂" in text for text in plain.ticktext)


def test_threshold_above_every_score_is_told(scores: pd.DataFrame) -> None:
    bar = head_map(scores, "induction", info={"threshold": 0.95}).layout.coloraxis.colorbar
    assert "0.95" in bar.ticktext[-1]
    assert max(bar.tickvals) == pytest.approx(0.8)


def test_scale_is_sequential_from_zero_and_diverging_for_both_signs(scores: pd.DataFrame) -> None:
    axis = head_map(scores, "induction").layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0.0, 0.8)
    assert [colour for _, colour in axis.colorscale] == list(LIGHT.sequential)
    centred = scores.assign(value=scores["value"] - 0.3)
    axis = head_map(centred, "induction", info={"better": "either", "threshold": 0.2}, dark=True).layout.coloraxis
    assert axis.cmin == -axis.cmax
    assert [colour for _, colour in axis.colorscale] == list(DARK.diverging)
    assert {-0.2, 0.2} <= set(axis.colorbar.tickvals)


def test_ring_follows_what_the_detector_looks_for(scores: pd.DataFrame) -> None:
    figure = head_map(scores.assign(value=scores["value"] + 1), "induction", info={"better": "lower"})
    assert (ring(figure).x, ring(figure).y) == ((0,), (0,))


def test_layers_with_fewer_heads_leave_empty_cells(scores: pd.DataFrame) -> None:
    fewer = scores[~((scores["layer"] == 1) & (scores["head"] == 2))]
    assert np.isnan(cells(head_map(fewer, "induction")).z[1, 2])


def test_detector_without_any_value_draws_an_empty_map(scores: pd.DataFrame) -> None:
    figure = head_map(scores.assign(value=np.nan), "induction")
    assert np.isnan(cells(figure).z).all()
    assert not [trace for trace in figure.data if trace.name == "strongest"]


def test_small_multiples_have_a_scale_each(scores: pd.DataFrame) -> None:
    both = pd.concat([scores, scores.assign(detector="echo", value=scores["value"] * 5)])
    detectors = pd.DataFrame({"detector": ["echo", "induction", "absent"], "title": ["Echo", "Ind", "No"]})
    figure = head_maps(both, detectors, columns=2)
    assert [cells(figure, i).coloraxis for i in (0, 1)] == ["coloraxis", "coloraxis2"]
    assert figure.layout.coloraxis.cmax == pytest.approx(4.0)
    assert figure.layout.coloraxis2.cmax == pytest.approx(0.8)
    assert "Echo" in figure.layout.annotations[0].text
    assert len([trace for trace in figure.data if trace.type == "heatmap"]) == 2


@pytest.mark.parametrize("shape", [(80, 64), (1, 1), (12, 12)])
def test_any_size_of_model(shape: tuple[int, int]) -> None:
    layers, heads = np.indices(shape)
    table = pd.DataFrame({"detector": "d", "layer": layers.ravel(), "head": heads.ravel(), "value": 0.5})
    figure = head_map(table, "d")
    assert cells(figure).z.shape == shape
    assert len(figure.layout.xaxis.tickvals) <= 13


def test_caption_is_data(scores: pd.DataFrame) -> None:
    figure = head_map(scores, "induction", info={"caption": "Mean attention."})
    assert caption_of(figure) == "Mean attention. n = 10 prompts."


def test_bare_values_are_hovered_without_tests(scores: pd.DataFrame) -> None:
    trace = cells(head_map(scores[["detector", "layer", "head", "value"]], "induction"))
    assert list(trace.customdata[2, 1]) == ["L2H1", "0.800"]
    assert "null" not in trace.hovertemplate


def test_titles_are_escaped(scores: pd.DataFrame) -> None:
    title = head_map(scores, "induction", info={"title": "<a href='x'>"}).layout.title.text
    assert "&lt;a href='x'&gt;" in title


def test_unknown_detector_is_refused_with_those_that_exist(scores: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match="induction"):
        head_map(scores, "sink")
    with pytest.raises(RequestError, match="workbench heads"):
        head_maps(scores.head(0))
