"""Greedy decoding under edits, with statistics of the rows that produce each token.

The first step's row is that of the last prompt token (it emits the first new token); later steps add one row
each. Prompts are padded on the left, so that all of them end in the same column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels import StatisticsRequest
from workbench.models import AttentionCall, Batch, Spec
from workbench.tracing.edits import Ablation, Edit, apply_ablation
from workbench.tracing.rotation import Rotation
from workbench.tracing.statistics import Measured, Statistic

if TYPE_CHECKING:
    from workbench.tracing.model import Model

# Where ablations act: while the prompt is read (which emits the first token), in the steps after, or in both.
Phase = Literal["both", "prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(repr=False)
class Generation:
    """New tokens of each prompt (-1 after its end), their text, and statistics `[prompt, layer, head, step]`.

    Keys in statistics count from the prompt's first real token. After a prompt's end statistics are NaN, keys
    -1.
    """

    ids: Int[Tensor, "prompt step"]
    texts: list[str] | None
    values: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        shape = f"{len(self.ids)} prompts, up to {self.ids.shape[1]} new tokens"
        return f"<Generation of {shape}{': statistics ' + ', '.join(self.values) if self.values else ''}>"

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


@torch.no_grad()
def generate(
    model: Model,
    batch: Batch,
    max_new_tokens: int,
    edits: Sequence[Edit],
    statistics: Sequence[Statistic],
    stop_ids: Iterable[int] | None,
    phase: Phase = "both",
) -> Generation:
    """Greedy continuation; ablations act at every position of a phase.

    "prefill" is the pass over the prompt, which emits the first new token; "decode" all steps after it (Wu et al. 2024
    mask retrieval heads there alone), and "both", the default, is both.
    """
    ablations = [edit for edit in edits if isinstance(edit, Ablation)]
    batch = _left_padded(batch).to(model.device)
    reader = _Reader(ablations, statistics, batch, Rotation(model.attachment), phase)
    turned = {head.layer for edit in ablations if edit.how == "q_mean" for head in edit.heads}
    stops = stop_tokens(model) if stop_ids is None else set(stop_ids)
    hf_model, cache = model.attachment.hf_model, None
    ids, mask, positions = batch.ids, batch.mask, batch.positions
    done = torch.zeros(len(batch), dtype=torch.bool, device=model.device)
    steps: list[Tensor] = []
    with model.attachment.observe(reader.attention), reader.rotation.noting(turned):
        for _ in range(max_new_tokens):
            reader.columns = mask.shape[1]
            output = hf_model(
                ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            token = output.logits[:, -1].argmax(-1)
            reader.end_step()
            steps.append(torch.where(done, -1, token))
            for stop in stops:
                done = done | (token == stop)
            if bool(done.all()):
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    new = torch.stack(steps, dim=1).cpu()
    return Generation(new, texts_of(model, new, stops), reader.finish(new < 0))


class _Reader:
    """The observer while decoding: edits every call, measures its last row."""

    def __init__(
        self,
        ablations: Sequence[Ablation],
        statistics: Sequence[Statistic],
        batch: Batch,
        rotation: Rotation,
        phase: Phase,
    ) -> None:
        self.ablations, self.statistics, self.batch = ablations, statistics, batch
        self.rotation, self.phase = rotation, phase
        self.columns = 0
        self._step: dict[str, list[Tensor]] = {}
        self._steps: dict[str, list[Tensor]] = {}

    def attention(self, call: AttentionCall) -> Tensor:
        z = call.output()
        now: Phase = "prefill" if self.columns == self.batch.ids.shape[1] else "decode"
        for ablation in self.ablations if self.phase in ("both", now) else ():
            first = self.batch.starts - (self.columns - call.k.shape[2])
            z = apply_ablation(z, call, ablation, slice(0, len(self.batch)), self.rotation, first)
        if self.statistics:
            self._measure(call.last_query())
        return z

    def _measure(self, call: AttentionCall) -> None:
        request = reduce(lambda a, b: a | b, (s.request for s in self.statistics), StatisticsRequest(output=True))
        # Keys of the call, counted from the prompt's first token: padding before it, a sliding cache dropped some.
        shift = self.columns - call.k.shape[2] - self.batch.starts.to(call.q.device)
        dropped = bool(request.first) and bool((shift > 0).any())
        found = call.statistics(
            request, key_features=_first_keys(shift, call.k.shape[2], request.first) if dropped else None
        )
        if dropped:
            found = replace(found, first=found.features)
        for statistic in self.statistics:
            value = statistic.read(Measured(found, request, call, None, None, None))
            if statistic.integer:
                value = torch.where(value >= 0, value + shift.reshape(-1, *[1] * (value.ndim - 1)), -1)
            self._step.setdefault(statistic.name, []).append(value[:, :, 0].cpu())

    def end_step(self) -> None:
        """The layers of one step side by side; where a layer has fewer heads than others, nothing."""
        for name, layers in self._step.items():
            heads = max(layer.shape[1] for layer in layers)
            even = [
                torch.cat([x, torch.full_like(x[:, :1], nothing_of(x)).expand(-1, heads - x.shape[1], *x.shape[2:])], 1)
                for x in layers
            ]
            self._steps.setdefault(name, []).append(torch.stack(even, dim=1))
        self._step = {}

    def finish(self, ended: Bool[Tensor, "prompt step"]) -> dict[str, Tensor]:
        """All steps, those after a prompt's end marked."""
        values = {name: torch.stack(steps, dim=3) for name, steps in self._steps.items()}
        for value in values.values():
            value[ended[:, None, None, :].expand(value.shape[:4])] = nothing_of(value)
        return values


