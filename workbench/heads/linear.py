"""Linear probes: can a property of a token be read off a head's output, or off the residual stream, by a line?

1. Vectors at labelled positions: a head's output `z` before the output projection, or the residual stream before a
   layer (`resid_pre`) or after it (`resid_post`).
2. Logistic regression on standardised vectors, cross-validated with whole prompts held out; means and deviations
   come from the training prompts of each fold. Classes count alike (balanced weights and balanced accuracy).
3. The control task of Hewitt and Liang (Designing and Interpreting Probes with Control Tasks, EMNLP 2019,
   arXiv 1909.03368): every token type gets a random label, drawn once with the shares of the real ones; a probe can
   learn it only by remembering tokens. Selectivity is the accuracy less that of the control.
4. 95 % intervals by bootstrap over prompts, of accuracy and of selectivity (the same prompts resampled for both).

A label that follows from the token alone makes the control no lower bound: with few token types in both halves, the
control is learnt as well. Where every type occurs in one prompt only, the control cannot be learnt at all, and
selectivity is no more than accuracy above chance: `types_shared` tells how many positions have a type that other
prompts have. A high accuracy says that the property is there to be read, not that the model reads it.

Cost: one trace, and for each site folds x 2 regressions of as many columns as it is wide; the vectors of one layer
are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tracing import Model

SITES = ("z", "resid_pre", "resid_post")
FOLDS = 5
RESAMPLES = 999
# No label: the position is left out.
UNLABELLED = -1
# Positions of a half, by their places.
Places = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Labels:
    """Which positions of which prompts have which label, and the prompts.

    `values` are classes from 0, `UNLABELLED` where a position does not count. `names` name the classes.
    """

    batch: Batch
    values: Int[Tensor, "prompt token"]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.values.shape != self.batch.ids.shape:
            raise RequestError(
                f"labels of shape {tuple(self.values.shape)} do not fit prompts of {tuple(self.batch.ids.shape)}."
            )
        if bool((self.values[~self.batch.mask.cpu()] != UNLABELLED).any()):
            raise RequestError("A label stands on padding; give only real tokens one.")


class Vectors(NamedTuple):
    """Labelled positions: vectors, classes, token types and the prompt of each."""

    features: Float[np.ndarray, "position feature"]
    classes: Int[np.ndarray, " position"]
    tokens: Int[np.ndarray, " position"]
    prompts: Int[np.ndarray, " position"]


@dataclass(frozen=True)
class Fit:
    """One probe: balanced accuracy, that of its control, and their difference, with intervals over prompts."""

    accuracy: float
    low: float
    high: float
    control: float
    control_low: float
    control_high: float
    selectivity: float
    selectivity_low: float
    selectivity_high: float


@dataclass(frozen=True)
class LinearProbes:
    """`table`: site, layer, head (-1 for the residual stream), accuracy, low, high, control, control_low, control_high,
    selectivity, selectivity_low, selectivity_high, positions, prompts. `chance` is the accuracy of guessing;
    `types_shared` the share of positions whose token type other prompts have as well.
    """

    table: pd.DataFrame
    chance: float
    classes: tuple[str, ...]
    types_shared: float


def probe_linearly(
    model: Model,
    labels: Labels,
    *,
    sites: Sequence[str] = ("z", "resid_post"),
    layers: Sequence[int] | None = None,
    folds: int = FOLDS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LinearProbes:
    """A probe for every head (`z`) and every layer of the residual stream, on the same positions and folds."""
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        raise RequestError(f"sites={tuple(sites)}: probes read one or more of {', '.join(SITES)}.")
    wanted = range(model.spec.n_layers) if layers is None else layers
    where = (labels.values != UNLABELLED).cpu()
    base = _positions(labels, where)
    split = _check(base, folds)
    control = control_labels(base.tokens, base.classes, seed)
    rows, total, done = [], len(wanted) * len(sites), 0
    for layer in wanted:
        names = [f"blocks.{layer}.attn.hook_z" if site == "z" else f"blocks.{layer}.hook_{site}" for site in sites]
        trace = model.trace(labels.batch, sites=names)
        for site in sites:
            for head, features in _features(trace.site(site, layer), where, site):
                found = fit(base._replace(features=features), control, split, seed)
                rows.append({"site": site, "layer": layer, "head": head} | vars(found))
            done += 1
            if progress is not None:
                progress(done, total)
    table = pd.DataFrame(rows).assign(positions=len(base.classes), prompts=len(np.unique(base.prompts)))
    count = int(base.classes.max()) + 1
    named = labels.names or tuple(map(str, range(count)))
    return LinearProbes(table, 1 / len(np.unique(base.classes)), named, _shared(base))


def _positions(labels: Labels, where: Bool[Tensor, "prompt token"]) -> Vectors:
    prompt, token = torch.nonzero(where, as_tuple=True)
    return Vectors(
        np.zeros((len(prompt), 0)),
        labels.values[prompt, token].numpy().astype(np.int64),
        labels.batch.ids.cpu()[prompt, token].numpy().astype(np.int64),
        prompt.numpy().astype(np.int64),
    )


def _features(
    values: Float[Tensor, "prompt token ..."], where: Bool[Tensor, "prompt token"], site: str
) -> Iterator[tuple[int, Float[np.ndarray, "position feature"]]]:
    """Vectors at the labelled positions: one set a head, or one of the stream (head -1)."""
    chosen = values[where].double().numpy()
    if site != "z":
        yield -1, chosen
        return
    for head in range(chosen.shape[1]):
        yield head, chosen[:, head]


def fit(
    vectors: Vectors,
    control: Int[np.ndarray, " position"],
    folds: Sequence[tuple[Places, Places]],
    seed: int = 0,
) -> Fit:
    """Cross-validated accuracy of the labels and of a control, with intervals over prompts."""
    right = _right(vectors.features, vectors.classes, folds)
    learnt = _right(vectors.features, control, folds)
    own, other = (
        _by_prompt(hits, labels, vectors.prompts) for hits, labels in ((right, vectors.classes), (learnt, control))
    )
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(own[0]), size=(RESAMPLES, len(own[0])))
    a, b = (np.array([_balanced(hits[draw], counts[draw]) for draw in draws]) for hits, counts in (own, other))
    accuracy, baseline = _balanced(*own), _balanced(*other)
    bounds = [float(bound) for values in (a, b, a - b) for bound in np.nanpercentile(values, [2.5, 97.5])]
    return Fit(
        accuracy, bounds[0], bounds[1], baseline, bounds[2], bounds[3], accuracy - baseline, bounds[4], bounds[5]
    )


def control_labels(
    tokens: Int[np.ndarray, " position"], classes: Int[np.ndarray, " position"], seed: int = 0
) -> Int[np.ndarray, " position"]:
    """A random class for each token type, with the shares of the real classes; every class occurs."""
    types, place = np.unique(tokens, return_inverse=True)
    kinds, counts = np.unique(classes, return_counts=True)
    if len(types) < len(kinds):
        raise RequestError(
            f"{len(types)} token types cannot have {len(kinds)} classes at random; label more kinds of tokens."
        )
    rng = np.random.default_rng(seed)
    drawn = rng.choice(kinds, size=len(types), p=counts / counts.sum())
    drawn[rng.permutation(len(types))[: len(kinds)]] = kinds
    return np.asarray(drawn[place.ravel()], dtype=np.int64)


def _right(
    features: Float[np.ndarray, "position feature"],
    labels: Int[np.ndarray, " position"],
    folds: Sequence[tuple[Places, Places]],
) -> Bool[np.ndarray, " position"]:
    """Whether each position is classified right by the probe that has not seen its prompt."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = np.zeros(len(labels), dtype=bool)
    for train, test in folds:
        if len(np.unique(labels[train])) < 2:
            found[test] = labels[test] == labels[train][0]
            continue
        # lbfgs stops at its limit where classes are separable; the line is settled long before.
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000, class_weight="balanced"))
        probe.fit(features[train], labels[train])
        found[test] = probe.predict(features[test]) == labels[test]
    return found


