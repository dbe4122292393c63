"""Hard-concrete gates (Louizos, Welling & Kingma 2018, arXiv 1712.01312), and how gates are trained here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.discovery.found import Progress
from workbench.errors import RequestError

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
# A gate is open from here on.
OPEN = 0.5


def sampled(alpha: Float[Tensor, " gate"], rows: int, generator: torch.Generator) -> Float[Tensor, "row gate"]:
    """Gates drawn anew for each row, in [0, 1] with mass on both ends; gradients go to `alpha`."""
    u = torch.rand(rows, len(alpha), generator=generator).clamp(1e-6, 1 - 1e-6).to(alpha)
    s = torch.sigmoid((u.log() - (-u).log1p() + alpha) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def settled(alpha: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """The gates without noise."""
    return (torch.sigmoid(alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_share(alpha: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """The probability that a gate is not 0."""
    return torch.sigmoid(alpha - TEMPERATURE * math.log(-LOW / HIGH))


def start(gates: int, probability: float = 0.9) -> Float[Tensor, " gate"]:
    """Gates that begin with sigma(alpha) at this probability."""
    return torch.full((gates,), math.log(probability / (1 - probability)), requires_grad=True)


def train(
    steps: int,
    step: Callable[[int], Mapping[str, float]],
    progress: Progress | None,
) -> tuple[list[Mapping[str, float]], str]:
    """Take steps until done or interrupted; what each said, and a note if it was cut short.

    An interruption from the keyboard ends training and nothing else: what was learned until then is kept. A loss
    that is not a number ends it as well.
    """
    if steps < 1:
        raise RequestError(f"steps={steps}: training needs at least one.")
    rows: list[Mapping[str, float]] = []
    try:
        for number in range(steps):
            row = step(number)
            if not math.isfinite(row["loss"]):
                return rows, f"stopped after {number} of {steps} steps: the loss was {row['loss']}"
            rows.append({"step": number, **row})
            if progress is not None:
                progress(number + 1, steps)
    except KeyboardInterrupt:
        return rows, f"interrupted after {len(rows)} of {steps} steps"
    return rows, ""
