"""Kinds of heads: clusters of their scores over all detectors, and a map of heads in two dimensions.

1. Each detector's scores, turned so that the largest says most, become ranks among the heads, and ranks become the
   quantiles of a normal distribution (van der Waerden's scores, mean 0). Detectors with different units, skews and
   outliers then count alike, while the top heads still stand apart. Heads of one score share the middle rank, so that
   a detector with few different scores varies less, and counts less.
2. Where a detector has no score for a head, the head gets 0, the middle. Detectors that score fewer than half of the
   heads, or all the same, are left out and named.
3. Detectors that rank heads nearly alike, or nearly the other way round (|r| above 0.9 between all of them), count
   as one together: variants of one measure must not outvote the others.
4. Ward's clusters of these vectors; their number is the one with the largest mean silhouette.
5. The same search on vectors whose columns were shuffled apart, heads kept: what silhouette no structure gives. Found
   clusters whose silhouette is not above that are a way of cutting a cloud, and the result says so.
6. Coordinates: the first two principal components, with their shares of variance and the detectors that carry
   them; or t-SNE, whose distances between far heads mean nothing.

Clusters describe scores, they are no claim about what heads are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from workbench.errors import RequestError
from workbench.heads.agreement import strengths

Method = Literal["pca", "tsne"]
METHODS: tuple[str, ...] = get_args(Method)
MOST_CLUSTERS = 12
LEAST_HEADS, LEAST_DETECTORS = 4, 2
SHUFFLES = 10
# Heads whose silhouettes are averaged: distances between all of them are held at once.
MOST_SILHOUETTES = 2000
# A detector marks a cluster whose mean normal score is at least this.
MARKS = 0.75
NAMED = 2
# Absolute correlation from which detectors count as variants of one.
ALIKE = 0.9
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class HeadMap:
    """`heads`: layer, head, cluster, x, y, silhouette. `clusters`: cluster, name, size, detectors (those that mark it,
    strongest first, by name), strength (their mean normal scores). `left_out`: detectors that could
    not be used, with the reason. `axes`: what the coordinates are.

    `silhouette` is the mean over heads, from -1 to 1; `null_silhouette` and `null_highest` are its mean and maximum
    where the detectors were shuffled apart.
    """

    heads: pd.DataFrame
    clusters: pd.DataFrame
    left_out: dict[str, str]
    axes: tuple[str, str]
    method: Method
    silhouette: float
    null_silhouette: float
    null_highest: float

    @property
    def structured(self) -> bool:
        """Whether the clusters are tighter than any of those found in shuffled scores."""
        return self.silhouette > self.null_highest


class _Vectors(NamedTuple):
    """Normal scores: heads by detectors."""

    index: pd.MultiIndex
    detectors: list[str]
    values: Float[np.ndarray, "head detector"]
    left_out: dict[str, str]


class _Partition(NamedTuple):
    labels: Int[np.ndarray, " head"]
    silhouette: float


def cluster_heads(scores: pd.DataFrame, detectors: pd.DataFrame, *, method: Method = "pca", seed: int = 0) -> HeadMap:
    """Clusters and coordinates of all heads, from the tables of `HeadScores`; the same seed gives the same."""
    if method not in METHODS:
        raise RequestError(f"method={method!r} makes no map; choose one of {', '.join(METHODS)}.")
    vectors = standardised(scores, detectors)
    rng = np.random.default_rng(seed)
    weighted = vectors.values * weights(vectors.values)
    found = _partition(weighted, rng)
    nulls = [_partition(rng.permuted(weighted, axis=0), rng).silhouette for _ in range(SHUFFLES)]
    labels = _by_size(found.labels)
    titles = dict(zip(detectors["detector"], detectors["title"], strict=True))
    x, y, axes = _coordinates(vectors._replace(values=weighted), method, seed, titles)
    heads = pd.DataFrame(
        {
            "layer": vectors.index.get_level_values("layer").to_numpy(),
            "head": vectors.index.get_level_values("head").to_numpy(),
            "cluster": labels, "x": x, "y": y, "silhouette": _silhouettes(weighted, labels),
        }
    )  # fmt: skip
    return HeadMap(
        heads, _named(vectors, labels, titles), vectors.left_out, axes, method, found.silhouette,
        float(np.mean(nulls)), float(np.max(nulls)),
    )  # fmt: skip


def standardised(scores: pd.DataFrame, detectors: pd.DataFrame) -> _Vectors:
    """Normal scores of each detector's ranks; what has none is in the middle."""
    wide = strengths(scores, detectors)
    known, varied = wide.notna().mean(), wide.nunique() > 1
    silent = [name for name in dict.fromkeys(scores["detector"]) if name not in wide.columns]
    left_out = {str(name): "no scores" for name in silent}
    left_out |= {str(name): "the same score for all heads" for name in wide.columns[~varied]}
    left_out |= {str(name): "scores fewer than half of the heads" for name in wide.columns[varied & (known < 0.5)]}
    used = wide.loc[:, varied & (known >= 0.5)]
    if len(used) < LEAST_HEADS or used.shape[1] < LEAST_DETECTORS:
        raise RequestError(
            f"{len(used)} heads with {used.shape[1]} detectors that tell them apart have no clusters; at least "
            f"{LEAST_HEADS} and {LEAST_DETECTORS} are needed."
        )
    ranks = used.rank() / (used.notna().sum() + 1)
    normal = pd.DataFrame(stats.norm.ppf(ranks), index=used.index, columns=used.columns)
    values = (normal - normal.mean()).fillna(0.0)
    index = pd.MultiIndex.from_tuples(list(values.index), names=["layer", "head"])
    return _Vectors(index, [str(name) for name in used.columns], values.to_numpy(dtype=float), left_out)


