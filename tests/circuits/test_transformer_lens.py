"""The same patches by TransformerLens, through its bridge to the same weights; and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from workbench.circuits import patch_activations
from workbench.models.testing import TINY, VOCAB_SIZE
from workbench.tracing import load

SITES = {
    "z": ("head_position", "attn_head_out_by_pos"),
    "q": ("head_position", "attn_head_q_by_pos"),
    "k": ("head_position", "attn_head_k_by_pos"),
    "v": ("head", "attn_head_v_all_pos"),
    "pattern": ("key", "attn_head_pattern_dest_src_pos"),
    "resid_pre": ("position", "resid_pre"),
    "attn_out": ("position", "attn_out"),
    "mlp_out": ("position", "mlp_out"),
}


@pytest.fixture(scope="module")
def bridge():
    from transformer_lens.model_bridge.sources.transformers.source import boot

    # The bridge fetches a tokenizer where it is given none.
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCAB_SIZE)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="0")
    found = boot("gpt2", hf_model=TINY["gpt2"](), tokenizer=tokenizer, device="cpu")
    found.eval()
    return found


@pytest.mark.parametrize("site", SITES)
def test_patches_agree(bridge, make_pairs, site) -> None:
    from transformer_lens import patching

    task = make_pairs((6, 6))
    by, name = SITES[site]
    _, cache = bridge.run_with_cache(task.clean.ids)
    function = getattr(patching, f"get_act_patch_{name}")
    theirs = function(bridge, task.corrupt.ids, cache, lambda logits: task.score(logits[:, -1]).mean())
    model = load(TINY["gpt2"]())
    found = patch_activations(model, task, site, by, direction="denoising")
    axes = {
        "head_position": ("layer", "position", "head"),
        "head": ("layer", "head"),
        "position": ("layer", "position"),
        "key": ("layer", "head", "position", "key"),
    }[by]
    grid = found.grid("denoising", axes) + found.corrupt.mean()
    mine = np.where(np.isnan(grid), found.corrupt.mean(), grid)
    np.testing.assert_allclose(mine, theirs.detach().numpy(), atol=1e-4)
    assert np.abs(mine - found.corrupt.mean()).max() > 0.01
