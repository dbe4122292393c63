"""The arrays that a streaming pass writes its statistics into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.request import AttentionStatistics, StatisticsRequest

SCALARS = (
    "lse", "max_logit", "max_prob", "entropy", "distance", "spread", "mean_logit", "first_logit", "sink_mass",
)  # fmt: skip
# Arrays without an axis that a group of prompts narrows.
WHOLE = ("diagonal", "block")


@dataclass
class Results:
    """The arrays that blocks write into, by name; `view` narrows them to one group of prompts."""

    arrays: dict[str, Tensor]

    @staticmethod
    def empty(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        request: StatisticsRequest,
        features: Tensor | None,
        value_features: Tensor | None,
        slots: Tensor | None,
        weights: Tensor | None,
    ) -> Results:
        batch, heads, queries, _ = q.shape
        keys = k.shape[2]
        row_sizes: dict[str, int | None] = {
            "output": v.shape[-1] if request.output else None,
            "first": len(request.first) or None,
            "recent": len(request.recent) or None,
            "offsets": len(request.offsets) or None,
            "above": len(request.above) or None,
            "features": None if features is None else features.shape[-1],
            "value_features": None if value_features is None else value_features.shape[-1],
            "at_keys": None if slots is None else slots.shape[-1],
            "top_mass": request.top_k or None,
        }
        shapes: dict[str, tuple[int, ...]] = {
            name: (queries, size) for name, size in row_sizes.items() if size is not None
        }
        shapes |= {name: (queries,) for name in SCALARS if getattr(request, name)}
        shapes |= {name: (keys,) for name in ("column_sum", "column_max") if getattr(request, name)}
        shapes |= {name: (keys,) for name in ("diagonal", "diagonal_last") if getattr(request, name)}
        if request.column_last:
            shapes["column_last"] = (len(request.column_last), keys)
        if weights is not None:
            shapes["column_weighted"] = (weights.shape[1], keys)
        if request.block:
            shapes["block_sum"] = shapes["block_max"] = (-(-queries // request.block), -(-keys // request.block))
        arrays = {name: q.new_zeros(batch, heads, *shape, dtype=torch.float32) for name, shape in shapes.items()}
        for name, tail in (
            ("argmax", (queries,) if request.argmax else None),
            ("top_keys", (queries, request.top_k) if request.top_k else None),
            ("column_above", (len(request.column_above), keys) if request.column_above else None),
        ):
            if tail is not None:
                arrays[name] = q.new_full((batch, heads, *tail), -1, dtype=torch.int64)
        return Results(arrays)

    def view(self, prompts: slice, rows: slice, columns: slice) -> dict[str, Tensor]:
        narrowed = {}
        for name, array in self.arrays.items():
            if name.startswith("column"):
                narrowed[name] = array[prompts, ..., columns]
            else:
                narrowed[name] = array[prompts] if name.startswith(WHOLE) else array[prompts, :, rows]
        return narrowed

    def finish(self) -> AttentionStatistics:
        return AttentionStatistics(**self.arrays)


def new_shares(outputs: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """The results once for each part: rows are written once, but what is summed over rows is kept apart."""
    summed = {name: array for name, array in outputs.items() if name.startswith(("column", *WHOLE))}
    rest = ({n: torch.full_like(a, -1) if n == "column_above" else torch.zeros_like(a) for n, a in summed.items()}
            for _ in range(1, parts))  # fmt: skip
    return [outputs, *(outputs | share for share in rest)]


def merge_shares(shares: list[dict[str, Tensor]]) -> None:
    """Everything into the first share, in the order of the parts."""
    whole = shares[0]
    for share in shares[1:]:
        for name, array in whole.items():
            if share[name] is array:
                continue
            if name == "column_above":
                array.copy_(earliest(array, share[name]))
            elif name in ("column_max", "block_max"):
                torch.maximum(array, share[name], out=array)
            else:
                array.add_(share[name])


def earliest(a: Tensor, b: Tensor) -> Tensor:
    """The smaller of two query indices, of which -1 is none."""
    return torch.where((a < 0) | ((b >= 0) & (b < a)), b, a)
