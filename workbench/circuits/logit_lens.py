"""The logit lens: the model's own end (norm, unembedding, cap) put on the stream after every layer.

nostalgebraist 2020, "interpreting GPT: the logit lens". At the last layer it is the model's own prediction, exactly.
What an earlier stream says through it need not be what the model "believes" there: streams of early layers are not
made for the last norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.circuits.asked import Asked, Run, asked_of, token_id
from workbench.circuits.blocks import Blocks
from workbench.circuits.inference import Interval, mean_effect
from workbench.circuits.logit_attribution import run_name
from workbench.circuits.recorded import Group, by_length, record
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tasks.task import NONE
from workbench.tracing import Model
from workbench.tracing.sites import Site

READ = "read"
# Rows of logits that are held at once, of the last stage and of one other.
ROWS = 128


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What the stream predicts at every stage and position.

    `stages`: "embed" (what enters layer 0), "L3" (after layer 3), and "L3.mid" (before its MLP) where asked for.
    `positions` are names of columns: "read" (the token whose logits the task reads), a role, or a number counted from
    the first token. Arrays are `[prompt, stage, position, ...]`, NaN (ids: -1) where a prompt has no such position.
    `probability[name]` is the total of a set of tokens ("answer", "foil", or one asked for), `rank[name]` that of the
    best of them, 1 the most likely. `entropy` and `kl` are in nats, `kl` from the last stage's prediction to this one.
    """

    task: str
    run: str
    stages: tuple[str, ...]
    positions: tuple[str, ...]
    top_ids: Int[np.ndarray, "prompt stage position top"]
    top_probabilities: Float[np.ndarray, "prompt stage position top"]
    probability: Mapping[str, Float[np.ndarray, "prompt stage position"]]
    rank: Mapping[str, Float[np.ndarray, "prompt stage position"]]
    entropy: Float[np.ndarray, "prompt stage position"]
    kl: Float[np.ndarray, "prompt stage position"]
    seed: int = 0

    def table(self) -> pd.DataFrame:
        """One row a stage and position: means over prompts, each with its interval (`x_low`, `x_high`), and n."""
        measures = {"entropy": self.entropy, "kl": self.kl}
        for name in self.probability:
            measures[f"{name}_probability"] = self.probability[name]
            measures[f"{name}_rank"] = self.rank[name]
        rows = []
        for place, position in enumerate(self.positions):
            there = ~np.isnan(self.entropy[:, 0, place])
            if not there.any():
                continue
            columns: dict[str, np.ndarray] = {}
            for label, values in measures.items():
                known = there & ~np.isnan(values[:, 0, place])
                nothing = np.full(len(self.stages), np.nan)
                found = Interval(nothing, nothing, nothing)
                if known.any():
                    found = mean_effect(values[known, :, place].T, self.seed)
                columns |= dict(zip((label, f"{label}_low", f"{label}_high"), found, strict=True))
            for stage, name in enumerate(self.stages):
                own = {label: column[stage] for label, column in columns.items()}
                rows.append({"stage": name, "position": position, "n": int(there.sum()), **own})
        return pd.DataFrame(rows)

    def top(self) -> pd.DataFrame:
        """One row a prompt, stage, position and place among the most likely tokens (ids and probabilities)."""
        prompt, stage, position, place = np.nonzero(self.top_ids >= 0)
        return pd.DataFrame(
            {
                "prompt": prompt,
                "stage": np.asarray(self.stages)[stage],
                "position": np.asarray(self.positions)[position],
                "place": place + 1,
                "token": self.top_ids[prompt, stage, position, place],
                "probability": self.top_probabilities[prompt, stage, position, place],
            }
        )


def logit_lens(
    model: Model,
    task: PairTask | Asked,
    *,
    positions: Sequence[int | str] | Literal["all"] = (READ,),
    tokens: Sequence[int | str] = (),
    middle: bool = False,
    top: int = 5,
    run: Run = "clean",
    seed: int = 0,
    memory_limit: int | None = None,
) -> LogitLens:
    """What the stream after every layer predicts.

    Args:
        task: pairs, of which one `run` is read, or prompts of one's own (`ask`).
        positions: "read", roles and numbers (counted from the first token, up to the one that is read), or "all".
        tokens: ids or one-token texts to follow beside the answers and the foils.
        middle: between attention and MLP as well.
    """
    asked = asked_of(task, run)
    lengths = asked.position - asked.batch.starts.cpu() + 1
    columns = _columns(asked, positions, lengths)
    if not 1 <= top <= model.spec.vocab_size:
        raise RequestError(f"top={top}: keep from 1 to {model.spec.vocab_size} tokens.")
    if middle and model.spec.parallel:
        raise RequestError("Attention and MLP of this model read the same stream: it has no middle; use middle=False.")
    followed = _followed(model, asked, tokens)
    stages = _stages(model, middle)
    shape = (len(asked), len(stages), len(columns))
    found = _Found.empty(shape, tuple(followed), top)
    for group in by_length(asked.batch, asked.position):
        base = record(model, group.cut(asked.batch), [place for _, place in stages], memory_limit)
        reader = _Reader(Blocks(model.attachment, group.tokens), [base.at(*place) for _, place in stages], followed)
        reader.read(group, {name: column[group.prompts] for name, column in columns.items()}, found)
    names = tuple(name for name, _ in stages)
    return LogitLens(
        asked.name, run_name(task, run), names, tuple(columns), found.top_ids, found.top_probabilities,
        found.probability, found.rank, found.entropy, found.kl, seed,
    )  # fmt: skip


