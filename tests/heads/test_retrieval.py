"""Retrieval detectors against the published loop and against full matrices in float64."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import workbench
from workbench.errors import RequestError
from workbench.heads import DETECTORS, Settings
from workbench.heads.answers import given_answers, written_answers
from workbench.heads.detector import Part
from workbench.heads.detectors.needle import accepted_trials, elsewhere
from workbench.heads.influence import influence
from workbench.heads.kinds import KINDS
from workbench.models import Head
from workbench.models.attach import KEY
from workbench.models.testing import build
from workbench.tasks import NEEDLES, NONE, REASONING_NEEDLES, json_retrieval, needle_grid
from workbench.tasks.corpus import prose_text
from workbench.tracing import ablate
from workbench.tracing import statistics as S

VOCABULARY = 600


def loop_module():
    path = Path(__file__).with_name("published_retrieval.py")
    spec = importlib.util.spec_from_file_location("published_retrieval", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small_tokenizer():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    needles = [needle.text for needle in (*NEEDLES, *REASONING_NEEDLES)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([prose_text()[:20000], *needles], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


@pytest.fixture(scope="module")
def tiny():
    """A random Llama of 2 layers, 4 heads and 2 KV heads that reads text."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf = build("llama", num_hidden_layers=2, max_position_embeddings=2048, **sizes | {"vocab_size": VOCABULARY})
    return workbench.load((hf, small_tokenizer()))


@pytest.fixture(scope="module")
def grid(tiny):
    return needle_grid(tiny.tokenizer, (320,), 2, needles=NEEDLES[:2])


