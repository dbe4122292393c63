"""Attribution patching of nodes, and what AtP* adds where the attention softmax or cancellation hides effects.

A node's score is its change times the gradient of the metric with respect to it (Nanda 2023; Kramar et al. 2024, arXiv
2403.00745). Nodes are what writers put out, and what readers take in: q of heads, k and v of KV heads as vectors, the
stream that an MLP or the logits read.

* QK fix: where q or k changes, the attention pattern is computed anew, and only its change goes on to first order.
* GradDrop: one backward pass for each layer in which nothing goes back through what that layer adds; the sizes of all
  these estimates are added up, so that a direct effect and one through a layer cannot cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.attribution.passes import Gradients, Part, Parts
from workbench.circuits.attribution.work import Chunk
from workbench.errors import RequestError
from workbench.models import AttentionCall

# Longer prompts would need patterns of their square in double precision.
PATTERN_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class NodeScores:
    """By token, and of all tokens at once: sums, but for keys under the QK fix, which share a softmax.

    `writers` and `readers` are `[prompt, node, token]`.
    """

    writers: Float[Tensor, "prompt writer token"]
    readers: Float[Tensor, "prompt reader token"]
    all_writers: Float[Tensor, "prompt writer"]
    all_readers: Float[Tensor, "prompt reader"]


def node_patching(chunk: Chunk, *, qk_fix: bool = False, drop: bool = False) -> NodeScores:
    """AtP, with either or both of AtP*'s corrections."""
    if qk_fix and chunk.clean_ids.shape[1] > PATTERN_TOKENS:
        raise RequestError(
            f"Prompts of {chunk.clean_ids.shape[1]} tokens: the QK fix computes whole patterns anew, up to "
            f"{PATTERN_TOKENS} tokens; use 'atp', or shorter prompts."
        )
    _, back = chunk.at_base()
    if not drop:
        return _estimate(chunk, back(None), qk_fix)
    layers = chunk.job.model.spec.n_layers
    if layers < 2:
        raise RequestError("GradDrop leaves out one layer at a time and needs two; this model has one. Use 'atp'.")
    total: list[Tensor] | None = None
    for layer in range(layers):
        one = _estimate(chunk, back(layer), qk_fix)
        sizes = [one.writers.abs(), one.readers.abs(), one.all_writers.abs(), one.all_readers.abs()]
        total = sizes if total is None else [old + new for old, new in zip(total, sizes, strict=True)]
    assert total is not None
    return NodeScores(*(value / (layers - 1) for value in total))


def _estimate(chunk: Chunk, gradients: Gradients, qk_fix: bool) -> NodeScores:
    graph = chunk.job.graph
    first: Parts = {key: (value * gradients.parts[key]).sum(-1) for key, value in chunk.change.items()}
    embed = first["embed", 0]
    prompts, tokens = embed.shape
    writers = embed.new_zeros(prompts, len(graph.writers), tokens)
    readers = embed.new_zeros(prompts, len(graph.readers), tokens)
    writers[:, 0], readers[:, -1] = embed, first["final", 0]
    joint: dict[int, Tensor] = {}
    for layer, places in enumerate(graph.layers):
        own: dict[Part, Tensor] = {part: first[part, layer] for part in ("z", "q", "k", "v")}
        if qk_fix:
            fixed, joint[layer] = _fixed(chunk, gradients, layer)
            own |= fixed
        writers[:, places.heads] = own["z"].transpose(1, 2)
        for part, where in (("q", places.q), ("k", places.k), ("v", places.v)):
            readers[:, where] = own[part].transpose(1, 2)  # type: ignore[index]
        if places.mlp.stop > places.mlp.start:
            writers[:, places.mlp_out.start] = first["mlp_out", layer]
            readers[:, places.mlp.start] = first["mlp_in", layer]
    all_readers = readers.sum(-1)
    for layer, value in joint.items():
        all_readers[:, graph.layers[layer].k] = value
    return NodeScores(writers, readers, writers.sum(-1), all_readers)


def _fixed(chunk: Chunk, gradients: Gradients, layer: int) -> tuple[Mapping[Part, Tensor], Float[Tensor, "prompt kv"]]:
    """Estimates of q and k by token under the QK fix, and of all keys of a KV head at once."""
    call = chunk.base.calls[layer]
    group = call.q.shape[1] // call.k.shape[1]
    z = gradients.parts["z", layer].transpose(1, 2).double()
    weight = z @ call.v.double().repeat_interleave(group, 1).transpose(2, 3)
    pattern = call.pattern(torch.float64)
    put = {part: chunk.put[part, layer].transpose(1, 2).to(call.q) for part in ("q", "k")}
    other = replace(call, q=put["q"]).pattern(torch.float64)
    queries = ((other - pattern) * weight).sum(-1)
    keys = ((replace(call, k=put["k"]).pattern(torch.float64) - pattern) * weight).sum((2, 3))
    alone = single_keys(call, put["k"], pattern, weight)
    dtype = chunk.there["q", layer].dtype
    grouped = alone.reshape(len(alone), -1, group, alone.shape[-1]).sum(2)
    found: Mapping[Part, Tensor] = {
        "q": queries.transpose(1, 2).to(dtype), "k": grouped.transpose(1, 2).to(dtype)
    }  # fmt: skip
    return found, keys.reshape(len(keys), -1, group).sum(2).to(dtype)


def single_keys(
    call: AttentionCall,
    put: Float[Tensor, "batch kv_head key dim"],
    pattern: Float[Tensor, "batch head query key"],
    weight: Float[Tensor, "batch head query key"],
) -> Float[Tensor, "batch head key"]:
    """What replacing one key alone does to sum(weight x pattern) over all queries, for every key: exact.

    With e the change of the key's exponentiated score, a row's sum goes from 1 to Z = 1 + p (e - 1): the key's own
    share becomes p e / Z, every other one p_j / Z (Kramar et al. 2024, section 3.1.1). No row is computed twice.
    """
    step = (_scores(call, put) - _scores(call, call.k)).clamp(max=700.0)
    grown = torch.where(pattern > 0, step.exp(), 1.0)
    # What is left to the others; where one key has almost everything, not by subtraction from 1.
    top = pattern.argmax(-1, keepdim=True)
    others = pattern.scatter(-1, top, 0.0)
    sink = torch.zeros_like(others[..., :1])
    if call.sinks is not None:
        sink = (1.0 - pattern.sum(-1, keepdim=True)).clamp(min=0.0)
    rest = (1.0 - pattern).scatter(-1, top, others.sum(-1, keepdim=True) + sink)
    sums = pattern * grown + rest
    product = pattern * weight
    others_weight = product.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    rest_weight = (product.sum(-1, keepdim=True) - product).scatter(-1, top, others_weight)
    own = (pattern * grown / sums - pattern) * weight
    return (own + (1.0 / sums - 1.0) * rest_weight).sum(2)


def _scores(call: AttentionCall, k: Tensor) -> Float[Tensor, "batch head query key"]:
    """Scores before the mask, in double precision."""
    keys = k.double().repeat_interleave(call.q.shape[1] // k.shape[1], 1)
    scores = call.q.double() @ keys.transpose(2, 3) * call.scale
    return scores if call.softcap is None else call.softcap * torch.tanh(scores / call.softcap)