def _stages(model: Model, middle: bool) -> list[tuple[str, tuple[Site, int]]]:
    found: list[tuple[str, tuple[Site, int]]] = [("embed", ("resid_pre", 0))]
    for layer in model.attachment.layers:
        if middle and layer.mlp_write is not None:
            found.append((f"L{layer.index}.mid", ("resid_mid", layer.index)))
        found.append((f"L{layer.index}", ("resid_post", layer.index)))
    return found


def _columns(asked: Asked, positions: Sequence[int | str] | str, lengths: Tensor) -> dict[str, Int[Tensor, " prompt"]]:
    """Name -> place counted from the first token, -1 where a prompt has none (or only after what is read)."""
    wanted: Sequence[int | str]
    if isinstance(positions, str):
        wanted = range(int(lengths.max())) if positions == "all" else [positions]
    else:
        wanted = positions
    if not len(wanted):
        raise RequestError("Name at least one position: 'read', a role, a number, or 'all'.")
    found: dict[str, Tensor] = {}
    for one in wanted:
        if isinstance(one, int):
            column = torch.full_like(lengths, one)
        elif one == READ:
            column = lengths - 1
        elif one in asked.roles:
            column = asked.roles[one] - asked.batch.starts.cpu()
        else:
            known = ", ".join((READ, *asked.roles))
            raise RequestError(f"{one!r} is no position of {asked.name}; choose from {known}, or a number.")
        column = torch.where((column >= 0) & (column < lengths), column, -1)
        if bool((column < 0).all()):
            raise RequestError(f"No prompt has position {one!r} up to the token that is read.")
        found[str(one)] = column
    return found


def _followed(model: Model, asked: Asked, tokens: Sequence[int | str]) -> dict[str, Int[Tensor, "prompt m"]]:
    found = {"answer": asked.answers} | ({"foil": asked.foils} if asked.foils.shape[1] else {})
    for one in tokens:
        if str(one) in found:
            raise RequestError(f"{one!r} is followed twice; name each token once.")
        found[str(one)] = torch.full((len(asked), 1), token_id(model, one))
    return found


@dataclass(eq=False)
class _Found:
    """Arrays being filled; see `LogitLens`."""

    top_ids: np.ndarray
    top_probabilities: np.ndarray
    probability: dict[str, np.ndarray]
    rank: dict[str, np.ndarray]
    entropy: np.ndarray
    kl: np.ndarray

    @classmethod
    def empty(cls, shape: tuple[int, int, int], names: tuple[str, ...], top: int) -> _Found:
        def nothing(*more: int) -> np.ndarray:
            return np.full((*shape, *more), np.nan)

        return cls(
            np.full((*shape, top), -1, dtype=np.int64), nothing(top), {name: nothing() for name in names},
            {name: nothing() for name in names}, nothing(), nothing(),
        )  # fmt: skip


@dataclass(eq=False)
class _Reader:
    """Puts the model's end on the streams of one group, some rows at a time."""

    blocks: Blocks
    streams: list[Float[Tensor, "prompt token d_model"]]
    followed: Mapping[str, Int[Tensor, "every_prompt m"]]

    @torch.no_grad()
    def read(self, group: Group, columns: Mapping[str, Int[Tensor, " prompt"]], found: _Found) -> None:
        places = torch.stack(list(columns.values()), 1)
        prompt, position = (places >= 0).nonzero(as_tuple=True)
        for rows in torch.split(torch.arange(len(prompt)), ROWS):
            own, where = prompt[rows], position[rows]
            at = (own, places[own, where])
            last = self._logits(-1, at).log_softmax(-1)
            for stage in range(len(self.streams)):
                predicted = self._logits(stage, at).log_softmax(-1)
                self._note(predicted, last, (group.prompts[own].numpy(), stage, where.numpy()), found)

    def _logits(self, stage: int, at: tuple[Tensor, Tensor]) -> Float[Tensor, "row vocab"]:
        stream = self.streams[stage]
        return self.blocks.logits(stream[at[0].to(stream.device), at[1].to(stream.device)]).float()

    def _note(self, predicted: Tensor, last: Tensor, place: tuple[np.ndarray, int, np.ndarray], found: _Found) -> None:
        top = found.top_ids.shape[-1]
        most = predicted.topk(top, dim=-1)
        found.top_ids[place] = most.indices.cpu().numpy()
        found.top_probabilities[place] = most.values.exp().cpu().numpy()
        found.entropy[place] = -(predicted.exp() * predicted).sum(-1).cpu().numpy()
        found.kl[place] = (last.exp() * (last - predicted)).sum(-1).clamp(min=0).cpu().numpy()
        for name, ids in self.followed.items():
            own = ids[torch.from_numpy(place[0])].to(predicted.device)
            there = own != NONE
            values = predicted.gather(1, own.clamp(min=0)).masked_fill(~there, -torch.inf)
            known = there.any(1)
            rank = 1 + (predicted > values.amax(1, keepdim=True)).sum(1).double()
            nothing = torch.full_like(rank, torch.nan)
            found.rank[name][place] = torch.where(known, rank, nothing).cpu().numpy()
            total = values.exp().sum(1).double()
            found.probability[name][place] = torch.where(known, total, nothing).cpu().numpy()
