"""The published detection loop of retrieval heads, step by step, on a plain Hugging Face model: a reference for ours.

After `retrieval_head_detection.py` of Wu et al. 2024 (written anew): prefill of all prompt tokens but the last with
SDPA, then one token at a time with eager attention and `output_attentions`, from the last prompt token on; at each step
the heaviest key of each head, one head after the other; a hit where it lies in the needle and holds the token written.
Beside the code's counter it keeps the keys themselves, for the paper's set semantics and the activation frequency.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Loop:
    """What one trial found: tokens written, hits over the span's length, and the distinct keys that were hit."""

    written: list[int] = field(default_factory=list)
    counter: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    keys: dict[tuple[int, int], set[int]] = field(default_factory=dict)

    def shares(self, length: int) -> np.ndarray:
        """The paper's score: distinct keys over the span's length."""
        shares = np.zeros_like(self.counter)
        for place, keys in self.keys.items():
            shares[place] = len(keys) / length
        return shares


@torch.no_grad()
def published_loop(
    hf_model: Any,
    prompt: Sequence[int],
    span: tuple[int, int],
    most: int,
    stops: Collection[int],
) -> Loop:
    """One trial; the model must not be attached, or be given its attention back, while this runs."""
    ids, (start, end) = torch.tensor([list(prompt)]), span
    hf_model.set_attn_implementation("sdpa")
    cache = hf_model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    hf_model.set_attn_implementation("eager")
    inp, loop = ids[0, -1], Loop()
    for _ in range(most):
        output = hf_model(inp.view(1, 1), past_key_values=cache, use_cache=True, output_attentions=True)
        cache = output.past_key_values
        inp = output.logits[0, -1].argmax()
        loop.written.append(int(inp))
        _count(loop, output.attentions, ids[0], inp, start, end)
        if int(inp) in stops:
            break
    return loop


def _count(
    loop: Loop, attentions: Sequence[torch.Tensor], prompt: torch.Tensor, inp: Any, start: int, end: int
) -> None:
    if not loop.counter.size:
        loop.counter = np.zeros((len(attentions), attentions[0].shape[1]))
    for layer in range(len(attentions)):
        for head in range(attentions[layer].shape[1]):
            _, keys = attentions[layer][0][head][-1].topk(1)
            for key in keys:
                if start <= key < end and inp.item() == prompt[key].item():
                    loop.counter[layer, head] += 1 / (end - start)
                    loop.keys.setdefault((layer, head), set()).add(int(key))
