"""Levels of the pooled pyramid that a viewer of long prompts zooms."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from workbench.errors import RequestError
from workbench.kernels.request import is_whole


def pooled(
    maps: Float[Tensor, "*lead row column"], factor: int, how: Literal["sum", "max"]
) -> Float[Tensor, "*lead coarse_row coarse_column"]:
    """The next level of a pyramid: `factor` x `factor` blocks become one, by their sum or their maximum.

    Raises:
        RequestError: another way than "sum" or "max", or a factor below one.
    """
    if how not in ("sum", "max"):
        raise RequestError(f"Pooling by {how!r}: choose 'sum' or 'max'.")
    if not is_whole(factor) or factor < 1:
        raise RequestError(f"Pooling by blocks of {factor!r}: a whole number, 1 or more, is needed.")
    beyond = 0.0 if how == "sum" else float("-inf")
    padded = pad(maps, (0, -maps.shape[-1] % factor, 0, -maps.shape[-2] % factor), value=beyond)
    parts = padded.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor))  # type: ignore[no-untyped-call]
    result: Tensor = parts.sum((-3, -1)) if how == "sum" else parts.amax((-3, -1))
    return result
