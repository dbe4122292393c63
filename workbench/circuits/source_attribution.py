"""What a head gives to the answer's logit, split by the token that it attends to.

A head writes `sum over tokens s of A[t, s] v[s] W_O`, so its direct logit attribution is a sum over tokens, exactly,
with attention as it was. One row of each pattern is made and no more, so that prompts may be long.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.circuits.asked import Asked, Run, asked_of
from workbench.circuits.inference import mean_effect
from workbench.circuits.logit_attribution import Of, chosen_contrast, group_readout, head_readings, held, run_name
from workbench.circuits.recorded import Group, Recorded, by_length, record
from workbench.errors import HeadError, RequestError
from workbench.models import AttentionCall, Head
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

# Tokens that run together.
TOKENS = 8192
ELSEWHERE = "elsewhere"


@dataclass(frozen=True, eq=False)
class SourceAttribution:
    """What heads give to a logit by way of each token.

    `values` `[prompt, head, token]` count tokens from the prompt's first, up to the one that is read; NaN beyond.
    Their sums over tokens are the heads' values in `LogitAttribution`. `tokens` are ids, -1 beyond; `roles` count
    as `values` do.
    """

    task: str
    of: Of
    run: str
    heads: tuple[Head, ...]
    values: Float[np.ndarray, "prompt head token"]
    tokens: Int[np.ndarray, "prompt token"]
    roles: Mapping[str, Int[np.ndarray, " prompt"]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seed: int = 0

    def table(self) -> pd.DataFrame:
        """One row a head and role: mean over prompts with its bootstrap interval; "elsewhere" is all other tokens.

        A role beyond the token that is read has nothing; roles at one token share its value, which "elsewhere" leaves
        out once.
        """
        prompts = np.arange(len(self.values))
        other = np.nan_to_num(self.values)
        longest = other.shape[2]
        parts: dict[str, np.ndarray] = {}
        for role, column in self.roles.items():
            seen = (column < longest) & (column >= 0)
            place = np.where(seen, column, 0)
            parts[role] = np.where(seen, np.nan_to_num(self.values[prompts, :, place]).T, 0.0)
        for column in self.roles.values():
            seen = (column < longest) & (column >= 0)
            other[prompts[seen], :, column[seen]] = 0.0
        parts[ELSEWHERE] = other.sum(2).T
        rows = []
        for role, effects in parts.items():
            found = mean_effect(effects, self.seed)
            for number, head in enumerate(self.heads):
                rows.append(
                    {
                        "node": str(head),
                        "layer": head.layer,
                        "head": head.head,
                        "source": role,
                        "of": self.of,
                        "run": self.run,
                        "n": len(prompts),
                        "value": found.value[number],
                        "low": found.low[number],
                        "high": found.high[number],
                    }
                )
        return pd.DataFrame(rows).sort_values(["layer", "head"], kind="stable").reset_index(drop=True)

    def per_prompt(self) -> pd.DataFrame:
        """One row a prompt, head and token."""
        prompt, head, token = np.nonzero(~np.isnan(self.values))
        return pd.DataFrame(
            {
                "prompt": prompt,
                "node": [str(self.heads[one]) for one in head],
                "position": token,
                "token": self.tokens[prompt, token],
                "value": self.values[prompt, head, token],
            }
        )


@torch.no_grad()
def source_attribution(
    model: Model,
    task: PairTask | Asked,
    heads: Sequence[Head | str] | None = None,
    *,
    of: Of | None = None,
    run: Run = "clean",
    seed: int = 0,
    memory_limit: int | None = None,
) -> SourceAttribution:
    """Direct logit attribution of heads (all by default) by the token attended to; arguments as for the whole heads."""
    asked = asked_of(task, run)
    chosen = chosen_contrast(asked, of)
    wanted = _heads(model, heads)
    longest = int((asked.position - asked.batch.starts.cpu()).max()) + 1
    values = np.full((len(asked), len(wanted), longest), np.nan)
    tokens = np.full((len(asked), longest), -1, dtype=np.int64)
    for group in by_length(asked.batch, asked.position):
        batch = group.cut(asked.batch)
        layers = sorted({head.layer for head in wanted})
        sites: list[tuple[Site, int]] = [("z", layer) for layer in layers]
        base = record(model, batch, [*sites, ("resid_post", model.spec.n_layers - 1)], memory_limit)
        rows = group.prompts.numpy()
        tokens[rows, : group.tokens] = batch.ids.numpy()
        found = _by_source(model, asked, group, base, wanted, chosen)
        values[rows[:, None], np.arange(len(wanted)), : group.tokens] = found.numpy()
    starts = asked.batch.starts.cpu()
    roles = {role: (column - starts).numpy() for role, column in asked.roles.items()}
    return SourceAttribution(
        asked.name, chosen, run_name(task, run), wanted, values, tokens, roles, held(model), seed
    )  # fmt: skip


def _heads(model: Model, heads: Sequence[Head | str] | None) -> tuple[Head, ...]:
    every = model.spec.heads()
    if heads is None:
        return tuple(every)
    found = []
    for one in heads:
        if isinstance(one, str):
            match = re.fullmatch(r"L(\d+)H(\d+)", one)
            if match is None:
                raise RequestError(f"{one!r} is no query head; heads are written 'L5H3'.")
            one = Head(int(match[1]), int(match[2]))
        if one not in every:
            raise HeadError(f"{one} does not exist: this model has {model.spec.n_layers} layers.")
        found.append(one)
    if not found:
        raise RequestError("Name at least one head, or None for all.")
    return tuple(dict.fromkeys(found))


def _by_source(
    model: Model, asked: Asked, group: Group, base: Recorded, heads: tuple[Head, ...], of: Of
) -> Float[Tensor, "prompt head token"]:
    """Values of one group, double precision."""
    readout = group_readout(model, asked, group, base, of)
    layers = sorted({head.layer for head in heads})
    readings = {
        layer: head_readings(model.attachment, layer, base.at("z", layer)[:, -1], readout)[0] for layer in layers
    }
    found = torch.zeros(len(group.prompts), len(heads), group.tokens, dtype=torch.float64)
    size = max(1, TOKENS // group.tokens)
    for first in range(0, len(group.prompts), size):
        rows = slice(first, first + size)

        def watch(call: AttentionCall, rows: slice = rows) -> Tensor:
            own = [number for number, head in enumerate(heads) if head.layer == call.layer]
            if own:
                which = torch.tensor([heads[number].head for number in own], device=call.q.device)
                pattern = call.last_query().pattern(torch.float64)[:, :, 0]
                group_size = call.q.shape[1] // call.k.shape[1]
                values = call.v[:, which // group_size].double()
                read = torch.einsum("phsd,phd->phs", values, readings[call.layer][rows][:, which])
                found[rows, own] = (pattern[:, which] * read).cpu()
            return call.output()

        with model.attachment.observe(watch):
            model.attachment.hf_model(
                base.batch.ids[rows].to(model.device),
                attention_mask=base.batch.mask[rows].to(model.device).long(),
                use_cache=False,
                logits_to_keep=1,
            )
    return found
