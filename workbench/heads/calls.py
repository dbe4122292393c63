"""Attention calls of one prompt at a time, for detectors that need more of a call than a statistic of its rows.

A trace reads the same functionals of every row. Some scores live on a few rows at the end of a prompt (a query, an
answer) and need their values too: those rows alone, against all keys, cost what as many decoding steps cost.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Progress
from workbench.models import AttentionCall, Batch
from workbench.models.memory import free_memory
from workbench.tracing import Model

ReadCall = Callable[[int, AttentionCall], None]


def needed_tokenizer(model: Model, kind: str) -> Any:
    """The model's tokenizer, which prompts of text need."""
    if model.tokenizer is None:
        raise RequestError(f"Detectors on {kind} prompts need a tokenizer; load the model with one.")
    return model.tokenizer


def unpadded(batch: Batch, prompt: int) -> Tensor:
    """The real ids of one prompt, `[1, token]`."""
    return batch.ids[prompt][batch.mask[prompt]][None]


@torch.no_grad()
def observe_prompts(model: Model, batch: Batch, read: ReadCall, progress: Progress | None = None) -> None:
    """Run each prompt alone, padding left out; `read(prompt, call)` sees the attention of every layer in turn.

    Positions in a call count from the prompt's first real token: the batch's columns, if it is padded on the right.
    The model goes on with its own z. Raises `MemoryRefused` before anything runs.
    """
    longest = Batch.from_ids([unpadded(batch, int(batch.lengths.argmax()))[0].tolist()])
    model.predict_memory(longest).check(free_memory(model.device), "Ask for shorter prompts in Settings.")
    for prompt in range(len(batch)):
        ids = unpadded(batch, prompt).to(model.device)

        def watch(call: AttentionCall, prompt: int = prompt) -> Tensor:
            read(prompt, call)
            return call.output()

        with ExitStack() as stack:
            stack.enter_context(model.attachment.observe(watch))
            last = torch.tensor([ids.shape[1] - 1], device=model.device)
            model.attachment.hf_model(ids, use_cache=False, logits_to_keep=last)
        if progress is not None:
            progress(prompt + 1, len(batch))


def rows_from(call: AttentionCall, first: int) -> AttentionCall:
    """The same call for its rows from `first` to the last, what as many decoding steps would have seen."""
    return replace(call, q=call.q[:, :, first:])
