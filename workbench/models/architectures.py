"""Where each architecture keeps its attention: one row a Hugging Face model type, read from its modelling
file.

`describe` gives the shape of a model, `locate` the modules that hooks go on, `ends` what stands before and
after the blocks. Per-layer values (width, scale, window, cap, sinks) are read from the attention modules
themselves, as passed to the attention function; the configuration is only checked (`fields`). What is not in
the table is refused by name.

Modules that add to the residual stream ("write") are those whose output is added unchanged: with Gemma's and
OLMo 2's norms after attention, that is the norm and not the output projection. Dropout in between is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import ModelRefused
from workbench.models import fields
from workbench.models.adapters.host import plain
from workbench.models.spec import LayerSpec, Spec


@dataclass(frozen=True)
class Architecture:
    """Paths to modules (from the model, the block or the attention module) and what the configuration may
    say.

    `head_dim`, `scale`, `window`, `softcap` and `sinks` are attribute paths on the attention module; a number
    for `scale` is what the module passes whatever its attributes say. None means that the architecture has no
    such thing. `parallel` names the configuration field that makes attention and MLP read the same residual.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    projection: str = "o_proj"
    attention_write: str = "self_attn.o_proj"
    mlp: str = "mlp"
    mlp_write: str = "mlp"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    unembedding: str = "lm_head"
    head_dim: str = "head_dim"
    scale: str | float = "scaling"
    window: str | None = None
    softcap: str | None = None
    sinks: str | None = None
    rotary: bool = True
    parallel: str | None = None
    # The implementation to load with, where the default one may drop a part of the attention: sdpa knows
    # neither softcap nor sinks, and is Gemma 2's default in some versions all the same.
    backend: str | None = None
    # The projection's weight is [in, out], as in GPT-2's Conv1D.
    transposed: bool = False
    # Paths above that some models of the type do without.
    optional: frozenset[str] = frozenset()
    known: frozenset[str] = fields.SIZES | fields.ROTARY
    refusals: tuple[fields.Refusal, ...] = ()


_LLAMA = fields.SIZES | fields.ROTARY
_GEMMA = _LLAMA | fields.GEMMA | fields.LAYERED_WINDOW

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        blocks="transformer.h",
        attention="attn",
        projection="c_proj",
        attention_write="attn.c_proj",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        rotary=False,
        transposed=True,
        known=fields.GPT2,
        refusals=(fields.UPCAST,),
    ),
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        attention="attention",
        projection="dense",
        attention_write="attention.dense",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head_dim="head_size",
        parallel="use_parallel_residual",
        known=_LLAMA | fields.GPT_NEOX,
    ),
    "opt": Architecture(
        blocks="model.decoder.layers",
        projection="out_proj",
        attention_write="self_attn.out_proj",
        # The two linear layers stand in the block itself and see all tokens in one axis.
        mlp="fc1",
        mlp_write="fc2",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        # q is scaled before the call.
        scale=1.0,
        rotary=False,
        optional=frozenset(["final_norm"]),
        known=fields.SIZES | fields.OPT,
        refusals=(fields.POST_NORM, fields.PROJECTED_EMBEDDING),
    ),
    "llama": Architecture(known=_LLAMA | frozenset(["is_llama_config", "pretraining_tp"])),
    "mistral": Architecture(window="config.sliding_window", known=_LLAMA | frozenset(["sliding_window"])),
    "mixtral": Architecture(
        window="config.sliding_window", known=_LLAMA | fields.EXPERTS | frozenset(["sliding_window"])
    ),
    "phi3": Architecture(
        window="config.sliding_window",
        known=_LLAMA | fields.PHI3 | frozenset(["sliding_window"]),
        refusals=(fields.PARTLY_FULL,),
    ),
    "qwen2": Architecture(
        window="sliding_window",
        known=_LLAMA | fields.LAYERED_WINDOW | frozenset(["use_mrope"]),
        refusals=(fields.LAYER_TYPES,),
    ),
    "qwen3": Architecture(
        window="sliding_window", known=_LLAMA | fields.LAYERED_WINDOW, refusals=(fields.LAYER_TYPES,)
    ),
    "qwen3_moe": Architecture(
        window="sliding_window",
        known=_LLAMA | fields.EXPERTS | fields.LAYERED_WINDOW - {"layer_types"},
    ),
    "gemma2": Architecture(
        window="sliding_window",
        softcap="attn_logit_softcapping",
        backend="eager",
        known=_GEMMA,
        refusals=(fields.LAYER_TYPES, fields.BIDIRECTIONAL),
        attention_write="post_attention_layernorm",
        mlp_write="post_feedforward_layernorm",
    ),
    "gemma3_text": Architecture(
        window="sliding_window",
        known=_GEMMA,
        refusals=(fields.LAYER_TYPES, fields.BIDIRECTIONAL, fields.UNUSED_SOFTCAP),
        attention_write="post_attention_layernorm",
        mlp_write="post_feedforward_layernorm",
    ),
    "olmo2": Architecture(
        attention_write="post_attention_layernorm",
        mlp_write="post_feedforward_layernorm",
        known=_LLAMA,
    ),
    "gpt_oss": Architecture(
        window="sliding_window",
        sinks="sinks",
        backend="eager",
        known=_LLAMA | fields.EXPERTS | fields.LAYERED_WINDOW,
        refusals=(fields.LAYER_TYPES,),
    ),
    # The hand-written and trained toys of `workbench.dynamics`: attention only unless a block has an MLP.
    "workbench_toy": Architecture(
        blocks="blocks",
        attention="attention",
        projection="output",
        attention_write="attention.output",
        embedding="token_embedding",
        final_norm="final_norm",
        unembedding="unembedding",
        rotary=False,
        optional=frozenset(["mlp", "mlp_write", "final_norm"]),
        known=fields.SIZES | fields.TOY,
    ),
}

