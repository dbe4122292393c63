"""The arrays that a streaming pass writes its statistics into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.request import AttentionStatistics, StatisticsRequest


@dataclass
class Results:
    """The arrays that blocks write into, by name; `view` narrows them to one group of prompts."""

    arrays: dict[str, Tensor]

    @staticmethod
    def empty(
        q: Tensor, k: Tensor, v: Tensor, request: StatisticsRequest, features: Tensor | None, slots: Tensor | None
    ) -> Results:
        batch, heads, queries, _ = q.shape
        keys = k.shape[2]
        row_sizes: dict[str, int | None] = {
            "output": v.shape[-1] if request.output else None,
            "first": len(request.first) or None,
            "recent": len(request.recent) or None,
            "offsets": len(request.offsets) or None,
            "features": None if features is None else features.shape[-1],
            "at_keys": None if slots is None else slots.shape[-1],
            "top_mass": request.top_k or None,
        }
        arrays = {
            name: q.new_zeros(batch, heads, queries, size, dtype=torch.float32)
            for name, size in row_sizes.items()
            if size is not None
        }
        for name in ("lse", "max_prob", "entropy", "distance", "sink_mass"):
            if getattr(request, name):
                arrays[name] = q.new_zeros(batch, heads, queries, dtype=torch.float32)
        if request.argmax:
            arrays["argmax"] = q.new_full((batch, heads, queries), -1, dtype=torch.int64)
        if request.top_k:
            arrays["top_keys"] = q.new_full((batch, heads, queries, request.top_k), -1, dtype=torch.int64)
        for name in ("column_sum", "column_max"):
            if getattr(request, name):
                arrays[name] = q.new_zeros(batch, heads, keys, dtype=torch.float32)
        if request.column_last:
            arrays["column_last"] = q.new_zeros(batch, heads, len(request.column_last), keys, dtype=torch.float32)
        return Results(arrays)

    def view(self, prompts: slice, rows: slice, columns: slice) -> dict[str, Tensor]:
        return {
            name: array[prompts, ..., columns] if name.startswith("column") else array[prompts, :, rows]
            for name, array in self.arrays.items()
        }

    def finish(self) -> AttentionStatistics:
        return AttentionStatistics(**self.arrays)
