"""Prompts in pairs, clean and corrupt, for what is moved between the two runs: patching, circuits, attribution.

A pair has the same number of tokens and the same role at the same column, so that an activation of one run can stand
in for that of the other (Heimersheim & Nanda 2024, arXiv 2404.15255: vary exactly one thing; Zhang & Nanda 2023, arXiv
2309.16042: replace tokens, do not add noise, and score by the difference of logits).  All positions are columns of the
padded batches; all checks are made when a task is built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.task import NONE, Value


class Edge(NamedTuple):
    """What `source` writes, as read by `target` through its "q", "k" or "v", or ("") by an MLP or the logits."""

    source: str
    target: str
    through: str = ""

    def __str__(self) -> str:
        return f"{self.source}->{self.target}" + (f".{self.through}" if self.through else "")


@dataclass(frozen=True)
class KnownCircuit:
    """A published circuit as data: which nodes of which model do what, to compare a found one with.

    `nodes`
        class of nodes -> their names (``L9H9`` a query head, ``L8.mlp`` an MLP).
    `edges`
        (from, to, input of the latter: "q", "k", "v" or ""); both ends are nodes, or classes of `nodes`, "embed" or
        "logits".
    `note`
        where sources differ and which side was taken.
    """

    model: str
    paper: str
    url: str
    nodes: Mapping[str, tuple[str, ...]]
    edges: tuple[tuple[str, str, str], ...] = ()
    note: str = ""

    @property
    def heads(self) -> tuple[str, ...]:
        """All heads, each once, in order of the classes."""
        found = dict.fromkeys(node for nodes in self.nodes.values() for node in nodes)
        return tuple(node for node in found if "H" in node)


@dataclass(frozen=True, eq=False)
class PairTask:
    """Clean and corrupt prompts, what is read at the end, and where each role stands.

    `answers`, `foils`
        ids that count for and against, ``[prompt, m]``, -1 for none.
    `position`
        the column whose logits are read.
    `roles`
        role -> its column (of a word of several tokens the last one's); the same in clean, corrupt and reference.
    `references`
        prompts of the same templates without the task's information, row by row as long as the clean ones: what
        means for mean ablation are taken over, positionwise within `groups`.
    `circuit`
        what was published about this task in one model.
    `dropped`
        kind of words or templates -> those that this tokenizer could not take.
    """

    name: str
    caption: str
    seed: int
    specials: str
    clean: Batch
    corrupt: Batch
    answers: Int[Tensor, "prompt answer"]
    foils: Int[Tensor, "prompt foil"]
    position: Int[Tensor, " prompt"]
    roles: Mapping[str, Int[Tensor, " prompt"]] = field(default_factory=dict)
    metric: str = "logit_difference"
    circuit: KnownCircuit | None = None
    info: tuple[Mapping[str, Value], ...] = ()
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    references: Batch | None = None

    def __post_init__(self) -> None:
        _check_batches(self)
        _check_columns(self)
        _check_tokens(self)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def changed(self) -> Bool[Tensor, "prompt token"]:
        """Where the corrupt prompt has another token."""
        return (self.clean.ids != self.corrupt.ids) & self.clean.mask

    @property
    def groups(self) -> Int[Tensor, " prompt"]:
        """Prompts with one number have one template, one length and every role at one column."""
        columns = [self.clean.starts, self.clean.lengths, self.position, *(self.roles[role] for role in self.roles)]
        labels = [str(one.get("template", "")) for one in self.info] or [""] * len(self)
        keys = [(label, *row) for label, row in zip(labels, torch.stack(columns, 1).tolist(), strict=True)]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return torch.tensor([numbers[key] for key in keys])

    @property
    def hash(self) -> str:
        """SHA-256 of the prompts, of what is read and where, and of how they were made."""
        tensors = {
            "answers": self.answers,
            "foils": self.foils,
            "position": self.position,
            **{f"role {name}": value for name, value in self.roles.items()},
        }
        about = {
            "name": self.name,
            "seed": self.seed,
            "specials": self.specials,
            "metric": self.metric,
            "clean": self.clean.hash,
            "corrupt": self.corrupt.hash,
            "references": None if self.references is None else self.references.hash,
            "info": [dict(one) for one in self.info],
            "shapes": {name: list(value.shape) for name, value in sorted(tensors.items())},
        }
        total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for _, value in sorted(tensors.items()):
            total.update(value.cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
        return total.hexdigest()

    def select(self, rows: Sequence[int]) -> PairTask:
        """The named pairs, in that order; columns stay as they are."""
        # Refuses rows that do not exist.
        clean = self.clean.select(rows)
        index = torch.as_tensor(rows, dtype=torch.long, device=self.position.device)
        return replace(
            self,
            clean=clean,
            corrupt=self.corrupt.select(rows),
            references=None if self.references is None else self.references.select(rows),
            answers=self.answers[index],
            foils=self.foils[index],
            position=self.position[index],
            roles={name: column[index] for name, column in self.roles.items()},
            info=tuple(self.info[row] for row in rows) if self.info else (),
        )

    def score(self, logits: Tensor, name: str | None = None) -> Float[Tensor, " prompt"]:
        """The task's metric (or a named one) of logits; see `metric`."""
        return metric(self, logits, name)


def _check_batches(task: PairTask) -> None:
    others = {"corrupt": task.corrupt} | ({} if task.references is None else {"reference": task.references})
    for label, other in others.items():
        if len(other) != len(task.clean):
            raise RequestError(f"{len(task.clean)} clean and {len(other)} {label} prompts; give one for each.")
        lengths = zip(task.clean.lengths.tolist(), other.lengths.tolist(), strict=True)
        for row, (one, two) in enumerate(lengths):
            if one != two:
                raise RequestError(
                    f"Pair {row} of {task.name} has {one} clean and {two} {label} tokens; both need the same number, "
                    "or columns mean different things. Replace words by others of as many tokens."
                )
        if not torch.equal(task.clean.mask, other.mask):
            raise RequestError(f"The {label} prompts of {task.name} are padded otherwise than the clean ones.")
    same = (~task.changed.any(dim=1)).nonzero().flatten().tolist()
    if same:
        raise RequestError(f"Pair {same[0]} of {task.name} has equal clean and corrupt prompts; change one word.")
    if task.info and len(task.info) != len(task):
        raise RequestError(f"{len(task.info)} entries of info for {len(task)} pairs; give one for each, or none.")


def _check_columns(task: PairTask) -> None:
    for label, column in {"position": task.position, **task.roles}.items():
        if column.shape != (len(task),):
            raise RequestError(f"{label} of {task.name} has shape {tuple(column.shape)}; one column a pair is needed.")
        outside = (column < 0) | (column >= task.clean.ids.shape[1])
        real = task.clean.mask.gather(1, column.clamp(0, task.clean.ids.shape[1] - 1)[:, None])[:, 0] & ~outside
        if not bool(real.all()):
            row = int((~real).nonzero()[0])
            raise RequestError(
                f"{label} of pair {row} of {task.name} is column {int(column[row])}, outside of the prompt's tokens "
                f"({int(task.clean.starts[row])} to {int(task.clean.starts[row] + task.clean.lengths[row]) - 1})."
            )


def _check_tokens(task: PairTask) -> None:
    for label, ids in (("answers", task.answers), ("foils", task.foils)):
        if ids.ndim != 2 or len(ids) != len(task) or bool((ids < NONE).any()):
            raise RequestError(f"{label} of {task.name} must be token ids [{len(task)} pairs, m], {NONE} for none.")
    if task.metric not in METRICS:
        raise RequestError(f"Metric {task.metric!r} is unknown; choose from {', '.join(METRICS)}.")
    missing = {"an answer": (task.answers != NONE).any(dim=1)}
    if task.metric != "log_probability":
        missing["a foil"] = (task.foils != NONE).any(dim=1)
    for label, there in missing.items():
        if not bool(there.all()):
            row = int((~there).nonzero()[0])
            raise RequestError(f"Pair {row} of {task.name} is without {label}; {task.metric} needs one.")
    both = (task.answers[:, :, None] == task.foils[:, None, :]) & (task.answers != NONE)[:, :, None]
    if bool(both.any()):
        row, place, _ = both.nonzero()[0].tolist()
        raise RequestError(
            f"Token {int(task.answers[row, place])} is both answer and foil of pair {row} of {task.name}; "
            "choose words that begin with different tokens."
        )


def metric(task: PairTask, logits: Tensor, name: str | None = None) -> Float[Tensor, " prompt"]:
    """One number a pair, higher is better, from logits at `position`, ``[prompt, vocab]``, or at all columns.

    "logit_difference" (mean logit of the answers less that of the foils), "logit_margin" (less the largest of the
    foils), "probability_difference" (total probability of the answers less that of the foils) and "log_probability"
    (of all answers together, in nats).  Gradients pass through.
    """
    chosen = task.metric if name is None else name
    if chosen not in METRICS:
        raise RequestError(f"Metric {chosen!r} is unknown; choose from {', '.join(METRICS)}.")
    if chosen != "log_probability" and bool((task.foils == NONE).all(dim=1).any()):
        raise RequestError(f"{task.name} has pairs without foils, which {chosen} needs; choose log_probability.")
    rows = at_position(task, logits).float()
    return METRICS[chosen](rows, task.answers.to(rows.device), task.foils.to(rows.device))


def right(task: PairTask, logits: Tensor) -> Bool[Tensor, " prompt"]:
    """Whether the best answer's logit is above that of every foil (where there are none: of every token)."""
    rows = at_position(task, logits).float()
    answers, foils = task.answers.to(rows.device), task.foils.to(rows.device)
    best = _taken(rows, answers, -torch.inf).amax(1)
    others = rows.scatter(1, answers.clamp(min=0), -torch.inf).amax(1)
    against = _taken(rows, foils, -torch.inf).amax(1) if foils.shape[1] else torch.full_like(best, -torch.inf)
    return best > torch.where((foils != NONE).any(1), against, others)


def at_position(task: PairTask, logits: Tensor) -> Float[Tensor, "prompt vocab"]:
    """Logits at `position`, given those of all columns or these already."""
    if logits.shape[:-1] == (len(task),):
        return logits
    if logits.shape[:-1] == task.clean.ids.shape:
        position = task.position.to(logits.device)
        return logits[torch.arange(len(task), device=logits.device), position]
    raise RequestError(
        f"logits of shape {tuple(logits.shape)} fit neither the {len(task)} pairs of {task.name} nor their "
        f"{tuple(task.clean.ids.shape)} columns."
    )


def _taken(
    rows: Float[Tensor, "prompt vocab"], ids: Int[Tensor, "prompt m"], nothing: float
) -> Float[Tensor, "prompt m"]:
    """Entries of the rows at ids, `nothing` where there is none."""
    return rows.gather(1, ids.clamp(min=0)).masked_fill(ids == NONE, nothing)


def _mean(rows: Float[Tensor, "prompt vocab"], ids: Int[Tensor, "prompt m"]) -> Float[Tensor, " prompt"]:
    return _taken(rows, ids, 0.0).sum(1) / (ids != NONE).sum(1)


def _logit_difference(rows: Tensor, answers: Tensor, foils: Tensor) -> Tensor:
    return _mean(rows, answers) - _mean(rows, foils)


def _logit_margin(rows: Tensor, answers: Tensor, foils: Tensor) -> Tensor:
    return _mean(rows, answers) - _taken(rows, foils, -torch.inf).amax(1)


def _probability_difference(rows: Tensor, answers: Tensor, foils: Tensor) -> Tensor:
    probabilities = rows.softmax(-1)
    return _taken(probabilities, answers, 0.0).sum(1) - _taken(probabilities, foils, 0.0).sum(1)


def _log_probability(rows: Tensor, answers: Tensor, foils: Tensor) -> Tensor:
    return _taken(rows.log_softmax(-1), answers, -torch.inf).logsumexp(1)


METRICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logit_difference": _logit_difference,
    "logit_margin": _logit_margin,
    "probability_difference": _probability_difference,
    "log_probability": _log_probability,
}
