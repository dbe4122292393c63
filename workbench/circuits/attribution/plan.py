"""How many prompts and points of integration run together, decided from the memory that is free before they run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.circuits.attribution.passes import constant_weights, run
from workbench.circuits.attribution.settings import Settings
from workbench.circuits.graph import Graph
from workbench.errors import MemoryRefused
from workbench.models import Attachment, AttentionCall
from workbench.models.memory import free_memory, size
from workbench.tracing import Model

# More tokens at once gain nothing.
TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16384}
# Share of free memory that is used where no limit is given.
SHARE = 0.5
_SAVED: weakref.WeakKeyDictionary[Attachment, dict[int, int]] = weakref.WeakKeyDictionary()


class Chunk(NamedTuple):
    """Prompts of a chunk, and points of each that run in one pass."""

    prompts: int
    points: int


def saved_bytes(model: Model, ids: Int[Tensor, "one token"]) -> int:
    """What one prompt's forward pass keeps for its gradients, measured on one such pass."""
    tokens = ids.shape[1]
    known = _SAVED.setdefault(model.attachment, {})
    if tokens not in known:
        seen: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        weights = {weight.untyped_storage().data_ptr() for weight in model.attachment.hf_model.parameters()}
        same: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
        with constant_weights(model), torch.autograd.graph.saved_tensors_hooks(keep, same):
            held = run(model, ids, AttentionCall.output)
        del held
        known[tokens] = sum(count for address, count in seen.items() if address not in weights)
    return known[tokens]


def plan(
    model: Model,
    graph: Graph,
    ids: Int[Tensor, "prompt token"],
    points: int,
    settings: Settings,
    *,
    edges: bool,
    patterns: bool,
) -> Chunk:
    """Points of one prompt first, then prompts. Raises `MemoryRefused` where one point of one prompt does not fit."""
    spec = model.spec
    prompts, tokens = ids.shape
    element = torch.finfo(model.attachment.dtype).bits // 8
    heads = max(layer.heads for layer in spec.layers)
    widths = sum((2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim + 4 * spec.d_model for layer in spec.layers)
    # Gradients of nodes, the forks of one layer (apart, pulled back, and together), logits.
    readers = max(layer.heads + 2 * layer.kv_heads for layer in spec.layers) + 1
    point = saved_bytes(model, ids[:1]) + element * tokens * widths + 4 * 4 * spec.vocab_size
    point += element * tokens * (4 * readers * spec.d_model) * edges
    # Two runs, what stands in, and the difference; patterns of one layer in double precision.
    prompt = 4 * element * tokens * widths + 8 * 10 * heads * tokens**2 * patterns
    if edges:
        prompt += element * tokens * len(graph.writers) * spec.d_model + 12 * graph.exists.size
    allowed = settings.memory_limit
    if allowed is None:
        free = free_memory(model.device)
        allowed = None if free is None else int(SHARE * free)
    most = TOKENS_AT_ONCE.get(model.device.type, TOKENS_AT_ONCE["cuda"]) // tokens
    if allowed is not None:
        if prompt + point > allowed:
            raise MemoryRefused(
                f"Attribution of one prompt of {tokens} tokens needs about {size(prompt + point)} beyond the weights, "
                f"but {size(allowed)} are allowed. Use shorter prompts, or a method without edges."
            )
        most = min(most, int((allowed - prompt) // point))
    together = max(1, min(points, most))
    fits = max(1, most // together)
    if allowed is not None:
        fits = min(fits, max(1, int(allowed // (prompt + together * point))))
    if settings.prompts_at_once is not None:
        fits = min(fits, settings.prompts_at_once)
    return Chunk(min(fits, prompts), together)
