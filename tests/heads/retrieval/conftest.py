"""Tiny models twice, attached and with eager attention of their own in float64, and a model that reads text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import workbench
from workbench.models import Batch
from workbench.models.architectures import ends, locate, output_weight
from workbench.models.testing import TINY, VOCAB_SIZE, build
from workbench.tasks import NONE, Task
from workbench.tasks.corpus import prose_text


@dataclass(frozen=True)
class Twin:
    """`model` is attached; `own` is the same model with eager attention, whose numbers are the truth."""

    model: workbench.Model
    own: Any

    def run(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Patterns `[head, query, key]`, values `[head, key, dim]` (repeated for all heads), logits; one prompt."""
        values: list[Tensor] = []
        hooks = [
            layer.attention.v_proj.register_forward_hook(lambda module, args, output: values.append(output[0]))
            for layer in locate(self.own)
            if hasattr(layer.attention, "v_proj")
        ]
        with torch.no_grad():
            found = self.own(ids[None], output_attentions=True, use_cache=False)
        for hook in hooks:
            hook.remove()
        spread = []
        for layer, value in zip(self.model.spec.layers, values, strict=False):
            by_head = value.reshape(len(ids), layer.kv_heads, layer.head_dim).transpose(0, 1)
            spread.append(by_head.repeat_interleave(layer.group, dim=0))
        return [pattern[0] for pattern in found.attentions], spread, found.logits[0]

    def output_weight(self, layer: int) -> Tensor:
        """`[head, dim, d_model]`."""
        return output_weight(locate(self.own)[layer], self.model.spec.layers[layer]).detach()

    @property
    def unembedding(self) -> Tensor:
        return ends(self.own).unembedding.weight.detach()


@cache
def _twin(name: str) -> Twin:
    own, watched = (TINY[name]().double() for _ in range(2))
    own.set_attn_implementation("eager")
    return Twin(workbench.load(watched), own)


@pytest.fixture
def twin() -> Any:
    """`twin("llama")`: a tiny model of that architecture in float64."""
    return _twin


@pytest.fixture
def random_task() -> Any:
    """`random_task(lengths, answers, **spans)`: random tokens whose last ones are the answer, then a full stop."""

    def make(lengths: list[int], answers: int = 2, seed: int = 5, **spans: list[list[int]]) -> Task:
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
        batch = Batch.from_ids(rows)
        positions = torch.tensor([list(range(length - answers - 2, length - 2)) for length in lengths])
        if not answers:
            positions = torch.full((len(lengths), 0), NONE)
        return Task(
            name="random",
            caption="Random tokens.",
            seed=seed,
            batch=batch,
            specials="none",
            answer_ids=batch.ids.gather(1, positions + 1),
            answer_positions=positions,
            spans={name: torch.tensor(bounds) for name, bounds in spans.items()},
        )

    return make


@pytest.fixture(scope="session")
def reader() -> workbench.Model:
    """A tiny Llama of random weights with a tokenizer, for what is made of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose_text()], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    model = build(
        "llama",
        vocab_size=len(wrapped),
        hidden_size=48,
        intermediate_size=64,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=1024,
    )
    return workbench.load((model, wrapped))