# Why a type that people are likely to try is not in the table.
_WHY_NOT = {
    "gemma3": "the image-and-text model; its text part alone is supported (load it as Gemma3ForCausalLM)",
    "llama4": "attention in chunks and image input",
    "llama4_text": "attention in chunks",
    "deepseek_v2": "latent attention keeps no per-head keys",
    "deepseek_v3": "latent attention keeps no per-head keys",
    "bert": "not causal",
    "t5": "encoder-decoder",
    "mamba": "no attention",
}


@dataclass(frozen=True)
class LayerModules:
    """The modules of one layer that hooks go on.

    The input of `projection` is z, head after head. `attention_write` and `mlp_write` put out what is added
    to the residual stream; read it with `written`, as some put out pairs or flatten the token axes. `mlp`
    takes the MLP's input; both are None in attention-only layers.
    """

    index: int
    block: nn.Module
    attention: nn.Module
    projection: nn.Module
    attention_write: nn.Module
    mlp: nn.Module | None
    mlp_write: nn.Module | None
    transposed: bool


@dataclass(frozen=True)
class Ends:
    """What stands before and after the blocks; some models have no final norm."""

    embedding: nn.Module
    final_norm: nn.Module | None
    unembedding: nn.Module


def architecture_of(model_type: str) -> Architecture:
    """The row of the table, or `ModelRefused` with the supported types."""
    row = ARCHITECTURES.get(model_type)
    if row is None:
        why = f" ({_WHY_NOT[model_type]})" if model_type in _WHY_NOT else ""
        raise ModelRefused(
            f"Architecture {model_type!r}{why} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}."
        )
    return row


def describe(hf_model: nn.Module) -> Spec:
    """The shape of a model; refuses by name what cannot be reproduced."""
    config = cast(Any, hf_model).config
    name: str = config.model_type
    row = architecture_of(name)
    fields.check_fields(name, vars(config), row.known | fields.BOOKKEEPING, row.refusals)
    layers = tuple(_layer(config, row, modules) for modules in locate(hf_model))
    if len(layers) != config.num_hidden_layers:
        raise ModelRefused(
            f"{name}: the model has {len(layers)} layers, but 'num_hidden_layers' = "
            f"{config.num_hidden_layers} of them run."
        )
    ends(hf_model)
    return Spec(
        architecture=name,
        layers=layers,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        rotary=row.rotary,
        parallel=row.parallel is not None and bool(getattr(config, row.parallel)),
    )


