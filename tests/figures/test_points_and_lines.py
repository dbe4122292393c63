"""Figures of studies: one band where groups share their controls, groups named by several columns, doses by factors."""

from __future__ import annotations

import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.figures import dose_lines, point_chart


@pytest.fixture
def rows() -> pd.DataFrame:
    frame = pd.DataFrame({"x": [1, 10, 1, 10], "part": ["a", "a", "b", "b"], "site": ["q", "k", "q", "k"]})
    frame = frame.assign(
        value=[0.1, 0.2, 0.3, 0.4], control_low=[0.0, 0.1, 0.0, 0.1], control_high=[0.2, 0.3, 0.2, 0.3]
    )
    return frame.assign(low=frame["value"] - 0.1, high=frame["value"] + 0.1)


def bands(figure) -> list[str]:
    return [trace.name for trace in figure.data if trace.fill == "tonexty"]


def test_shared_controls_are_drawn_once(rows: pd.DataFrame) -> None:
    assert bands(dose_lines(rows, x="x", value="value", group="part", band="others")) == ["others"]
    own = rows.assign(control_high=[0.2, 0.3, 0.5, 0.6])
    assert bands(dose_lines(own, x="x", value="value", group="part")) == [
        "a, range of random draws",
        "b, range of random draws",
    ]


def test_doses_by_factors_have_an_axis_of_their_own(rows: pd.DataFrame) -> None:
    figure = dose_lines(rows, x="x", value="value", group="part", log_x=True)
    assert figure.layout.xaxis.type == "log" and list(figure.layout.xaxis.tickvals) == [1, 10]
    assert dose_lines(rows, x="x", value="value", group="part").layout.xaxis.type is None


def test_groups_of_several_columns(rows: pd.DataFrame) -> None:
    figure = point_chart(rows, value="value", label="x", group=["part", "site"])
    assert [trace.name for trace in figure.data] == ["a q", "a k", "b q", "b k"]
    with pytest.raises(RequestError, match="no column 'sight'"):
        point_chart(rows, value="value", label="x", group=["part", "sight"])
