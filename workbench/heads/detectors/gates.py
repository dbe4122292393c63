"""DuoAttention: which KV heads need the whole context, by gates that are trained to do without.

Each KV head has a gate `a`, 1 at the start and kept within [0, 1]; its query heads put out

    a * full attention + (1 - a) * streaming attention (the first `sinks` keys and the `recent` last ones).

The gates alone are trained, to keep the final hidden states at the label tokens what they are with full attention
(mean squared difference) while `penalty * mean |a|` closes them: AdamW without weight decay, the learning rate rising
over the first fifth of the steps and falling over the last, down to a tenth.

Both kinds of attention run through SDPA, the streaming one with a mask that all layers share: O(N) a layer but for that
mask of N x N bits, so prompts are limited to `LONGEST` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from workbench.errors import RequestError
from workbench.heads.calls import needed_tokenizer, unpadded
from workbench.heads.detector import Array, Detector, Kind, Part, Progress, PromptScores
from workbench.heads.settings import Settings
from workbench.models import AttentionCall
from workbench.models.architectures import ends
from workbench.tasks import Task
from workbench.tasks.passkeys import passkeys
from workbench.tracing import Model

LONGEST = 4096
RATE, PENALTY, FLOOR = 0.02, 0.05, 0.1


@dataclass(frozen=True)
class Gates:
    """Trained gates `[layer][KV head]`, the same per query head, and the course of loss and penalty over steps."""

    values: tuple[Float[Tensor, " kv_head"], ...]
    loss: tuple[float, ...]
    penalty: tuple[float, ...]
    groups: tuple[int, ...]

    def per_query_head(self) -> Array:
        """`[layer, head]`, NaN where a layer has fewer heads than others."""
        rows = [
            gates.double().repeat_interleave(group).numpy()
            for gates, group in zip(self.values, self.groups, strict=True)
        ]
        table = np.full((len(rows), max(map(len, rows))), np.nan)
        for layer, row in enumerate(rows):
            table[layer, : len(row)] = row
        return table


def streaming_mask(
    tokens: int, sinks: int, recent: int, window: int | None, device: torch.device
) -> Bool[Tensor, "query key"]:
    """Keys that a query sees of the first `sinks` and the last `recent`, its own included, in the model's window."""
    at = torch.arange(tokens, device=device)
    back = at[:, None] - at
    seen = (back >= 0) & ((back < recent) | (at < sinks))
    return seen if window is None else seen & (back < window)


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: up over the first fifth, down over the last, never below a tenth."""
    ramp = max(1, steps // 5)
    return max(FLOOR, min(1.0, (step + 1) / ramp, (steps - step) / ramp))


def train_gates(
    model: Model,
    task: Task,
    *,
    steps: int,
    sinks: int,
    recent: int,
    rate: float = RATE,
    penalty: float = PENALTY,
    progress: Progress | None = None,
) -> Gates:
    """Train the gates on the task's prompts in turn, one a step; the model's weights stay as they are."""
    _check(model, task, steps, sinks, recent)
    device = model.device
    gates = [torch.ones(layer.kv_heads, device=device, requires_grad=True) for layer in model.spec.layers]
    optimiser = torch.optim.AdamW(gates, lr=rate, weight_decay=0.0)
    targets: dict[int, Tensor] = {}
    losses, penalties = [], []
    with _frozen(model.attachment.hf_model):
        for step in range(steps):
            prompt = step % len(task)
            if prompt not in targets:
                with torch.no_grad():
                    targets[prompt] = _hidden(model, task, prompt)
            for group in optimiser.param_groups:
                group["lr"] = rate * schedule(step, steps)
            with torch.enable_grad(), model.attachment.observe(_Gated(gates, sinks, recent)):
                loss = (_hidden(model, task, prompt) - targets[prompt]).float().square().mean()
                size = torch.cat(gates).abs().mean()
                optimiser.zero_grad()
                (loss + penalty * size).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                for gate in gates:
                    gate.clamp_(0.0, 1.0)
            losses.append(float(loss.detach()))
            penalties.append(float(size.detach()))
            if progress is not None:
                progress((step + 1) * len(task) // steps, len(task))
    values = tuple(gate.detach().cpu() for gate in gates)
    return Gates(values, tuple(losses), tuple(penalties), tuple(layer.group for layer in model.spec.layers))


class _Gated:
    """The observer: full and streaming attention, mixed by the layer's gates."""

    def __init__(self, gates: Sequence[Tensor], sinks: int, recent: int) -> None:
        self.gates, self.sinks, self.recent = gates, sinks, recent
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        full = call.output()
        group = call.q.shape[1] // call.k.shape[1]
        if call.window not in self._masks:
            self._masks[call.window] = streaming_mask(
                call.q.shape[2], self.sinks, self.recent, call.window, call.q.device
            )
        streaming = scaled_dot_product_attention(
            call.q, call.k, call.v, attn_mask=self._masks[call.window], scale=call.scale, enable_gqa=group > 1
        )
        share = self.gates[call.layer].repeat_interleave(group)[:, None, None].to(full.dtype)
        return share * full + (1 - share) * streaming


