"""LOCOS, its controls and patching against explicit sums over every key, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.heads import Settings, detect
from workbench.heads.calls import observe_prompts
from workbench.heads.detectors.one_hop import OBSERVED, OneHopReader, Steps
from workbench.heads.detectors.patching import restore
from workbench.models.architectures import locate
from workbench.tasks.one_hop import INFERRED


def readings(subject, task):
    reader = OneHopReader(subject.model, task)
    observe_prompts(subject.model, task.batch, reader.read)
    return reader.scores


@pytest.fixture
def task(random_task):
    return random_task(
        [48, 41],
        answers=2,
        needle=[[10, 16], [24, 29]],
        elsewhere=[[20, 26], [5, 10]],
        reply=[[40, 48], [34, 41]],
    )


def explicit(subject, task, prompt, layer, head):
    """Every term of the formulas written out, key by key."""
    length = int(task.batch.lengths[prompt])
    patterns, values, _ = subject.run(task.batch.ids[prompt, :length])
    a, v, w = patterns[layer][head], values[layer][head], subject.output_weight(layer)[head]
    rows, ids = task.answer_positions[prompt].tolist(), task.answer_ids[prompt].tolist()
    other = task.answer_ids[1 - prompt].tolist()
    window = subject.model.spec.layers[layer].window
    reply, end = task.spans["reply"][prompt].tolist()
    result = {"dla": [], "dla_null": []}
    for name, span in (("", "needle"), ("_null", "elsewhere")):
        first, last = task.spans[span][prompt].tolist()
        locos, attention = [], []
        for t, y in zip(rows, ids, strict=True):
            seen = [j for j in range(t + 1) if window is None or t - j < window]
            phi = {j: float(a[t, j] * (subject.unembedding[y] @ (v[j] @ w))) for j in seen}
            inside = [j for j in seen if first <= j < last]
            outside = [j for j in seen if not first <= j < last]
            ratio = len(inside) / len(outside)
            locos.append(sum(phi[j] for j in inside) - ratio * sum(phi[j] for j in outside))
            attention.append(sum(float(a[t, j]) for j in inside) - ratio * sum(float(a[t, j]) for j in outside))
        steps = a[rows, first:last].sum(-1).mean() if rows else 0.0
        rest = [t for t in range(reply - 1, end - 1) if t not in rows]
        result[f"locos{name}"], result[f"attention{name}"] = np.mean(locos), np.mean(attention)
        result[f"contrastive{name}"] = float(steps - a[rest, first:last].sum(-1).mean())
        result[f"snapkv{name}"] = float(a[reply - OBSERVED : reply, first:last].sum(-1).max())
    for t, y, wrong in zip(rows, ids, other, strict=True):
        direct = subject.unembedding @ (a[t] @ v @ w)
        result["dla"].append(float(direct[y]))
        result["dla_null"].append(float(direct[wrong]))
    return {name: float(np.mean(value)) for name, value in result.items()}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_all_scores_are_the_explicit_sums(name, twin, task):
    subject = twin(name)
    found = readings(subject, task)
    for prompt in range(2):
        for layer, head in ((0, 0), (1, 3), (2, 2)):
            for score, expected in explicit(subject, task, prompt, layer, head).items():
                assert found[score][prompt, layer, head] == pytest.approx(expected, abs=2e-5, rel=1e-4), score


def test_steps_split_the_reply_and_begin_before_it(task):
    steps = Steps.of(task, 0)
    assert steps.first == 40 - OBSERVED
    assert (steps.answer + steps.first).tolist() == [44, 45]
    assert (steps.other + steps.first).tolist() == [39, 40, 41, 42, 43, 46]
    assert steps.gold.tolist() == task.batch.ids[0, 45:47].tolist()
    assert steps.wrong.tolist() == task.answer_ids[1].tolist()


def test_patching_restores_what_a_hook_on_the_projection_restores(twin, random_task):
    subject = twin("llama")
    task = random_task([30, 30], answers=1, needle=[[8, 14]] * 2, reply=[[26, 30]] * 2)
    task.batch.ids[1, :8], task.batch.ids[1, 14:] = task.batch.ids[0, :8], task.batch.ids[0, 14:]
    found = restore(subject.model, task)
    at, gold = int(task.answer_positions[0, 0]), int(task.answer_ids[0, 0])
    layers = locate(subject.own)

    def logits(ids, layer=None, head=None, source=None):
        z = []

        def hook(module, args):
            z.append(args[0].clone())
            if layer is not None and module is layers[layer].projection:
                changed = args[0].clone()
                changed[..., head * 8 : (head + 1) * 8] = source[..., head * 8 : (head + 1) * 8]
                return (changed,)
            return None

        hooks = [one.projection.register_forward_pre_hook(hook) for one in layers]
        with torch.no_grad():
            out = subject.own(ids[None], use_cache=False).logits[0, at]
        for one in hooks:
            one.remove()
        return out, z

    intact, source = logits(task.batch.ids[0])
    broken, _ = logits(task.batch.ids[1])
    others = broken.clone()
    others[gold] = -torch.inf
    rival = int(others.argmax())
    assert found.clean[0] == pytest.approx(float(intact[gold] - intact[rival]), abs=1e-4)
    assert found.corrupt[0] == pytest.approx(float(broken[gold] - broken[rival]), abs=1e-4)
    for layer in range(3):
        for head in range(6):
            patched, _ = logits(task.batch.ids[1], layer, head, source[layer])
            expected = float(patched[gold] - patched[rival])
            assert found.patched[0, layer, head] == pytest.approx(expected, abs=1e-4)
    assert abs(found.patched - found.corrupt[0]).max() > 1e-2


def test_runs_from_text_to_table(reader):
    settings = Settings(one_hop_prompts=3, one_hop_length=260, patching_prompts=2, patching_length=260)
    names = ["locos", "locos_attention", "locos_dla", "locos_contrastive", "locos_snapkv", "locos_cri"]
    scores = detect(reader, names, settings=settings)
    assert scores.table.groupby("detector").n.first().to_dict() == dict.fromkeys(names[:5], 3) | {"locos_cri": 2}
    assert scores.table.value.notna().all()
    assert not any(needle.literal for needle in INFERRED)
