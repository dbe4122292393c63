"""Figures of an atlas: what stands where, in both modes, with every text made harmless."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.figures import agreement_matrix, caption_of, head_scatter, rank_maps
from workbench.figures.theme import DARK, LIGHT

LAYERS, HEADS = 4, 3


@pytest.fixture
def scores(seed):
    rng = np.random.default_rng(seed)
    layer, head = (axis.ravel() for axis in np.indices((LAYERS, HEADS)))
    parts = []
    for name in ("a", "b", "<i>c</i>"):
        value = rng.random(len(head))
        part = pd.DataFrame({"detector": name, "layer": layer, "head": head, "value": value})
        parts.append(part.assign(rank=part["value"].rank(ascending=False).astype(int)))
    return pd.concat(parts, ignore_index=True)


def correlations(values: dict[tuple[str, str], float]) -> pd.DataFrame:
    rows = [(a, b, rho, rho - 0.1, min(1.0, rho + 0.1), 12) for (a, b), rho in values.items()]
    return pd.DataFrame(rows, columns=["detector_a", "detector_b", "rho", "low", "high", "heads"])


def test_agreement_puts_like_detectors_side_by_side_and_fills_both_halves():
    pairs = correlations(
        {("a", "x"): -0.5, ("a", "b"): 0.9, ("a", "y"): -0.4, ("x", "b"): -0.5, ("x", "y"): 0.8, ("b", "y"): np.nan}
    )
    figure = agreement_matrix(pairs, {"a": "<script>", "b": "B"})
    names = list(figure.layout.xaxis.ticktext)
    assert names == list(figure.layout.yaxis.ticktext)
    assert abs(names.index("&lt;script&gt;") - names.index("B")) == 1 == abs(names.index("x") - names.index("y"))
    grid = np.array(figure.data[0].z, dtype=float)
    assert np.array_equal(grid, grid.T, equal_nan=True) and np.allclose(np.diag(grid), 1)
    assert np.isnan(grid[names.index("B"), names.index("y")])
    told = figure.data[0].customdata[names.index("&lt;script&gt;"), names.index("B")]
    assert told == "<b>&lt;script&gt; and B</b><br>+0.90 (0.80 to 1.00), 12 heads"
    assert "12 heads" in caption_of(figure) and "4 detectors" in caption_of(figure)
    with pytest.raises(RequestError, match="at least two"):
        agreement_matrix(pairs.head(0))


@pytest.mark.parametrize("count", [2, 12])
def test_clusters_differ_in_colour_or_shape(scores, count):
    rng = np.random.default_rng(0)
    heads = pd.DataFrame({
        "layer": np.arange(24) // 3, "head": np.arange(24) % 3, "cluster": np.arange(24) % count,
        "x": rng.normal(size=24), "y": rng.normal(size=24),
    })  # fmt: skip
    clusters = pd.DataFrame({"cluster": range(count), "name": [f"<b>{i}" for i in range(count)], "size": 24 // count})
    figure = head_scatter(heads, clusters, axes=("one: <u>", "two"), scores=scores, titles={"a": "A<"})
    looks = {(trace.marker.color, trace.marker.symbol) for trace in figure.data}
    assert len(looks) == count == len(figure.data)
    assert sum(len(trace.x) for trace in figure.data) == 24
    first = figure.data[0].customdata[0]
    assert first[0] == "L0H0" and first[1] == "&lt;b&gt;0" and "rank" in first[2] and "<i>" not in first[2]
    assert figure.layout.xaxis.title.text == "one:<br>&lt;u&gt;"
    dark = head_scatter(heads, clusters, dark=True)
    assert dark.data[0].marker.color == DARK.series[0] != LIGHT.series[0] == figure.data[0].marker.color


def test_rank_maps_share_one_scale_and_ranks_are_shares_outranked(scores):
    figure = rank_maps(scores, {"a": "First"}, columns=2)
    assert len(figure.data) == 3 and {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    grid = np.array(figure.data[0].z, dtype=float)
    rows = scores[scores.detector == "a"]
    for row in rows.to_dict("records"):
        assert grid[row["layer"], row["head"]] == pytest.approx(
            (rows["value"] < row["value"]).mean() * 12 / 11, abs=1e-3
        )
    assert [note.text for note in figure.layout.annotations] == ["First", "b", "&lt;i&gt;c&lt;/i&gt;"]
    ties = scores.assign(value=1.0)
    assert np.allclose(np.array(rank_maps(ties).data[0].z, dtype=float), 0.5)
    with pytest.raises(RequestError, match="empty"):
        rank_maps(scores.assign(value=np.nan))


def test_heads_without_a_score_stay_empty(scores):
    scores.loc[0, "value"] = np.nan
    figure = rank_maps(scores)
    assert np.isnan(figure.data[0].z[0][0]) and figure.data[0].customdata[0][0][0] == ""
