"""Attention through a streaming mask: the first tokens and the most recent ones, renormalised.

What a head would be if its cache kept no more (StreamingLLM, arXiv 2309.17453; DuoAttention's streaming heads,
arXiv 2410.10819), without moving positions. Two exact parts, attention over a window and attention over the first few
keys, are joined by their log-sum-exps, so that no array of size N x N is made.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.kernels import StatisticsRequest
from workbench.models import AttentionCall


def streamed_output(
    call: AttentionCall, head: int, sinks: int, recent: int, first: Int[Tensor, " batch"] | None = None
) -> Float[Tensor, "batch query dim"]:
    """z of one head that sees its first `sinks` tokens and the last `recent`, itself among them.

    A window of the model's own still holds. `first` is the column of each prompt's first token, negative where a
    sliding cache no longer holds it; by default that of the first key.
    """
    kv_head = head // (call.q.shape[1] // call.k.shape[1])
    own = replace(
        call,
        q=call.q[:, head : head + 1],
        k=call.k[:, kv_head : kv_head + 1],
        v=call.v[:, kv_head : kv_head + 1],
        sinks=None,
    )
    window = recent if call.window is None else min(recent, call.window)
    near = replace(own, window=window).statistics(StatisticsRequest(output=True, lse=True))
    assert near.output is not None and near.lse is not None
    # [batch, query]; in float32 as the kernels have it.
    lse, z = near.lse[:, 0].float(), near.output[:, 0].float()
    scores, values = _first_scores(own, sinks, window, first)
    bound = torch.cat([lse[..., None], scores], dim=-1)
    if call.sinks is not None:
        learned = call.sinks[head].float().expand_as(lse)[..., None]
        total = torch.logsumexp(torch.cat([bound, learned], dim=-1), dim=-1)
    else:
        total = torch.logsumexp(bound, dim=-1)
    share = torch.exp(lse - total)[..., None]
    mass = torch.exp(scores - total[..., None])
    return (share * z + torch.einsum("b q s, b q s d -> b q d", mass, values)).to(call.q.dtype)


def _first_scores(
    call: AttentionCall, sinks: int, window: int, first: Tensor | None
) -> tuple[Float[Tensor, "batch query sink"], Float[Tensor, "batch query sink dim"]]:
    """Scores of the first keys of each prompt beyond the window (-inf where there is none), and their values."""
    batch, queries, keys = len(call.q), call.q.shape[2], call.k.shape[2]
    own = torch.arange(keys - queries, keys, device=call.q.device)[None, :, None]
    if first is None:
        first = own.new_zeros(batch) if call.key_start is None else call.key_start
    column = first.to(own)[:, None, None] + torch.arange(sinks, device=own.device)
    seen = (column >= 0) & (column <= own - window)
    if call.window is not None:
        seen = seen & (column > own - call.window)
    column = column.clamp(0, keys - 1).expand(batch, 1, sinks)[:, 0]
    spread = column[..., None].expand(-1, -1, call.k.shape[-1])
    k = call.k[:, 0].gather(1, spread).float()
    v = call.v[:, 0].gather(1, column[..., None].expand(-1, -1, call.v.shape[-1])).float()
    scores = torch.einsum("b q d, b s d -> b q s", call.q[:, 0].float(), k) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    return scores.masked_fill(~seen, float("-inf")), v[:, None].expand(-1, queries, -1, -1)
