"""Small models with random weights, one or more an architecture, made offline from a fixed seed.

For the tests of this package and of whatever is built on it: `TINY["llama"]()` is a `LlamaForCausalLM` that
is sharp enough (weights far from zero, norms and biases off their initial values) for attention to be uneven
and for mistakes to show. Vocabulary 101, up to 320 positions, float32, evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from workbench.models.architectures import ARCHITECTURES

VOCAB_SIZE = 101
MAX_POSITIONS = 320

_COMMON: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ROTARY: dict[str, Any] = {"max_position_embeddings": MAX_POSITIONS, "num_hidden_layers": 3}
_GPT2: dict[str, Any] = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": MAX_POSITIONS}
_GPT_NEOX: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "rotary_pct": 0.25,
}


def _heads(query: int, kv: int, width: int = 48) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 64,
        "num_attention_heads": query,
        "num_key_value_heads": kv,
    }


def _layers(*windowed: bool) -> dict[str, Any]:
    kinds = ["sliding_attention" if one else "full_attention" for one in windowed]
    return {"layer_types": kinds, "num_hidden_layers": len(kinds), "sliding_window": 7}


def build(model_type: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model of any type in `transformers`; leaves torch's own random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config_class: Any = CONFIG_MAPPING[model_type]
        factory: Any = AutoModelForCausalLM
        backend = ARCHITECTURES[model_type].backend if model_type in ARCHITECTURES else None
        model: nn.Module = factory.from_config(config_class(**_COMMON | config), attn_implementation=backend)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 1.0 if name.endswith("sinks") else 0.2 if parameter.ndim > 1 else 0.1
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return cast(PreTrainedModel, model.eval())


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": partial(build, "gpt2", **_GPT2),
    "gpt2_scaled": partial(build, "gpt2", **_GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": partial(build, "gpt_neox", **_ROTARY, **_GPT_NEOX),
    "gpt_neox_sequential": partial(build, "gpt_neox", **_ROTARY, **_GPT_NEOX, use_parallel_residual=False),
    "opt": partial(
        build,
        "opt",
        hidden_size=48,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
    ),
    "llama": partial(build, "llama", **_ROTARY, **_heads(6, 2)),
    "mistral": partial(build, "mistral", **_ROTARY, **_heads(8, 1, width=64), sliding_window=7),
    "qwen2": partial(
        build,
        "qwen2",
        **_ROTARY,
        **_heads(4, 2),
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=2,
    ),
    "qwen3": partial(build, "qwen3", **_ROTARY, **_heads(4, 2), head_dim=16),
    "gemma2": partial(
        build,
        "gemma2",
        **_heads(4, 2),
        **_layers(True, False, True),
        max_position_embeddings=MAX_POSITIONS,
        head_dim=16,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=20.0,
    ),
    "gemma3": partial(
        build,
        "gemma3_text",
        **_heads(4, 1),
        **_layers(True, True, False),
        max_position_embeddings=MAX_POSITIONS,
        head_dim=16,
        query_pre_attn_scalar=10,
    ),
    "phi3": partial(build, "phi3", **_ROTARY, **_heads(6, 2), partial_rotary_factor=0.5),
    "olmo2": partial(build, "olmo2", **_ROTARY, **_heads(4, 2)),
    "gpt_oss": partial(
        build,
        "gpt_oss",
        **_heads(8, 2, width=64),
        **_layers(True, False, True),
        max_position_embeddings=MAX_POSITIONS,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "mixtral": partial(build, "mixtral", **_ROTARY, **_heads(4, 2), num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": partial(
        build,
        "qwen3_moe",
        **_ROTARY,
        **_heads(4, 2),
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
}
