"""Head scores in the formats of other tools: Retrieval_Head's JSON and DuoAttention's folder; HeadVis is a module
of its own (`workbench.runs.headvis`).

`retrieval-head`
    One JSON object, `"layer-head"` to the list of that head's scores, one a trial. A run keeps means, so that we write
    lists of one; read, the value is the mean of a list and `n` its length, with a bootstrap interval over trials.
`duo`
    `full_attention_heads.tsv`, a row a layer and a column a **KV head**, and `config.json` with at least `sink_size`
    and `recent_size`. One number serves all query heads of a KV head: read, KV head c gives its number to the query
    heads c * group to (c + 1) * group - 1; written, the query heads of a KV head are joined by mean or maximum, which
    loses what sets them apart. Released files hold leftovers of training a little outside 0 to 1; the original reader
    clips them, and so do we. All layers must have equally many KV heads.

Readers return `HeadScores`, so that imported scores can be compared, clustered and drawn like our own; nulls, p and q
are not in these formats and stay missing. Files are JSON and tab-separated numbers, nothing is evaluated; what is
larger than `MOST_BYTES` or names more than `MOST_HEADS` heads is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench.errors import RequestError
from workbench.heads import HeadScores
from workbench.heads.inference import bootstrap_mean
from workbench.runs.disk import write_atomically, writing

MOST_BYTES = 64 * 1024 * 1024
MOST_HEADS = 1_000_000
SINK_SIZE, RECENT_SIZE = 64, 256
Join = Literal["mean", "max"]
_KEY = re.compile(r"(\d{1,5})-(\d{1,5})")


def write_retrieval_head(scores: pd.DataFrame, detector: str, file: str | Path) -> Path:
    """One detector of a head-score table as Retrieval_Head's JSON; heads without a value are left out."""
    rows = rows_of(scores, detector)
    found = {
        f"{layer}-{head}": [float(value)]
        for layer, head, value in zip(rows["layer"], rows["head"], rows["value"], strict=True)
    }
    return write_json(file, found)


def read_retrieval_head(file: str | Path, detector: str = "retrieval", model: str = "imported") -> HeadScores:
    """Retrieval_Head's JSON; heads that it leaves out are not in the table."""
    path = Path(file)
    found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise RequestError(f'{path} is no Retrieval_Head file: it must hold one object, as in {{"16-19": [0.94]}}.')
    rows = []
    for key, values in found.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise RequestError(f"{path}: {key[:40]!r} names no head; keys are layer-head, as in '16-19'.")
        trials = numbers(values, f"{path}: {key}")
        if not trials:
            raise RequestError(f"{path}: {key} has no score; give a list of one number a trial.")
        interval = bootstrap_mean(np.array(trials)[:, None], seed=0)
        rows.append({
            "layer": int(match[1]), "head": int(match[2]), "value": float(interval.value[0]),
            "low": float(interval.low[0]), "high": float(interval.high[0]), "n": len(trials),
        })  # fmt: skip
    return head_scores(pd.DataFrame(rows), detector, model, f"Mean over trials, read from {path.name}")


