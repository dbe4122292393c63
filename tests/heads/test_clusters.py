"""Clusters of heads that are known beforehand, and honest answers where there are none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.heads.clusters import cluster_heads, standardised, weights

WIDTH = 10


def tables(values: np.ndarray, better: str = "higher"):
    names = [f"d{i}" for i in range(values.shape[1])]
    rows = [
        {"detector": name, "layer": i // WIDTH, "head": i % WIDTH, "value": values[i, j]}
        for j, name in enumerate(names)
        for i in range(len(values))
    ]
    about = pd.DataFrame({"detector": names, "title": [n.upper() for n in names], "better": better})
    return pd.DataFrame(rows), about


@pytest.fixture
def planted():
    """Three kinds of heads, 60, 25 and 15; detectors 0-1 mark the second, 2-3 the third."""
    rng = np.random.default_rng(1)
    kinds = np.repeat([0, 1, 2], [60, 25, 15])
    values = rng.normal(size=(100, 4)) * 0.3
    values[kinds == 1, :2] += 4
    values[kinds == 2, 2:] += 4
    order = rng.permutation(100)
    return kinds[order], values[order]


def test_planted_kinds_are_found_and_named_by_what_marks_them(planted):
    kinds, values = planted
    found = cluster_heads(*tables(values))
    assert len(found.clusters) == 3
    # Ranks spread the noise of unmarked heads out, so that one of them may stray.
    assert (found.heads.cluster.to_numpy() == kinds).mean() >= 0.98
    assert list(found.clusters["size"]) == sorted(found.clusters["size"], reverse=True)
    assert [set(text.split()) for text in found.clusters.detectors] == [set(), {"d0", "d1"}, {"d2", "d3"}]
    assert found.clusters.name[0] == "Unmarked" and set(found.clusters.name[1].split(", ")) == {"D0", "D1"}
    assert found.structured and found.silhouette > found.null_highest >= found.null_silhouette


def test_noise_has_no_structure_and_says_so():
    values = np.random.default_rng(2).normal(size=(80, 6))
    found = cluster_heads(*tables(values))
    assert not found.structured or found.silhouette - found.null_highest < 0.02
    assert found.silhouette < 0.3


def test_the_map_is_that_of_a_singular_value_decomposition(planted):
    _, values = planted
    vectors = standardised(*tables(values)).values
    vectors = vectors * weights(vectors)
    u, s, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    found = cluster_heads(*tables(values)).heads
    for column, i in (("x", 0), ("y", 1)):
        assert np.abs(found[column].to_numpy()) == pytest.approx(np.abs(u[:, i] * s[i]), abs=1e-9)
    share = s[0] ** 2 / (s**2).sum()
    assert cluster_heads(*tables(values)).axes[0].startswith(f"component 1 ({share:.0%} of variance): ")


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_the_same_seed_gives_the_same_map(planted, method):
    _, values = planted
    one, other = (cluster_heads(*tables(values), method=method, seed=4) for _ in range(2))
    pd.testing.assert_frame_equal(one.heads, other.heads)
    assert np.isfinite(one.heads[["x", "y", "silhouette"]]).all(axis=None)


def test_scores_do_not_depend_on_units_or_on_the_side_that_says_most(planted):
    _, values = planted
    plain = standardised(*tables(values)).values
    assert standardised(*tables(np.exp(3 * values))).values == pytest.approx(plain)
    assert standardised(*tables(-values, better="lower")).values == pytest.approx(plain)
    assert plain.mean(0) == pytest.approx(0, abs=1e-12) and plain.std(0) == pytest.approx(0.97, abs=0.01)


def test_variants_of_one_detector_count_as_one(planted):
    _, values = planted
    one = standardised(*tables(values[:, [0, 2]])).values
    noise = np.random.default_rng(5).normal(size=(100, 1)) * 1e-3
    variants = [values[:, [0]], -values[:, [0]] + noise, values[:, [0]], values[:, [2]]]
    many = standardised(*tables(np.column_stack(variants)))
    assert weights(many.values) ** 2 == pytest.approx([1 / 3] * 3 + [1])

    def distances(vectors):
        scaled = vectors * weights(vectors)
        return np.linalg.norm(scaled[:, None] - scaled[None], axis=-1)

    assert distances(many.values) == pytest.approx(distances(one), abs=0.2)


def test_a_single_head_that_stands_out_in_one_detector_is_no_cluster_in_noise():
    """One score for all heads but one: were it scaled to variance 1, that head would be alone in every shuffle."""
    values = np.random.default_rng(6).normal(size=(80, 6))
    values[:, 5] = np.arange(80) == 7
    found = cluster_heads(*tables(values))
    assert found.null_highest < 0.25


def test_detectors_that_cannot_serve_are_named_and_gaps_are_in_the_middle(planted):
    _, values = planted
    gaps = values[:, 0].copy()
    gaps[:20] = np.nan
    extra = np.column_stack(
        [values, gaps, np.full(100, 2.0), np.full(100, np.nan), np.where(np.arange(100) < 30, gaps, np.nan)]
    )
    extra[20:30, 7] = values[20:30, 1]
    vectors = standardised(*tables(extra))
    assert vectors.left_out == {
        "d6": "no scores", "d5": "the same score for all heads", "d7": "scores fewer than half of the heads",
    }  # fmt: skip
    assert vectors.detectors == ["d0", "d1", "d2", "d3", "d4"]
    assert (vectors.values[:20, 4] == 0).all()
    assert np.isfinite(cluster_heads(*tables(extra)).heads[["x", "y"]]).all(axis=None)


def test_too_little_is_refused():
    with pytest.raises(RequestError, match="3 heads with 2 detectors"):
        cluster_heads(*tables(np.arange(6.0).reshape(3, 2)))
    with pytest.raises(RequestError, match="1 detectors"):
        cluster_heads(*tables(np.arange(8.0).reshape(8, 1)))


def test_an_unknown_method_is_refused(unchecked_signatures):
    with pytest.raises(RequestError, match="method='umap'"):
        cluster_heads(*tables(np.eye(8)), method="umap")
