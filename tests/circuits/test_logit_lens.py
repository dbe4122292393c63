"""The logit lens against the model's own predictions and the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.circuits import ask, logit_lens
from workbench.errors import RequestError


def test_the_last_stage_is_the_model(any_model, task) -> None:
    found = logit_lens(any_model, task, positions="all", top=3)
    logits = any_model.trace(task.clean, logits="all").logits.log_softmax(-1)
    lengths = (task.position - task.clean.starts + 1).tolist()
    for prompt, length in enumerate(lengths):
        own = logits[prompt, :length]
        np.testing.assert_array_equal(found.top_ids[prompt, -1, :length], own.topk(3).indices)
        for name, ids in (("answer", task.answers), ("foil", task.foils)):
            values = own[:, ids[prompt, 0]]
            np.testing.assert_allclose(found.probability[name][prompt, -1, :length], values.exp(), atol=1e-5)
            np.testing.assert_array_equal(
                found.rank[name][prompt, -1, :length], 1 + (own > values[:, None]).sum(1).numpy()
            )
        np.testing.assert_allclose(found.entropy[prompt, -1, :length], -(own.exp() * own).sum(-1), atol=1e-4)
        assert np.isnan(found.entropy[prompt, :, length:]).all()
        assert (found.top_ids[prompt, :, length:] == -1).all()
    np.testing.assert_allclose(np.nan_to_num(found.kl[:, -1]), 0, atol=1e-6)
    assert np.nanmax(found.kl) > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_stage_is_its_definition(llama, make_pairs, side) -> None:
    task = make_pairs(side=side)
    found = logit_lens(llama, task, middle=True, positions=["read", "changed", 1], run="corrupt", tokens=[7])
    assert found.stages == ("embed", "L0.mid", "L0", "L1.mid", "L1", "L2.mid", "L2")
    assert found.positions == ("read", "changed", "1")
    trace = llama.trace(task.corrupt, sites=["resid_pre", "resid_mid", "resid_post"])
    sites = [("resid_pre", 0)] + [(f"resid_{part}", layer) for layer in range(3) for part in ("mid", "post")]
    hf = llama.attachment.hf_model
    columns = (task.position, task.roles["changed"], task.corrupt.starts + 1)
    for stage, site in enumerate(sites):
        for place, column in enumerate(columns):
            stream = trace.site(*site)[torch.arange(3), column]
            own = hf.lm_head(hf.model.norm(stream)).softmax(-1)
            np.testing.assert_array_equal(found.top_ids[:, stage, place], own.topk(5).indices)
            np.testing.assert_allclose(found.top_probabilities[:, stage, place], own.detach().topk(5).values, rtol=1e-4)
            np.testing.assert_allclose(found.probability["7"][:, stage, place], own[:, 7].detach(), rtol=1e-4)


def test_tables(llama, task) -> None:
    found = logit_lens(llama, task, positions="all")
    table = found.table()
    assert len(table) == 4 * 10
    assert set(table.n) == {1, 3}
    read = logit_lens(llama, task).table()
    assert (read.answer_probability_low <= read.answer_probability).all()
    assert list(read.stage) == ["embed", "L0", "L1", "L2"]
    top = found.top()
    assert len(top) == (7 + 10 + 7) * 4 * 5
    assert (top.groupby(["prompt", "stage", "position"]).probability.sum() <= 1 + 1e-6).all()


def test_prompts_without_foils(llama) -> None:
    found = logit_lens(llama, ask(llama, [[5, 6, 7]], [3]))
    assert set(found.rank) == {"answer"}


def test_refusals(llama, model_named, task) -> None:
    with pytest.raises(RequestError, match="'middle' is no position"):
        logit_lens(llama, task, positions=["middle"])
    with pytest.raises(RequestError, match="No prompt has position 10"):
        logit_lens(llama, task, positions=[10])
    with pytest.raises(RequestError, match="at least one position"):
        logit_lens(llama, task, positions=[])
    with pytest.raises(RequestError, match="top=0"):
        logit_lens(llama, task, top=0)
    with pytest.raises(RequestError, match="no middle"):
        logit_lens(model_named("gpt_neox"), task, middle=True)
