"""Sizes of the prompts that detectors run on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Sizes of the detectors' tasks; the defaults are the published ones where a laptop can run them.

    `bos_id` is the start token of a model that comes without a tokenizer; `published_needles` takes the three of Wu et
    al. for decoding (they need at least 256 tokens) in place of ours.
    """

    seed: int = 0
    bos_id: int | None = None
    text_prompts: int = 50
    text_length: int = 64
    plain_prompts: int = 16
    repeat_prompts: int = 10
    repeat_length: int = 50
    repeat_copies: int = 3
    needle_lengths: tuple[int, ...] = (160, 256)
    needle_depths: int = 3
    greedy_lengths: tuple[int, ...] = (160,)
    greedy_tokens: int = 50
    published_needles: bool = False
    reasoning_lengths: tuple[int, ...] = (192,)
    json_prompts: int = 6
    json_pairs: int = 5
    long_prompts: int = 4
    long_length: int = 512
    selected_keys: int = 16
    name_prompts: int = 12
    evaluator_prompts: int = 10
    evaluator_length: int = 25
    evaluator_copies: int = 4
    weight_draws: int = 99
    weight_offsets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    causal_probe: str = "induction"
    causal_prompts: int = 6
    causal_length: int = 10
    gating_steps: int = 60
    gating_masks: int = 4
    document_prompts: int = 8
    documents: int = 4
    one_hop_prompts: int = 8
    one_hop_length: int = 192
    patching_prompts: int = 3
    patching_length: int = 160
    chunk_prompts: int = 3
    chunk_prompt_length: int = 512
    chunk_length: int = 32
    chunks_selected: int = 4
    gate_prompts: int = 16
    gate_length: int = 256
    gate_steps: int = 60
    gate_sinks: int = 4
    gate_recent: int = 32

    def at_length(self, tokens: int) -> Settings:
        """The same with texts, repeated sequences and needle prompts of so many tokens."""
        return replace(
            self, text_length=tokens, repeat_length=tokens // self.repeat_copies, needle_lengths=(tokens,),
            greedy_lengths=(tokens,),
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
