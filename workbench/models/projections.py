"""W_Q, W_K, W_V and W_O of every head, read from where each architecture keeps them, norms folded in.

Folding makes weights of a head comparable with those of another layer: what a head reads is the residual stream
divided by its length and no more.

1. A norm's gain before attention is multiplied into the rows of W_Q, W_K and W_V; where that norm also centres
   (LayerNorm), their columns are centred, which does the same.
2. Gains on q and k themselves (Qwen3, Gemma 3, OLMo 2) go into the columns of W_Q and W_K; the gain of a norm after
   the output projection (Gemma, OLMo 2) into those of W_O; the final norm's into the unembedding.
3. Biases, and the division by a length that depends on the token, are no part of a weight: `ignored` lists the
   biases that are not zero and the norms on q, k and the output whose division is dropped.

One row a model type, as in `architectures`; all matrices act on row vectors (`x @ W`), as TransformerLens has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import ModelRefused
from workbench.models.adapters import plain
from workbench.models.architectures import LayerModules, ends, output_weight
from workbench.models.spec import LayerSpec


@dataclass(frozen=True)
class Projections:
    """Paths from the block (norms) and from the attention module (the rest); None where there is no such module.

    `packing` says how one module (`query`) holds all three: apart (it does not), in three blocks q, k, v, or head by
    head. `gain_offset` is what a norm adds to its weight (1 in Gemma).
    """

    norm: str | None = "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    packing: Literal["apart", "blocks", "heads"] = "apart"
    query_norm: str | None = None
    key_norm: str | None = None
    written_norm: str | None = None
    gain_offset: float = 0.0


PROJECTIONS: dict[str, Projections] = {
    "gpt2": Projections(norm="ln_1", query="c_attn", packing="blocks"),
    "gpt_neox": Projections(query="query_key_value", packing="heads"),
    "opt": Projections(norm="self_attn_layer_norm"),
    "llama": Projections(),
    "mistral": Projections(),
    "mixtral": Projections(),
    "phi3": Projections(query="qkv_proj", packing="blocks"),
    "qwen2": Projections(),
    "qwen3": Projections(query_norm="q_norm", key_norm="k_norm"),
    "qwen3_moe": Projections(query_norm="q_norm", key_norm="k_norm"),
    "gemma2": Projections(written_norm="post_attention_layernorm", gain_offset=1.0),
    "gemma3_text": Projections(
        query_norm="q_norm", key_norm="k_norm", written_norm="post_attention_layernorm", gain_offset=1.0
    ),
    "olmo2": Projections(norm=None, query_norm="q_norm", key_norm="k_norm", written_norm="post_attention_layernorm"),
    "gpt_oss": Projections(),
    "workbench_toy": Projections(norm="norm", query="query", key="key", value="value"),
}


class LayerWeights(NamedTuple):
    """One layer's folded weights; `ignored` names what a matrix cannot hold."""

    query: Float[Tensor, "head d_model head_dim"]
    key: Float[Tensor, "kv_head d_model head_dim"]
    value: Float[Tensor, "kv_head d_model head_dim"]
    output: Float[Tensor, "head head_dim d_model"]
    ignored: tuple[str, ...]


class EndWeights(NamedTuple):
    """The embedding as it is, the unembedding with the final norm folded in."""

    embedding: Float[Tensor, "token d_model"]
    unembedding: Float[Tensor, "d_model token"]
    ignored: tuple[str, ...]


class NormGain(NamedTuple):
    """What a norm multiplies by, entry by entry, beside the length (None for nothing), and whether it centres."""

    gain: Float[Tensor, " width"] | None
    centres: bool


def layer_weights(
    architecture: str, modules: LayerModules, layer: LayerSpec, dtype: torch.dtype = torch.float32
) -> LayerWeights:
    """The folded weights of one layer, on the device where the layer is."""
    row = _row(architecture)
    query, key, value = _unpacked(row, modules, layer, dtype)
    before = _gain(_named(modules.block, row.norm), row, dtype)
    query, key, value = (_read_folded(weight, before) for weight in (query, key, value))
    query_norm, key_norm = (_named(modules.attention, path) for path in (row.query_norm, row.key_norm))
    query, key = (_gained(w, _gain(norm, row, dtype)) for w, norm in ((query, query_norm), (key, key_norm)))
    written = _named(modules.block, row.written_norm)
    after = _gain(written, row, dtype)
    output = output_weight(modules, layer).detach().to(dtype)
    if after.centres:
        output = output - output.mean(dim=-1, keepdim=True)
    if after.gain is not None:
        output = output * after.gain
    paths = (row.query,) if row.packing != "apart" else (row.query, row.key, row.value)
    candidates = {path: _named(modules.attention, path) for path in paths}
    candidates |= {"output projection": modules.projection, "norm before attention": _named(modules.block, row.norm)}
    dropped = {"length of q": query_norm, "length of k": key_norm, "length of the output": written}
    return LayerWeights(
        query, key, value, output, (*_biases(candidates), *(name for name, norm in dropped.items() if norm is not None))
    )


