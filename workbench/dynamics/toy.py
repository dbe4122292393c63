"""A small transformer that attaches like any Hugging Face decoder.

Token and learned absolute position embeddings, blocks of one attention layer each and, if asked, one MLP of
ReLUs with biases (layer norms before them if asked), a final layer norm if asked, an untied unembedding; no
other biases. Attention goes through the public attention registry with the same calls as Llama's, so that
``set_attn_implementation``, hooks on the output projection, padding masks, caches and ``generate`` behave as
on a released model.

The head width, the number of key/value heads and the score scale are free, because hand-written circuits need
widths that are no divisor of the residual width, and a scale of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workbench.errors import RequestError


class ToyConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Shape of a `ToyModel`.

    ``scaling=None`` means ``head_dim ** -0.5``, ``intermediate_size=None`` no MLPs, ``final_layer_norm=None`` a
    final norm if the blocks have norms.
    """

    model_type = "workbench_toy"
    # Like every configuration it takes keywords that its signature does not list, so runtime checks of the
    # signature must leave it alone.
    __no_type_check__ = True

    vocab_size: int = 65
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 64
    scaling: float | None = None
    layer_norm: bool = True
    final_layer_norm: bool | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise RequestError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; choose a divisor."
            )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.scaling is None:
            self.scaling = self.head_dim**-0.5
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


def eager_attention(
    module: nn.Module,
    query: Float[Tensor, "prompt head query width"],
    key: Float[Tensor, "prompt kv_head key width"],
    value: Float[Tensor, "prompt kv_head key width"],
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Float[Tensor, "prompt query head width"], Float[Tensor, "prompt head query key"]]:
    """Full-matrix attention: what runs, and returns its pattern, when the implementation is ``eager``."""
    groups = cast(int, module.num_key_value_groups)
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = pattern @ value.repeat_interleave(groups, dim=1)
    return mixed.transpose(1, 2).contiguous(), pattern


class ToyAttention(nn.Module):
    """One attention layer; its input to ``output`` is z, head after head."""

    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        assert config.scaling is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.scaling
        self.is_causal = True
        width = config.hidden_size
        self.query = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=False)
        self.key = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.output = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "prompt token width"],
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "prompt token width"], Tensor | None]:
        shape = hidden_states.shape[:-1]
        heads = (*shape, -1, self.head_dim)
        query = self.query(hidden_states).view(heads).transpose(1, 2)
        key = self.key(hidden_states).view(heads).transpose(1, 2)
        value = self.value(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        mixed, pattern = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.output(mixed.reshape(*shape, -1).contiguous()), pattern


class ToyMLP(nn.Module):
    """``outward(relu(inward(x)))``, both with biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inward = nn.Linear(width, hidden)
        self.outward = nn.Linear(hidden, width)

    def forward(self, hidden_states: Float[Tensor, "prompt token width"]) -> Float[Tensor, "prompt token width"]:
        return cast(Tensor, self.outward(self.inward(hidden_states).relu()))


class ToyBlock(nn.Module):
    """Attention, then any MLP, each added to the residual stream."""

    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = _norm(config, config.layer_norm)
        self.attention = ToyAttention(config, layer_idx)
        hidden = config.intermediate_size
        self.mlp = None if hidden is None else ToyMLP(config.hidden_size, hidden)
        self.mlp_norm = None if hidden is None else _norm(config, config.layer_norm)

    def forward(
        self, hidden_states: Float[Tensor, "prompt token width"], **kwargs: Any
    ) -> tuple[Float[Tensor, "prompt token width"], Tensor | None]:
        added, pattern = self.attention(self.norm(hidden_states), **kwargs)
        hidden_states = hidden_states + added
        if self.mlp is not None and self.mlp_norm is not None:
            hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return hidden_states, pattern


def _norm(config: ToyConfig, wanted: bool | None) -> nn.Module:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if wanted else nn.Identity()


class ToyModel(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The decoder with its unembedding."""

    config_class = ToyConfig
    config: ToyConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList([ToyBlock(config, i) for i in range(config.num_hidden_layers)])
        own = config.final_layer_norm
        self.final_norm = _norm(config, config.layer_norm if own is None else own)
        self.unembedding = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.unembedding

    def forward(
        self,
        input_ids: Int[Tensor, "prompt token"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#prompt token"] | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Float[Tensor, "prompt token width"] | None = None,
        labels: Int[Tensor, "prompt token"] | None = None,
        use_cache: bool | None = False,
        output_attentions: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = cast(Tensor, self.token_embedding(input_ids))
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        position_ids = self._positions(inputs_embeds, position_ids, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden = inputs_embeds + self.position_embedding(position_ids)
        # `generate` asks for it; attention functions need not see it.
        kwargs.pop("return_dict", None)
        patterns: list[Tensor | None] = []
        for block in self.blocks:
            hidden, pattern = block(hidden, attention_mask=mask, past_key_values=past_key_values, **kwargs)
            patterns.append(pattern)
        logits = self.unembedding(self.final_norm(_kept(hidden, logits_to_keep)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            attentions=cast(tuple[torch.FloatTensor, ...], tuple(patterns)) if output_attentions else None,
        )

    def _positions(
        self,
        embedded: Float[Tensor, "prompt token width"],
        position_ids: Int[Tensor, "#prompt token"] | None,
        cache: DynamicCache | None,
    ) -> Int[Tensor, "#prompt token"]:
        seen = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + embedded.shape[1], device=embedded.device).unsqueeze(0)
        limit = self.config.max_position_embeddings
        if seen + embedded.shape[1] > limit:
            raise RequestError(
                f"{seen + embedded.shape[1]} tokens exceed the {limit} learned positions of this model; "
                "shorten the prompt or build it with a larger max_position_embeddings."
            )
        return position_ids


def _kept(
    hidden: Float[Tensor, "prompt token width"], logits_to_keep: int | Tensor
) -> Float[Tensor, "prompt kept width"]:
    """The last so many positions (0: all), the listed ones, or those listed for each prompt."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:]
    if logits_to_keep.ndim == 2:
        return hidden.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden[:, logits_to_keep]