def patterns(model, ids):
    """float64 `[layer, head, query, key]` of one prompt, by the model's own eager attention."""
    hf = model.attachment.hf_model
    hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = hf.double()(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    finally:
        hf.float().set_attn_implementation(KEY)
    return torch.cat(found).double().numpy()


def judged_right(task, found):
    """As if the model had answered every prompt right, whatever it wrote."""
    return Part(task, replace(found, texts=list(task.answers)))


def text_ids(task, prompt, answer):
    real = task.decoding.ids[prompt][task.decoding.mask[prompt]].tolist()
    return real, [*real, *answer]


def written(found, prompt):
    return found.ids[prompt][found.ids[prompt] >= 0].tolist()


def test_greedy_scores_are_those_of_full_matrices(tiny, grid):
    detectors = [DETECTORS[name] for name in ("retrieval_greedy", "activation_frequency", "semantic_retrieval")]
    wanted = {s.name: s for detector in detectors for s in detector.statistics(grid)}
    # The tiny model writes what it likes; made to write the needle's words, it has something to hit.
    found = given_answers(tiny, grid, list(wanted.values()))
    part = judged_right(grid, found)
    greedy, active, semantic = (detector.score([part]) for detector in detectors)
    null_span = elsewhere(grid, grid.seed + 5)
    some = 0
    for prompt in range(len(grid)):
        answer = written(found, prompt)
        asked, ids = text_ids(grid, prompt, answer)
        # Given answers begin behind the lead, greedy ones behind the prompt: equal without a chat template.
        a = patterns(tiny, ids)[:, :, len(asked) - 1 : len(ids) - 1]
        first, last = grid.spans["answer_in_needle"][prompt].tolist()
        needle = set(range(*grid.spans["needle"][prompt].tolist()))
        held = {ids[key] for key in needle}
        rows = [step for step, token in enumerate(answer) if token in held]
        for layer in range(2):
            for head in range(4):
                heavy = a[layer, head].argmax(-1)
                hit = {k for k, y in zip(heavy, answer, strict=True) if first <= k < last and ids[k] == y}
                some += len(hit)
                assert greedy.values[prompt, layer, head] == pytest.approx(len(hit) / (last - first))
                assert active.values[prompt, layer, head] == bool(hit)
                mass = a[layer, head][rows][:, sorted(needle)].sum(-1).mean()
                assert semantic.values[prompt, layer, head] == pytest.approx(mass, abs=1e-5)
                other = null_span[prompt].nonzero().flatten().tolist()
                null = a[layer, head][rows][:, other].sum(-1).mean()
                assert semantic.null[prompt, layer, head] == pytest.approx(null, abs=1e-5)
        assert len(rows) == len(answer)
    assert semantic.values.max() > 0.05 and np.isfinite(greedy.null).all()
    trials = [trial for _, trial in accepted_trials(part)]
    counted = [trial.counted(trial.hits()) for trial in trials]
    assert all((one >= share - 1e-12).all() for one, share in zip(counted, greedy.values, strict=True))


def test_hits_count_each_key_once_or_every_time():
    from workbench.heads.detectors.needle import Trial

    prompt = torch.tensor([5, 6, 7, 8, 7])
    heaviest = torch.tensor([[[2, 2, 4, 1, 3]]])
    trial = Trial(prompt, torch.tensor([7, 7, 7, 6, 9]), heaviest, (2, 5))
    hits = trial.hits()
    assert hits.tolist() == [[[True, True, True, False, False]]]
    assert trial.copied(hits) == pytest.approx(2 / 3) and trial.counted(hits) == pytest.approx(1.0)
    assert sorted(trial.shuffled(torch.Generator().manual_seed(0)).tolist()) == [6, 7, 7, 7, 9]


def test_failed_trials_are_left_out(tiny, grid):
    found = written_answers(tiny, grid, [S.argmax()], 4)
    texts = [answer if index == 1 else "nothing" for index, answer in enumerate(grid.answers)]
    part = Part(grid, replace(found, texts=texts))
    assert [index for index, _ in accepted_trials(part)] == [1]
    assert len(DETECTORS["retrieval_greedy"].score([part]).values) == 1
    none = Part(grid, replace(found, texts=["nothing"] * len(grid)))
    assert DETECTORS["activation_frequency"].score([none]).values.shape == (0, 2, 4)


def test_chained_facts_are_scored_by_their_heaviest_keys(tiny):
    task = needle_grid(tiny.tokenizer, (260,), 1, needles=REASONING_NEEDLES)
    found = given_answers(tiny, task, DETECTORS["headkv_r2"].statistics(task))
    scores = DETECTORS["headkv_r2"].score([Part(task, found.values)])
    null_span = elsewhere(task, task.seed + 5)
    for prompt in range(len(task)):
        answer = task.answer_ids[prompt][task.answer_ids[prompt] != NONE].tolist()
        asked, ids = text_ids(task, prompt, answer)
        a = patterns(tiny, ids)[:, :, len(asked) - 1 : len(ids) - 1]
        first, last = task.spans["needle"][prompt].tolist()
        k = min(64, last - first)
        order = np.argsort(-a, axis=-1, kind="stable")[..., :k]
        mass = np.take_along_axis(a, order, -1)
        expected = (mass * ((order >= first) & (order < last))).sum(-1).mean(-1)
        np.testing.assert_allclose(scores.values[prompt], expected, atol=2e-4)
        np.testing.assert_allclose(
            scores.null[prompt], (mass * null_span[prompt].numpy()[order]).sum(-1).mean(-1), atol=2e-4
        )
    assert 0 < scores.values.max() <= 1


def test_json_copies_are_those_of_full_matrices(tiny):
    task = json_retrieval(tiny.tokenizer, prompts=2, pairs=4)
    found = given_answers(tiny, task, DETECTORS["json_retrieval"].statistics(task))
    scores = DETECTORS["json_retrieval"].score([Part(task, found.values)])
    for prompt in range(len(task)):
        ids = task.batch.ids[prompt][task.batch.mask[prompt]].tolist()
        a = patterns(tiny, ids)
        first, last = task.spans["needle"][prompt].tolist()
        pairs = zip(task.answer_positions[prompt].tolist(), task.answer_keys[prompt].tolist(), strict=True)
        due = [(row, ids[key]) for row, key in pairs if key != NONE]
        for layer in range(2):
            for head in range(4):
                heavy = [(int(a[layer, head, row].argmax()), token) for row, token in due]
                hit = {key for key, token in heavy if first <= key < last and ids[key] == token}
                assert scores.values[prompt, layer, head] == pytest.approx(len(hit) / len(due))


def test_influence_is_the_relative_loss(tiny, unchecked_signatures):
    documents = {"prose": [prose_text(0)[:200], prose_text(40)[:300]], "code": ["def f(x):\n    return x + 1"]}
    heads = [Head(0, 1), Head(1, 2)]
    table = influence(tiny, heads, documents)
    assert table.domain.tolist() == ["prose", "prose", "code"] and sorted(table["rank"][:2]) == [1, 2]
    for row in table.itertuples():
        batch = tiny.batch([documents[row.domain][row.document]])
        base = tiny.trace(batch, logits="all").logits[0, :-1]
        masked = tiny.trace(batch, logits="all", edits=[ablate(heads, "uniform")]).logits[0, :-1]
        losses = [torch.nn.functional.cross_entropy(x.double(), batch.ids[0, 1:]).item() for x in (base, masked)]
        assert row.loss == pytest.approx(losses[0], rel=1e-5)
        assert row.influence == pytest.approx((losses[1] - losses[0]) / losses[0], abs=1e-5)
    assert table.influence.abs().max() > 1e-4 and table.selected.tolist().count(True) == 2
    with pytest.raises(RequestError, match="No heads to mask"):
        influence(tiny, [], documents)
    with pytest.raises(RequestError, match="texts by domain"):
        influence(tiny, heads, ["a text"])
    with pytest.raises(RequestError, match="selected=0"):
        influence(tiny, heads, documents, selected=0)
    with pytest.raises(RequestError, match="one token"):
        influence(tiny, heads, {"prose": ["a"]})


def test_what_a_detector_lacks_is_named(tiny, grid):
    bare = replace(grid, spans={}, keys={}, answer_keys=None, decoding=None)
    for name, match in (
        ("semantic_retrieval", "span 'needle'"),
        ("headkv_r2", "span 'needle'"),
        ("json_retrieval", "answer_keys"),
        ("retrieval", "keys 'needle'"),
    ):
        with pytest.raises(RequestError, match=match):
            DETECTORS[name].statistics(bare)
    with pytest.raises(RequestError, match="no prompts to be answered"):
        written_answers(tiny, bare, [], 4)
    context = torch.stack([grid.spans["needle"][:, 0], grid.spans["needle"][:, 1] + 3], dim=1)
    with pytest.raises(RequestError, match="longer than the 3 tokens of text around it"):
        elsewhere(replace(grid, spans={**grid.spans, "context": context}), 0)
    nameless = replace(tiny, tokenizer=None)
    for kind in ("needle_greedy", "needle_reasoning", "json"):
        with pytest.raises(RequestError, match=f"{kind} prompts need a tokenizer"):
            KINDS[kind].tasks(nameless, Settings())


def test_smollm2_scores_are_those_of_the_published_loop():
    model = workbench.load("smollm2-135m")
    task = needle_grid(model.tokenizer, (160,), 2, needles=NEEDLES[:2])
    newline = model.tokenizer("\n", add_special_tokens=False)["input_ids"]
    stops = {model.tokenizer.eos_token_id, *newline}
    found = written_answers(model, task, [S.argmax()], 50, stop_ids=sorted(stops))
    trials = accepted_trials(Part(task, found))
    assert len(trials) >= 2
    scores = DETECTORS["retrieval_greedy"].score([Part(task, found)]).values
    active = DETECTORS["activation_frequency"].score([Part(task, found)]).values
    hf, loop = model.attachment.hf_model, loop_module().published_loop
    try:
        for place, (index, trial) in enumerate(trials):
            truth = loop(hf, trial.prompt.tolist(), trial.span, 50, stops)
            assert truth.written == written(found, index)
            np.testing.assert_allclose(scores[place], truth.shares(trial.span[1] - trial.span[0]), atol=1e-6)
            np.testing.assert_allclose(trial.counted(trial.hits()), truth.counter, atol=1e-6)
            np.testing.assert_array_equal(active[place], truth.counter > 0)
    finally:
        hf.set_attn_implementation(KEY)
    assert scores.mean(0).max() > 0.3
