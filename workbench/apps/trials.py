"""Trials of the ablation lab: a prompt, and a probe, before and after heads are taken away."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, get_args

import numpy as np
import pandas as pd

from workbench.apps.library import counted
from workbench.errors import RequestError
from workbench.figures.text import form
from workbench.heads import Ablator, build_probe, verify
from workbench.heads.detector import Progress
from workbench.heads.probes import ProbeSettings
from workbench.models import Batch, Head
from workbench.runs import environment
from workbench.studies.survey import model_facts
from workbench.tracing import Model, ablate
from workbench.tracing.edits import Ablation, How, check_strength
from workbench.tracing.generate import stop_tokens

HOWS: tuple[str, ...] = get_args(How)
# Forms whose replacement depends on every token: for each token that is written, all before it are run anew.
ANEW = ("resample", "frozen_zero")
MOST_ANEW = 1024
PROBES = ("induction", "needle", "answer", "json", "held_out", "perplexity")
MOST_HEADS, MOST_NEW, MOST_DRAWS = 512, 200, 50
_LIKELIEST = 10


@dataclass(frozen=True)
class Trial:
    """What a trial does; `probe` "" measures the prompt alone."""

    heads: tuple[str, ...]
    how: str = "mean"
    strength: float = 1.0
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
        if self.probe == "needle" and self.how in ANEW:
            raise RequestError(
                f"{self.how} needs all tokens of a prompt at once, and the probe 'needle' writes them one by one; "
                "choose the probe 'answer' (the same question, its answer given), or another form."
            )
        check_strength(self.strength)
        for name, low, high in (("new_tokens", 1, MOST_NEW), ("draws", 10, MOST_DRAWS)):
            if not low <= getattr(self, name) <= high:
                raise RequestError(f"{name}={getattr(self, name)}: choose {low} to {high}.")

    def as_dict(self) -> dict[str, Any]:
        """For the address and the history."""
        return {**asdict(self), "heads": list(self.heads)}

    @property
    def form(self) -> str:
        """Form and strength, as tables and reports write them."""
        return form({"how": self.how, "strength": self.strength})

    def study(self, model: str) -> tuple[str, str]:
        """`study.toml` that repeats the probe with these heads, and the command that runs it."""
        probe = self.probe or "held_out"
        heads = ", ".join(json.dumps(str(Head.parse(head))) for head in self.heads)
        fields = f"heads = [{heads}], probe = {json.dumps(probe)}, how = {json.dumps(self.how)}"
        fields += f", draws = {self.draws}, seed = {self.seed}"
        fields += "" if self.strength == 1 else f", strength = {self.strength}"
        about = [] if self.probe else ["# The lab showed one prompt; a study measures many: held-out prose and code."]
        title = f"Removing {counted(len(self.heads), 'head')} ({self.form})"
        lines = [
            *about,
            "[study]",
            'name = "from-the-lab"',
            f"title = {json.dumps(title)}",
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
    total = _prompt_steps(trial) + (trial.draws + 1) * bool(trial.probe)
    about = {
        "model": model_facts(model), "certificate": model.certificate.as_dict(), "environment": environment(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    found: dict[str, Any] = {"model": model.source.name, "about": about}
    if trial.prompt:
        found["prompt"] = _on_prompt(model, trial, heads, progress, total)
    if trial.probe:
        before = _prompt_steps(trial)
        verification = verify(
            model, heads, probe=trial.probe, how=trial.how, strength=trial.strength, draws=trial.draws,  # type: ignore[arg-type]
            seed=trial.seed, progress=lambda done, _: progress(before + done, total),
        )  # fmt: skip
        found |= {"probe": _records(verification.table), "draws": _records(verification.draws)}
    return found


def _prompt_steps(trial: Trial) -> int:
    if not trial.prompt:
        return 0
    return 4 + (trial.new_tokens if trial.how in ANEW else 0)


def _on_prompt(model: Model, trial: Trial, heads: Sequence[Head], progress: Progress, total: int) -> dict[str, Any]:
    """Continuations, next tokens and losses, intact and ablated."""
    batch = model.batch(trial.prompt)
    length, most = int(batch.lengths[0]), model.spec.max_positions
    if most is not None and length + trial.new_tokens > most:
        raise RequestError(f"The prompt has {length} tokens and the model takes {most}; shorten it.")
    if trial.how in ANEW and length + trial.new_tokens > MOST_ANEW:
        raise RequestError(
            f"The prompt has {length} tokens: {trial.how} runs all of them anew for each new token, so that "
            f"{MOST_ANEW} in all are allowed. Shorten the prompt or choose another form."
        )
    progress(0, total)
    edit = _edit(model, trial, heads, length + trial.new_tokens)
    told: dict[str, Any] = {"tokens": _texts(model, batch.ids[0, -length:].tolist())}
    # Where the likeliest tokens of the intact model stand afterwards.
    asked: list[int] = []
    for at, (name, edits) in enumerate((("before", []), ("after", [edit]))):
        progress(2 * at, total)
        trace = model.trace(batch, loss=True, logits="last", edits=edits)
        assert trace.logits is not None and trace.loss is not None
        probabilities = trace.logits[0, -1].float().softmax(-1).cpu()
        best = probabilities.topk(min(_LIKELIEST, len(probabilities)))
        asked = asked or best.indices.tolist()
        progress(2 * at + 1, total)
        if edits and trial.how in ANEW:
            new = _written_anew(model, batch.ids[0, -length:].tolist(), edit, trial.new_tokens, progress, total)
        else:
            written = model.generate(batch, max_new_tokens=trial.new_tokens, edits=edits)
            new = [token for token in written.ids[0].tolist() if token >= 0]
        told[name] = {
            "next": [
                {"token": text, "id": int(token), "p": float(p)}
                for text, token, p in zip(_texts(model, best.indices.tolist()), best.indices, best.values, strict=True)
            ],
            "of_before": [float(p) for p in probabilities[asked]],
            # Entry t is of the token after t.
            "loss": [_plain(float(value)) for value in trace.loss[0, len(trace.loss[0]) - length + 1 :]],
            "new": _texts(model, new),
        }
    return told


def _edit(model: Model, trial: Trial, heads: Sequence[Head], tokens: int) -> Ablation:
    """The ablation, with what it puts in place of the heads measured once: on prose that is not the prompt."""
    how: How = trial.how  # type: ignore[assignment]
    if how in ("mean", "q_mean"):
        return Ablator.prepare(model, how, _prose(model), trial.strength)(heads)
    if how == "resample":
        # The heads read other text, column by column, repeated where the prompt is longer.
        other = [token for row in _prose(model).ids.tolist() for token in row]
        foreign = Batch.from_ids([(other * (tokens // len(other) + 1))[:tokens]])
        return ablate(heads, how, values=model.head_outputs(foreign, heads, mean=False), strength=trial.strength)
    return ablate(heads, how, strength=trial.strength)


def _prose(model: Model) -> Batch:
    return build_probe("held_out", model, ProbeSettings()).tasks[0].batch


def _written_anew(model: Model, ids: list[int], edit: Ablation, most: int, progress: Progress, total: int) -> list[int]:
    """Greedy continuation without a cache: every token is that of a trace of all before it."""
    new: list[int] = []
    stops = stop_tokens(model)
    while len(new) < most and not (new and new[-1] in stops):
        progress(4 + len(new), total)
        logits = model.trace([ids + new], edits=[edit], logits="last").logits
        assert logits is not None
        new.append(int(logits[0, -1].argmax()))
    return new


def _texts(model: Model, ids: Sequence[int]) -> list[str]:
    if model.tokenizer is None:
        return [str(token) for token in ids]
    return [model.tokenizer.decode([token])[:200] for token in ids]


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): _plain(value) for key, value in row.items()} for row in table.to_dict("records")]


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
    numbers: dict[str, Any] = {}
    if fields.get("strength") not in (None, ""):
        try:
            numbers["strength"] = float(str(fields["strength"]))
        except ValueError:
            raise RequestError(f"strength={str(fields['strength'])[:20]!r}: a number from 0 to 1 is needed.") from None
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
