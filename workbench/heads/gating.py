"""Causal head gating: every head's output behind a gate, learned twice more with a push towards keeping and removing.

Nam et al. 2025 (arXiv 2505.13737). The z of head (l, h) is multiplied by g = sigmoid(theta) before W_O, the weights
stay as they are, and theta is fitted to the loss of the answers:

1. no push: loss;
2. from there, towards keeping: loss - strength * mean(theta), whose gates are `up`;
3. from 1 again, towards removing: loss + strength * mean(theta), whose gates are `down`.

A head that the answers need stays open under 3 (facilitating, `down`), one that harms them stays shut under 2
(interfering, 1 - `up`), and one without consequence follows the push (irrelevant, `up` * (1 - `down`)). Several masks
from different starting points are fitted side by side.

The public package subtracts the penalty with a positive weight for its "positive" stage and calls that the push
towards few heads; here both pushes follow from the definition. Explicit patterns: for short prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench.errors import RequestError
from workbench.heads.ablation_map import repeated
from workbench.heads.detector import Array, Progress
from workbench.models import AttentionCall
from workbench.tasks import Task
from workbench.tracing import Model

MOST_TOKENS = 512
Role = Literal["facilitating", "interfering", "irrelevant"]


@dataclass(frozen=True)
class GateSettings:
    """The package's settings (500 updates, learning rate 1, strength 0.1, clamp 4), with fewer updates and masks."""

    steps: int = 60
    masks: int = 4
    learning_rate: float = 1.0
    strength: float = 0.1
    clamp: float = 4.0
    gradient_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Gates:
    """Gates `[mask, layer, head]` (NaN where there is no such head), and the loss at each update, mean over masks."""

    free: Float[np.ndarray, "mask layer head"]
    up: Float[np.ndarray, "mask layer head"]
    down: Float[np.ndarray, "mask layer head"]
    losses: dict[str, list[float]]

    @property
    def facilitating(self) -> Array:
        return self.down

    @property
    def interfering(self) -> Array:
        return np.asarray(1 - self.up)

    @property
    def irrelevant(self) -> Array:
        return np.asarray(self.up * (1 - self.down))

    def role(self, layer: int, head: int) -> Role:
        """The role whose score, mean over masks, is the largest."""
        scores: dict[Role, float] = {
            "facilitating": float(self.facilitating[:, layer, head].mean()),
            "interfering": float(self.interfering[:, layer, head].mean()),
            "irrelevant": float(self.irrelevant[:, layer, head].mean()),
        }
        return max(scores, key=lambda role: scores[role])


def fit_gates(
    model: Model, task: Task, settings: GateSettings | None = None, *, progress: Progress | None = None
) -> Gates:
    """Fit the three sets of gates on a task's answers; differentiates through the model, whose weights stay."""
    settings = settings or GateSettings()
    tokens = task.batch.ids.shape[1]
    if tokens > MOST_TOKENS:
        raise RequestError(f"Prompts of {tokens} tokens: gates are fitted with explicit patterns, up to {MOST_TOKENS}.")
    if settings.steps < 1 or settings.masks < 1:
        raise RequestError(f"steps={settings.steps}, masks={settings.masks}: both must be at least 1.")
    fit = _Fit(model, task, settings)
    spec = model.spec
    shape = (settings.masks, spec.n_layers, max(layer.heads for layer in spec.layers))
    start = torch.rand(shape, generator=torch.Generator().manual_seed(settings.seed))
    theta = torch.logit(start.clamp(1e-3, 1 - 1e-3)).to(model.device)
    losses: dict[str, list[float]] = {}
    found: dict[str, Tensor] = {}
    for stage, (name, push) in enumerate((("free", 0.0), ("up", -1.0), ("down", 1.0))):
        told = None if progress is None else _counted(progress, stage * settings.steps, 3 * settings.steps)
        found[name], losses[name] = fit.run(found.get("free", theta), push * settings.strength, told)
    real = torch.zeros(shape[1:], dtype=torch.bool)
    for layer in spec.layers:
        real[layer.index, : layer.heads] = True
    gates = {
        name: np.asarray(torch.where(real, theta.sigmoid().cpu(), torch.nan).double().numpy())
        for name, theta in found.items()
    }
    return Gates(gates["free"], gates["up"], gates["down"], losses)


def _counted(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


class _Fit:
    """One task, all masks side by side along the batch."""

    def __init__(self, model: Model, task: Task, settings: GateSettings) -> None:
        self.model, self.settings, self.prompts = model, settings, len(task)
        self.task = repeated(task, settings.masks)
        self.batch = self.task.batch.to(model.device)

    def run(self, start: Tensor, push: float, told: Callable[[int], None] | None) -> tuple[Tensor, list[float]]:
        """theta after all updates, and the losses on the way."""
        theta = start.detach().clone().requires_grad_(True)
        optimiser = torch.optim.Adam([theta], lr=self.settings.learning_rate)
        clamp, losses = self.settings.clamp, []
        for step in range(1, self.settings.steps + 1):
            with torch.enable_grad():
                loss = self._loss(theta)
                # Each mask has its own optimum: sums over masks, means over a mask's gates.
                penalty = theta.clamp(-clamp, clamp).flatten(1).mean(1).sum()
                (gradient,) = torch.autograd.grad(loss.sum() + push * penalty, theta)
            norm = gradient.flatten(1).norm(dim=1)[:, None, None]
            theta.grad = gradient * (self.settings.gradient_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
            optimiser.step()
            losses.append(float(loss.detach().mean()))
            if told is not None:
                told(step)
        return theta.detach(), losses

    def _loss(self, theta: Tensor) -> Float[Tensor, " mask"]:
        """Mean loss of the answers under each mask."""
        batch, task, attachment = self.batch, self.task, self.model.attachment
        gates = theta.sigmoid().repeat_interleave(self.prompts, dim=0)

        def observer(call: AttentionCall) -> Tensor:
            group = call.q.shape[1] // call.k.shape[1]
            z = call.pattern(call.q.dtype) @ call.v.repeat_interleave(group, dim=1)
            return z * gates[:, call.layer, : z.shape[1], None, None].to(z.dtype)

        options = {"attention_mask": batch.mask.long(), "position_ids": batch.positions} if batch.padded else {}
        with attachment.observe(observer):
            logits = attachment.hf_model(batch.ids, use_cache=False, **options).logits
        rows = task.answer_positions.clamp(min=0).to(logits.device)
        there = (task.answer_ids >= 0).to(logits.device)
        at_answers = logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[-1])).float()
        target = task.answer_ids.clamp(min=0).to(logits.device)
        each = cross_entropy(at_answers.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        per_prompt = (each * there).sum(1) / there.sum(1)
        return per_prompt.view(self.settings.masks, self.prompts).mean(1)
