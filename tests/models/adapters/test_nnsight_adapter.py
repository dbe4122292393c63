"""Models of nnsight on this machine: with its edits in place, under its traces, and what is refused."""

from __future__ import annotations

import pytest
import torch

import workbench
from workbench import statistics
from workbench.errors import MissingExtra, RequestError
from workbench.models.testing import TINY, VOCAB_SIZE

nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
from workbench.models.adapters.nnsight import wrapper_around  # noqa: E402


def ids(prompts: int = 2, tokens: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (prompts, tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_certified(name: str) -> None:
    model = workbench.load(wrapper_around(TINY[name](), None))
    checks = {check.name: check for check in model.certificate.checks}
    assert model.adapter == "nnsight" and checks["nnsight logits"].passed
    assert model.source.weights_sha256 == workbench.load(TINY[name]()).source.weights_sha256


def test_stored_edits_act_in_every_trace() -> None:
    lm = wrapper_around(TINY["llama"](), None)
    model = workbench.load(lm)
    clean = model.trace(ids(), logits="last").logits
    with lm.edit(inplace=True):
        z = lm.model.layers[1].self_attn.o_proj.input
        z = z.clone()
        z[..., :8] = 0
        lm.model.layers[1].self_attn.o_proj.input = z
    asked = {"statistics": statistics.entropy(), "logits": "last"}
    edited = model.trace(ids(), **asked)
    ablated = workbench.load(TINY["llama"]()).trace(ids(), edits=workbench.ablate("L1H0"), **asked)
    torch.testing.assert_close(edited.logits, ablated.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(edited["entropy"], ablated["entropy"], rtol=0, atol=1e-4)
    assert (edited.logits - clean).abs().max() > 1e-2
    # A patch that starts in the middle runs all layers, so that the edit still acts.
    z = torch.zeros(2, 11, 48)
    patched = model.trace(ids(), edits=workbench.patch("resid_pre", z, layer=2), logits="last")
    assert patched.logits.isfinite().all()
    lm.clear_edits()
    assert torch.equal(model.trace(ids(), logits="last").logits, clean)


def test_a_trace_of_the_user_runs_while_attached() -> None:
    lm = wrapper_around(TINY["gpt2"](), None)
    with lm.trace(ids()):
        before = lm.transformer.h[1].output.save()
    model = workbench.load(lm)
    with lm.trace(ids()):
        during = lm.transformer.h[1].output.save()
    site = model.trace(ids(), sites=["resid_post"]).site("resid_post", 1)
    for found in (before, during):
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found, site, rtol=0, atol=1e-4)


def test_a_model_without_its_weights_is_refused(tmp_path) -> None:
    lm = wrapper_around(TINY["llama"](), None)
    lm._module.to("meta")
    with pytest.raises(RequestError, match=r"no weights here yet: .*dispatch=True.* or load it with remote=True"):
        workbench.load(lm)


def test_what_holds_no_hugging_face_model_is_refused() -> None:
    with pytest.raises(RequestError, match="holds no Hugging Face model"):
        workbench.load(nnsight.NNsight(torch.nn.Linear(2, 2)))


def test_without_the_package_the_pip_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "nnsight.modeling.transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'attention-workbench\[nnsight\]'"):
        workbench.load(TINY["llama"](), through="nnsight")
