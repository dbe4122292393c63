"""What a report says of an atlas: kinds of heads, pairs of detectors that agree or do not, and what could not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from workbench.figures.atlas import agreement_matrix, head_scatter, rank_maps
from workbench.figures.text import interval, number, probability, signed
from workbench.reports.catalogue import Catalogue
from workbench.reports.source import RunLike, frame, head_name

PAIRS = 8
SHOWN_HEADS = 6
MARKS = 8
Plan = tuple[str, str, Callable[[bool], Any]]


@dataclass(frozen=True)
class Cluster:
    """A kind of heads: its name, size, most typical heads, and the detectors that mark it with their mean scores."""

    name: str
    size: int
    heads: tuple[str, ...]
    marks: str


@dataclass(frozen=True)
class AgreedPair:
    """Two detectors: rank correlation with interval, and what their top heads share beside chance."""

    names: str
    rho: str
    interval: str
    k: str
    shared: str
    chance: str
    q: str


@dataclass(frozen=True)
class AtlasView:
    """An atlas as texts; every list may be empty."""

    clusters: tuple[Cluster, ...]
    structure: str
    alike: tuple[AgreedPair, ...]
    apart: tuple[AgreedPair, ...]
    skipped: tuple[tuple[str, str], ...]
    left_out: str


def atlas_view(run: RunLike, known: Catalogue) -> AtlasView | None:
    """The atlas of a run; None where it has neither agreement nor clusters nor anything skipped."""
    pairs, skipped = frame(run, "agreement"), frame(run, "skipped")
    heads, clusters = frame(run, "head_clusters"), frame(run, "cluster_info")
    if pairs is None and heads is None and skipped is None:
        return None
    about = run.manifest.get("atlas") or {}
    alike, apart = _pairs(pairs, frame(run, "overlap"), known.titles())
    return AtlasView(
        clusters=_clusters(heads, clusters, known.titles()),
        structure=_structure(about, clusters),
        alike=alike,
        apart=apart,
        skipped=() if skipped is None else tuple(
            (str(row["title"]), str(row["reason"])) for row in skipped.to_dict("records")
        ),
        left_out=_left_out(about, known.titles()),
    )  # fmt: skip


def atlas_charts(run: RunLike, known: Catalogue) -> Iterator[Plan]:
    """(part, figure id, how to draw it) for all that the run's tables allow."""
    scores, pairs = frame(run, "head_scores"), frame(run, "agreement")
    heads, clusters = frame(run, "head_clusters"), frame(run, "cluster_info")
    about = run.manifest.get("atlas") or {}
    if heads is not None and clusters is not None:
        axes = tuple(str(text) for text in about.get("axes", ("", "")))
        yield "headmap", "head-map", partial(_scatter, heads, clusters, axes, scores, known.titles())
    if scores is not None and (pairs is not None or heads is not None) and "rank" in scores:
        yield "multiples", "rank-maps", partial(_multiples, scores, known.titles())
    if pairs is not None and pairs["rho"].notna().any():
        yield "agreement", "agreement", partial(_matrix, pairs, known.titles())


def _scatter(
    heads: pd.DataFrame,
    clusters: pd.DataFrame,
    axes: tuple[str, ...],
    scores: pd.DataFrame | None,
    titles: Mapping[str, str],
    dark: bool,
) -> Any:
    return head_scatter(heads, clusters, axes=axes, scores=scores, titles=titles, dark=dark)


def _multiples(scores: pd.DataFrame, titles: Mapping[str, str], dark: bool) -> Any:
    return rank_maps(scores, titles, dark=dark)


def _matrix(pairs: pd.DataFrame, titles: Mapping[str, str], dark: bool) -> Any:
    return agreement_matrix(pairs, titles, dark=dark)


def _clusters(
    heads: pd.DataFrame | None, clusters: pd.DataFrame | None, titles: Mapping[str, str]
) -> tuple[Cluster, ...]:
    if heads is None or clusters is None:
        return ()
    found = []
    for row in clusters.to_dict("records"):
        own = heads[heads["cluster"] == row["cluster"]].nlargest(SHOWN_HEADS, "silhouette")
        marks = zip(str(row["detectors"]).split(), str(row["strength"]).split(), strict=False)
        told = [f"{titles.get(name, name)} {signed(float(mean))}" for name, mean in marks]
        told = [*told[:MARKS], f"{len(told) - MARKS} more"] if len(told) > MARKS + 1 else told
        found.append(
            Cluster(
                name=str(row["name"]),
                size=int(row["size"]),
                heads=tuple(head_name(layer, head) for layer, head in zip(own["layer"], own["head"], strict=True)),
                marks=", ".join(told),
            )
        )
    return tuple(found)


def _structure(about: Mapping[str, Any], clusters: pd.DataFrame | None) -> str:
    """How far clusters are more than a way of cutting a cloud."""
    if about.get("no_map"):
        return f"There is no map: {about['no_map']}"
    if clusters is None or "silhouette" not in about:
        return ""
    own, most = about["silhouette"], about.get("null_highest")
    told = f"{len(clusters)} clusters, mean silhouette {number(own)}; shuffled scores reach {number(most)} at most."
    if about.get("structured"):
        return f"{told} The clusters are tighter than chance makes them; below 0.25 they still have no clear borders."
    return f"{told} So the clusters are no tighter than those of shuffled scores: a way of cutting a cloud, not kinds."


def _left_out(about: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    rows = about.get("left_out") or {}
    return "; ".join(f"{titles.get(str(name), str(name))} ({reason})" for name, reason in rows.items())


def _pairs(
    pairs: pd.DataFrame | None, overlap: pd.DataFrame | None, titles: Mapping[str, str]
) -> tuple[tuple[AgreedPair, ...], tuple[AgreedPair, ...]]:
    """The pairs of the highest correlations, and those of the lowest."""
    if pairs is None:
        return (), ()
    ranked = pairs[pairs["rho"].notna()].sort_values("rho", kind="stable")
    k = _middle_k(overlap)
    shared = {}
    if overlap is not None and k is not None:
        rows = overlap[overlap["k"] == k].to_dict("records")
        shared = {(row["detector_a"], row["detector_b"]): row for row in rows}
    count = min(PAIRS, len(ranked) // 2)
    high, low = ranked.tail(count).iloc[::-1], ranked.head(count)
    high, low = ([_pair(row, shared, k, titles) for row in part.to_dict("records")] for part in (high, low))
    return tuple(high), tuple(low)


def _middle_k(overlap: pd.DataFrame | None) -> int | None:
    """The number of top heads to compare: ten, or what is nearest to it."""
    if overlap is None:
        return None
    return int(min(overlap["k"].unique(), key=lambda k: abs(k - 10)))


def _pair(
    row: Mapping[str, Any],
    shared: Mapping[tuple[str, str], Mapping[str, Any]],
    k: int | None,
    titles: Mapping[str, str],
) -> AgreedPair:
    a, b = str(row["detector_a"]), str(row["detector_b"])
    over = shared.get((a, b), {})
    return AgreedPair(
        names=f"{titles.get(a, a)} and {titles.get(b, b)}",
        rho=signed(row["rho"]),
        interval=interval(row["low"], row["high"]),
        k=str(k or ""),
        shared=number(over.get("shared"), places=1),
        chance=number(over.get("chance_shared"), places=1),
        q=probability(over.get("q")),
    )
