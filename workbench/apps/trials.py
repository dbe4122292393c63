"""Trials of the ablation lab: a prompt, and a probe, before and after heads are taken away."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch

from workbench.apps.live import Progress
from workbench.errors import RequestError
from workbench.heads import build_probe, verify
from workbench.heads.probes import ProbeSettings
from workbench.models import Head
from workbench.tracing import Model, ablate
from workbench.tracing.edits import Edit, How

HOWS: tuple[str, ...] = get_args(How)
# Forms that continue a prompt as it is; the others need every token at once, or other prompts column by column.
WRITING = ("zero", "mean", "uniform", "to_sink", "q_mean", "streaming")
PROBES = ("induction", "needle", "answer", "json", "held_out", "perplexity")
MOST_HEADS, MOST_NEW, MOST_DRAWS = 512, 200, 50
_LIKELIEST = 10


@dataclass(frozen=True)
class Trial:
    """What a trial does; `probe` "" measures the prompt alone."""

    heads: tuple[str, ...]
    how: str = "mean"
    prompt: str = ""
    new_tokens: int = 40
    probe: str = ""
    draws: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.heads:
            raise RequestError("No heads were chosen; name some, as in L18H6, or take your set from the atlas.")
        if len(self.heads) > MOST_HEADS:
            raise RequestError(f"{len(self.heads)} heads: {MOST_HEADS} at most.")
        for head in self.heads:
            Head.parse(head)
        if self.how not in HOWS:
            raise RequestError(f"how={self.how!r} is no ablation; choose one of {', '.join(HOWS)}.")
        if self.probe and self.probe not in PROBES:
            raise RequestError(f"probe={self.probe!r}: choose one of {', '.join(PROBES)}.")
        if not self.probe and not self.prompt.strip():
            raise RequestError("There is nothing to measure: write a prompt, or choose a probe.")
        if self.prompt and self.how not in WRITING:
            raise RequestError(
                f"{self.how} cannot be shown on one prompt; choose one of {', '.join(WRITING)}, or leave the prompt "
                "empty and choose a probe."
            )
        for name, low, high in (("new_tokens", 1, MOST_NEW), ("draws", 10, MOST_DRAWS)):
            if not low <= getattr(self, name) <= high:
                raise RequestError(f"{name}={getattr(self, name)}: choose {low} to {high}.")

    def as_dict(self) -> dict[str, Any]:
        """For the address and the history."""
        return {**asdict(self), "heads": list(self.heads)}

    def study(self, model: str) -> tuple[str, str]:
        """`study.toml` that repeats the probe with these heads, and the command that runs it."""
        probe = self.probe or "held_out"
        heads = ", ".join(json.dumps(str(Head.parse(head))) for head in self.heads)
        fields = f"heads = [{heads}], probe = {json.dumps(probe)}, how = {json.dumps(self.how)}"
        fields += f", draws = {self.draws}, seed = {self.seed}"
        lines = [
            "[study]",
            'name = "from-the-lab"',
            f"title = {json.dumps(f'Removing {len(self.heads)} heads ({self.how})')}",
            'question = "What does the model lose without these heads, against matched random ones?"',
            'paper = ""',
            "",
            "[[cells]]",
            'measurement = "verify"',
            f"set = {{ {fields} }}",
        ]
        return "\n".join(lines) + "\n", f"workbench study run probes/from-the-lab --model {model}"


def run_trial(model: Model, trial: Trial, progress: Progress) -> dict[str, Any]:
    """Everything that the page shows of a trial, as plain numbers and texts."""
    heads = [model.spec.check(Head.parse(head)) for head in trial.heads]
    total = 4 * bool(trial.prompt) + (trial.draws + 1) * bool(trial.probe)
    found: dict[str, Any] = {"model": model.source.name}
    if trial.prompt:
        found["prompt"] = _on_prompt(model, trial, heads, progress, total)
    if trial.probe:
        before = 4 * bool(trial.prompt)
        verification = verify(
            model, heads, probe=trial.probe, how=trial.how, draws=trial.draws, seed=trial.seed,  # type: ignore[arg-type]
            progress=lambda done, _: progress(before + done, total),
        )  # fmt: skip
        rows = verification.table.to_dict("records")
        found["probe"] = [{str(key): _plain(value) for key, value in row.items()} for row in rows]
    return found


def _on_prompt(model: Model, trial: Trial, heads: Sequence[Head], progress: Progress, total: int) -> dict[str, Any]:
    """Continuations, next tokens and losses, intact and ablated."""
    batch = model.batch(trial.prompt)
    length, most = int(batch.lengths[0]), model.spec.max_positions
    if most is not None and length + trial.new_tokens > most:
        raise RequestError(f"The prompt has {length} tokens and the model takes {most}; shorten it.")
    edits: list[Edit] = []
    if trial.how in ("mean", "q_mean"):
        reference = build_probe("held_out", model, ProbeSettings()).tasks[0].batch
        edits = [ablate(heads, trial.how, reference=reference)]  # type: ignore[arg-type]
    else:
        edits = [ablate(heads, trial.how)]  # type: ignore[arg-type]
    told: dict[str, Any] = {"tokens": _texts(model, batch.ids[0, -length:].tolist())}
    for at, (name, change) in enumerate((("before", []), ("after", edits))):
        progress(2 * at, total)
        trace = model.trace(batch, loss=True, logits="last", edits=change)
        assert trace.logits is not None and trace.loss is not None
        probabilities = trace.logits[0, -1].float().softmax(-1)
        best = probabilities.topk(_LIKELIEST)
        progress(2 * at + 1, total)
        written = model.generate(batch, max_new_tokens=trial.new_tokens, edits=change)
        new = [token for token in written.ids[0].tolist() if token >= 0]
        told[name] = {
            "next": [
                {"token": text, "id": int(token), "p": float(p)}
                for text, token, p in zip(_texts(model, best.indices.tolist()), best.indices, best.values, strict=True)
            ],
            # Entry t is of the token after t.
            "loss": [_plain(float(value)) for value in trace.loss[0, len(trace.loss[0]) - length + 1 :]],
            "new": _texts(model, new),
        }
    ids = [one["id"] for one in told["before"]["next"]]
    after = torch.as_tensor(ids)
    told["after"]["of_before"] = [float(p) for p in probabilities[after.to(probabilities.device)]]
    return told


def _texts(model: Model, ids: Sequence[int]) -> list[str]:
    if model.tokenizer is None:
        return [str(token) for token in ids]
    return [model.tokenizer.decode([token])[:200] for token in ids]


def _plain(value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def read_trial(fields: Mapping[str, Any]) -> Trial:
    """A trial from an address or a form; what is missing has its default."""
    names = ("how", "prompt", "probe")
    texts = {name: str(fields[name]) for name in names if fields.get(name) not in (None, "")}
    numbers: dict[str, int] = {}
    for name in ("new_tokens", "draws", "seed"):
        if fields.get(name) in (None, ""):
            continue
        try:
            numbers[name] = int(str(fields[name]))
        except ValueError:
            raise RequestError(f"{name}={str(fields[name])[:20]!r}: a whole number is needed.") from None
    heads = fields.get("heads") or ()
    names_of = heads.split(",") if isinstance(heads, str) else [str(one) for one in heads]
    return Trial(tuple(dict.fromkeys(name.strip() for name in names_of if name.strip())), **texts, **numbers)  # type: ignore[arg-type]
