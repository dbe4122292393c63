"""The table against the models themselves: what attention is called with, what is added to the residual
stream, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedModel

from workbench.dynamics.handwritten import handwritten_induction
from workbench.errors import ModelRefused
from workbench.models.architectures import (
    ARCHITECTURES,
    describe,
    ends,
    locate,
    output_weight,
    rewritten,
    written,
)
from workbench.models.fields import BOOKKEEPING
from workbench.models.spec import LayerSpec
from workbench.models.testing import MAX_POSITIONS, TINY, VOCAB_SIZE, build

KEY = "test_recorder"
MODELS: dict[str, Callable[[], PreTrainedModel]] = TINY | {
    "toy": lambda: handwritten_induction(vocab=VOCAB_SIZE, max_positions=24)
}
every_model = pytest.mark.parametrize("name", MODELS)


def tokens() -> Tensor:
    # Longer than every window; the handwritten model wants its start token first.
    ids = torch.randint(0, VOCAB_SIZE - 1, (2, 21), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = VOCAB_SIZE - 1
    return ids


def attention_by_spec(query: Tensor, key: Tensor, value: Tensor, layer: LayerSpec, sinks: Tensor | None) -> Tensor:
    """Full-matrix causal attention from what the spec says alone."""
    key, value = (x.repeat_interleave(layer.group, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    rows, columns = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None, :]
    visible = columns <= rows
    if layer.window is not None:
        visible &= columns > rows - layer.window
    scores = scores.masked_fill(~visible, -torch.inf)
    if layer.sinks:
        assert sinks is not None
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    pattern = scores.softmax(-1)[..., : key.shape[2]]
    return (pattern @ value).transpose(1, 2)


@contextmanager
def attention_replaced(model: PreTrainedModel, function: Callable[..., Any]) -> Iterator[None]:
    before = model.config._attn_implementation
    AttentionInterface.register(KEY, function)
    AttentionMaskInterface.register(KEY, lambda *args, **more: None)
    model.set_attn_implementation(KEY)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@every_model
def test_the_spec_is_what_attention_is_called_with(name: str) -> None:
    model = MODELS[name]()
    spec = describe(model)
    calls: list[dict[str, Any]] = []

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **more: Any) -> Any:
        assert mask is None
        calls.append({"module": module, "query": query, "key": key, "value": value, **more})
        layer = spec.layers[len(calls) - 1]
        return attention_by_spec(query, key, value, layer, more.get("s_aux")), None

    with torch.no_grad():
        expected = model(tokens()).logits
        with attention_replaced(model, record):
            logits = model(tokens()).logits

    assert len(calls) == spec.n_layers
    for call, layer, modules in zip(calls, spec.layers, locate(model), strict=True):
        assert call["module"] is modules.attention
        assert call["query"].shape == (2, layer.heads, 21, layer.head_dim)
        assert call["key"].shape == call["value"].shape == (2, layer.kv_heads, 21, layer.head_dim)
        assert call["scaling"] == layer.scale
        assert call.get("sliding_window") == layer.window
        assert call.get("softcap") == layer.softcap
        assert (call.get("s_aux") is not None) == layer.sinks
        assert not call["dropout"]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@every_model
def test_the_test_models_are_uneven_enough_to_show_mistakes(name: str) -> None:
    model = MODELS[name]()
    spec = describe(model)

    def uniform(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **more: Any) -> Any:
        flat = LayerSpec(0, spec.layers[0].heads, spec.layers[0].kv_heads, query.shape[3], scale=0.0)
        return attention_by_spec(query, key, value, flat, None), None

    with torch.no_grad():
        expected = model(tokens()).logits
        with attention_replaced(model, uniform):
            assert (model(tokens()).logits - expected).abs().max() > 0.1


def outputs_of(modules: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, name=name: seen.update(
                {name: output, f"{name} in": args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


@every_model
def test_what_attention_and_mlp_write_is_what_the_residual_stream_gains(name: str) -> None:
    model = MODELS[name]()
    spec = describe(model)
    named: dict[str, nn.Module] = {}
    for layer in locate(model):
        parts = {"block": layer.block, "attention": layer.attention_write, "mlp": layer.mlp_write}
        named |= {f"{part} {layer.index}": module for part, module in parts.items() if module is not None}
        named[f"z {layer.index}"] = layer.projection
    seen = outputs_of(named, lambda: model(tokens()))

    for modules, layer in zip(locate(model), spec.layers, strict=True):
        before = seen[f"block {layer.index} in"]
        after = written(seen[f"block {layer.index}"], before)
        gained = written(seen[f"attention {layer.index}"], before)
        assert gained.abs().max() > 0.01
        if modules.mlp_write is not None:
            gained = gained + written(seen[f"mlp {layer.index}"], before)
        torch.testing.assert_close(before + gained, after, atol=1e-5, rtol=1e-5)

        z = seen[f"z {layer.index} in"].reshape(2, 21, layer.heads, layer.head_dim)
        bias = getattr(modules.projection, "bias", None)
        by_head = torch.einsum("bqhc,hcd->bqd", z, output_weight(modules, layer))
        by_head = by_head if bias is None else by_head + bias
        torch.testing.assert_close(by_head, seen[f"z {layer.index}"], atol=1e-5, rtol=1e-5)


@every_model
def test_the_ends_make_the_first_residual_and_the_logits(name: str) -> None:
    model = MODELS[name]()
    found = ends(model)
    named = {"embedding": found.embedding, "block": locate(model)[-1].block, "out": found.unembedding}
    seen = outputs_of(named, lambda: model(tokens()))
    last = seen["block"][0] if isinstance(seen["block"], tuple) else seen["block"]
    normed = last if found.final_norm is None else found.final_norm(last)
    torch.testing.assert_close(seen["out in"], normed)
    assert seen["embedding"].shape == last.shape == (2, 21, describe(model).d_model)
    assert seen["out"].shape == (2, 21, VOCAB_SIZE)


@every_model
def test_parallel_layers_feed_the_mlp_from_before_attention(name: str) -> None:
    model = MODELS[name]()
    parallel = describe(model).parallel
    assert parallel == (name == "gpt_neox")
    layer = locate(model)[0]
    if layer.mlp is None:
        assert name == "toy"
        return
    normal = outputs_of({"mlp": layer.mlp}, lambda: model(tokens()))["mlp in"]
    hook = layer.attention_write.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    without = outputs_of({"mlp": layer.mlp}, lambda: model(tokens()))["mlp in"]
    hook.remove()
    assert torch.equal(normal, without) == parallel


@every_model
def test_rewriting_what_is_written_reaches_the_logits(name: str) -> None:
    model = MODELS[name]()
    layer = locate(model)[-1]
    module = layer.attention_write if layer.mlp_write is None else layer.mlp_write
    with torch.no_grad():
        embedded = ends(model).embedding(tokens())
        before = model(tokens()).logits
        same = module.register_forward_hook(lambda _, __, out: rewritten(out, written(out, embedded)))
        assert torch.equal(model(tokens()).logits, before)
        same.remove()
        zero = module.register_forward_hook(lambda _, __, out: rewritten(out, torch.zeros_like(embedded)))
        assert (model(tokens()).logits - before).abs().max() > 0.01
        zero.remove()


def test_layers_that_differ_are_described_one_by_one() -> None:
    windows = {name: [layer.window for layer in describe(TINY[name]()).layers] for name in TINY}
    assert windows["mistral"] == [7, 7, 7]
    assert windows["qwen2"] == [None, None, 7]
    assert windows["gemma2"] == windows["gpt_oss"] == [7, None, 7]
    assert windows["gemma3"] == [7, 7, None]
    scales = [layer.scale for layer in describe(TINY["gpt2_scaled"]()).layers]
    assert scales == pytest.approx([12**-0.5, 12**-0.5 / 2, 12**-0.5 / 3])
    qwen = describe(TINY["qwen3"]())
    assert qwen.layers[0].head_dim * qwen.layers[0].heads != qwen.d_model


def test_sizes_and_positions() -> None:
    spec = describe(TINY["llama"]())
    assert (spec.architecture, spec.d_model, spec.vocab_size) == ("llama", 48, VOCAB_SIZE)
    assert (spec.max_positions, spec.rotary) == (MAX_POSITIONS, True)
    assert [describe(TINY[name]()).rotary for name in ("gpt2", "opt")] == [False, False]


@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - {"workbench_toy"}))
def test_every_field_that_the_configuration_class_has_is_known(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    known = ARCHITECTURES[model_type].known | BOOKKEEPING
    assert set(vars(config)) <= known


LEFTOVERS = {
    "gpt2": {
        "n_ctx": 320,
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "_num_labels": 1,
    },
    "gpt_neox": {"rotary_emb_base": 10000, "torch_dtype": "float16"},
    "opt": {"prefix": "</s>", "activation_dropout": 0.0},
    "llama": {"pretraining_tp": 1, "is_llama_config": True, "rope_interleaved": False, "mystery": None},
    "gemma2": {
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window_size": 4096,
    },
    "gemma3": {"sliding_window_pattern": 6, "rope_local_base_freq": 10000.0},
    "phi3": {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "full_attn_mod": 1},
    "gpt_oss": {"initial_context_length": 4096, "experts_per_token": 4},
    "qwen3_moe": {"max_window_layers": 48},
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_leftovers_of_published_checkpoints_pass(name: str) -> None:
    factory = TINY[name]
    assert describe(factory(**LEFTOVERS[name])).layers == describe(factory()).layers  # type: ignore[call-arg]


@every_model
def test_an_unknown_field_is_refused_by_name_and_value(name: str) -> None:
    model = MODELS[name]()
    model.config.foo = 3
    with pytest.raises(ModelRefused, match="configuration field 'foo' = 3 is not known"):
        describe(model)
    model.config.foo = False
    describe(model)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gpt2", "reorder_and_upcast_attn", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "head_dim", 12),
        ("llama", "is_encoder_decoder", True),
        ("llama", "attention_chunk_size", 8192),
        ("llama", "sliding_window", 4096),
        ("llama", "return_dict", False),
        ("mistral", "layer_types", ["full_attention"] * 3),
        ("qwen2", "layer_types", ["chunked_attention"] * 3),
        ("qwen2", "dual_chunk_attention_config", {"chunk_size": 262144}),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3", "use_bidirectional_attention", True),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("opt", "do_layer_norm_before", False),
        ("opt", "word_embed_proj_dim", 32),
        ("phi3", "full_attn_mod", 2),
    ],
)
def test_values_that_we_cannot_reproduce_are_refused_by_name(name: str, field: str, value: Any) -> None:
    model = TINY[name]()
    setattr(model.config, field, value)
    with pytest.raises(ModelRefused, match=f"'{field}' = "):
        describe(model)


def test_per_layer_configurations_are_refused() -> None:
    model = TINY["llama"]()
    model.config.per_layer_config = {1: {"num_key_value_heads": 3}}
    with pytest.raises(ModelRefused, match="per_layer_config"):
        describe(model)


def test_unknown_architectures_are_refused_with_what_is_supported() -> None:
    bloom = build("bloom", hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ModelRefused, match=r"'bloom' is not supported; supported are gemma2, .*qwen3_moe"):
        describe(bloom)
    pictures = TINY["gemma3"]()
    pictures.config.model_type = "gemma3"
    with pytest.raises(ModelRefused, match=r"'gemma3' .*text part alone is supported"):
        describe(pictures)


def test_models_without_a_language_head_are_refused() -> None:
    with pytest.raises(ModelRefused, match=r"LlamaModel has no module 'model\.layers'"):
        describe(TINY["llama"]().model)
    model = TINY["llama"]()
    del model.lm_head
    with pytest.raises(ModelRefused, match="no module 'lm_head'"):
        describe(model)


def test_models_that_are_not_whole_are_refused() -> None:
    wrapped = TINY["llama"]()
    wrapped.model.layers[1].self_attn.o_proj = nn.Sequential(wrapped.model.layers[1].self_attn.o_proj)
    with pytest.raises(ModelRefused, match="layer 1: the output projection is a Sequential"):
        describe(wrapped)
    packed = TINY["llama"]()
    weight = packed.model.layers[0].self_attn.o_proj.weight
    packed.model.layers[0].self_attn.o_proj.weight = nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ModelRefused, match="packed by quantisation"):
        describe(packed)
    short = TINY["llama"]()
    short.config.num_hidden_layers = 2
    with pytest.raises(ModelRefused, match="'num_hidden_layers' = 2"):
        describe(short)
    pruned = TINY["llama"]()
    pruned.model.layers[2].self_attn.o_proj = nn.Linear(40, 48)
    with pytest.raises(ModelRefused, match="layer 2: 40 inputs"):
        describe(pruned)
    both_ways = TINY["llama"]()
    both_ways.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ModelRefused, match="layer 0 is not causal"):
        describe(both_ways)
