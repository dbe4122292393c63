"""What can be asked of an attribution, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from workbench.circuits.effects import DIRECTIONS, Direction
from workbench.errors import RequestError

Ablation = Literal["patching", "mean", "mean-positional", "zero"]
Freeze = Literal["none", "final", "all"]
Rule = Literal["midpoint", "left"]
# Prompts done, and how many there are.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How an attribution is made.

    `direction`
        "noising": gradients at the clean prompts (or on the way), what clean activations lose for others; "denoising":
        at the corrupt ones.
    `ablation`
        what stands in for a clean activation: that of the corrupt prompt ("patching"), the mean of the reference
        prompts at that position of the same template ("mean-positional"), over all their tokens ("mean"), or nothing.
    `freeze`
        norms whose scale the gradient takes as given: "none", the "final" one, or "all".
    `steps`, `rule`
        of integrated gradients: at the middles of so many steps, or at their ends on the corrupt side ("left").
    `positions`
        keep scores of nodes by token as well.
    """

    direction: Direction = "noising"
    ablation: Ablation = "patching"
    freeze: Freeze = "none"
    steps: int = 5
    rule: Rule = "midpoint"
    positions: bool = False
    prompts_at_once: int | None = None
    memory_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"direction": DIRECTIONS, "ablation": get_args(Ablation), "rule": get_args(Rule)}
        choices["freeze_ln_scale"] = get_args(Freeze)
        for name, known in choices.items():
            value = getattr(self, "freeze" if name == "freeze_ln_scale" else name)
            if value not in known:
                raise RequestError(f"{name}={value!r} is not known; choose from {', '.join(known)}.")
        for name in ("steps", "prompts_at_once", "memory_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name}={value} must be at least 1.")
        if self.direction == "denoising" and self.ablation != "patching":
            raise RequestError(
                f"ablation={self.ablation!r} has one direction: values are taken out of the clean run; use "
                "direction='noising'."
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """How much of the clean run there is at each point of an integration."""
        offset = 0.5 if self.rule == "midpoint" else 0.0
        return tuple((step + offset) / self.steps for step in range(self.steps))

    def check(self, *, edges: bool, on_the_way: bool) -> None:
        """What a method of edges, or one with gradients between two runs, cannot do."""
        if edges and self.positions:
            raise RequestError("positions=True: scores by token are those of nodes; use 'atp' or one of its kin.")
        if on_the_way and self.ablation != "patching":
            raise RequestError(
                f"ablation={self.ablation!r}: gradients between the two runs go with ablation='patching'; use 'eap' or "
                "'eap-ig-activations' for means."
            )
