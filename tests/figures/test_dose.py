"""Dose curve: nested sets over k beside their own controls."""

from __future__ import annotations

import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.figures import caption_of, dose_curve, has_doses


@pytest.fixture
def doses(verification: pd.DataFrame) -> pd.DataFrame:
    """One detector at k = 1, 2, 4 (only the last one shown), another at one size."""
    first = verification.iloc[[0]]
    steps = [
        first.assign(k=4, effect=1.0),
        first.assign(k=1, effect=0.1, low=0.0, q=0.4),
        first.assign(k=2, effect=0.15, low=0.05, q=0.2),
    ]
    return pd.concat([*steps, verification.iloc[[1]]], ignore_index=True)


def test_the_curve_runs_over_k_with_its_band(doses: pd.DataFrame) -> None:
    figure = dose_curve(doses, labels={"induction": "Induction"})
    curve = next(trace for trace in figure.data if (trace.name or "").startswith("named heads"))
    assert list(curve.x) == [1, 2, 4] and list(curve.y) == [0.1, 0.15, 1.0]
    assert list(curve.marker.symbol) == ["diamond-open", "diamond-open", "diamond"]
    assert curve.error_y.array[2] == pytest.approx(0.2) and curve.error_y.arrayminus[2] == pytest.approx(0.2)
    band = next(trace for trace in figure.data if trace.name == "range of random draws")
    assert list(band.x) == [1, 2, 4] and list(band.y) == [0.2] * 3 and band.fill == "tonexty"
    assert figure.layout.annotations[0].text == "Induction: loss" and len(figure.layout.annotations) == 1
    assert "mean over 8 prompts" in caption_of(figure)


def test_one_size_is_no_curve(verification: pd.DataFrame, doses: pd.DataFrame) -> None:
    assert has_doses(doses) and not has_doses(verification)
    with pytest.raises(RequestError, match="--dose"):
        dose_curve(verification)
