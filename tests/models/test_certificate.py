"""The certificate passes on every model that we support, and each of its checks can fail."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from workbench.dynamics.handwritten import handwritten_induction
from workbench.errors import CertificateFailed
from workbench.kernels import AttentionStatistics
from workbench.models import AttentionCall, Certificate, Check, attach, attach_model
from workbench.models.architectures import describe, locate, output_weight
from workbench.models.testing import TINY, VOCAB_SIZE

NAMES = ("logits", "output", "rows", "causal", "padding left", "padding right", "edit", "no edit")
every_model = pytest.mark.parametrize("name", TINY)
Sabotage = Callable[[AttentionCall], AttentionCall]


def probe_logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.fixture(autouse=True)
def certified() -> Iterator[None]:
    """What a test registers or patches is gone for the next one."""
    yield
    attach._register()


@every_model
def test_it_passes_on_every_model(name: str) -> None:
    model = TINY[name]()
    before = probe_logits(model)
    attachment, certificate = attach_model(model)
    assert certificate.passed
    assert tuple(check.name for check in certificate.checks) == NAMES
    for check in certificate.checks:
        within = check.measured > check.tolerance if check.name == "edit" else check.measured <= check.tolerance
        assert check.passed and within
    assert certificate.as_dict()["checks"][1]["detail"].startswith("z rebuilt in float64 from q, k, v of")
    torch.testing.assert_close(probe_logits(model), before, rtol=1e-4, atol=1e-4)
    attachment.detach()
    assert torch.equal(probe_logits(model), before)


@every_model
def test_it_passes_in_bfloat16(name: str) -> None:
    """Also on mixtures of experts, where rounding sends single tokens to other experts."""
    _, certificate = attach_model(TINY[name]().to(torch.bfloat16))
    assert {check.name: check.tolerance for check in certificate.checks}["logits"] == 5e-2


@pytest.mark.parametrize(("name", "dtype"), [("gemma2", torch.float16), ("mistral", torch.float64)])
def test_it_passes_in_other_precisions(name: str, dtype: torch.dtype) -> None:
    _, certificate = attach_model(TINY[name]().to(dtype))
    output = certificate.checks[1]
    assert output.measured < (1e-2 if dtype == torch.float16 else 1e-12)


@dataclass(frozen=True)
class Altered(AttentionCall):
    """A call whose results are not quite those of the model."""

    def output(self) -> Tensor:
        return super().output() * 1.01


class NotCausal(Altered):
    def output(self) -> Tensor:
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (self.k, self.v))
        return torch.softmax(self.q @ k.transpose(2, 3) * self.scale, dim=-1) @ v


class Measured(Altered):
    """Statistics with one result changed."""

    change: Callable[[AttentionStatistics], AttentionStatistics]

    def output(self) -> Tensor:
        return AttentionCall.output(self)

    def statistics(self, *args: Any, **options: Any) -> AttentionStatistics:
        return type(self).change(super().statistics(*args, **options))


class WrongLse(Measured):
    change = staticmethod(lambda found: replace(found, lse=found.lse + 1e-3))


class MissingLse(Measured):
    change = staticmethod(lambda found: replace(found, lse=torch.full_like(found.lse, math.nan)))


class WrongOutput(Measured):
    change = staticmethod(lambda found: found if found.output is None else replace(found, output=found.output * 1.01))


def as_class(kind: type[AttentionCall]) -> Sabotage:
    return lambda call: kind(**{name: getattr(call, name) for name in call.__dataclass_fields__})


def tiled(call: AttentionCall) -> AttentionCall:
    """Query head h reads key/value head h modulo their number, instead of h divided by the group."""
    group = call.q.shape[1] // call.k.shape[1]
    return replace(call, k=call.k.repeat(1, group, 1, 1), v=call.v.repeat(1, group, 1, 1))


def cut_short(call: AttentionCall) -> AttentionCall:
    return call if call.key_end is None else replace(call, key_end=call.key_end - 1)


SABOTAGE: dict[str, tuple[str, Sabotage, set[str]]] = {
    "window one too wide": (
        "mistral", lambda call: replace(call, window=call.window + 1), {"logits", "output", "causal", "padding"},
    ),
    "window one too narrow": (
        "gpt_oss", lambda call: replace(call, window=call.window and call.window - 1),
        {"logits", "output", "causal", "padding"},
    ),
    "no softcap": ("gemma2", lambda call: replace(call, softcap=None), {"logits", "output", "causal", "padding"}),
    "no sinks": ("gpt_oss", lambda call: replace(call, sinks=None), {"logits", "output", "causal", "padding"}),
    "heads tiled": ("llama", tiled, {"logits", "output", "causal", "padding"}),
    "usual scale": (
        "gpt2_scaled", lambda call: replace(call, scale=call.q.shape[-1] ** -0.5),
        {"logits", "output", "causal", "padding"},
    ),
    "padding is seen": (
        "llama", lambda call: replace(call, key_start=None, key_end=None), {"padding left"},
    ),
    "padding one too long": ("llama", cut_short, {"padding"}),
    "not causal": ("qwen3", as_class(NotCausal), {"causal", "padding", "no edit"}),
    "another z": ("llama", as_class(Altered), {"causal", "padding", "no edit"}),
    "another z beside statistics": ("llama", as_class(WrongOutput), {"logits"}),
    "another log-sum-exp": ("llama", as_class(WrongLse), {"rows"}),
    "no log-sum-exp": ("gemma3", as_class(MissingLse), {"rows"}),
}  # fmt: skip


def failed(message: str) -> set[str]:
    """Names of the failed checks; "padding" for both sides."""
    found = set(re.findall(r"(?:model\. |; )([a-z ]+): [\w.+-]+ \(tolerance", message))
    assert found <= set(NAMES)
    both = {"padding left", "padding right"}
    return (found - both) | {"padding"} if both <= found else found


def sabotage(monkeypatch: pytest.MonkeyPatch, change: Sabotage) -> None:
    monkeypatch.setattr(attach, "AttentionCall", lambda *args, **options: change(AttentionCall(*args, **options)))


@pytest.mark.parametrize("what", SABOTAGE)
def test_each_mistake_is_found_and_the_model_given_back(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change, expected = SABOTAGE[what]
    model = TINY[name]()
    implementation, before = model.config._attn_implementation, probe_logits(model)
    sabotage(monkeypatch, change)
    with pytest.raises(CertificateFailed) as caught:
        attach_model(model)
    assert failed(str(caught.value)) - {"no edit"} == expected - {"no edit"}
    assert "no edit" in failed(str(caught.value)) or expected in ({"padding left"}, {"padding"}, {"logits"}, {"rows"})
    # While the error, and with it every frame, is still held.
    assert model.config._attn_implementation == implementation != attach.KEY
    assert torch.equal(probe_logits(model), before)
    monkeypatch.undo()
    assert attach_model(model)[1].passed


@pytest.mark.parametrize("what", ["window one too wide", "no sinks", "no softcap", "heads tiled", "padding is seen"])
def test_mistakes_are_found_in_bfloat16(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change, expected = SABOTAGE[what]
    model = TINY[name]().to(torch.bfloat16)
    sabotage(monkeypatch, change)
    with pytest.raises(CertificateFailed) as caught:
        attach_model(model)
    assert expected <= failed(str(caught.value))


def test_a_model_that_does_not_use_z_is_refused() -> None:
    model = scaled_projections(TINY["llama"](), 0.0)
    with pytest.raises(
        CertificateFailed, match=r"edit: 0 \(tolerance 1.2e-06\), least change of the logits when a layer"
    ):
        attach_model(model)


def test_a_layer_that_writes_nothing_is_no_reason_to_refuse() -> None:
    model = TINY["llama"]()
    with torch.no_grad():
        locate(model)[1].projection.weight.zero_()
    assert attach_model(model)[1].passed


def scaled_projections(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    with torch.no_grad():
        for modules in locate(model):
            modules.projection.weight.mul_(factor)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weak_and_dead_heads_are_no_reason_to_refuse(dtype: torch.dtype) -> None:
    model = scaled_projections(TINY["llama"](), 1e-3)
    with torch.no_grad():
        for modules, layer in zip(locate(model), describe(model).layers, strict=True):
            output_weight(modules, layer)[0] = 0
    _, certificate = attach_model(model.to(dtype))
    edit = certificate.checks[NAMES.index("edit")]
    # Far less than one step of bfloat16 in the largest logit.
    assert 1e-5 < edit.measured < torch.finfo(torch.bfloat16).eps


def test_logits_in_the_hundreds_are_rounded_like_that() -> None:
    model = TINY["qwen2"]()
    with torch.no_grad():
        for modules in locate(model):
            modules.attention.q_proj.weight.mul_(6)
    _, certificate = attach_model(model)
    rows = certificate.checks[NAMES.index("rows")]
    assert rows.measured <= rows.tolerance < 1e-3
    assert rows.tolerance > 2e-5


@pytest.mark.parametrize(("vocab", "positions"), [(9, 14), (400, 16), (5, 4)])
def test_the_handwritten_model_passes(vocab: int, positions: int) -> None:
    """Its second layer only answers tokens that were seen before: the probe repeats some."""
    attach_model(handwritten_induction(vocab=vocab, max_positions=positions))


def test_windows_longer_than_the_probe_are_said_to_be_unproven() -> None:
    details = [attach_model(TINY["mistral"](sliding_window=window))[1].checks[1].detail for window in (7, 47, 48, 100)]
    note = "; windows of {} keys are longer than the probe and were not exercised"
    assert [detail.partition("layers")[2] for detail in details] == ["", "", note.format(48), note.format(100)]


def test_require_names_every_failed_check() -> None:
    good = Check("rows", 0.0, 1e-5, True, "fine")
    bad = [partial(Check, passed=False, detail="why")(name, 0.5, 0.25) for name in ("logits", "causal")]
    Certificate((good,)).require()
    with pytest.raises(CertificateFailed, match=r"logits: 0.5 \(tolerance 0.25\), why; causal: 0.5") as caught:
        Certificate((good, *bad)).require()
    assert "rows" not in str(caught.value)
