"""Head scores and patterns as the static data of HeadVis (Anthropic, github.com/anthropics/headvis), and back.

`config.json`
    model_name, heads `[[layer, head], ...]`, n_layers, n_heads, n_intervals, metrics, metric_descriptions,
    head_data_pattern, has_umap.
`scatter_data.json`
    a row a head: layer, head, and a number for each metric that the head has.
`heads/L{l}H{h}.json`
    sequences (tokens, attention in flat sparse form: index q * seq_len + k, max_activation, interval), histogram of
    |q - k| over the kept entries, tokens ranked by attention on either side.

HeadVis samples 200 sequences of each head by deciles of its largest weight. A run keeps patterns of a few heads on one
or two prompts: these are written as they are, all in the highest interval, the others without sequences. As its front
end does, the largest weight leaves out position 0 and the diagonal. No projections are written (`has_umap` false).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench.errors import RequestError
from workbench.heads import HeadScores
from workbench.runs.disk import writing
from workbench.runs.interchange import check_count, head_scores, numbers, read_json, write_json
from workbench.runs.run import Run

# Top keys a row, and the least weight, that are kept.
KEYS_A_ROW, LEAST_WEIGHT = 8, 0.005
INTERVALS = 10
MOST_TOKENS = 20
DIGITS = 4


@dataclass(frozen=True)
class Shown:
    """A prompt as HeadVis shows it for one head: tokens, and attention `[query, key]` with small weights left out."""

    id: int
    tokens: tuple[str, ...]
    attention: Float[np.ndarray, "query key"]


@dataclass(frozen=True)
class HeadVis:
    """What a HeadVis folder holds: scores (a detector a metric), the configuration, and sequences by (layer, head)."""

    scores: HeadScores
    config: Mapping[str, Any]
    sequences: Mapping[tuple[int, int], tuple[Shown, ...]] = field(default_factory=dict)


def write_headvis(
    scores: pd.DataFrame,
    detectors: pd.DataFrame,
    folder: str | Path,
    *,
    model: str,
    sequences: Mapping[tuple[int, int], Sequence[Shown]] | None = None,
) -> Path:
    """All detectors of a head-score table, and the sequences of the heads that have some."""
    target, patterns = Path(folder), sequences or {}
    rows = scores[scores["value"].notna()]
    if rows.empty:
        raise RequestError("There are no head scores to write; give a run of `workbench heads` or `atlas`.")
    metrics = [str(name) for name in dict.fromkeys(rows["detector"])]
    wide = scores.pivot(index=["layer", "head"], columns="detector", values="value")[metrics]
    heads = [(int(layer), int(head)) for layer, head in wide.index]
    described = dict(zip(detectors["detector"], detectors["measures"], strict=True))
    with writing(target):
        (target / "heads").mkdir(parents=True, exist_ok=True)
    write_json(target / "config.json", {
        "model_name": model, "heads": [list(head) for head in heads],
        "n_layers": max(layer for layer, _ in heads) + 1, "n_heads": max(head for _, head in heads) + 1,
        "n_intervals": INTERVALS, "metrics": metrics,
        "metric_descriptions": {name: str(described.get(name, name)) for name in metrics},
        "head_data_pattern": "L{layer}H{head}.json", "has_umap": False, "umap_heads": [],
        "custom_plots": [{"key": "qk_distance_histogram", "label": "Q-K distance"}],
        "custom_tables": [
            {"key": "top_query_tokens", "label": "Top query tokens"},
            {"key": "top_key_tokens", "label": "Top key tokens"},
        ],
    })  # fmt: skip
    write_json(target / "scatter_data.json", [
        {"layer": layer, "head": head, **{name: float(value) for name, value in row.items() if value == value}}
        for (layer, head), row in zip(heads, wide.to_dict("records"), strict=True)
    ])  # fmt: skip
    for layer, head in heads:
        write_json(target / "heads" / f"L{layer}H{head}.json", _head(patterns.get((layer, head), ())))
    return target


def _head(sequences: Sequence[Shown]) -> dict[str, Any]:
    kept = [(one, *_sparse(one.attention)) for one in sequences]
    return {
        "sequences": [
            {
                "sequence_id": one.id, "interval": INTERVALS, "tokens": list(one.tokens),
                "attention_indices": (query * len(one.tokens) + key).tolist(),
                "attention_values": [round(float(weight), DIGITS) for weight in weights],
                "seq_len": len(one.tokens), "max_activation": round(_largest(one.attention), DIGITS),
            }
            for one, query, key, weights in kept
        ],
        "qk_distance_histogram": _distances([query - key for _, query, key, _ in kept]),
        "top_query_tokens": _top_tokens([([one.tokens[i] for i in query], w) for one, query, _, w in kept]),
        "top_key_tokens": _top_tokens([([one.tokens[i] for i in key], w) for one, _, key, w in kept]),
        "histogram": {}, "statistics": {},
    }  # fmt: skip


def _sparse(attention: Float[np.ndarray, "query key"]) -> tuple[Any, Any, Any]:
    """Queries, keys and weights of the largest entries of each row."""
    bar = np.sort(attention, axis=1)[:, -min(KEYS_A_ROW, attention.shape[1])][:, None]
    query, key = np.nonzero((attention >= bar) & (attention >= LEAST_WEIGHT))
    return query, key, attention[query, key]


def _largest(attention: Float[np.ndarray, "query key"]) -> float:
    inner = attention[1:, 1:] - np.diag(np.diag(attention[1:, 1:]))
    return float(inner.max()) if inner.size else 0.0


def _distances(found: Sequence[Any]) -> dict[str, list[int]]:
    distances = np.abs(np.concatenate(found)) if found else np.zeros(0, dtype=int)
    longest = int(distances.max()) if distances.size else 1
    edges = [0, *(2**power for power in range(int(np.ceil(np.log2(longest + 1))) + 1))]
    counts, _ = np.histogram(distances, bins=edges)
    return {"bin_edges": edges, "bin_values": [int(count) for count in counts]}


def _top_tokens(found: Sequence[tuple[list[str], Any]]) -> list[dict[str, Any]]:
    total: dict[str, float] = defaultdict(float)
    for tokens, weights in found:
        for token, weight in zip(tokens, weights, strict=True):
            total[token] += float(weight)
    best = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:MOST_TOKENS]
    return [{"token": token, "weight": round(weight, DIGITS)} for token, weight in best]


def kept_patterns(run: Run) -> dict[tuple[int, int], list[Shown]]:
    """The patterns that a run keeps of its top heads, with their tokens; empty where it has none."""
    if not run.has_array("patterns") or not run.has_table("example_tokens"):
        return {}
    data, found = run.array("patterns").load(), defaultdict(list)
    texts = {
        str(name): tuple(map(str, rows.sort_values("position")["text"]))
        for name, rows in run.table("example_tokens").groupby("example", sort=False)
    }
    numbered = {name: index for index, name in enumerate(texts)}
    for index in range(data.sizes["example_head"]):
        one = data.isel(example_head=index)
        example = str(one["example"].item())
        if example in texts:
            size = len(texts[example])
            attention = np.nan_to_num(one["pattern"].to_numpy().astype(float)[:size, :size])
            head = int(one["layer"].item()), int(one["head"].item())
            found[head].append(Shown(numbered[example], texts[example], attention))
    return dict(found)


def read_headvis(folder: str | Path, model: str | None = None) -> HeadVis:
    """A HeadVis folder: every metric of its scatter plot as a detector, and the sequences of its heads.

    A head that is listed without a file of its own (there may be more heads than data) has no sequences.
    """
    place = Path(folder)
    config = read_json(place / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("metrics"), list):
        raise RequestError(f"{place / 'config.json'} must be an object with a list 'metrics'.")
    name = model or str(config.get("model_name") or "imported")
    file = place / "scatter_data.json"
    rows = read_json(file)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise RequestError(f"{file} must be a list of objects, one a head.")
    check_count(len(rows), file)
    heads = [(_index(row, "layer", file), _index(row, "head", file)) for row in rows]
    parts = [_metric(rows, heads, str(metric), name, file) for metric in config["metrics"]]
    known = [part for part in parts if part is not None]
    if not known:
        raise RequestError(f"{file} has none of the metrics that config.json names.")
    paths = {head: place / "heads" / f"L{head[0]}H{head[1]}.json" for head in heads}
    sequences = {head: _read_head(path) for head, path in paths.items() if path.is_file()}
    return HeadVis(HeadScores.join(known), config, {head: found for head, found in sequences.items() if found})


def _metric(
    rows: Sequence[Mapping[str, Any]], heads: Sequence[tuple[int, int]], metric: str, model: str, file: Path
) -> HeadScores | None:
    found = [
        {
            "layer": layer,
            "head": head,
            "value": numbers([row[metric]], f"{file}: {metric} of L{layer}H{head}")[0],
            "n": 1,
        }
        for (layer, head), row in zip(heads, rows, strict=True)
        if row.get(metric) is not None
    ]
    return head_scores(pd.DataFrame(found), metric, model, f"{metric}, read from {file.name}") if found else None


def _read_head(file: Path) -> tuple[Shown, ...]:
    found = read_json(file)
    listed = found.get("sequences") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise RequestError(f"{file} must be an object with a list 'sequences'.")
    return tuple(_read_sequence(one, f"{file}: sequence {index}") for index, one in enumerate(listed))


def _read_sequence(found: object, where: str) -> Shown:
    if not isinstance(found, dict):
        raise RequestError(f"{where} is no object.")
    tokens = found.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise RequestError(f"{where}: 'tokens' must be a list of texts.")
    length = _index(found, "seq_len", where)
    if length != len(tokens) or length > 4096:
        raise RequestError(f"{where}: seq_len {length} must be the number of tokens ({len(tokens)}), at most 4096.")
    places, values = (
        found.get("attention_indices"),
        numbers(found.get("attention_values"), f"{where}: attention_values"),
    )
    if not isinstance(places, list) or len(places) != len(values):
        raise RequestError(f"{where}: attention_indices and attention_values must be lists of one length.")
    attention = np.zeros((length, length))
    for place, value in zip(places, values, strict=True):
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < length * length:
            raise RequestError(f"{where}: index {str(place)[:40]!r} is outside the {length} x {length} pattern.")
        attention[divmod(place, length)] = value
    return Shown(_index(found, "sequence_id", where), tuple(tokens), attention)


def _index(row: Mapping[str, Any], name: str, where: object) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**9:
        raise RequestError(f"{where}: {name!r} is {str(value)[:40]!r}, not a whole number from 0.")
    return value
