"""Names, successors and Olsson's evaluators on models built by hand, and against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import workbench
from workbench.dynamics.toy import ToyConfig, ToyModel
from workbench.errors import RequestError
from workbench.heads import Settings, detect
from workbench.heads.detector import Part
from workbench.heads.detectors import evaluators
from workbench.heads.detectors.names import NAMES, TEMPLATES, name_prompts
from workbench.heads.detectors.successor import WORD_LISTS, effective_embedding, ordered_lists
from workbench.models import Head
from workbench.models.testing import TINY
from workbench.tracing import ablate


@pytest.fixture(scope="module")
def words():
    """A tokenizer with a token for each word of the lists, with its leading space."""
    lists = {word for one in WORD_LISTS.values() for word in one if not word.isdigit() or int(word) < 30}
    plain = {
        word for text in TEMPLATES for word in text.replace("{io}", "").replace("{s}", "").replace(",", " ").split()
    }
    vocabulary = ["<unk>", ",", *sorted(f" {word}" for word in lists | plain | set(NAMES)), *sorted(plain)]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(dict.fromkeys(vocabulary))}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|,"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def by_hand(tokenizer, circuits):
    """Tokens are unit vectors in and out; the heads of layer 1 have the given token-to-token matrices."""
    size = len(tokenizer)
    config = ToyConfig(
        vocab_size=size, hidden_size=size, num_hidden_layers=2, num_attention_heads=len(circuits), head_dim=size,
        layer_norm=False,
    )  # fmt: skip
    model = ToyModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.token_embedding.weight.copy_(torch.eye(size))
        # No two tokens have quite the same logit.
        model.unembedding.weight.copy_(torch.eye(size) + 0.001 * torch.randn(size, size))
        # A head without any effect is refused on attach.
        model.blocks[0].attention.value.weight.copy_(torch.eye(size).repeat(len(circuits), 1))
        model.blocks[0].attention.output.weight.copy_(0.001 * torch.randn(size, size * len(circuits)))
        inner = model.blocks[1].attention
        inner.value.weight.copy_(torch.eye(size).repeat(len(circuits), 1))
        inner.output.weight.copy_(torch.cat([circuit.T for circuit in circuits], dim=1))
    return workbench.load((model.eval(), tokenizer))


def values(table, detector):
    rows = table.query("detector == @detector and layer == 1").sort_values("head")
    return rows.value.tolist(), rows.null.tolist()


def test_heads_that_write_and_suppress_names(words):
    size = len(words)
    model = by_hand(words, [torch.eye(size), -torch.eye(size), torch.randn(size, size)])
    table = detect(model, ["name_copying", "name_suppression"], settings=Settings(name_prompts=6)).table
    copying, null = values(table, "name_copying")
    assert copying[:2] == [1.0, 0.0] and copying[2] < 0.4 and max(null) < 0.4
    suppression, _ = values(table, "name_suppression")
    assert suppression[:2] == [0.0, 1.0] and suppression[2] < 0.4


def test_name_prompts_mark_the_names(words):
    task = name_prompts(words, 8, seed=3)
    at = {label: task.batch.ids.gather(1, task.spans[label][:, :1])[:, 0] for label in ("IO", "S", "S2")}
    assert torch.equal(at["S"], at["S2"]) and (at["IO"] != at["S"]).all()
    for row, info in zip(task.batch.ids, task.info, strict=True):
        assert not set(row.tolist()) & {info["other"], info["other2"], info["other3"]}
    with pytest.raises(RequestError, match="name_prompts=0"):
        name_prompts(words, 0, seed=3)


def test_a_successor_head_built_by_hand_scores_one(words):
    size = len(words)
    successor, predecessor = torch.zeros(size, size), torch.zeros(size, size)
    for one in ordered_lists(words):
        for place, target in enumerate(one.successor.tolist()):
            if target >= 0:
                successor[one.ids[place], one.ids[target]] = predecessor[one.ids[target], one.ids[place]] = 1.0
    # Words that two lists share (May, numbers) have a successor in each.
    model = by_hand(words, [successor, predecessor, torch.eye(size)])
    table = detect(model, ["successor"], settings=Settings(weight_draws=49)).table
    found, null = values(table, "successor")
    assert found[0] == 1.0 and found[1] < 0.05 and found[2] == 0.0
    assert max(null) < 0.15
    assert table.query("layer == 1 and head == 0").p.item() == pytest.approx(1 / 50)


def test_lists_are_cycles_where_they_say_so_and_leave_out_what_is_not_a_token(words):
    found = {one.name: one for one in ordered_lists(words)}
    assert len(found["days"].ids) == 7 and (found["days"].successor >= 0).all()
    assert found["days"].successor.tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert found["short days"].successor[-1] == -1
    # The tokenizer has no number above 29.
    assert len(found["numbers"].ids) == 29 and (found["numbers"].successor >= 0).sum() == 28
    with pytest.raises(RequestError, match="three steps"):
        ordered_lists(words, {"short": ("Monday", "Tuesday")})


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_effective_embedding_is_the_first_mlp_of_the_embedding(name):
    """By modules: norm and MLP of block 0 on what the model embeds, attention adding nothing but its bias."""
    model = workbench.load(TINY[name]())
    ids = torch.tensor([4, 9, 11])
    mine = effective_embedding(model, ids)
    silent = ablate([Head(0, head) for head in range(4 if name != "llama" else 6)], how="zero")
    if name == "gpt2":
        block = model.attachment.layers[0].block
        with torch.no_grad():
            raw = model.attachment.hf_model.transformer.wte(ids) + block.attn.c_proj.bias
            expected = block.mlp(block.ln_2(raw))
    else:
        traced = model.trace([[4], [9], [11]], sites=["mlp_out"], edits=silent)
        expected = traced.site("mlp_out", 0)[:, 0]
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_evaluators_on_the_handwritten_model(handwritten, handwritten_settings):
    """Prefix matching 1 and a QK trace of 30 a token for the induction head; nothing for the other."""
    settings = replace(handwritten_settings, evaluator_prompts=6, evaluator_length=10, evaluator_copies=3)
    table = detect(handwritten, ["prefix_matching", "qk_trace", "token_copying"], settings=settings).table
    found = table.set_index(["detector", "layer"])
    assert found.value["prefix_matching", 1] == pytest.approx(1.0, abs=1e-5)
    assert found.value["prefix_matching", 0] < 0.05 and found.null["prefix_matching", 1] < 0.05
    assert found.value["qk_trace", 1] == pytest.approx(30 * handwritten.spec.vocab_size, rel=1e-4)
    assert found.value["qk_trace", 0] == 0.0


def test_token_copying_follows_its_definition():
    """Query by query, with logits of the whole vocabulary."""
    model = workbench.load(TINY["llama"]())
    settings = Settings(bos_id=1, evaluator_prompts=2, evaluator_length=8, evaluator_copies=2, weight_offsets=(1, 2))
    kind, detector = evaluators.EVALUATORS, evaluators.TOKEN_COPYING
    parts = kind.parts(model, [detector], kind.tasks(model, settings), settings)
    mine = detector.score(parts).values
    (once,) = [part for part in parts if part.task.name == evaluators.ONCE]
    ids, trace, weights = once.task.batch.ids, once.found.trace, once.found.weights
    layer, head = 1, 4
    for prompt in range(2):
        shares = []
        for query in range(1, 8):
            logits = (
                trace.site("z", layer)[prompt, query, head] @ weights.layer(layer).output[head] @ weights.unembedding
            )
            raised = (logits - logits.mean()).clamp(min=0)[ids[prompt]]
            attended = (trace.site("pattern", layer)[prompt, head, query] * raised).sum()
            shares.append((attended / raised.sum()).item() if raised.sum() > 0 else 0.0)
        assert mine[prompt, layer, head] == pytest.approx(np.mean(shares), abs=1e-5)


def test_share_of_a_perfect_copier_and_of_a_blind_head():
    pattern = torch.eye(6).roll(-2, 1)[None, None]
    order = torch.arange(6)
    assert evaluators.raised_share(pattern, pattern, order).item() == pytest.approx(1.0)
    assert evaluators.raised_share(torch.ones(1, 1, 6, 6), pattern, order).item() == pytest.approx(1 / 6)
    assert evaluators.raised_share(torch.zeros(1, 1, 6, 6), pattern, order).item() == 0.0


def test_words_need_a_tokenizer():
    model = workbench.load(TINY["llama"]())
    for name in ("successor", "name_copying"):
        with pytest.raises(RequestError, match=r"needs? a tokenizer"):
            detect(model, [name])


def test_parts_without_prompts_hold_the_weights(handwritten):
    from workbench.heads.kinds import KINDS
    from workbench.heads.weights import HeadWeights

    (part,) = KINDS["weights"].parts(handwritten, [], [], Settings())
    assert isinstance(part, Part) and part.task is None and isinstance(part.found, HeadWeights)
