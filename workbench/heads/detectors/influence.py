"""Where the attention that matters to the loss comes from (MoA, Fu et al. 2024, arXiv 2406.14909).

Removing the weight A_ij and renormalising its row changes the loss, to first order, by E_ij = -A_ij (G_ij - sum_n
A_in G_in) / (1 - A_ij) with G = dL/dA. The profile of a head is the sum of |E| over blocks. It needs the gradient of
the loss by the attention outputs, hence a backward pass; the loss is that of the response's tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Detector, Part, Progress, PromptScores
from workbench.heads.settings import Settings
from workbench.kernels import StatisticsRequest, removal_effects
from workbench.models import AttentionCall
from workbench.tasks import NONE, Task
from workbench.tracing import Model

BLOCK, SMALL_BLOCK = 64, 16
# Activations of all layers are kept for the backward pass.
LONGEST = 8192
# The span that a candidate keeps: one block of first keys, and this share of the blocks nearest to the query.
LOCAL_SHARE = 0.25


@dataclass(frozen=True)
class Influence:
    """Block sums of |E| of every prompt and layer, `[head, block_row, block_column]` each, and the block size."""

    maps: list[list[Tensor]]
    block: int
    tokens: list[int]


def influence(model: Model, task: Task, block: int | None = None, progress: Progress | None = None) -> Influence:
    """Run each prompt forward and backward, one at a time, padding left out.

    Args:
        block: a power of two from 16 on; 64, as published, from 1024 tokens on, else 16.

    Raises:
        RequestError: a prompt whose activations would be too many to keep.
    """
    longest = int(task.batch.lengths.max())
    if longest > LONGEST:
        raise RequestError(
            f"A prompt of {longest} tokens: influence keeps the activations of all layers for a backward pass, and "
            f"takes {LONGEST} tokens at most; ask for shorter prompts."
        )
    size = block or (BLOCK if longest >= 16 * BLOCK else SMALL_BLOCK)
    maps = []
    for prompt in range(len(task)):
        maps.append(_prompt_maps(model, task, prompt, size))
        if progress is not None:
            progress(prompt + 1, len(task))
    return Influence(maps, size, task.batch.lengths.tolist())


def _prompt_maps(model: Model, task: Task, prompt: int, block: int) -> list[Tensor]:
    real = task.batch.mask[prompt]
    ids = task.batch.ids[prompt][real][None].to(model.device)
    rows = task.answer_positions[prompt]
    rows = (rows[rows != NONE] - task.batch.starts[prompt]).to(model.device)
    calls: list[AttentionCall] = []
    outputs: list[Tensor] = []

    def watch(call: AttentionCall) -> Tensor:
        z = call.output()
        z = z if z.requires_grad else z.requires_grad_()
        calls.append(call)
        outputs.append(z)
        return z

    with torch.enable_grad(), model.attachment.observe(watch):
        logits = model.attachment.hf_model(ids, use_cache=False, logits_to_keep=rows).logits[0]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, rows + 1])
        gradients = torch.autograd.grad(loss, outputs)
    return [_layer_map(call, gradient, block) for call, gradient in zip(calls, gradients, strict=True)]


@torch.no_grad()
def _layer_map(call: AttentionCall, gradient: Tensor, block: int) -> Tensor:
    found = call.statistics(StatisticsRequest(output=True, lse=True))
    assert found.output is not None and found.lse is not None
    maps, _ = removal_effects(
        call.q, call.k, call.v, gradient, found.output, found.lse,
        block=block, scale=call.scale, window=call.window, softcap=call.softcap, sinks=call.sinks,
    )  # fmt: skip
    return maps[0].cpu()


def span_blocks(count: int) -> Tensor:
    """Blocks that a candidate keeps, `[block_row, block_column]`: the first, and a quarter of them nearest."""
    back = torch.arange(count)[:, None] - torch.arange(count)
    return (back >= 0) & ((back < ceil(count * LOCAL_SHARE)) | (torch.arange(count) == 0))


def _shares(found: Influence, prompt: int) -> tuple[Float[Tensor, "layer head"], float]:
    """Share of influence outside the span, and the share of visible entries that lie there."""
    maps, tokens = found.maps[prompt], found.tokens[prompt]
    outside = ~span_blocks(-(-tokens // found.block))
    heads = max(len(one) for one in maps)
    shares = torch.full((len(maps), heads), torch.nan, dtype=torch.float64)
    for layer, one in enumerate(maps):
        whole = one.double().sum((-2, -1))
        shares[layer, : len(one)] = (one.double() * outside).sum((-2, -1)) / whole.clamp(min=1e-300)
    entries = _entries(tokens, found.block)
    return shares, float((entries * outside).sum() / entries.sum())


def _entries(tokens: int, block: int) -> Float[Tensor, "block_row block_column"]:
    """Visible entries of each block under causality."""
    edges = torch.arange(-(-tokens // block)) * block
    rows = torch.arange(tokens)[:, None]
    seen = (rows - edges + 1).clamp(min=0, max=block).double()
    owner = (torch.arange(tokens) // block)[:, None].expand_as(seen)
    return torch.zeros(len(edges), len(edges), dtype=torch.float64).scatter_add_(0, owner, seen)


def influence_profile(found: Influence) -> pd.DataFrame:
    """layer, head, block_distance, tokens, influence: each head's share of influence by distance, in blocks.

    `tokens` is the distance to the block's last key, in whole blocks; means over prompts. `block_distance` -1 holds
    the first block, wherever the query: influence of first tokens is no matter of distance.
    """
    rows = []
    for maps in found.maps:
        for layer, one in enumerate(maps):
            whole = one.double().sum((-2, -1)).clamp(min=1e-300)
            rest = one.double().clone()
            rest[:, 1:, 0] = 0.0
            share = [(-1, one.double()[:, 1:, 0].sum(-1) / whole)]
            share += [(d, rest.diagonal(-d, -2, -1).sum(-1) / whole) for d in range(one.shape[-1])]
            rows += [(layer, head, d, float(of[head])) for d, of in share for head in range(len(one))]
    table = pd.DataFrame(rows, columns=["layer", "head", "block_distance", "influence"])
    sums = table.groupby(["layer", "head", "block_distance"], as_index=False)["influence"].sum()
    sums["influence"] /= len(found.maps)
    sums.insert(3, "tokens", np.where(sums.block_distance < 0, 0, sums.block_distance * found.block))
    return sums


def run_influence(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Influence:
    """The run of the kind `needle_influence`."""
    assert task is not None
    return influence(model, task, progress=progress)


def _far(parts: Sequence[Part]) -> PromptScores:
    values, null = [], []
    for part in parts:
        found = part.found
        assert isinstance(found, Influence)
        for prompt in range(len(found.maps)):
            share, even = _shares(found, prompt)
            values.append(share.numpy())
            null.append(np.full_like(values[-1], even))
    return PromptScores(np.stack(values), np.stack(null))


FAR_INFLUENCE = Detector(
    name="far_influence",
    title="Far influence",
    kind="needle_influence",
    measures="share of the head's influence on the loss that comes from outside the first block and the nearest "
    "quarter of the blocks",
    null="the share of visible entries that lie there",
    unit="share of influence",
    positions="all queries (the loss is that of the answer's tokens)",
    threshold=None,
    paper="Fu et al. 2024, MoA: mixture of sparse attention",
    url="https://arxiv.org/abs/2406.14909",
    score=_far,
    probe="answer",
    note="The paper profiles 2048 to 8192 tokens in blocks of 64 and lets a search choose each head's span; here one "
    "span for all, in blocks of 16 below 1024 tokens. The response is the needle's gold answer; the paper's is the "
    "model's own. A row's only key cannot be removed and counts zero (the paper's code takes A G there).",
)
INFLUENCE = (FAR_INFLUENCE,)
