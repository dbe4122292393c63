"""Every detector's scores of a real model again, in float64 with the full matrices in place of streaming statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench import load
from workbench.heads import DETECTORS, KINDS, Settings, detect
from workbench.heads.sets import members
from workbench.kernels import dispatch

# Small prompts: what is compared is the arithmetic, head by head.
SETTINGS = Settings(
    text_prompts=3, text_length=48, plain_prompts=3, repeat_prompts=2, repeat_length=16, needle_lengths=(160,),
    needle_depths=1, long_prompts=1, long_length=192, json_prompts=1, json_pairs=4, name_prompts=3,
    evaluator_prompts=2, evaluator_length=12, document_prompts=1, documents=3, one_hop_prompts=2, chunk_prompts=1,
    chunk_prompt_length=224, weight_draws=3,
)  # fmt: skip
CHOSEN = [name for name in members("fast") if name != "flow"]


@pytest.fixture(scope="module")
def scores():
    """(streaming in float32, full matrices in float64) of all detectors that read attention."""
    with pytest.MonkeyPatch.context() as patched:
        found = []
        for dtype in (torch.float32, torch.float64):
            model = load("smollm2-135m", dtype=dtype)
            if dtype == torch.float64:
                patched.setattr(dispatch, "_choose", lambda *_: "reference")
            found.append(detect(model, CHOSEN, settings=SETTINGS).table.set_index(["detector", "layer", "head"]))
            model.detach()
    return found


@pytest.mark.parametrize("name", CHOSEN)
def test_scores_equal_those_of_full_matrices_in_float64(scores, name):
    ours, truth = (table.loc[name]["value"].to_numpy(dtype=float) for table in scores)
    assert (np.isnan(ours) == np.isnan(truth)).all()
    known = ~np.isnan(truth)
    if not known.any() or np.ptp(truth[known]) < 1e-9:
        np.testing.assert_allclose(ours[known], truth[known], atol=1e-6)
        return
    correlation = np.corrcoef(ours[known], truth[known])[0, 1]
    assert correlation > 0.9999, f"{DETECTORS[name].title} ({KINDS[DETECTORS[name].kind].title}): {correlation:.6f}"
