"""Attaching, observing, detaching: one model object changes, and only while it is attached."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from workbench.errors import ModelRefused, RequestError
from workbench.models import Attachment, AttentionCall, attach, attach_model
from workbench.models.architectures import locate
from workbench.models.testing import TINY, VOCAB_SIZE

every_model = pytest.mark.parametrize("name", TINY)


def tokens(prompts: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (prompts, length), generator=torch.Generator().manual_seed(2))


def logits(model: PreTrainedModel, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False, **options).logits


def zeros(call: AttentionCall) -> Tensor:
    return torch.zeros_like(call.output())


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_attached_model_computes_what_it_did(name: str, side: str) -> None:
    """Without an observer, under padding, and as Hugging Face's own `generate` runs it, sliding caches and all."""
    model, own = TINY[name](), TINY[name]()
    attachment = Attachment(model)
    mask = torch.ones_like(tokens())
    mask[0, slice(0, 6) if side == "left" else slice(14, 20)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found, truth = (logits(x, attention_mask=mask, position_ids=positions)[mask.bool()] for x in (model, own))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    if side == "left":
        options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
        assert model.generate(tokens(), **options).tolist() == own.generate(tokens(), **options).tolist()
    attachment.detach()
    assert torch.equal(logits(model), logits(own))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_detaching_restores_what_was_chosen(implementation: str) -> None:
    model = TINY["mistral"]()
    model.set_attn_implementation(implementation)
    before = logits(model)
    attachment = Attachment(model)
    assert model.config._attn_implementation == attach.KEY
    attachment.detach()
    attachment.detach()
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model), before)
    again = Attachment(model)
    assert model.config._attn_implementation == attach.KEY
    again.detach()


def test_dropping_the_attachment_detaches() -> None:
    model = TINY["llama"]()
    before = model.config._attn_implementation
    attachment, certificate = attach_model(model)
    assert certificate.passed and model.config._attn_implementation == attach.KEY
    del attachment
    gc.collect()
    assert model.config._attn_implementation == before
    attach_model(model)


def test_attached_twice_is_refused() -> None:
    model = TINY["llama"]()
    first, _ = attach_model(model)
    for make in (Attachment, attach_model):
        with pytest.raises(RequestError, match="is attached already; use that attachment, detach"):
            make(model)
    with first.observe(zeros):
        assert logits(model).any()
    first.detach()
    attach_model(model)


def test_a_copy_of_an_attached_model_says_what_to_do() -> None:
    model = TINY["llama"]()
    attachment, _ = attach_model(model)
    twin = copy.deepcopy(model)
    for run in (logits, attach_model):
        with pytest.raises(RequestError, match=r"without an attachment \(a copy.*set_attn_implementation\('sdpa'\)"):
            run(twin)
    twin.set_attn_implementation("sdpa")
    other, _ = attach_model(twin)
    torch.testing.assert_close(logits(twin), logits(model))
    assert attachment.hf_model is not other.hf_model


def test_models_that_share_a_configuration_object_say_so() -> None:
    model = TINY["llama"]()
    twin = type(model)(model.config).eval()
    attachment = Attachment(model)
    with pytest.raises(RequestError, match="shares its configuration"):
        logits(twin)
    with pytest.raises(RequestError, match="shares its configuration"):
        Attachment(twin)
    attachment.detach()
    assert logits(twin).isfinite().all()


def test_two_models_at_once_do_not_disturb_each_other() -> None:
    one, two = TINY["llama"](), TINY["gpt_oss"]()
    before = [logits(one), logits(two)]
    first, second = Attachment(one), Attachment(two)
    seen: list[str] = []

    def watch(name: str) -> Callable[[AttentionCall], Tensor]:
        return lambda call: (seen.append(f"{name}{call.layer}"), call.output())[1]

    with first.observe(watch("one")):
        torch.testing.assert_close(logits(two), before[1], rtol=1e-4, atol=1e-4)
        assert seen == []
        with second.observe(watch("two")):
            logits(one)
            logits(two)
    assert seen == ["one0", "one1", "one2", "two0", "two1", "two2"]
    first.detach()
    torch.testing.assert_close(logits(two), before[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(one), before[0])
    assert two.config._attn_implementation == attach.KEY


def test_one_observer_at_a_time_and_none_after_an_error() -> None:
    model = TINY["llama"]()
    attachment = Attachment(model)
    clean = logits(model)

    def broken(call: AttentionCall) -> Tensor:
        raise KeyError("broken")

    with attachment.observe(zeros), pytest.raises(RequestError, match="traced already"), attachment.observe(zeros):
        pass
    with pytest.raises(KeyError), attachment.observe(broken):
        logits(model)
    assert torch.equal(logits(model), clean)
    attachment.detach()
    with pytest.raises(RequestError, match="detached; load it again"), attachment.observe(zeros):
        pass


@pytest.mark.parametrize(("name", "options"), [("gpt2", {}), ("opt", {}), ("llama", {"attention_dropout": 0.2})])
def test_dropout_is_refused_before_attaching(name: str, options: dict[str, float]) -> None:
    model = TINY[name](**options).train()
    implementation = model.config._attn_implementation
    with pytest.raises(RequestError, match=r"in training mode and two runs of it differ.*call model.eval\(\)"):
        attach_model(model)
    assert model.config._attn_implementation == implementation
    attach_model(model.eval())


def test_training_mode_without_dropout_is_fine_and_attention_dropout_never() -> None:
    model = TINY["llama"]().train()
    attachment, _ = attach_model(model)
    for modules in attachment.layers:
        modules.attention.attention_dropout = 0.2
    with pytest.raises(RequestError, match=r"Attention dropout is on; call model.eval\(\)"):
        logits(model)
    model.eval()
    assert logits(model).isfinite().all()


def test_an_error_on_the_way_gives_the_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama"]()
    implementation = model.config._attn_implementation

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.models.certificate._causal", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        attach_model(model)
    assert caught.tb is not None and model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"position_bias": torch.zeros(1)}, "'position_bias'"),
        ({"alibi": 1}, "'alibi'"),
        ({"is_causal": False}, "causality"),
    ],
)
def test_what_we_do_not_reproduce_is_refused_by_name(
    extra: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY["llama"]()
    implementation, attention = model.config._attn_implementation, locate(model)[1].attention
    original = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **options: original(*args, **options, **extra))
    with pytest.raises(ModelRefused, match=f"Layer 1 .*{named}"):
        attach_model(model)
    assert model.config._attn_implementation == implementation
    # What is not set, or off, is no reason.
    harmless = {"position_bias": None, "alibi": False, "output_attentions": False}
    monkeypatch.setattr(attention, "forward", lambda *args, **options: original(*args, **{**options, **harmless}))
    attach_model(model)


