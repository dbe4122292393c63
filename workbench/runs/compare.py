"""Two runs side by side: the same detector, or the same statistic of a trace, on the same head, then and now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workbench.errors import RunError

from .run import Run
from .samples import Samples, read_samples

_KEYS = ["detector", "layer", "head"]
_VALUES = ["value", "low", "high"]
_BETWEEN = ["low", "high", "p"]
_Array = NDArray[np.float64]


def compare_runs(a: Run, b: Run) -> pd.DataFrame:
    """Scores of two runs, one row for each detector and head that both have; of two traces, means of statistics.

    Columns: detector, layer, head, value_a, value_b, difference (b - a), low_a, high_a, low_b, high_b,
    overlap (whether the two intervals have a number in common; missing where an interval is); low, high, p, q of the
    difference (q over the heads of a detector) and the `method` by which it was judged (`.differences.METHODS`).
    `attrs` of the frame: the runs' ids as `a` and `b`; `same_weights`, `same_prompts` (None if a run does not say);
    `notes`, sentences on what makes the two less than comparable and on how differences were judged; `identical`,
    whether all scores and intervals are the same.
    """
    left, right = _scores(a), _scores(b)
    if a.has_table("head_scores") != b.has_table("head_scores"):
        raise RunError(
            f"of the runs {a.path} and {b.path}, one has head scores and the other statistics of one text, which are "
            "not the same even where they have one name; compare two of a kind"
        )
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
    of_a, of_b = _samples(a), _samples(b)
    counts = joined["n_a"].to_numpy(dtype=float), joined["n_b"].to_numpy(dtype=float)
    result = _judged(joined[order], of_a, of_b, counts, _shares(a) & _shares(b))
    result.attrs = _attributes(
        a, b, len(left) - len(joined), len(right) - len(joined), bool((result["method"] == "paired").all())
    )  # fmt: skip
    result.attrs["notes"] += [*_ways(result), *_unpaired(result, (a, of_a), (b, of_b))]
    result.attrs["identical"] = left.shape == right.shape and len(joined) == len(left) and _alike(joined)
    if result.attrs["identical"]:
        result.attrs["notes"].append(f"The scores are identical: all {len(joined)}, with their intervals.")
    return result


def _judged(
    joined: pd.DataFrame,
    of_a: dict[str, Samples],
    of_b: dict[str, Samples],
    counts: tuple[_Array, _Array],
    shares: set[str],
) -> pd.DataFrame:
    """The rows with interval, p and q of the difference, by the best way that the runs allow."""
    # Reading runs needs no torch, which stands behind the heads' statistics.
    from workbench.heads.inference import q_values

    from .differences import between, from_intervals

    result = joined.assign(**dict.fromkeys((*_BETWEEN, "q"), np.nan), method="none")
    for name, rows in joined.groupby("detector", sort=False):
        heads = (rows["layer"].to_numpy(dtype=int), rows["head"].to_numpy(dtype=int))
        found = None
        if name in of_a and name in of_b:
            found = between(of_a[str(name)], of_b[str(name)], heads, share=name in shares)
        if found is None:
            at = joined.index.get_indexer(rows.index)
            first, second = (_interval(rows, side) for side in "ab")
            of_rows = (counts[0][at], counts[1][at])
            found = "intervals", from_intervals(first, second, of_rows, share=name in shares)
        method, values = found
        for key, value in zip(_BETWEEN, values, strict=True):
            result.loc[rows.index, key] = value
        result.loc[rows.index, "q"] = q_values(values.p)
        result.loc[rows.index[~np.isnan(values.low)], "method"] = method
    return result


def _interval(rows: pd.DataFrame, side: str) -> tuple[_Array, _Array, _Array]:
    value, low, high = (rows[f"{key}_{side}"].to_numpy(dtype=float) for key in _VALUES)
    return value, low, high


def _ways(found: pd.DataFrame) -> list[str]:
    """How the differences of how many detectors were judged, as sentences."""
    from .differences import METHODS

    best = found.groupby("detector")["method"].agg(lambda one: next((m for m in METHODS if m in set(one)), "none"))
    counted = Counter(best)
    if not set(counted) - {"none"}:
        return ["Differences have no interval: a run has one prompt, or reads weights."]
    told = [f"{counted[name]} {words}" for name, words in METHODS.items() if counted[name]]
    return [f"Differences by {len(best)} detectors: {'; '.join(told)}."]


def _unpaired(found: pd.DataFrame, a: tuple[Run, dict[str, Samples]], b: tuple[Run, dict[str, Samples]]) -> list[str]:
    """Why detectors were not compared prompt by prompt, as sentences."""
    by_intervals = set(found.loc[found["method"] == "intervals", "detector"])
    bare = [run.path.name for run, kept in (a, b) if by_intervals - set(kept)]
    told = []
    if bare:
        subject = f"{bare[0]} keeps" if len(set(bare)) == 1 else f"{' and '.join(bare)} keep"
        told.append(
            f"{subject} no scores of single prompts{'' if set(a[1]) | set(b[1]) else ', as runs once did not'}; "
            "run again to pair: on the same prompts, differences are then told far more finely."
        )
    both = {name: (a[1][name], b[1][name]) for name in set(found["detector"]) if name in a[1] and name in b[1]}
    loose = {str(name) for name in found.loc[found["method"].isin(["samples", "intervals"]), "detector"]} & set(both)
    others = [name for name in loose if both[name][0].prompts != both[name][1].prompts]
    if others:
        told.append(f"The prompts of {_some(others)} are not the same in both, so that nothing can be paired there.")
    if left := loose - set(others):
        told.append(f"Of {_some(left)} the prompts are the same, but some have no score, so that rows may not match.")
    return told


def _some(names: Iterable[str], most: int = 6) -> str:
    known = sorted(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def _shares(run: Run) -> set[str]:
    """Detectors whose scores lie between 0 and 1; a contrast of two samples lies elsewhere."""
    if not run.has_table("detectors"):
        return set()
    table = run.table("detectors")
    if not {"detector", "unit", "better"} <= set(table.columns):
        return set()
    units = table["unit"].astype(str)
    within = units.str.startswith("share of ") | (units == "attention mass")
    return set(map(str, table.loc[within & (table["better"] != "either"), "detector"]))


def ablated(run: Run) -> str:
    """Which heads a run was made without, and how, in words; empty where the model ran as it is."""
    asked = run.manifest.get("settings", {}).get("ablate")
    if not isinstance(asked, dict) or not asked.get("heads"):
        return ""
    return f"without {', '.join(map(str, asked['heads']))} ({asked.get('how')} ablation)"


def removed_heads(a: Run, b: Run) -> list[str]:
    """Heads that one of two runs was made without, and the other not."""
    sides = []
    for run in (a, b):
        asked = run.manifest.get("settings", {}).get("ablate")
        sides.append(set(map(str, asked.get("heads", ()))) if isinstance(asked, dict) else set())
    return sorted(sides[0] ^ sides[1])


def same_shape(a: Run, b: Run) -> bool:
    """Whether heads of one run's model can be heads of the other's by their index."""
    shapes = [[run.manifest.get("model", {}).get(key) for key in ("layers", "heads")] for run in (a, b)]
    return shapes[0] == shapes[1]


def _samples(run: Run) -> dict[str, Samples]:
    """Scores of single prompts; of a trace over several prompts, means over each prompt's positions."""
    if run.has_table("head_scores") or not run.has_array("statistics"):
        return read_samples(run)
    array = run.array("statistics")
    if array.sizes.get("prompt", 1) < 2:
        return {}
    prompts = tuple(str(prompt.get("sha256")) for prompt in run.manifest.get("prompts", []))
    found = {}
    for name in set(run.table("statistic_means")["statistic"]):
        values = np.asarray(array[name].to_numpy(), dtype=np.float64)
        known = ~np.isnan(values)
        means = np.where(known, values, 0.0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)
        found[str(name)] = Samples(means, prompts, count=len(means))
    return found


