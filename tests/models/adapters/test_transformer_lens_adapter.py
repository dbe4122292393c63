"""Bridges of TransformerLens: what is attached to, what fires, what is refused, and that all of it is given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import workbench
from workbench import statistics
from workbench.circuits import patch_activations
from workbench.errors import MissingExtra, ModelRefused, RequestError
from workbench.models import Batch
from workbench.models.testing import TINY, VOCAB_SIZE
from workbench.tasks.pairs import PairTask

pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
from workbench.models.adapters.transformer_lens import bridge_around


def ids(prompts: int = 2, tokens: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (prompts, tokens), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=["gpt2", "llama", "qwen2"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return bridge_around(TINY[request.param](), None)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_certified_against_its_bridge(name: str) -> None:
    model = workbench.load(bridge_around(TINY[name](), None))
    checks = {check.name: check for check in model.certificate.checks}
    assert model.adapter == "transformer-lens" and checks["transformer-lens logits"].passed
    # OPT's bridge gives no patterns.
    assert ("transformer-lens patterns" in checks) == (name != "opt")
    assert model.source.weights_sha256 == workbench.load(TINY[name]()).source.weights_sha256


def test_the_bridge_gets_its_own_computation_back(bridge) -> None:
    before, cache = bridge.run_with_cache(ids())
    modules = [name for name, _ in bridge.original_model.named_modules()]
    chosen = bridge.original_model.config._attn_implementation
    model = workbench.load(bridge)
    assert "blocks.0.attn.hook_pattern" not in bridge.run_with_cache(ids())[1]
    torch.testing.assert_close(bridge(ids()), before, rtol=0, atol=1e-4)
    model.detach()
    after, again = bridge.run_with_cache(ids())
    assert torch.equal(after, before)
    assert torch.equal(again["blocks.0.attn.hook_pattern"], cache["blocks.0.attn.hook_pattern"])
    assert [name for name, _ in bridge.original_model.named_modules()] == modules
    assert bridge.original_model.config._attn_implementation == chosen


def test_hooks_of_the_user_fire_in_a_trace(bridge) -> None:
    model, seen = workbench.load(bridge), []
    clean = model.trace(ids(), logits="last", sites=["z"])

    def look(value, hook):
        seen.append((hook.name, tuple(value.shape[:2])))

    names = [
        f"blocks.1.{name}" for name in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "mlp.hook_out")
    ]
    for name in names:
        bridge.add_hook(name, look)
    model.trace(ids())
    assert {name for name, _ in seen} >= {bridge_name(name) for name in names}
    assert {shape for _, shape in seen} == {(2, 11)}
    bridge.reset_hooks()

    def zero(value, hook):
        value[:, :, 1] = 0
        return value

    bridge.add_hook("blocks.1.attn.hook_z", zero)
    hooked = model.trace(ids(), logits="last").logits
    bridge.reset_hooks()
    ablated = model.trace(ids(), edits=workbench.ablate("L1H1"), logits="last").logits
    torch.testing.assert_close(hooked, ablated, rtol=0, atol=1e-4)
    assert (hooked - clean.logits).abs().max() > 1e-2


def bridge_name(alias: str) -> str:
    """What the hook point behind an alias is called."""
    for one, name in (
        ("hook_q", "q.hook_out"),
        ("hook_k", "k.hook_out"),
        ("hook_v", "v.hook_out"),
        ("hook_z", "o.hook_in"),
    ):
        alias = alias.replace(f"attn.{one}", f"attn.{name}")
    return alias


def test_patching_with_a_hook_in_place_runs_whole_passes(bridge) -> None:
    model = workbench.load(bridge)
    batch = Batch.from_ids(ids())
    corrupt = Batch.from_ids((ids() + 1).clamp(max=VOCAB_SIZE - 1))
    last = torch.full((2,), 10)
    task = PairTask("t", "t", 0, "none", batch, corrupt, last[:, None] + 5, last[:, None] + 6, last, roles={})

    def double(value, hook):
        return 2 * value

    def values(model):
        return patch_activations(model, task, "z", "head", direction="denoising").values["denoising"]

    plain = values(model)
    bridge.add_hook("blocks.0.mlp.hook_out", double)
    hooked = values(model)
    effects = patch_activations(model, task, "z", "head", direction="denoising")
    assert "whole" in effects.route or "pass" in effects.route, effects.route
    # Against the patch by hand.
    z = model.trace(batch, sites=["blocks.2.attn.hook_z"]).site("z", 2)
    edit = workbench.patch("z", z, layer=2, heads=[0])
    logits = model.trace(corrupt, edits=edit, logits="last").logits[:, 0]
    found = hooked[[change[0].node for change in effects.changes].index("L2H0")]
    torch.testing.assert_close(torch.tensor(found).float(), task.score(logits), rtol=0, atol=1e-4)
    bridge.reset_hooks()
    assert abs(plain - hooked).max() > 1e-3


@pytest.mark.parametrize("name", ["attn.hook_pattern", "attn.hook_attn_scores"])
def test_hooks_that_would_stay_silent_are_refused(bridge, name: str) -> None:
    model = workbench.load(bridge)
    bridge.add_hook(f"blocks.1.{name}", lambda value, hook: None)
    with pytest.raises(RequestError, match=rf"a hook on blocks\.1\.{name}, which does not fire .*reset_hooks"):
        model.trace(ids())
    bridge.reset_hooks()
    assert model.trace(ids(), statistics=statistics.entropy())["entropy"].shape == (
        2,
        3,
        len(model.spec.heads()) // 3,
        11,
    )


def test_flags_without_effect_are_refused(bridge) -> None:
    model = workbench.load(bridge)
    bridge.set_use_attn_result(True)
    with pytest.raises(RequestError, match="use_attn_result has no effect"):
        model.trace(ids())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_processed_weights_are_refused(name: str) -> None:
    bridge = bridge_around(TINY[name](), None)
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ModelRefused, match=r"weights were processed .* leave out enable_compatibility_mode"):
        workbench.load(bridge)


def test_a_bridge_made_over_a_loaded_model(unchecked_signatures) -> None:
    model = workbench.load(TINY["llama"](), through="transformer-lens")
    assert model.adapter == "transformer-lens"
    assert workbench.load(TINY["llama"]()).adapter == "native"
    with pytest.raises(
        RequestError, match="through='lens' is no adapter; choose one of native, transformer-lens, nnsight"
    ):
        workbench.load(TINY["llama"](), through="lens")
    with pytest.raises(RequestError, match="but the model given is one of transformer-lens"):
        workbench.load(bridge_around(TINY["llama"](), None), through="nnsight")


def test_without_the_package_the_pip_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge.sources._bridge_builder", None)
    with pytest.raises(MissingExtra, match=r"pip install 'attention-workbench\[transformer-lens\]'"):
        workbench.load(TINY["llama"](), through="transformer-lens")