def test_masks_that_are_no_padding_are_refused() -> None:
    model = TINY["llama"]()
    attachment = Attachment(model)
    holes = torch.ones_like(tokens())
    holes[1, 5] = 0
    with pytest.raises(RequestError, match="Padding stands between real tokens"):
        logits(model, attention_mask=holes)
    whole = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    with pytest.raises(RequestError, match=r"mask of shape \(2, 1, 20, 20\) for 20 keys"):
        logits(model, attention_mask=whole)
    attachment.detach()


@pytest.mark.parametrize("padded", [True, False])
def test_keys_that_are_not_there_yet_are_not_taken_for_real_ones(padded: bool) -> None:
    model, mask = TINY["llama"](), torch.ones_like(tokens())
    mask[0, :3] = 0 if padded else 1
    attachment = Attachment(model)
    options = {"cache_implementation": "static", "disable_compile": True, "max_new_tokens": 3}
    with pytest.raises(RequestError, match="A cache of fixed size gives 22 keys to 20 tokens"):
        model.generate(tokens(), attention_mask=mask, **options)
    attachment.detach()
    assert model.generate(tokens(), attention_mask=mask, **options).shape == (2, 23)


def test_a_model_without_the_attention_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama"]()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ModelRefused, match="LlamaForCausalLM does not take its attention from transformers'"):
        Attachment(model)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_gradients_are_the_models_own(name: str) -> None:
    grads = []
    for attached in (True, False):
        model = TINY[name]()
        attachment = Attachment(model) if attached else None
        model(tokens(), use_cache=False).logits.square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        del attachment
    assert len(grads[0]) == len(grads[1]) > 10
    for found, truth in zip(*grads, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4 * max(1.0, float(truth.abs().max())))


def test_calls_are_what_the_layer_was_called_with() -> None:
    model = TINY["gpt_oss"]()
    attachment, calls = Attachment(model), []
    mask = torch.ones_like(tokens())
    mask[0, :6] = mask[1, 15:] = 0
    with attachment.observe(lambda call: (calls.append(call), call.output())[1]):
        logits(model, attention_mask=mask)
    assert [call.layer for call in calls] == [0, 1, 2]
    assert [call.window for call in calls] == [7, None, 7]
    for call, modules in zip(calls, locate(model), strict=True):
        assert call.q.shape == (2, 8, 20, 8) and call.k.shape == call.v.shape == (2, 2, 20, 8)
        assert torch.equal(call.sinks, modules.attention.sinks)
        assert call.key_start.tolist() == [6, 0] and call.key_end.tolist() == [20, 15]
        pattern = call.pattern(torch.float64)
        assert pattern.dtype == torch.float64
        with torch.no_grad():
            z, output, last = pattern @ call.v.double().repeat_interleave(4, dim=1), call.output(), call.last_query()
            torch.testing.assert_close(output.double(), z, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(last.output()[0], output[0, :, -1:], rtol=1e-5, atol=1e-5)
    assert attachment.device.type == "cpu" and attachment.dtype == torch.float32


def test_the_factory_of_transformers_is_left_alone() -> None:
    """A model made after another was attached starts with its own attention."""
    model = TINY["llama"]()
    attachment = Attachment(model)
    other = AutoModelForCausalLM.from_config(TINY["llama"]().config)
    assert other.config._attn_implementation != attach.KEY
    assert logits(other.eval()).isfinite().all()
    attachment.detach()
