"""Which keys a query may see: causality, a sliding window and padding, without a mask of size N x N.

Real tokens of a prompt are one run `[start, end)` of the key axis, with padding before or after it; queries are
right-aligned with keys (query i has the key index `i + K - Q`), which covers prefill, chunked prefill and
decoding. A query sees the real keys `j` with `j <= i` and, under a window w, `j > i - w`.

That expresses other conventions too: lengths of right-padded prompts are `end` (`start` 0); a chunk of queries that
begins at key index o is passed with its first `o + Q` keys (later ones are invisible to it, so nothing is lost).
With more queries than keys, the first Q - K of them have no key and see nothing. Without causality every query
sees every real key; a window is a causal notion and is refused there, and so is padding with more queries than
keys, which would not say which queries are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels.request import is_whole


@dataclass(frozen=True)
class Geometry:
    """The visible region of one attention call.

    `start` and `end` bound the real keys of each prompt; both None means that every key is real.
    """

    batch: int
    queries: int
    keys: int
    causal: bool = True
    window: int | None = None
    start: Int[Tensor, " batch"] | None = None
    end: Int[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            if not is_whole(self.window):
                raise RequestError(f"A window of {self.window!r} keys: give a whole number, or None for no window.")
            if self.window < 1:
                raise RequestError(f"A window of {self.window} keys shows nothing; use None for no window.")
            if not self.causal:
                raise RequestError(
                    f"A window of {self.window} keys looks back from a query: it needs causal attention."
                )
        if not self.causal and self.queries > self.keys and not (self.start is None and self.end is None):
            raise RequestError(
                f"{self.queries} queries for {self.keys} padded keys, without causality: which queries are padding is "
                "not defined; ask prompt by prompt, without key_start and key_end."
            )

    @property
    def query_offset(self) -> int:
        """Key index of the first query."""
        return self.keys - self.queries

    def slices(self) -> Iterator[tuple[slice, slice, slice]]:
        """Groups of prompts that share their real region: (prompts, queries, keys) slices.

        Without padding the whole batch is one group; otherwise each prompt is cut to its own real tokens, so
        padding costs nothing and needs no mask.
        """
        if self.start is None and self.end is None:
            # Without causality every query sees the keys, those before the first key too.
            first = max(-self.query_offset, 0) if self.causal else 0
            if self.keys and first < self.queries:
                yield slice(0, self.batch), slice(first, self.queries), slice(0, self.keys)
            return
        ranges = self.real_ranges()
        row = 0
        while row < self.batch:
            stop = row + 1
            while stop < self.batch and ranges[stop] == ranges[row]:
                stop += 1
            first, last = ranges[row]
            q_first, q_last = max(first - self.query_offset, 0), max(last - self.query_offset, 0)
            if last > first and q_last > q_first:
                yield slice(row, stop), slice(q_first, q_last), slice(first, last)
            row = stop

    def real_ranges(self) -> list[tuple[int, int]]:
        """First and end of each prompt's real keys, within the keys."""
        starts = [0] * self.batch if self.start is None else self.start.clamp(0, self.keys).tolist()
        ends = [self.keys] * self.batch if self.end is None else self.end.clamp(0, self.keys).tolist()
        return list(zip(starts, ends, strict=True))

    def window_of(self, keys: int) -> int | None:
        """The window, or None where it covers all of `keys`."""
        return self.window if self.window is not None and self.window < keys else None

    def visible(self, device: torch.device | str = "cpu") -> Bool[Tensor, "batch query key"]:
        """The mask as an explicit array: for the reference and for small displays only."""
        rows = torch.arange(self.queries, device=device)[:, None] + self.query_offset
        columns = torch.arange(self.keys, device=device)[None, :]
        mask = torch.ones(self.queries, self.keys, dtype=torch.bool, device=device)
        if self.causal:
            mask &= columns <= rows
        if self.window is not None:
            mask &= columns > rows - self.window
        full = mask.expand(self.batch, -1, -1).clone()
        zeros = torch.zeros(self.batch, dtype=torch.long, device=device)
        start = zeros if self.start is None else self.start.to(device)
        end = zeros + self.keys if self.end is None else self.end.to(device)
        real_key = (columns >= start[:, None]) & (columns < end[:, None])
        real_query = (rows[:, 0] >= start[:, None]) & (rows[:, 0] < end[:, None])
        if not self.causal:
            # More queries than keys, and no padding: all of them are real.
            real_query = real_query | (rows[:, 0] < 0)
        return full & real_key[:, None, :] & real_query[:, :, None]

    def visible_count(self, device: torch.device | str = "cpu") -> Int[Tensor, "batch key"]:
        """How many queries can see each key: the divisor of a column mean."""
        columns = torch.arange(self.keys, device=device)
        start = (
            torch.zeros(self.batch, dtype=torch.long, device=device) if self.start is None else self.start.to(device)
        )
        end = start * 0 + self.keys if self.end is None else self.end.to(device)
        low = torch.full_like(columns, self.query_offset)
        high = torch.full_like(columns, self.keys)
        if self.causal:
            low = torch.maximum(low, columns)
        if self.window is not None:
            high = torch.minimum(high, columns + self.window)
        # Queries before the first key see keys only without causality, where nothing is padded.
        low = torch.maximum(low[None], start[:, None]) if self.causal or self.query_offset >= 0 else low[None]
        high = torch.minimum(high[None], end[:, None])
        real = (columns[None] >= start[:, None]) & (columns[None] < end[:, None])
        return (high - low).clamp(min=0) * real
