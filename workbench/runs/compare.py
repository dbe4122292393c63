"""Two runs side by side: the same detector on the same head, then and now."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import RunError

from .run import Run

_KEYS = ["detector", "layer", "head"]
_VALUES = ["value", "low", "high"]


def compare_runs(a: Run, b: Run) -> pd.DataFrame:
    """Head scores of two runs, one row for each detector and head that both have.

    Columns: detector, layer, head, value_a, value_b, difference (b - a), low_a, high_a, low_b, high_b,
    overlap (whether the two intervals have a number in common; missing where an interval is). `attrs` of the
    frame: the runs' ids as `a` and `b`; `same_weights`, `same_prompts` (None if a run does not say); `notes`,
    sentences on what makes the two less than comparable; `identical`, whether all scores and intervals are the same.
    """
    left, right = _scores(a), _scores(b)
    joined = left.merge(right, on=_KEYS, suffixes=("_a", "_b"), sort=True)
    if joined.empty:
        raise RunError(
            f"the runs {a.path} and {b.path} have no head score in common: "
            f"{_describe(left)} against {_describe(right)}; "
            "compare runs of the same detectors and model shape"
        )
    joined["difference"] = joined["value_b"] - joined["value_a"]
    bounds = joined[["low_a", "high_a", "low_b", "high_b"]]
    overlap = (bounds["low_a"] <= bounds["high_b"]) & (bounds["low_b"] <= bounds["high_a"])
    joined["overlap"] = overlap.astype("boolean").mask(bounds.isna().any(axis=1))
    order = [*_KEYS, "value_a", "value_b", "difference", *bounds.columns, "overlap"]
    result = joined[order]
    result.attrs = _attributes(a, b, len(left) - len(joined), len(right) - len(joined))
    result.attrs["identical"] = left.shape == right.shape and len(joined) == len(left) and _alike(joined)
    if result.attrs["identical"]:
        result.attrs["notes"].append(f"The scores are identical: all {len(joined)}, with their intervals.")
    return result


def _alike(joined: pd.DataFrame) -> bool:
    """Whether every score and bound is the same in both, or missing in both."""
    a, b = ([f"{name}_{side}" for name in _VALUES] for side in "ab")
    return bool(np.array_equal(joined[a].to_numpy(), joined[b].to_numpy(), equal_nan=True))


def _scores(run: Run) -> pd.DataFrame:
    if not run.has_table("head_scores"):
        raise RunError(
            f"the run {run.path} is of kind {run.kind} and has no head scores to compare; "
            "give one made by `workbench heads` or `workbench demo`"
        )
    table = run.table("head_scores")
    missing = [column for column in [*_KEYS, *_VALUES] if column not in table.columns]
    if missing:
        raise RunError(f"the head scores of the run {run.path} lack {', '.join(missing)}; make the run again")
    twice = table[table.duplicated(_KEYS)]
    if len(twice):
        first = twice.iloc[0]
        name = f"L{first['layer']}H{first['head']}"
        raise RunError(
            f"the run {run.path} has more than one {first['detector']} score for {name}; "
            "only runs of one model each can be compared"
        )
    scores = table[[*_KEYS, *_VALUES]]
    return scores.astype(dict.fromkeys(_VALUES, "float64"))


def _describe(scores: pd.DataFrame) -> str:
    if scores.empty:
        return "none"
    detectors = sorted(set(scores["detector"]))
    shown = ", ".join(detectors[:6]) + (" ..." if len(detectors) > 6 else "")
    return f"{shown} on {scores['layer'].nunique()} layers of {scores['head'].nunique()} heads"


def _attributes(a: Run, b: Run, only_a: int, only_b: int) -> dict[str, Any]:
    notes = []
    same_weights = _same(_weights(a), _weights(b))
    if same_weights is None:
        notes.append("A run does not record its model's weights, so the models may differ.")
    elif not same_weights:
        notes.append(f"The model's weights differ: {_model(a)} against {_model(b)}.")
    same_prompts = _same(_prompts(a), _prompts(b))
    if same_prompts is False:
        notes.append("The prompts differ, so intervals describe different samples.")
    for run, number in ((a, only_a), (b, only_b)):
        if number:
            notes.append(f"{number} scores are in {run.id} only.")
    return {
        "a": a.id,
        "b": b.id,
        "same_weights": same_weights,
        "same_prompts": same_prompts,
        "notes": notes,
    }


def _same(a: object, b: object) -> bool | None:
    return None if not a or not b else a == b


def _weights(run: Run) -> object:
    model = run.manifest.get("model")
    return model.get("weights_sha256") if isinstance(model, dict) else None


def _model(run: Run) -> str:
    model = run.manifest["model"]
    return f"{model.get('name', 'a model')} ({str(model['weights_sha256'])[:12]})"


def _prompts(run: Run) -> object:
    prompts = run.manifest.get("prompts")
    if not isinstance(prompts, list):
        return None
    return sorted((str(p.get("name")), str(p.get("sha256"))) for p in prompts if isinstance(p, dict))
