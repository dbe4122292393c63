"""LongHeads: which chunks of its past each head would visit, were it to see a few of them at a time.

The context is cut into chunks of `length` tokens. For each chunk and head:

1. attention inside the chunk, its outputs averaged over the chunk's tokens: `c_g`;
2. the chunk's key `k_g = softmax(c_g K_g^T / sqrt(d)) K_g`, keys as they are before rotation;
3. a query, before rotation, ranks the chunks by `q.k_g`.

The method always shows the first, the previous and the current chunk. Measured here is the ranking without that help:
the histogram over depth of the best few chunks, and how many of them lie in the middle, where only content can call.
One `[rows, chunks]` table a chunk of queries, so memory is O(N); explicit patterns are never made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.calls import needed_tokenizer, observe_prompts
from workbench.heads.detector import Array, Detector, Kind, Part, Progress, PromptScores
from workbench.heads.settings import Settings
from workbench.kernels import attention_output
from workbench.models import AttentionCall, Batch
from workbench.tasks import Task, text_domains
from workbench.tracing import Model
from workbench.tracing.rotation import Rotation

DEPTHS = 10


@dataclass(frozen=True)
class Selections:
    """Share of selections in the middle `[prompt, layer, head]`, what a uniform choice gives `[prompt]`, and counts of
    selections by depth `[layer, head, depth]`, from the first chunk to the one before the query's."""

    middle: Float[np.ndarray, "prompt layer head"]
    chance: Float[np.ndarray, " prompt"]
    counts: Float[np.ndarray, "layer head depth"]

    def histogram(self) -> pd.DataFrame:
        """Share of each head's selections at each depth: layer, head, depth (the bin's middle, 0 to 1), share."""
        layers, heads, depths = self.counts.shape
        share = self.counts / np.maximum(self.counts.sum(-1, keepdims=True), 1)
        layer, head, depth = np.indices(self.counts.shape).reshape(3, layers * heads * depths)
        table = pd.DataFrame(
            {"layer": layer, "head": head, "depth": (depth + 0.5) / depths, "share": share.reshape(-1)}
        )
        return table[self.counts.sum(-1)[layer, head] > 0].reset_index(drop=True)


def chunk_keys(
    call: AttentionCall, keys: Float[Tensor, "batch kv_head key dim"], length: int
) -> Float[Tensor, "head chunk dim"]:
    """The key of every whole chunk of one prompt, per query head; `keys` are those before rotation.

    Inside a chunk only distances matter to rotary attention, so that q and k as they enter the softmax will do.
    """
    count = call.k.shape[2] // length
    q, k, v, plain = (
        x[0, :, : count * length].reshape(x.shape[1], count, length, x.shape[-1]).transpose(0, 1)
        for x in (call.q, call.k, call.v, keys)
    )
    output = attention_output(q, k, v, scale=call.scale, window=call.window, softcap=call.softcap, sinks=call.sinks)
    centre = output.float().mean(2)
    group = call.q.shape[1] // call.k.shape[1]
    plain = plain.float().repeat_interleave(group, dim=1)
    weights = (torch.einsum("c h d, c h t d -> c h t", centre, plain) * call.scale).softmax(-1)
    return torch.einsum("c h t, c h t d -> h c d", weights, plain)


