"""Prose against code."""

from __future__ import annotations

import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.figures import caption_of, domain_scatter


def test_outlier_is_labelled_with_its_intervals(contrast: pd.DataFrame) -> None:
    equal, others, far = domain_scatter(contrast, labelled=1).data
    assert list(far.text) == ["L2H1"]
    assert (far.x[0], far.y[0]) == (0.5, 0.1)
    assert far.error_y.array[0] == pytest.approx(0.03)
    assert far.error_y.arrayminus[0] == pytest.approx(0.02)
    assert far.textposition == ("middle right",), "away from the diagonal"
    assert len(others.x) == 11
    assert list(equal.x) == list(equal.y)


def test_no_point_is_lost_and_domains_may_be_swapped(contrast: pd.DataFrame) -> None:
    figure = domain_scatter(contrast, ("code", "prose"))
    assert sum(len(trace.x) for trace in figure.data[1:]) == 12
    assert figure.layout.xaxis.title.text == "first-token mass on code"


def test_labels_of_close_heads_do_not_lie_on_each_other(contrast: pd.DataFrame) -> None:
    code = contrast["domain"] == "code"
    close = contrast.assign(value=contrast["value"].where(~code, 0.9 + contrast["layer"] / 1000))
    far = domain_scatter(close, labelled=12).data[2]
    shown = [place for place, text in zip(far.textposition, far.text, strict=True) if text]
    assert 2 <= len(shown) < 12
    assert len(set(shown)) == len(shown)


def test_hover_names_the_head(contrast: pd.DataFrame) -> None:
    far = domain_scatter(contrast, labelled=1).data[2]
    assert list(far.customdata[0]) == ["L2H1", "0.500 (0.480 to 0.530)", "0.100 (0.080 to 0.130)"]


def test_caption_and_refusal(contrast: pd.DataFrame) -> None:
    assert "over 20 prompts of each kind" in caption_of(domain_scatter(contrast))
    with pytest.raises(RequestError, match="code, prose"):
        domain_scatter(contrast, ("prose", "poetry"))
