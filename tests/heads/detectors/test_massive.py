"""Residual peaks and massive activations, against the model's own hidden states."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import workbench
from workbench.errors import RequestError
from workbench.heads.detectors.massive import massive_activations, massive_summary, residual_peaks, sink_dimensions
from workbench.models import Batch
from workbench.models.testing import TINY

IDS = [[5, 9, 12, 5, 30], [7, 5, 8], [40, 41, 5, 44]]


def marked():
    """A tiny Llama: token 5 carries 2000 in dimension 7; 90 (token 9) and 110 (token 12) are too little."""
    own = TINY["llama"]()
    with torch.no_grad():
        weight = own.get_input_embeddings().weight
        weight[5, 7], weight[9, 3], weight[12, 4] = -2000.0, 90.0, 110.0
    return own


@pytest.fixture(scope="module")
def model():
    return workbench.load(marked())


@pytest.mark.parametrize("side", ["right", "left"])
def test_peaks_are_those_of_the_models_own_hidden_states(model, side):
    found = residual_peaks(model, Batch.from_ids(IDS, side=side))
    own, first, others = marked(), [], []
    for ids in IDS:
        with torch.no_grad():
            states = own(torch.tensor([ids]), output_hidden_states=True).hidden_states
        # The last of them is behind the final norm.
        norms = torch.stack([state[0].double().norm(dim=-1) for state in states[:-1]])
        first.append(norms[:, 0])
        others.append(norms[:, 1:].mean(1))
    assert found.depth.tolist() == [0, 1, 2, 3] and (found.n == 3).all()
    at, rest = torch.stack(first), torch.stack(others)
    np.testing.assert_allclose(found["first"][:3], at.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.others[:3], rest.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.ratio[:3], (at / rest).mean(0), rtol=1e-4)
    assert (found.low <= found.ratio).all() and (found.ratio <= found.high).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_massive_activations_are_found_where_they_were_put(model, side):
    found = massive_activations(model, Batch.from_ids(IDS, side=side))
    start = found[found.depth == 0]
    where = list(zip(start.prompt, start.position, start.token, start.dim, strict=True))
    assert where == [(0, 0, 5, 7), (0, 3, 5, 7), (1, 1, 5, 7), (2, 2, 5, 7)]
    assert (start.value.round() == -2000).all() and (start.ratio >= 1000).all()
    np.testing.assert_allclose(start.ratio, start.value.abs() / start["median"])
    table = model.attachment.hf_model.get_input_embeddings().weight.detach()
    median = float(table[torch.tensor(IDS[1])].abs().median())
    assert start["median"][start.prompt == 1].item() == pytest.approx(median)
    assert sink_dimensions(found, len(IDS)) == (7,)
    summary = massive_summary(found).set_index("dim")
    assert summary.loc[7, "prompts"] == 3 and summary.loc[7, "first_depth"] == 0
    assert summary.loc[7, "positions"] == "0 1 2 3"


def test_none_is_an_empty_table(model):
    found = massive_activations(model, Batch.from_ids(IDS), magnitude=1e9)
    assert found.empty and sink_dimensions(found, 3) == () and massive_summary(found).empty
    assert list(found.columns) == ["prompt", "depth", "position", "token", "dim", "value", "median", "ratio"]


def test_dimensions_count_prompts_once_and_need_their_share():
    table = pd.DataFrame({"prompt": [0, 0, 0, *range(9)], "dim": [4, 4, 4, *[2] * 9]})
    assert sink_dimensions(table, 10) == (2,)
    assert sink_dimensions(table, 10, share=0.1) == (2, 4)
    assert sink_dimensions(table, 11) == ()


def test_requests_that_mean_nothing_are_refused(model):
    with pytest.raises(RequestError, match="prompt of 1 token"):
        residual_peaks(model, Batch.from_ids([[5], [5, 6]]))
    with pytest.raises(RequestError, match="ratio = 0"):
        massive_activations(model, Batch.from_ids(IDS), ratio=0)
    with pytest.raises(RequestError, match="share = 2"):
        sink_dimensions(pd.DataFrame({"prompt": [0], "dim": [0]}), 1, share=2)