def nothing_of(like: Tensor) -> float:
    """What stands where there is no value."""
    return math.nan if like.is_floating_point() else -1


def _first_keys(shift: Tensor, keys: int, sizes: Sequence[int]) -> Float[Tensor, "prompt key size"]:
    """Whether a key is among the first of its prompt, of which a sliding cache may hold none."""
    place = torch.arange(keys, device=shift.device) + shift[:, None]
    return torch.stack([(place >= 0) & (place < size) for size in sizes], dim=-1).float()


def check_request(
    spec: Spec,
    batch: Batch,
    max_new_tokens: int,
    edits: Sequence[Edit],
    statistics: Sequence[Statistic],
    phase: Phase = "both",
) -> None:
    """Refuse what cannot be done while decoding, before anything runs."""
    if phase not in PHASES:
        raise RequestError(f"phase={phase!r} is no phase of decoding; choose one of {', '.join(PHASES)}.")
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens = {max_new_tokens}: ask for 1 or more.")
    # The last new token is never fed back.
    longest, most = int(batch.lengths.max()) + max_new_tokens - 1, spec.max_positions
    if most is not None and not spec.rotary and longest > most:
        raise RequestError(
            f"max_new_tokens = {max_new_tokens}: {longest} tokens exceed the model's {most} learned positions."
        )
    for edit in edits:
        if not isinstance(edit, Ablation):
            raise RequestError("generate() takes ablations; patches belong to one forward pass (trace).")
        edit.check(spec)
        fixed = edit.values is not None and any(value.ndim > 1 for value in edit.values.values())
        if fixed or edit.how in ("resample", "frozen_zero") or edit.positions is not None:
            raise RequestError(
                f"generate() cannot ablate with how={edit.how!r} and these values or positions: new tokens have "
                "none of their own. Use how='zero', 'mean', 'uniform', 'to_sink', 'q_mean' or 'streaming' without "
                "positions."
            )
    for statistic in statistics:
        if statistic.axis != "query" or statistic.given:
            raise RequestError(f"{statistic.name!r} is fixed to the keys of a batch; generate() takes row statistics.")
        if statistic.needs_result_factor or statistic.of_values is not None:
            raise RequestError(f"{statistic.name!r} is not measured while decoding; trace the finished text instead.")


def _left_padded(batch: Batch) -> Batch:
    rows = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    return Batch.from_ids(rows, side="left", texts=batch.texts)


def stop_tokens(model: Model) -> set[int]:
    """The end tokens of model and tokenizer."""
    found: set[int] = set()
    for holder in (getattr(model.attachment.hf_model, "generation_config", None), model.tokenizer):
        end: Any = getattr(holder, "eos_token_id", None)
        found |= set(end) if isinstance(end, list) else set() if end is None else {end}
    return found


def texts_of(model: Model, new: Tensor, stops: set[int]) -> list[str] | None:
    """New tokens as text, end tokens left out."""
    if model.tokenizer is None:
        return None
    rows = [[token for token in row if token >= 0 and token not in stops] for row in new.tolist()]
    return [model.tokenizer.decode(row) for row in rows]