def select(
    queries: Float[Tensor, "head query dim"], keys: Float[Tensor, "head chunk dim"], length: int, chosen: int
) -> tuple[Float[Tensor, " head"], Float[Tensor, "head depth"], float]:
    """Of one prompt: the share of selections in the middle, their counts by depth, and the share by chance.

    A query in chunk c ranks the chunks before its own; only queries that have more than `chosen` of them count. The
    middle is all but the first chunk and the previous one.
    """
    heads, tokens = queries.shape[:2]
    counts, middle = torch.zeros(heads, DEPTHS), torch.zeros(heads)
    rows, chance = 0, 0.0
    for chunk in range(chosen + 1, -(-tokens // length)):
        own = queries[:, chunk * length : (chunk + 1) * length]
        scores = torch.einsum("h q d, h c d -> h q c", own.float(), keys[:, :chunk])
        best = scores.topk(chosen, dim=-1).indices.flatten(1).cpu()
        middle += ((best > 0) & (best < chunk - 1)).sum(-1)
        depth = ((best + 0.5) / chunk * DEPTHS).long()
        counts.scatter_add_(1, depth, torch.ones_like(depth, dtype=torch.float32))
        rows += own.shape[1]
        chance += own.shape[1] * (chunk - 2) / chunk
    return middle / (rows * chosen), counts, chance / rows


def selected_chunks(
    model: Model, batch: Batch, length: int, chosen: int, progress: Progress | None = None
) -> Selections:
    """Which chunks of `length` tokens every head's queries rank among their `chosen` best."""
    if length < 2 or chosen < 1:
        raise RequestError(f"Chunks of {length} tokens, {chosen} selected: ask for 2 tokens and 1 chunk or more.")
    shortest, least = int(batch.lengths.min()), (chosen + 2) * length
    if shortest < least:
        raise RequestError(
            f"A prompt of {shortest} tokens leaves no query a choice among more than {chosen} chunks of {length}; "
            f"prompts need {least} tokens."
        )
    shape = (model.spec.n_layers, max(layer.heads for layer in model.spec.layers))
    middle, chance = torch.zeros(len(batch), *shape), torch.zeros(len(batch))
    counts = torch.zeros(*shape, DEPTHS)
    rotation = Rotation(model.attachment)

    def read(prompt: int, call: AttentionCall) -> None:
        queries, keys = (rotation.back(call.layer, x.float()) for x in (call.q, call.k))
        share, found, by_chance = select(queries[0], chunk_keys(call, keys, length), length, chosen)
        middle[prompt, call.layer, : len(share)] = share
        counts[call.layer, : len(share)] += found
        chance[prompt] = by_chance

    with rotation.noting(range(model.spec.n_layers)):
        observe_prompts(model, batch, read, progress)
    return Selections(_array(middle), _array(chance), _array(counts))


def _array(values: Tensor) -> Array:
    return np.asarray(values.double().numpy())


def _tasks(model: Model, settings: Settings) -> list[Task]:
    tokenizer = needed_tokenizer(model, "chunks")
    size = (settings.chunk_prompts, settings.chunk_prompt_length, settings.seed)
    return list(text_domains(tokenizer, ("prose",), *size).values())


def _run(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Any:
    assert task is not None
    return selected_chunks(model, task.batch, settings.chunk_length, settings.chunks_selected, progress)


def _score(parts: Sequence[Part]) -> PromptScores:
    found = [part.found for part in parts]
    null = [np.broadcast_to(one.chance[:, None, None], one.middle.shape) for one in found]
    return PromptScores(np.concatenate([one.middle for one in found]), np.concatenate(null))


CHUNKS = Kind("chunks", "longer prose, cut into chunks", _tasks, _run)

LONGHEADS = Detector(
    name="longheads",
    title="Distant chunks (LongHeads)",
    kind="chunks",
    measures="share of the chunks that queries rank highest which are neither the first nor the one just before",
    null="the share among chunks drawn uniformly",
    unit="share of selections",
    positions="queries with more earlier chunks than are selected",
    threshold=None,
    paper="Lu et al. 2024, LongHeads: Multi-head attention is secretly a long context processor",
    url="https://arxiv.org/abs/2402.10685",
    score=_score,
    better="either",
    note="Descriptive. The method forces the first, the previous and the current chunk into every selection; the "
    "ranking is read here without that. Chunks of 256 tokens in the paper, fewer here. Attention inside a chunk is "
    "causal, and keys are pooled before rotation, as the query that meets them is not rotated either (neither is said "
    "outright). `selected_chunks(...).histogram()` has the depths.",
)
