"""Configuration fields of Hugging Face models: which we know, and which values we refuse.

A field that is new, or that a fork of a model added, may change attention in a way that no hook can see. So
every field has to be known: either it cannot change attention, or the model's modules carry its effect
(widths, windows, scales) and `describe` reads it there. An unknown field passes only when it is off (None or
False). Fields are those of transformers 5.17 to 5.23, and leftovers that published checkpoints carry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from workbench.errors import ModelRefused

Config = Mapping[str, Any]

# Bookkeeping, token ids, plans for many devices, training and generation leftovers: no effect on what one
# forward pass computes.
BOOKKEEPING = frozenset(
    """
    _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation_internal
    _model_name_or_path _name_or_path _num_labels _output_attentions _post_init_done architectures auto_map
    base_model_ep_plan base_model_fsdp_plan base_model_pp_plan base_model_tp_plan bos_token_id
    cache_implementation chunk_size_feed_forward dtype eos_token_id finetuning_task gradient_checkpointing
    id2label initializer_range is_decoder is_encoder_decoder label2id model_type name_or_path
    output_hidden_states pad_token_id prefix problem_type quantization_config return_dict sep_token_id
    task_specific_params tie_word_embeddings tokenizer_class torch_dtype torchscript transformers.js_config
    transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache vocab_size
    """.split()
)
# Sizes, norms, activations and dropout rates (off in evaluation): the modules carry their effect.
SIZES = frozenset(
    """
    attention_bias attention_dropout head_dim hidden_act hidden_size intermediate_size max_position_embeddings
    mlp_bias num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps
    """.split()
)
# Rotary positions are in q and k before they reach the attention function.
ROTARY = frozenset(
    """
    original_max_position_embeddings partial_rotary_factor rope_interleaved rope_parameters rope_scaling
    rope_theta
    """.split()
)
LAYERED_WINDOW = frozenset(["layer_types", "max_window_layers", "sliding_window", "use_sliding_window"])
EXPERTS = frozenset(
    """
    decoder_sparse_step experts_per_token initial_context_length mlp_only_layers moe_intermediate_size
    norm_topk_prob num_experts num_experts_per_tok num_local_experts output_router_logits router_aux_loss_coef
    router_jitter_noise swiglu_alpha swiglu_limit
    """.split()
)
GEMMA = frozenset(
    """
    _sliding_window_pattern attn_logit_softcapping final_logit_softcapping hidden_activation
    query_pre_attn_scalar rope_local_base_freq sliding_window_pattern sliding_window_size
    use_bidirectional_attention
    """.split()
)
GPT2 = frozenset(
    """
    activation_function add_cross_attention attn_pdrop embd_pdrop layer_norm_epsilon n_ctx n_embd n_head
    n_inner n_layer n_positions reorder_and_upcast_attn resid_pdrop scale_attn_by_inverse_layer_idx
    scale_attn_weights summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj
    """.split()
)
GPT_NEOX = frozenset(
    """
    classifier_dropout hidden_dropout layer_norm_eps rotary_emb_base rotary_pct use_parallel_residual
    """.split()
)
OPT = frozenset(
    """
    _remove_final_layer_norm activation_dropout activation_function do_layer_norm_before dropout enable_bias
    ffn_dim init_std layer_norm_elementwise_affine layerdrop word_embed_proj_dim
    """.split()
)
PHI3 = frozenset(["embd_pdrop", "full_attn_mod", "interpolate_factor", "lm_head_bias", "resid_pdrop"])
TOY = frozenset(["final_layer_norm", "layer_norm", "layer_norm_eps", "scaling"])


@dataclass(frozen=True)
class Refusal:
    """A known field with values under which our view of the model would be wrong."""

    field: str
    wrong: Callable[[Any, Config], bool]
    reason: str


def _on(value: Any, _: Config) -> bool:
    return value is not None and value is not False


def _off(value: Any, _: Config) -> bool:
    return value is False


def _other_layers(value: Any, _: Config) -> bool:
    return value is not None and not set(value) <= {"full_attention", "sliding_attention"}


# Refused in every architecture.
GENERAL_REFUSALS = (
    Refusal("is_encoder_decoder", _on, "encoder-decoder models have cross-attention, which is not traced"),
    Refusal("add_cross_attention", _on, "cross-attention is not traced"),
    Refusal("_output_attentions", _on, "it forces the eager backend; load the model with output_attentions=False"),
    Refusal("_heterogeneity_spec", _on, "per_layer_config replaces parts of single layers"),
    Refusal("return_dict", _off, "outputs lose their names; load the model with return_dict=True"),
)
LAYER_TYPES = Refusal("layer_types", _other_layers, "only full and sliding-window attention are reproduced")
BIDIRECTIONAL = Refusal("use_bidirectional_attention", _on, "only causal attention is reproduced")
UPCAST = Refusal("reorder_and_upcast_attn", _on, "scores in float32 and weights in another type are not reproduced")
UNUSED_SOFTCAP = Refusal(
    "attn_logit_softcapping", _on, "Gemma 3's attention ignores it, so what the weights expect is unclear"
)
POST_NORM = Refusal(
    "do_layer_norm_before",
    _off,
    "the residual stream itself is normalised after every layer, so the residual sites would be wrong",
)
PROJECTED_EMBEDDING = Refusal(
    "word_embed_proj_dim",
    lambda value, config: value != config.get("hidden_size"),
    "the unembedding is not one matrix on the residual stream",
)
PARTLY_FULL = Refusal("full_attn_mod", lambda value, _: value not in (None, 1), "only 1 is known")


def check_fields(architecture: str, config: Config, known: frozenset[str], refusals: tuple[Refusal, ...] = ()) -> None:
    """Raise `ModelRefused`, by name and value, for the first field that we cannot vouch for."""
    for refusal in (*GENERAL_REFUSALS, *refusals):
        if refusal.field in config and refusal.wrong(config[refusal.field], config):
            raise ModelRefused(
                f"{architecture}: configuration field {refusal.field!r} = {config[refusal.field]!r} is not "
                f"supported: {refusal.reason}."
            )
    for name, value in config.items():
        if name not in known and value is not None and value is not False:
            raise ModelRefused(
                f"{architecture}: configuration field {name!r} = {value!r} is not known, so it may change "
                "attention in a way that would go unseen. If it cannot, delete it from the model's "
                "configuration and load again."
            )
