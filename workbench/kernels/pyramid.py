"""Levels of the pooled pyramid that a viewer of long prompts zooms."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def pooled(
    maps: Float[Tensor, "*lead row column"], factor: int, how: Literal["sum", "max"]
) -> Float[Tensor, "*lead coarse_row coarse_column"]:
    """The next level of a pyramid: `factor` x `factor` blocks become one, by their sum or their maximum."""
    padded = pad(maps, (0, -maps.shape[-1] % factor, 0, -maps.shape[-2] % factor))
    parts = padded.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor))  # type: ignore[no-untyped-call]
    result: Tensor = parts.sum((-3, -1)) if how == "sum" else parts.amax((-3, -1))
    return result
