"""The atlas of a report: computed from the run's tables, complete without any of them, and escaped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from workbench.heads.agreement import agreement
from workbench.heads.clusters import cluster_heads
from workbench.reports.atlas import atlas_view
from workbench.reports.build import build
from workbench.reports.catalogue import catalogue
from workbench.reports.write import render


@pytest.fixture(scope="module")
def atlas(demo: Any) -> Any:
    """The synthetic run with what an atlas adds to it."""
    scores, about = demo.table("head_scores"), demo.table("detectors")
    ranks = scores.groupby("detector")["value"].rank(ascending=False, method="first").fillna(270).astype(int)
    scores = scores.assign(rank=ranks)
    found, pairs = cluster_heads(scores, about), agreement(scores, about, resamples=20)
    skipped = pd.DataFrame({
        "detector": ["learned"], "title": ["<b>Learned</b> sink"], "kind": ["text"],
        "reason": ["The model has <script>alert(1)</script> no learned sinks."],
    })  # fmt: skip
    more = {
        "head_scores": scores, "agreement": pairs.correlations, "overlap": pairs.overlaps, "skipped": skipped,
        "head_clusters": found.heads, "cluster_info": found.clusters,
    }  # fmt: skip
    about_atlas = {
        "axes": list(found.axes), "silhouette": found.silhouette, "null_highest": found.null_highest,
        "structured": found.structured, "left_out": found.left_out,
    }  # fmt: skip
    return replace(demo, frames=demo.frames | more, manifest=demo.manifest | {"kind": "atlas", "atlas": about_atlas})


def test_a_run_without_an_atlas_has_no_such_section(demo: Any) -> None:
    assert atlas_view(demo, catalogue(demo)) is None
    assert 'id="atlas"' not in render(demo)


def test_the_section_tells_the_pairs_and_clusters_of_the_tables(atlas: Any) -> None:
    view = atlas_view(atlas, catalogue(atlas))
    assert view is not None
    pairs = atlas.table("agreement").dropna(subset="rho").sort_values("rho")
    best, worst = pairs.iloc[-1], pairs.iloc[0]
    titles = catalogue(atlas).titles()
    assert view.alike[0].names == f"{titles[best.detector_a]} and {titles[best.detector_b]}"
    assert view.apart[0].names == f"{titles[worst.detector_a]} and {titles[worst.detector_b]}"
    row = atlas.table("overlap").query("k == 10 and detector_a == @best.detector_a and detector_b == @best.detector_b")
    assert view.alike[0].shared == f"{row['shared'].item():.1f}" and view.alike[0].chance == f"{100 / 270:.1f}"
    assert sum(cluster.size for cluster in view.clusters) == 270
    assert "silhouette" in view.structure and "Retrieval (greedy) (no scores)" in view.left_out


def test_the_page_has_the_figures_and_escapes_what_it_is_told(atlas: Any) -> None:
    content = build(atlas)
    assert {"headmap", "multiples", "agreement"} <= set(content.figures)
    page = render(atlas)
    assert 'id="atlas"' in page and 'href="#atlas"' in page
    for name in ("rank-maps", "head-map", "agreement"):
        assert f'data-figure="{name}"' in page
    assert "<script>alert(1)" not in page and "&lt;b&gt;Learned&lt;/b&gt; sink" in page
    assert ("http-equiv" in page and "connect-src &#39;none&#39;" in page) or "connect-src 'none'" in page


@pytest.mark.parametrize("missing", ["agreement", "overlap", "head_clusters", "cluster_info", "skipped", "head_scores"])
def test_each_table_may_be_missing(atlas: Any, missing: str) -> None:
    assert 'id="atlas"' in render(atlas.without(missing))


def test_a_small_budget_leaves_figures_out_and_says_so(atlas: Any) -> None:
    page = render(atlas, budget_bytes=1_400_000)
    assert len(page.encode()) <= 1_400_000
    assert "left out" in page and 'id="atlas"' in page