def end_weights(architecture: str, hf_model: nn.Module, dtype: torch.dtype = torch.float32) -> EndWeights:
    """Embedding and folded unembedding; nothing of size vocabulary squared is ever made of them."""
    found = ends(hf_model)
    gain = _gain(found.final_norm, _row(architecture), dtype)
    embedding, rows = _weight(found.embedding, dtype), _weight(found.unembedding, dtype)
    unembedding = _read_folded(rows.T[None], gain)[0]
    ignored = _biases({"unembedding": found.unembedding, "final norm": found.final_norm})
    return EndWeights(embedding, unembedding.to(embedding.device), ignored)


def norm_gain(architecture: str, norm: nn.Module | None, dtype: torch.dtype = torch.float32) -> NormGain:
    """A norm's gain as the model applies it (Gemma adds 1 to its weight)."""
    return _gain(norm, _row(architecture), dtype)


def _row(architecture: str) -> Projections:
    row = PROJECTIONS.get(architecture)
    if row is None:
        raise ModelRefused(
            f"Where {architecture!r} keeps W_Q, W_K and W_V is not known; known are {', '.join(sorted(PROJECTIONS))}."
        )
    return row


def _unpacked(
    row: Projections, modules: LayerModules, layer: LayerSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """W_Q, W_K and W_V, `[head, d_model, head_dim]` each."""
    counts, width = (layer.heads, layer.kv_heads, layer.kv_heads), layer.head_dim
    if row.packing == "apart":
        named = [cast(nn.Module, _named(modules.attention, path)) for path in (row.query, row.key, row.value)]
        parts = [_weight(module, dtype, modules.transposed) for module in named]
    else:
        rows = _weight(cast(nn.Module, _named(modules.attention, row.query)), dtype, modules.transposed)
        if row.packing == "heads":
            parts = [part.flatten(0, 1) for part in rows.reshape(layer.heads, 3, width, -1).unbind(1)]
        else:
            parts = list(torch.split(rows, [count * width for count in counts]))
    q, k, v = (part.reshape(count, width, -1).transpose(1, 2) for part, count in zip(parts, counts, strict=True))
    return q, k, v


def _read_folded(weight: Float[Tensor, "head d_model width"], norm: NormGain) -> Float[Tensor, "head d_model width"]:
    """A matrix that reads the residual stream, with the norm before it."""
    if norm.gain is not None:
        weight = weight * norm.gain[:, None]
    return weight - weight.mean(dim=1, keepdim=True) if norm.centres else weight


def _gained(weight: Float[Tensor, "head d_model width"], norm: NormGain) -> Float[Tensor, "head d_model width"]:
    """q's or k's own gain: one for all heads, or one a head (OLMo 2)."""
    return weight if norm.gain is None else weight * norm.gain.reshape(-1, 1, weight.shape[-1])


def _gain(norm: nn.Module | None, row: Projections, dtype: torch.dtype) -> NormGain:
    norm = plain(norm)
    weight = getattr(norm, "weight", None)
    gain = None if weight is None else cast(Tensor, weight).detach().to(dtype) + row.gain_offset
    return NormGain(gain, isinstance(norm, nn.LayerNorm))


def _weight(module: nn.Module, dtype: torch.dtype, transposed: bool = False) -> Float[Tensor, "out in"]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ModelRefused(
            f"A {type(module).__name__} has no plain floating-point weight (packed by quantisation, or wrapped by an "
            "adapter); dequantise it or merge the adapter first."
        )
    rows = weight.detach().to(dtype)
    return rows.T if transposed else rows


def _named(parent: nn.Module, path: str | None) -> nn.Module | None:
    return None if path is None else parent.get_submodule(path)


def _biases(modules: dict[str, nn.Module | None]) -> tuple[str, ...]:
    """Names of the biases that are not zero."""
    found = {name: getattr(module, "bias", None) for name, module in modules.items()}
    return tuple(f"bias of {name}" for name, bias in found.items() if bias is not None and bool(bias.detach().any()))
