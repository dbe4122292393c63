"""How many rows run together, from the memory that is free: decided before anything is allocated."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from workbench.circuits.blocks import LOGIT_ROWS
from workbench.errors import MemoryRefused
from workbench.models import Attachment
from workbench.models.memory import BodyCost, free_memory, measure_body, size
from workbench.tracing import Model
from workbench.tracing.sites import Site, site_shape

# More rows than this gain nothing.
ROWS_AT_ONCE = {"cpu": 2048, "cuda": 65536}
FLOAT = 4
_COSTS: weakref.WeakKeyDictionary[Attachment, BodyCost] = weakref.WeakKeyDictionary()


def recorded_bytes(model: Model, sites: Iterable[tuple[Site, int]], prompts: int, tokens: int) -> int:
    """What recorded sites of a run take."""
    element = torch.finfo(model.attachment.dtype).bits // 8
    total = prompts * model.spec.vocab_size * FLOAT
    for site, layer in set(sites):
        entries = 1
        for count in site_shape(site, model.spec, layer, prompts, tokens):
            entries *= count
        total += entries * (FLOAT if site == "pattern" else element)
    return total


def row_bytes(model: Model, tokens: int) -> int:
    """The most that one row takes in a block call, if it is its prompt's only one: then all keys are copied for it.

    What the model's own layers hold is measured; the rest follows from shapes: the stream before, during and after,
    q, z and keys and values as they are, laid out, and joined with those before.
    """
    attachment, spec = model.attachment, model.spec
    if attachment not in _COSTS:
        _COSTS[attachment] = measure_body(attachment)
    element = torch.finfo(attachment.dtype).bits // 8
    body = max(mark.peak.per_token + mark.peak.per_position for mark in _COSTS[attachment].marks)
    widest = max(
        6 * layer.heads * layer.head_dim + 4 * (tokens + 1) * layer.kv_heads * layer.head_dim for layer in spec.layers
    )
    return int(max(0.0, body)) + (4 * spec.d_model + widest) * element


def rows_at_once(
    model: Model, held: int, prompts: int, tokens: int, rows: int | None, limit: int | None, explicit: bool
) -> int:
    """Rows of a block call: as many as fit beside the `held` bytes of recorded runs, up to what still gains.

    Raises `MemoryRefused` where one prompt does not fit.
    """
    allowed = free_memory(model.device) if limit is None else limit
    most = rows or ROWS_AT_ONCE.get(model.device.type, ROWS_AT_ONCE["cuda"])
    if allowed is None:
        return most
    each = row_bytes(model, tokens)
    if explicit:
        # Patterns in double precision, and what they are made with.
        each += 6 * 8 * max(layer.heads for layer in model.spec.layers) * tokens
    logits = LOGIT_ROWS * model.spec.vocab_size * 3 * FLOAT
    room = allowed - held - logits
    if room < each * tokens:
        need = held + logits + each * tokens
        raise MemoryRefused(
            f"Patching {prompts} prompts of {tokens} tokens needs about {size(need)} beyond the weights ({size(held)} "
            f"are recorded runs), but {size(allowed)} are allowed. Patch fewer prompts at a time, or cut them."
        )
    return int(min(most, room // each))
