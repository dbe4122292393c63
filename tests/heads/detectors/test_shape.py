"""Shapes of rows, against the same read off float64 patterns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.heads.detector import Part
from workbench.heads.detectors import shape
from workbench.tasks import TOKEN_CLASSES

architectures = pytest.mark.parametrize(
    ("name", "side"), [("llama", "right"), ("mistral", "left"), ("gemma2", "right"), ("gpt2", "left")]
)


def by_hand(calls, prompt, task, window, row):
    """Everything of one layer's rows but the first, as means: `[head]` each."""
    a = calls.a
    n = a.shape[-1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    seen = (i - j >= 0) & (i - j < (window or n))
    count = seen.sum(-1).double()
    real = task.batch.mask[prompt]
    content = a.clone()
    content[..., 0] = -1.0
    content[:, ~seen] = -1.0
    found = {
        "confidence": (content.amax(-1), 1 / count),
        "locality": ((a * (i - j < 32)).sum(-1), (seen & (i - j < 32)).sum(-1) / count),
        "mean_distance": ((a * (i - j)).sum(-1), (seen * (i - j)).sum(-1) / count),
        "entropy_share": (torch.special.entr(a).sum(-1) / count.clamp(min=2).log(), torch.ones(n)),
    }
    for name in TOKEN_CLASSES[1:]:
        mark = task.marks[name][prompt][real].double()
        found[f"{name}_mass"] = (a @ mark, (seen * mark).sum(-1) / count)
    return {key: (values[:, 1:].mean(-1), null[1:].mean()) for key, (values, null) in found.items()}[row]


@architectures
@pytest.mark.parametrize("row", ["confidence", "locality", "mean_distance", "entropy_share", "digits_mass"])
def test_means_over_rows_and_uniform_attention(tiny, name, side, row):
    detector = {one.name: one for one in shape.SHAPE}[row]
    model, part, patterns = tiny(name, shape.SHAPE, side=side)
    scores = detector.score([part])
    assert scores.values.shape == scores.null.shape[:1] + scores.values.shape[1:]
    for prompt, layers in enumerate(patterns):
        for layer, calls in enumerate(layers):
            values, null = by_hand(calls, prompt, part.task, model.spec.layers[layer].window, row)
            np.testing.assert_allclose(scores.values[prompt, layer], values.numpy(), atol=2e-5, rtol=2e-4)
            np.testing.assert_allclose(scores.null[prompt, layer], float(null), atol=1e-6)


@architectures
@pytest.mark.parametrize("content", [False, True])
def test_positional_heads_count_the_commonest_distance(tiny, name, side, content):
    detector = shape.POSITIONAL_CONTENT if content else shape.POSITIONAL
    model, part, patterns = tiny(name, shape.SHAPE, side=side)
    scores, offsets = detector.score([part]), shape.positional_offsets([part], detector.statistics(part.task)[0].name)
    for layer in range(model.spec.n_layers):
        backs = []
        for layers in patterns:
            a = layers[layer].a.clone()
            a[..., 0] -= 2.0 if content else 0.0
            backs.append((torch.arange(a.shape[1]) - a.argmax(-1))[:, 1:])
        for head in range(backs[0].shape[0]):
            counts = torch.bincount(torch.cat([back[head] for back in backs]))
            best = int(counts.argmax())
            shares = [(back[head] == best).double().mean() for back in backs]
            np.testing.assert_allclose(scores.values[:, layer, head], shares, atol=1e-9)
            row = offsets.query("layer == @layer and head == @head").iloc[0]
            assert row.offset == -best and row.share == pytest.approx(float(counts[best] / counts.sum()))


def test_the_handwritten_previous_token_head_is_positional(handwritten):
    ids = torch.randint(0, 30, (2, 20)).tolist()
    task_batch = handwritten.batch(ids)
    trace = handwritten.trace(task_batch, statistics=[shape.S.argmax()])
    offsets = shape.positional_offsets([Part(None, trace)]).set_index(["layer", "head"])
    assert offsets.loc[(0, 0), "offset"] == -1 and offsets.loc[(0, 0), "share"] == 1.0


def test_dealing_the_keys_at_random_undoes_a_positional_head(tiny):
    """A head that always looks one back, and one that always looks at position 0."""
    _, part, _ = tiny("llama", shape.SHAPE)
    keys = part.found["argmax"]
    real = part.task.batch.mask
    columns = torch.arange(keys.shape[-1])
    saved = keys.clone()
    try:
        keys[:] = torch.where(real[:, None, None], (columns - 1).clamp(min=0), -1)
        scores = shape.POSITIONAL.score([part])
        assert (scores.values == 1.0).all() and scores.null.max() < 0.2
    finally:
        keys[:] = saved


def test_class_masses_say_what_uniform_attention_would_give(tiny):
    _, part, _ = tiny("llama", shape.SHAPE)
    table = shape.class_masses([part])
    assert set(table.token_class) == set(TOKEN_CLASSES) and len(table) == 3 * 6 * 4
    own = table.query("token_class == 'digits'")
    scores = shape.DIGIT_MASS.score([part])
    np.testing.assert_allclose(own.mass.to_numpy().reshape(3, 6), scores.values.mean(0))
    np.testing.assert_allclose(own.share.to_numpy().reshape(3, 6), scores.null.mean(0))
