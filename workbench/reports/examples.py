"""Attention patterns of short prompts for the token view and the pattern map.

A causal pattern is kept as its lower triangle in 16-bit steps of 1/65535, base64: 5.5 kB a head at 64 tokens.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workbench.figures.pattern import colour_range
from workbench.reports.source import RunLike, frame, head_name


@dataclass(frozen=True)
class Pattern:
    """The attention pattern of one head on one example."""

    key: str
    head: str
    layer: int
    index: int
    example: str
    title: str
    caption: str
    tokens: tuple[str, ...]
    values: NDArray[np.float32]

    def payload(self) -> dict[str, Any]:
        """For the token view: packed weights, the top of the scale, the query to show first."""
        return {
            "head": self.head,
            "example": self.example,
            "top": round(colour_range(self.values), 4),
            "start": telling_query(self.values, self.tokens),
            "weights": pack(self.values),
        }


def patterns(run: RunLike) -> list[Pattern]:
    """All patterns of the run whose example has its tokens; none where the run has no such array."""
    tokens = frame(run, "example_tokens")
    if tokens is None or "patterns" not in run.arrays:
        return []
    info = frame(run, "example_info")
    data = run.array("patterns")
    stack = np.asarray(data["pattern"].transpose("example_head", "query", "key").values, dtype=np.float32)
    labels = [data[name].values for name in ("example", "layer", "head")]
    found: list[Pattern] = []
    for index, (example, layer, head) in enumerate(zip(*labels, strict=True)):
        texts = tuple(map(str, tokens[tokens["example"] == example].sort_values("position")["text"]))
        if not texts or len(texts) > stack.shape[1]:
            continue
        title, caption = _described(info, str(example))
        values = np.nan_to_num(stack[index, : len(texts), : len(texts)])
        key = f"p{index}"
        found.append(
            Pattern(
                key,
                head_name(layer, head),
                int(layer),
                int(head),
                str(example),
                title,
                caption,
                texts,
                values,
            )
        )
    return found


def pack(values: NDArray[np.float32]) -> str:
    """The lower triangle, row by row, as little-endian 16-bit numbers in base64."""
    rows, columns = np.tril_indices(values.shape[0])
    steps = np.clip(np.round(values[rows, columns] * 65535), 0, 65535).astype("<u2")
    return base64.b64encode(steps.tobytes()).decode()


def telling_query(values: NDArray[np.float32], tokens: Sequence[str]) -> int:
    """The last of the queries with the largest attention to a token other than the first and itself.

    Words go before punctuation where both attend about as much.
    """
    count = len(values)
    if count < 3:
        return count - 1
    others = np.tril(values, k=-1)[:, 1:]
    best = others.max(axis=1)
    strong = [query for query in range(count) if best[query] >= 0.9 * best.max()]
    pairs = {query: (tokens[query], tokens[1 + int(others[query].argmax())]) for query in strong}
    words = [query for query, pair in pairs.items() if all(any(map(str.isalnum, text)) for text in pair)]
    return max(words or strong)


def reach(values: NDArray[np.float32]) -> float:
    """How much there is to see: mean of the largest attention beyond the previous key, the first left out."""
    return float(np.tril(values, k=-2)[:, 1:].max(axis=1, initial=0.0).mean())


def _described(info: pd.DataFrame | None, example: str) -> tuple[str, str]:
    if info is not None:
        rows = info[info["example"] == example]
        if not rows.empty:
            return str(rows.iloc[0]["title"]), str(rows.iloc[0]["caption"])
    return example, ""