def weights(values: Float[np.ndarray, "head detector"]) -> Float[np.ndarray, " detector"]:
    """Factors by which the detectors of a group of like ones together count as one."""
    if values.shape[1] < 2:
        return np.ones(values.shape[1])
    alike = np.abs(np.corrcoef(values, rowvar=False))
    distance = np.clip(1 - (alike + alike.T) / 2, 0, 1)
    np.fill_diagonal(distance, 0)
    groups = fcluster(linkage(squareform(distance, checks=False), "complete"), 1 - ALIKE, criterion="distance")
    return np.asarray(1 / np.sqrt(np.bincount(groups)[groups]))


def _partition(values: Float[np.ndarray, "head detector"], rng: np.random.Generator) -> _Partition:
    """Ward's clusters; of all counts the one with the largest silhouette, the smaller count among equals."""
    from sklearn.cluster import AgglomerativeClustering

    sample = rng.permutation(len(values))[:MOST_SILHOUETTES]
    best: _Partition | None = None
    for count in range(2, min(MOST_CLUSTERS, len(values) - 1) + 1):
        labels = AgglomerativeClustering(n_clusters=count, linkage="ward").fit_predict(values)
        mean = _mean_silhouette(values[sample], labels[sample])
        if best is None or mean > best.silhouette:
            best = _Partition(labels.astype(np.int64), mean)
    assert best is not None
    return best


def _mean_silhouette(values: Array, labels: Int[np.ndarray, " head"]) -> float:
    from sklearn.metrics import silhouette_score

    if not 1 < len(np.unique(labels)) < len(labels):
        return -1.0
    return float(silhouette_score(values, labels))


def _silhouettes(values: Array, labels: Int[np.ndarray, " head"]) -> Array:
    """How much nearer each head is to its own cluster than to the next; sums over blocks of heads."""
    from sklearn.metrics import silhouette_samples

    return np.asarray(silhouette_samples(values, labels), dtype=float)


def _by_size(labels: Int[np.ndarray, " head"]) -> Int[np.ndarray, " head"]:
    """Clusters numbered by size, 0 the largest; equals by their first head."""
    found, first, counts = np.unique(labels, return_index=True, return_counts=True)
    order = found[np.lexsort((first, -counts))]
    place = np.empty(len(found), dtype=np.int64)
    place[order] = np.arange(len(found))
    return np.asarray(place[labels])


def _named(vectors: _Vectors, labels: Int[np.ndarray, " head"], titles: dict[str, str]) -> pd.DataFrame:
    """Each cluster with the detectors that mark it; named by the strongest of them."""
    rows, names = [], []
    for cluster in range(int(labels.max()) + 1):
        inside = labels == cluster
        means = vectors.values[inside].mean(axis=0)
        order = [int(i) for i in np.argsort(-means, kind="stable") if means[i] >= MARKS]
        marks = [vectors.detectors[i] for i in order]
        name = ", ".join(titles.get(mark, mark) for mark in marks[:NAMED]) or "Unmarked"
        names.append(name)
        rows.append(
            {
                "cluster": cluster, "name": f"{name} ({names.count(name)})" if names.count(name) > 1 else name,
                "size": int(inside.sum()), "detectors": " ".join(marks),
                "strength": " ".join(f"{means[i]:.2f}" for i in order),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _coordinates(
    vectors: _Vectors, method: Method, seed: int, titles: dict[str, str]
) -> tuple[Array, Array, tuple[str, str]]:
    if method == "tsne":
        from sklearn.manifold import TSNE

        near = min(30.0, (len(vectors.values) - 1) / 3)
        placed = TSNE(2, perplexity=near, init="pca", random_state=seed).fit_transform(vectors.values)
        placed = np.asarray(placed, dtype=float)
        return placed[:, 0], placed[:, 1], ("t-SNE 1", "t-SNE 2")
    from sklearn.decomposition import PCA

    # Full decomposition: no random numbers, and signs fixed by the loadings.
    made = PCA(2, svd_solver="full").fit(vectors.values)
    placed = made.transform(vectors.values)
    labels = [
        f"component {i + 1} ({share:.0%} of variance): {_poles(loading, vectors.detectors, titles)}"
        for i, (share, loading) in enumerate(zip(made.explained_variance_ratio_, made.components_, strict=True))
    ]
    return placed[:, 0], placed[:, 1], (labels[0], labels[1])


def _poles(loading: Float[np.ndarray, " detector"], detectors: list[str], titles: dict[str, str]) -> str:
    """The detector at either end of an axis."""
    low, high = (detectors[int(pick(loading))] for pick in (np.argmin, np.argmax))
    return f"{titles.get(low, low)} to {titles.get(high, high)}"