def write_duo(
    scores: pd.DataFrame,
    detector: str,
    folder: str | Path,
    group: int,
    *,
    join: Join = "mean",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """One detector of a head-score table as DuoAttention's folder; `group` query heads share a KV head.

    DuoAttention reads 0 as streaming and 1 as full attention, so that scores outside 0 to 1 are refused: scale them
    first. `config` is added to the sizes of sink and window.
    """
    rows = rows_of(scores, detector)
    grid = _grid(rows, detector)
    if group < 1 or grid.shape[1] % group:
        raise RequestError(f"group={group} does not divide {grid.shape[1]} query heads into KV heads.")
    if grid.min() < 0 or grid.max() > 1:
        raise RequestError(
            f"Scores of {detector!r} run from {grid.min():.3g} to {grid.max():.3g}; DuoAttention's are shares of full "
            "attention, 0 to 1. Choose another detector, or scale them."
        )
    shared = grid.reshape(len(grid), -1, group)
    alphas = shared.max(axis=2) if join == "max" else shared.mean(axis=2)
    target = Path(folder)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        lines = ["\t".join(f"{value:.18e}" for value in row) for row in alphas]
        write_atomically(target / "full_attention_heads.tsv", "\n".join(lines) + "\n")
    write_json(target / "config.json", {"sink_size": SINK_SIZE, "recent_size": RECENT_SIZE, **(config or {})})
    return target


def read_duo(
    folder: str | Path, group: int = 1, detector: str = "duo", model: str = "imported"
) -> tuple[HeadScores, dict[str, Any]]:
    """DuoAttention's folder as scores of query heads, `group` of which share a KV head, and its configuration."""
    place = Path(folder)
    if group < 1:
        raise RequestError(f"group={group}: at least one query head reads a KV head.")
    config = read_json(place / "config.json")
    if not isinstance(config, dict) or not all(_is_size(config.get(name)) for name in ("sink_size", "recent_size")):
        raise RequestError(f"{place / 'config.json'} must be an object with whole numbers sink_size and recent_size.")
    file = place / "full_attention_heads.tsv"
    alphas = np.clip(_read_tsv(file), 0, 1)
    values = np.repeat(alphas, group, axis=1)
    check_count(values.size, file)
    layer, head = np.indices(values.shape)
    rows = pd.DataFrame({"layer": layer.ravel(), "head": head.ravel(), "value": values.ravel(), "n": 1})
    said = f"Share of full attention of the head's KV head ({group} query heads each), read from {place.name}"
    return head_scores(rows, detector, model, said), config


def _read_tsv(file: Path) -> Float[np.ndarray, "layer kv_head"]:
    table: list[list[float]] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = [float(cell) for cell in line.split("\t")]
        except ValueError:
            raise RequestError(f"{file}, line {number}: only numbers with tabs between are expected.") from None
        if not all(map(math.isfinite, row)):
            raise RequestError(f"{file}, line {number}: every number must be finite.")
        if table and len(row) != len(table[0]):
            raise RequestError(f"{file}, line {number}: {len(row)} heads, but the lines above have {len(table[0])}.")
        table.append(row)
    if not table:
        raise RequestError(f"{file} is empty; it must have a line a layer.")
    return np.array(table)


def _grid(rows: pd.DataFrame, detector: str) -> Float[np.ndarray, "layer head"]:
    wide = rows.pivot(index="layer", columns="head", values="value")
    full = wide.reindex(index=range(int(rows["layer"].max()) + 1), columns=range(int(rows["head"].max()) + 1))
    if full.isna().any(axis=None):
        raise RequestError(f"{detector!r} has no score for some heads; DuoAttention's table needs every one.")
    return np.asarray(full, dtype=float)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def rows_of(scores: pd.DataFrame, detector: str) -> pd.DataFrame:
    """The rows of one detector that have a value."""
    rows = scores[(scores["detector"] == detector) & scores["value"].notna()]
    if rows.empty:
        known = ", ".join(map(str, dict.fromkeys(scores.loc[scores["value"].notna(), "detector"]))) or "none"
        raise RequestError(f"No scores of {detector!r} to write; there are {known}.")
    return rows.sort_values(["layer", "head"])


def head_scores(rows: pd.DataFrame, detector: str, model: str, caption: str) -> HeadScores:
    """Read scores of one detector in the form of our own: the highest has rank 1, what is not known is missing."""
    check_count(len(rows), caption)
    if rows.duplicated(["layer", "head"]).any():
        first = rows[rows.duplicated(["layer", "head"])].iloc[0]
        raise RequestError(f"{caption}: L{int(first['layer'])}H{int(first['head'])} comes twice.")
    rows = rows.sort_values(["layer", "head"], ignore_index=True)
    columns = ["model", "detector", "layer", "head", "value", "low", "high", "n", "null", "p", "q", "rank"]
    table = rows.assign(
        model=model, detector=detector, rank=rows["value"].rank(ascending=False, method="first").astype("int64")
    ).reindex(columns=columns)
    about = {
        "detector": detector, "title": detector.replace("_", " ").capitalize(), "measures": caption, "unit": "",
        "threshold": np.nan, "paper": "", "url": "", "caption": f"{caption}.", "positions": "", "better": "higher",
        "null": "not in the file", "note": "", "prompts": int(rows["n"].max()),
    }  # fmt: skip
    return HeadScores(table, pd.DataFrame([about]), pd.DataFrame(), pd.DataFrame())


def numbers(values: object, where: str) -> list[float]:
    """A JSON list of finite numbers."""
    if not isinstance(values, list):
        raise RequestError(f"{where} holds {type(values).__name__}; a list of numbers is expected.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RequestError(f"{where} holds {str(value)[:40]!r} among its numbers; all must be finite numbers.")
    return [float(value) for value in values]


def check_count(heads: int, where: object) -> None:
    """Refuse what no model has."""
    if heads > MOST_HEADS:
        raise RequestError(f"{where}: {heads:,} heads are more than any model has (the limit is {MOST_HEADS:,}).")


def read_text(path: Path) -> str:
    """A text file of a bounded size."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise RequestError(f"{path} has {size:,} bytes; files of scores have at most {MOST_BYTES:,}.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no UTF-8 text: {error.reason}.") from error


def read_json(path: Path) -> Any:
    """A JSON file of a bounded size and depth; a key that comes twice is refused."""
    try:
        return json.loads(read_text(path), object_pairs_hook=lambda pairs: _once(pairs, path))
    except json.JSONDecodeError as error:
        raise RequestError(f"{path} is no JSON: {error}.") from error
    except RecursionError:
        raise RequestError(f"{path} is nested too deeply for a file of scores.") from None


def _once(pairs: Sequence[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RequestError(f"{path}: a key comes twice in one object.")
    return found


def write_json(file: str | Path, value: object) -> Path:
    """A JSON file, whole or not at all; a number that is not finite is refused."""
    target = Path(file)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ": "))
    except ValueError as error:
        raise RequestError(f"{target} would hold a number that is not finite, which JSON cannot: {error}.") from error
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, text + "\n")
    return target
