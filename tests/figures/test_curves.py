"""Position curves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.figures import caption_of, position_curves


def test_values_and_positions_land_in_the_lines(curves: pd.DataFrame) -> None:
    figure = position_curves(curves, [(2, 1)])
    by_name = {trace.name: trace for trace in figure.data}
    assert set(by_name) == {"first token", "entropy"}
    np.testing.assert_allclose(by_name["first token"].y, 0.7)
    np.testing.assert_array_equal(by_name["first token"].x, range(8))


def test_nats_and_fractions_have_panels_of_their_own(curves: pd.DataFrame) -> None:
    figure = position_curves(curves, [(2, 1)])
    assert figure.data[0].yaxis != figure.data[1].yaxis
    assert figure.layout.yaxis.title.text == "share of attention"
    assert figure.layout.yaxis2.title.text == "entropy"


def test_entropy_below_one_is_still_no_share_of_attention(curves: pd.DataFrame) -> None:
    low = curves[curves["statistic"] == "entropy"].assign(value=0.4)
    assert position_curves(low).layout.yaxis.title.text == "entropy"


def test_several_heads_are_named(curves: pd.DataFrame) -> None:
    names = {trace.name for trace in position_curves(curves[curves["statistic"] == "first_1"]).data}
    assert names == {"L2H1 · first token", "L0H1 · first token"}


def test_same_statistic_of_two_detectors_is_told_apart(curves: pd.DataFrame) -> None:
    own = curves[(curves["layer"] == 2) & (curves["statistic"] == "first_1")]
    both = pd.concat([own, own.assign(detector="other")])
    names = {trace.name for trace in position_curves(both, labels={"sink": "Attention sink"}).data}
    assert names == {"Attention sink · first token", "other · first token"}


@pytest.mark.parametrize(("longest", "kind"), [(50, "linear"), (500, "log")])
def test_long_prompts_get_a_logarithmic_axis_that_keeps_the_first_query(longest: int, kind: str) -> None:
    table = pd.DataFrame({"position": range(longest), "value": 0.5})
    figure = position_curves(table.assign(detector="d", layer=0, head=0, statistic="first_1"))
    assert figure.layout.xaxis.type == kind
    assert min(figure.data[0].x) == (1 if kind == "log" else 0)


def test_skipped_positions_break_the_line() -> None:
    table = pd.DataFrame({"position": [100, 101, 102, 103, 300, 301, 302], "value": 0.5})
    figure = position_curves(table.assign(detector="d", layer=0, head=0, statistic="needle_key"), log=False)
    assert np.isnan(figure.data[0].x[4])
    assert list(figure.data[0].x[5:]) == [300, 301, 302]
    spread = pd.DataFrame({"position": np.unique(np.geomspace(1, 5000, 40).astype(int)), "value": 0.5})
    figure = position_curves(spread.assign(detector="d", layer=0, head=0, statistic="x"))
    assert not np.isnan(figure.data[0].x).any()


def test_caption_and_refusal(curves: pd.DataFrame) -> None:
    assert caption_of(position_curves(curves, [(2, 1)])).startswith("L2H1 over the query position: first token")
    assert caption_of(position_curves(curves, [(2, 1)], caption="Own words.")) == "Own words."
    with pytest.raises(RequestError, match="L9H9"):
        position_curves(curves, [(9, 9)])


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(
    ("low", "high"), [(0, 2), (0, 7), (1, 63), (50, 99), (0, 255), (51, 255), (137, 160), (159, 255), (0, 14_000)]
)
def test_position_axes_have_readable_numbers(low: int, high: int, log: bool) -> None:
    table = pd.DataFrame({"position": [low, high], "value": 0.5})
    axis = position_curves(table.assign(detector="d", layer=0, head=0, statistic="s"), log=log).layout.xaxis
    assert 3 <= len(axis.tickvals) <= 11
    first, last = (10**end if log else end for end in axis.range)
    assert all(first < tick < last for tick in axis.tickvals)
    assert list(axis.ticktext) == [f"{tick:,}" for tick in axis.tickvals]


def test_a_logarithmic_axis_spans_a_decade() -> None:
    row = {"value": 0.5, "detector": "d", "layer": 0, "head": 0, "statistic": "s"}
    assert position_curves(pd.DataFrame({"position": [50, 255]}).assign(**row)).layout.xaxis.type == "linear"
    axis = position_curves(pd.DataFrame({"position": [0, 255]}).assign(**row)).layout.xaxis
    assert list(axis.tickvals) == [1, 2, 5, 10, 20, 50, 100, 200]