def _layer(config: Any, row: Architecture, modules: LayerModules) -> LayerSpec:
    attention, where = plain(modules.attention), f"{config.model_type}: layer {modules.index}"
    if not getattr(attention, "is_causal", True):
        raise ModelRefused(f"{where} is not causal; only causal attention is reproduced.")
    weight = getattr(modules.projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ModelRefused(
            f"{where}: the output projection is a {type(modules.projection).__name__} without a plain "
            "floating-point weight (packed by quantisation, or wrapped by an adapter); dequantise it or "
            "merge the adapter first."
        )
    width, d_model = weight.shape if modules.transposed else weight.shape[::-1]
    head_dim = int(_attribute(attention, row.head_dim))
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    kv_heads = heads if kv_heads is None else kv_heads
    groups = int(getattr(attention, "num_key_value_groups", 1))
    if width != heads * head_dim or d_model != config.hidden_size or kv_heads * groups != heads:
        raise ModelRefused(
            f"{where}: {width} inputs and {d_model} outputs of the output projection, and groups of "
            f"{groups}, do not fit {heads} heads of width {head_dim}, {kv_heads} key/value heads and a "
            f"residual width of {config.hidden_size}. Were heads pruned, or is the layer split over devices?"
        )
    window = None if row.window is None else _attribute(attention, row.window)
    softcap = None if row.softcap is None else _attribute(attention, row.softcap)
    return LayerSpec(
        index=modules.index,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(row.scale if isinstance(row.scale, float) else _attribute(attention, row.scale)),
        window=None if window is None else int(window),
        softcap=None if softcap is None else float(softcap),
        sinks=row.sinks is not None and _attribute(attention, row.sinks) is not None,
    )


def locate(hf_model: nn.Module) -> tuple[LayerModules, ...]:
    """The modules of every layer, in order."""
    row = architecture_of(cast(Any, hf_model).config.model_type)
    return tuple(
        LayerModules(
            index=index,
            block=block,
            attention=_module(block, row.attention),
            projection=_module(block, f"{row.attention}.{row.projection}"),
            attention_write=_module(block, row.attention_write),
            mlp=_find(block, row, "mlp"),
            mlp_write=_find(block, row, "mlp_write"),
            transposed=row.transposed,
        )
        for index, block in enumerate(_module(hf_model, row.blocks).children())
    )


def ends(hf_model: nn.Module) -> Ends:
    """Embedding, final norm and unembedding."""
    row = architecture_of(cast(Any, hf_model).config.model_type)
    return Ends(
        embedding=_module(hf_model, row.embedding),
        final_norm=_find(hf_model, row, "final_norm"),
        unembedding=_module(hf_model, row.unembedding),
    )


def output_weight(modules: LayerModules, layer: LayerSpec) -> Float[Tensor, "head head_dim d_model"]:
    """The output projection's weight, head by head: `z[h] @ weight[h]` is head h's part of its output."""
    weight = cast(Tensor, modules.projection.weight)
    rows = weight if modules.transposed else weight.T
    return rows.reshape(layer.heads, layer.head_dim, -1)


def written(output: Any, like: Float[Tensor, "prompt token d_model"]) -> Float[Tensor, "prompt token d_model"]:
    """What a module adds to the residual stream: its output, a tuple's first, its token axes restored."""
    tensor = output[0] if isinstance(output, tuple) else output
    return cast(Tensor, tensor).reshape(like.shape)


def rewritten(output: Any, value: Float[Tensor, "prompt token d_model"]) -> Any:
    """`output` with `value` in place of what `written` reads, in the form that the model expects."""
    if isinstance(output, tuple):
        return (value.reshape(output[0].shape), *output[1:])
    return value.reshape(cast(Tensor, output).shape)


def _attribute(module: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), cast(Any, module))


def _module(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise ModelRefused(
            f"{type(root).__name__} has no module {path!r}. Load a causal language model with its head "
            "(AutoModelForCausalLM), with adapters merged."
        ) from None


def _find(root: nn.Module, row: Architecture, part: str) -> nn.Module | None:
    path: str = getattr(row, part)
    if part in row.optional and getattr(root, path.split(".")[0], None) is None:
        return None
    return _module(root, path)
