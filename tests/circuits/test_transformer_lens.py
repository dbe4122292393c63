"""The same patches by TransformerLens, through its bridge to the same weights; and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from workbench.circuits import Spot, direct_logit_attribution, logit_lens, patch_activations, patch_paths
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


def boot():
    from transformer_lens.model_bridge.sources.transformers import source

    # The bridge fetches a tokenizer where it is given none.
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCAB_SIZE)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="0")
    found = source.boot("gpt2", hf_model=TINY["gpt2"](), tokenizer=tokenizer, device="cpu")
    found.eval()
    return found


@pytest.fixture(scope="module")
def bridge():
    return boot()


@pytest.fixture(scope="module")
def folded():
    """A bridge with norms folded into weights, which its logit attribution needs; value biases stay in their heads."""
    found = boot()
    found.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False, center_unembed=False)
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


@pytest.mark.parametrize("site", ["q", "k", "v"])
@pytest.mark.parametrize(("layer", "head"), [(0, 1), (1, 3)])
def test_paths_agree(bridge, make_pairs, site, layer, head) -> None:
    from transformer_lens import patching

    task = make_pairs((6, 6))
    (_, clean), (_, corrupt) = (bridge.run_with_cache(batch.ids) for batch in (task.clean, task.corrupt))
    theirs = patching.get_act_patch_direct_path(
        bridge, task.corrupt.ids, clean, corrupt, lambda logits: task.score(logits[:, -1]).mean(), layer, head, site,
        verbose=False,
    )  # fmt: skip
    receivers = [Spot(later, site, one) for later in range(layer + 1, 3) for one in range(4)]
    found = patch_paths(
        load(TINY["gpt2"]()), task, [f"L{layer}H{head}"], receivers, form="strict", apart=True, direction="denoising"
    )
    mine = found.values["denoising"].mean(1).reshape(-1, 4)
    np.testing.assert_allclose(mine, theirs[layer + 1 :].detach().numpy(), atol=1e-4)
    assert np.abs(found.effect("denoising").mean(1)).max() > 2e-3


@pytest.mark.parametrize("of", ["difference", "answer"])
def test_logit_attributions_agree(folded, make_pairs, of) -> None:
    from transformer_lens.tools import analysis

    task = make_pairs((6, 6))
    model = load(TINY["gpt2"]())
    foils = task.foils[:, 0] if of == "difference" else None
    for by in ("component", "head"):
        theirs = analysis.direct_logit_attribution(folded, task.clean.ids, task.answers[:, 0], foils, unit=by)
        names = [_ours(label) for label in theirs.labels if label != "remainder"]
        mine = direct_logit_attribution(model, task, by=by, of=of)
        values = mine.values[:, [mine.nodes.index(name) for name in names]].T
        np.testing.assert_allclose(values, theirs.attribution[: len(names)].detach().numpy(), atol=1e-4)
        assert len(names) == (8 if by == "component" else 12)
        if by == "head":
            rest = mine.values.sum(1) - values.sum(0)
            np.testing.assert_allclose(rest, theirs.attribution[-1].detach().numpy(), atol=1e-4)


def _ours(label: str) -> str:
    """`0_attn_out` is `L0.attn`."""
    layer, _, rest = label.partition("_")
    if label == "pos_embed":
        return "positions"
    return f"L{layer}.{rest.removesuffix('_out')}" if layer.isdigit() else label


def test_lenses_agree(folded, make_pairs) -> None:
    task = make_pairs((6, 6))
    found = logit_lens(load(TINY["gpt2"]()), task, top=1)
    _, cache = folded.run_with_cache(task.clean.ids)
    streams = cache.accumulated_resid(apply_ln=True, pos_slice=-1)
    # Stages are those before each layer, and the end.
    theirs = (streams @ folded.W_U + folded.b_U).softmax(-1).detach()
    answers = theirs.gather(2, task.answers[None].expand(len(theirs), -1, -1))[:, :, 0].T
    np.testing.assert_allclose(found.probability["answer"][:, :, 0], answers, atol=1e-4)
    np.testing.assert_array_equal(found.top_ids[:, :, 0, 0], theirs.argmax(-1).T)