def _hidden(model: Model, task: Task, prompt: int) -> Float[Tensor, "label d_model"]:
    """Final hidden states (after the last norm) at the label tokens of one prompt."""
    first, last = task.spans["labels"][prompt].tolist()
    ids = unpadded(task.batch, prompt).to(model.device)
    kept: list[Tensor] = []
    hook = ends(model.attachment.hf_model).unembedding.register_forward_pre_hook(
        lambda module, args: kept.append(args[0])
    )
    try:
        rows = torch.arange(first, last, device=model.device)
        model.attachment.hf_model(ids, use_cache=False, logits_to_keep=rows)
    finally:
        hook.remove()
    return kept[0].reshape(last - first, -1)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the weights, while they flow to the gates."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _check(model: Model, task: Task, steps: int, sinks: int, recent: int) -> None:
    for name, value in (("steps", steps), ("sinks", sinks), ("recent", recent)):
        if value < 1:
            raise RequestError(f"Gates: {name}={value} is too small; ask for 1 or more.")
    longest = int(task.batch.lengths.max())
    if longest > LONGEST:
        raise RequestError(
            f"Gates are trained through a mask of {longest} x {longest}; at most {LONGEST} tokens are allowed. "
            "Ask for a smaller gate_length."
        )
    if longest <= sinks + recent:
        raise RequestError(
            f"Prompts of {longest} tokens fit into {sinks} sinks and {recent} recent keys, so that no head needs more; "
            "ask for longer prompts or fewer keys."
        )
    for layer in model.spec.layers:
        if layer.softcap is not None or layer.sinks:
            what = "soft-capped logits" if layer.softcap is not None else "learned sinks"
            raise RequestError(
                f"{model.spec.architecture}: layer {layer.index} has {what}, which SDPA does not know; gates are "
                "trained on models without."
            )


def _tasks(model: Model, settings: Settings) -> list[Task]:
    tokenizer = needed_tokenizer(model, "passkey")
    return [passkeys(tokenizer, settings.gate_prompts, settings.gate_length, seed=settings.seed)]


def _run(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Any:
    assert task is not None
    return train_gates(
        model, task, steps=settings.gate_steps, sinks=settings.gate_sinks, recent=settings.gate_recent,
        progress=progress,
    )  # fmt: skip


def _score(parts: Sequence[Part]) -> PromptScores:
    (part,) = parts
    values = part.found.per_query_head()[None]
    return PromptScores(values, np.zeros((0, *values.shape[1:])), exact=True)


GATES = Kind("passkeys", "passkeys in a book, on which gates are trained", _tasks, _run, costly=True)

DUO_GATE = Detector(
    name="duo_gate",
    title="Retrieval gate (DuoAttention)",
    kind="passkeys",
    probe="needle",
    measures="trained gate of the head's KV head: how much full attention passkeys need beyond first and recent tokens",
    null="none: one set of gates is trained, without an interval",
    unit="gate (0 to 1)",
    positions="final hidden states at question and answer tokens",
    threshold=None,
    paper="Xiao et al. 2024, DuoAttention: Efficient long-context LLM inference with retrieval and streaming heads",
    url="https://arxiv.org/abs/2410.10819",
    score=_score,
    note="Rank, do not threshold: released gates of GQA models are above one half nearly everywhere. Far from the "
    "published training (2000 steps, 1000 to 32000 tokens of BookSum with ten passkeys of 32 words, 128 sinks, 256 "
    "recent): a few dozen steps on short prompts with two passkeys, so that gates separate but have not settled. Query "
    "heads of one KV head share its gate.",
)