def _alike(joined: pd.DataFrame) -> bool:
    """Whether every score and bound is the same in both, or missing in both."""
    a, b = ([f"{name}_{side}" for name in _VALUES] for side in "ab")
    return bool(np.array_equal(joined[a].to_numpy(), joined[b].to_numpy(), equal_nan=True))


def _scores(run: Run) -> pd.DataFrame:
    if not run.has_table("head_scores"):
        if run.has_table("statistic_means"):
            return _means(run)
        raise RunError(
            f"the run {run.path} is of kind {run.kind} and has no head scores to compare; "
            "give one made by `workbench heads`, `workbench trace` or `workbench demo`"
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
    counted = table.assign(n=table["n"] if "n" in table.columns else np.nan)
    scores = counted[[*_KEYS, *_VALUES, "n"]]
    return scores.astype(dict.fromkeys([*_VALUES, "n"], "float64"))


def _means(run: Run) -> pd.DataFrame:
    """The statistics of a trace as scores: means over positions, without an interval."""
    table = run.table("statistic_means").rename(columns={"statistic": "detector", "mean": "value"})
    numbers = [*_VALUES, "n"]
    return table.assign(low=np.nan, high=np.nan, n=np.nan)[[*_KEYS, *numbers]].astype(dict.fromkeys(numbers, "float64"))


def _describe(scores: pd.DataFrame) -> str:
    if scores.empty:
        return "none"
    detectors = sorted(set(scores["detector"]))
    shown = ", ".join(detectors[:6]) + (" ..." if len(detectors) > 6 else "")
    return f"{shown} on {scores['layer'].nunique()} layers of {scores['head'].nunique()} heads"


def _attributes(a: Run, b: Run, only_a: int, only_b: int, paired: bool) -> dict[str, Any]:
    notes = []
    same_weights = _same(_weights(a), _weights(b))
    if same_weights is None:
        notes.append("A run does not record its model's weights, so the models may differ.")
    elif not same_weights:
        notes.append(f"The model's weights differ: {_model(a)} against {_model(b)}.")
    same_prompts = _same(_prompts(a), _prompts(b))
    if same_prompts is False:
        words = _batches(a, b)
        notes.append(
            f"{words} Detectors that both have were measured on the same ones."
            if paired
            else f"{words} Where a detector's prompts differ, intervals describe different samples."
        )
    if all(not run.has_table("head_scores") for run in (a, b)):
        notes.append(
            "Values are means over the positions of the text. Positions of one text are no independent sample, so that "
            "one text has no interval: a difference says what these texts show, not what others would."
        )
    if not same_shape(a, b):
        notes.append("The models have different shapes: heads of the same index are no counterparts.")
    if ablated(a) != ablated(b):
        sides = (f"{side} is {ablated(run) or 'the model as it is'}" for side, run in (("A", a), ("B", b)))
        notes.append(f"{'; '.join(sides)}. What differs in other heads is how they answer to that.")
    for run, number in ((a, only_a), (b, only_b)):
        if number:
            notes.append(f"{number} scores are in {run.path.name} only.")
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


def _batches(a: Run, b: Run) -> str:
    """Which batches of prompts two runs share, and which they do not, as sentences."""
    first, second = (dict(sorted((digest, name) for name, digest in _prompts(run) or [])) for run in (a, b))
    both = [name for digest, name in first.items() if digest in second]
    parts = [f"{len(both)} in both ({_tally(both)})"] if both else []
    for run, own, other in ((a, first, second), (b, second, first)):
        if only := [name for digest, name in own.items() if digest not in other]:
            parts.append(f"{len(only)} in {run.path.name} only ({_tally(only)})")
    return f"The prompts differ, batch by batch: {'; '.join(parts)}."


def _tally(names: list[str]) -> str:
    counted = sorted(Counter(names).items())
    return ", ".join(name if number == 1 else f"{name} x {number}" for name, number in counted)


def _prompts(run: Run) -> list[tuple[str, str]] | None:
    prompts = run.manifest.get("prompts")
    if not isinstance(prompts, list):
        return None
    return sorted((str(p.get("name")), str(p.get("sha256"))) for p in prompts if isinstance(p, dict))