def _by_prompt(
    right: Bool[np.ndarray, " position"], labels: Int[np.ndarray, " position"], prompts: Int[np.ndarray, " position"]
) -> tuple[Float[np.ndarray, "prompt class"], Float[np.ndarray, "prompt class"]]:
    """Right answers and positions of each class, prompt by prompt."""
    _, at = np.unique(prompts, return_inverse=True)
    kinds, of = np.unique(labels, return_inverse=True)
    hits, counts = np.zeros((2, int(at.max()) + 1, len(kinds)))
    np.add.at(hits, (at.ravel(), of.ravel()), right)
    np.add.at(counts, (at.ravel(), of.ravel()), 1.0)
    return hits, counts


def _balanced(hits: Float[np.ndarray, "prompt class"], counts: Float[np.ndarray, "prompt class"]) -> float:
    """Mean over classes of the share that is right; classes that no prompt has do not count."""
    seen = counts.sum(axis=0)
    return float((hits.sum(axis=0)[seen > 0] / seen[seen > 0]).mean())


def _check(vectors: Vectors, folds: int) -> list[tuple[Places, Places]]:
    """The folds, after what makes probing possible has been checked."""
    from sklearn.model_selection import GroupKFold

    kinds, counts = np.unique(vectors.classes, return_counts=True)
    if len(kinds) < 2:
        raise RequestError(f"The labels have {len(kinds)} class; a probe needs two or more.")
    prompts = len(np.unique(vectors.prompts))
    if not 2 <= folds <= prompts:
        raise RequestError(f"folds={folds} of {prompts} prompts: whole prompts are held out, so choose 2 to {prompts}.")
    for kind, count in zip(kinds, counts, strict=True):
        within = len(np.unique(vectors.prompts[vectors.classes == kind]))
        if within < 2:
            raise RequestError(
                f"Class {kind} ({count} positions) occurs in one prompt only; no prompt is in both halves, so that no "
                "probe could learn it. Label more prompts."
            )
    split = GroupKFold(folds).split(np.zeros((len(vectors.classes), 1)), vectors.classes, vectors.prompts)
    return [(np.asarray(train), np.asarray(test)) for train, test in split]


def _shared(vectors: Vectors) -> float:
    """Share of positions whose token type occurs in another prompt as well."""
    pairs = pd.DataFrame({"token": vectors.tokens, "prompt": vectors.prompts})
    return float((pairs.groupby("token")["prompt"].transform("nunique") > 1).mean())
