"""Which keys a query of each layer sees: windows differ by layer, and prompts begin at different columns."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.tracing import Trace


def _places(trace: Trace) -> Int[Tensor, "prompt token"]:
    """Position of each column within its prompt, -1 at padding."""
    batch = trace.batch
    place = torch.arange(batch.ids.shape[1]) - batch.starts[:, None].cpu()
    return torch.where(batch.mask.cpu(), place, -1)


def _windows(trace: Trace) -> Int[Tensor, "layer 1 1"]:
    """Keys that a query of each layer sees at most."""
    longest = trace.batch.ids.shape[1]
    return torch.tensor([min(layer.window or longest, longest) for layer in trace.spec.layers])[:, None, None]


def visible_keys(trace: Trace) -> Int[Tensor, "prompt layer 1 query"]:
    """How many keys each query sees, its own included; 0 at padding."""
    return torch.minimum(_places(trace)[:, None, None] + 1, _windows(trace))


def seeing_queries(trace: Trace) -> Int[Tensor, "prompt layer 1 key"]:
    """How many queries see each key; 0 at padding."""
    place = _places(trace)
    left = torch.where(place >= 0, trace.batch.lengths[:, None].cpu() - place, 0)
    return torch.minimum(left[:, None, None], _windows(trace))


def sees_first(trace: Trace) -> Bool[Tensor, "prompt layer 1 query"]:
    """Queries that see position 0 and at least one other key."""
    place = _places(trace)[:, None, None]
    return (place >= 1) & (place < _windows(trace))


def hides_first(trace: Trace) -> Bool[Tensor, "prompt layer 1 query"]:
    """Queries from which a window hides position 0."""
    return _places(trace)[:, None, None] >= _windows(trace)


def mean_over(
    values: Float[Tensor, "prompt layer head token"], rows: Bool[Tensor, "#prompt #layer #head token"]
) -> Float[Tensor, "prompt layer head"]:
    """Mean over chosen positions, in float64; NaN where there is none."""
    chosen = rows & ~values.isnan()
    mean: Tensor = torch.where(chosen, values.double(), 0.0).sum(-1) / chosen.sum(-1)
    return mean
