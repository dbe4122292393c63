"""Sinks against full matrices in float64 on tiny models, and in closed form on a model whose first token is one."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import workbench
from workbench.dynamics.toy import ToyConfig, ToyModel
from workbench.errors import RequestError
from workbench.heads.detector import Part
from workbench.heads.detectors import sinks
from workbench.heads.detectors.sink_tables import (
    anatomy_statistics,
    sink_anatomy,
    sink_rates,
    sink_study,
    sink_table,
)
from workbench.models import Batch
from workbench.models.architectures import locate, output_weight
from workbench.models.testing import TINY, VOCAB_SIZE
from workbench.tasks import Task, one_token, random_tokens

LENGTHS = (30, 23, 41)
NAMES = ("llama", "mistral", "gemma2", "gpt_oss")
each_model = pytest.mark.parametrize("name", NAMES)
both_sides = pytest.mark.parametrize("side", ["right", "left"])


def labelled(batch: Batch, domain: str = "prose") -> Task:
    nothing = torch.full((len(batch), 1), -1)
    return Task("made_up", "Made up.", 0, batch, "none", nothing, nothing, settings={"domain": domain})


def ids_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@cache
def model_of(name):
    return workbench.load(TINY[name]())


@cache
def truth(name):
    """Per prompt, run alone: patterns of the model's own eager code, and q, k, v as they enter the softmax."""
    own = TINY[name]()
    own.set_attn_implementation("eager")
    model, found = model_of(name), []
    for ids in ids_of():
        with torch.no_grad():
            patterns = own(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
        trace = model.trace([ids], sites=["q", "k", "v"])
        layers = []
        for index, (layer, pattern) in enumerate(zip(model.spec.layers, patterns, strict=True)):
            q, k, v = (trace.site(site, index)[0].double().transpose(0, 1) for site in "qkv")
            k, v = (x.repeat_interleave(layer.group, dim=0) for x in (k, v))
            weight = output_weight(locate(own)[index], layer).detach().double()
            layers.append((pattern[0].double(), q, k, v, weight, layer))
        found.append(layers)
    return found


def visible(layer, n):
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return (j <= i) & (i - j < (layer.window or n))


def columns(pattern, layer):
    return pattern.sum(1) / visible(layer, pattern.shape[-1]).sum(0)


def over_heads(name, one):
    """`[prompt, layer, head]` of a function of one layer's truth."""
    return np.stack([np.stack([one(*layer).numpy() for layer in prompt]) for prompt in truth(name)])


def scored(name, side, detector):
    task = labelled(Batch.from_ids(ids_of(), side=side))
    trace = model_of(name).trace(task.batch, statistics=detector.statistics(task))
    return detector.score([Part(task, trace)])


def gap(pattern, q, k, v, weight, layer):
    logits = layer.scale * q @ k.transpose(1, 2)
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    n = len(pattern[0])
    gaps = [
        logits[:, i, 0] - logits[:, i, 1 : i + 1].mean(-1) for i in range(1, min(n, layer.window or n))
    ]  # every query that sees position 0 sees all keys after it
    return torch.stack(gaps).mean(0)


def drain(pattern, q, k, v, weight, layer):
    # weight is [head, dim, d_model]
    norms = torch.linalg.vector_norm(torch.einsum("h k d, h d m -> h k m", v, weight), dim=-1)
    return norms[:, 0] / norms[:, 1:].mean(1)


def hidden(pattern, q, k, v, weight, layer):
    means, seeing = columns(pattern, layer), visible(layer, pattern.shape[-1]).sum(0)
    return ((means > 0.1) & (seeing >= 10))[:, 1:].sum(1).double()


def streaming(pattern, q, k, v, weight, layer):
    n = pattern.shape[-1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    kept = (pattern * ((j < 4) | (i - j < 16))).sum(-1)
    return kept[:, 20:].mean(1)


def learned(pattern, q, k, v, weight, layer):
    return (1 - pattern.sum(-1)).mean(1)


@each_model
@both_sides
@pytest.mark.parametrize(
    ("detector", "oracle"),
    [
        (sinks.SINK_LOGIT_GAP, gap), (sinks.VALUE_DRAIN, drain), (sinks.HIDDEN_SINK, hidden),
        (sinks.STREAMING_SHARE, streaming),
    ],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_scores_are_those_of_full_matrices(name, side, detector, oracle):
    found = scored(name, side, detector)
    np.testing.assert_allclose(found.values, over_heads(name, oracle), rtol=2e-4, atol=2e-4)


@both_sides
def test_learned_sinks_take_what_rows_lack(side):
    found = scored("gpt_oss", side, sinks.LEARNED_SINK)
    np.testing.assert_allclose(found.values, over_heads("gpt_oss", learned), atol=1e-5)
    n, window = LENGTHS[1], model_of("gpt_oss").spec.layers[0].window
    even = np.mean([1 / (min(i + 1, window) + 1) for i in range(n)])
    np.testing.assert_allclose(found.null[1, 0], even, rtol=1e-6)


def test_without_learned_sinks_there_is_no_score():
    assert scored("llama", "right", sinks.LEARNED_SINK).values.shape == (0, 3, 6)


@each_model
@both_sides
def test_table_of_all_positions(name, side):
    model, batch = model_of(name), Batch.from_ids(ids_of(), side=side)
    trace = model.trace(batch, statistics=[workbench.statistics.column_mean()])
    table = sink_table([trace], 0.2, positions=50).set_index(["layer", "head", "k"])
    for layer in range(model.spec.n_layers):
        alphas = [columns(prompt[layer][0], prompt[layer][-1]) for prompt in truth(name)]
        for k in (1, 2, 23, 24, 30, 31, 41):
            held = torch.stack([a[:, k - 1] for a in alphas if a.shape[1] >= k])
            rows = table.xs((layer, k), level=("layer", "k"))
            np.testing.assert_allclose(rows.alpha, held.mean(0), atol=1e-5)
            np.testing.assert_allclose(rows.share, (held > 0.2).double().mean(0), atol=1e-12)
            assert (rows.n == len(held)).all()
    assert table.index.get_level_values("k").max() == max(LENGTHS)


@each_model
def test_uniform_columns_are_those_of_uniform_rows(name):
    model, batch = model_of(name), Batch.from_ids(ids_of(), side="left")
    trace = model.trace(batch, statistics=[workbench.statistics.entropy()])
    found = sinks.uniform_columns(trace)
    for prompt, n in enumerate(LENGTHS):
        for index, layer in enumerate(model.spec.layers):
            seen = visible(layer, n).double()
            want = (seen / seen.sum(1, keepdim=True)).sum(0) / seen.sum(0)
            got = found[prompt, index, 0, batch.mask[prompt]]
            np.testing.assert_allclose(got, want, rtol=1e-9)


def test_published_bar_of_hidden_sinks_follows_the_length():
    model, batch = model_of("llama"), Batch.from_ids(ids_of())
    trace = model.trace(batch, statistics=[workbench.statistics.column_mean()])
    relative = sinks.hidden_sinks(trace, None, alpha=2.0)
    for prompt, n in enumerate(LENGTHS):
        alone = sinks.hidden_sinks(trace, 2.0 / n)
        assert torch.equal(relative[prompt], alone[prompt])
    assert relative.any() and not relative[..., 0].any()
    with pytest.raises(RequestError, match="above 0"):
        sinks.hidden_sinks(trace, 0.0)


def perfect_sink() -> ToyModel:
    """One layer: head 0 rests on position 0 with a logit of 30, head 1 is uniform; token 0 has no value.

    Residual: one-hot tokens, then a flag of position 0 and a constant. Values copy the token, outputs double them.
    """
    config = ToyConfig(
        vocab_size=8, hidden_size=10, num_hidden_layers=1, num_attention_heads=2, head_dim=8, scaling=1.0,
        layer_norm=False, max_position_embeddings=64,
    )  # fmt: skip
    model = ToyModel(config)
    token = torch.arange(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.token_embedding.weight[token, token] = 1.0
        model.position_embedding.weight[0, 8] = 1.0
        model.position_embedding.weight[:, 9] = 1.0
        attention = model.blocks[0].attention
        attention.query.weight[0, 9] = 30.0
        attention.key.weight[0, 8] = 1.0
        for head in (0, 8):
            attention.value.weight[head + token[1:], token[1:]] = 1.0
            attention.output.weight[token, head + token] = 2.0
        model.unembedding.weight[token, token] = 1.0
    return model.eval()


@cache
def resting():
    return workbench.load(perfect_sink())


def of_toy(detector, length=40):
    ids = [
        [0, *torch.randint(1, 8, (length - 1,), generator=torch.Generator().manual_seed(s)).tolist()] for s in (1, 2)
    ]
    task = labelled(Batch.from_ids(ids))
    return detector.score([Part(task, resting().trace(task.batch, statistics=detector.statistics(task)))]).values[:, 0]


def test_a_perfect_sink_in_closed_form():
    n = 40
    assert of_toy(sinks.SINK_RANDOM).tolist() == [[1.0, 0.0]] * 2
    np.testing.assert_allclose(of_toy(sinks.SINK_LOGIT_GAP), [[30.0, 0.0]] * 2, atol=1e-4)
    np.testing.assert_allclose(of_toy(sinks.VALUE_DRAIN), 0.0, atol=1e-6)
    assert (of_toy(sinks.HIDDEN_SINK) == 0).all()
    share = of_toy(sinks.STREAMING_SHARE)
    np.testing.assert_allclose(share[:, 0], 1.0, atol=1e-6)
    np.testing.assert_allclose(share[:, 1], np.mean([20 / (i + 1) for i in range(20, n)]), rtol=1e-5)


def test_rate_of_a_model_is_the_mean_over_its_heads():
    task = random_tokens(8, prompts=5, length=40, bos_id=0)
    row = sink_study(resting(), {"random": [task]}).iloc[0]
    assert (row.prompts, row.k, row.value, row.low, row.high, row.n) == ("random", 1, 0.5, 0.5, 0.5, 5)
    trace = resting().trace(task.batch, statistics=[workbench.statistics.column_mean()])
    rates = sink_rates([trace], 0.05, positions=3)
    # Uniform attention: alpha_1 is the harmonic number over 40, about 0.107; alpha_k falls with k.
    assert rates.value.tolist() == [1.0, 0.5, 0.5] and rates.k.tolist() == [1, 2, 3]
    with pytest.raises(RequestError, match="column mean lies between 0 and 1"):
        sink_rates([trace], 1.5)
    with pytest.raises(RequestError, match="positions = 0"):
        sink_table([trace], positions=0)


def test_anatomy_of_a_perfect_sink():
    found = sink_anatomy(resting(), random_tokens(8, prompts=4, length=40, bos_id=0).batch).set_index("head")
    assert found.alpha[0] == pytest.approx(1.0, abs=1e-5) and found.logit_gap[0] == pytest.approx(30.0, abs=1e-4)
    assert found.first_cosine[0] == pytest.approx(1.0, abs=1e-6) and found.first_cosine[1] == 0
    assert found.value_norm_first.tolist() == [0, 0] and found.value_norm_others.tolist() == [1, 1]
    np.testing.assert_allclose(found.value_write_norm_others, 2.0, rtol=1e-6)
    assert found.key_norm_first[0] == 1 and found.key_norm_others[0] == 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_norms_and_cosines_under_left_padding(name):
    model, batch = model_of(name), Batch.from_ids(ids_of(), side="left")
    trace = model.trace(batch, statistics=anatomy_statistics())
    for prompt, layers in enumerate(truth(name)):
        real = batch.mask[prompt]
        for index, (_, q, k, *_) in enumerate(layers):
            cosine = torch.nn.functional.cosine_similarity(q, k[:, :1], dim=-1)
            np.testing.assert_allclose(trace["first_cosine"][prompt, index][:, real], cosine, atol=1e-4)
            np.testing.assert_allclose(trace["key_norm"][prompt, index][:, real], k.norm(dim=-1), rtol=1e-4)


def test_one_token_repeated_has_no_sink_under_rotation():
    """Gu et al. 2025: equal tokens have equal hidden states there, so nothing marks the first."""
    model = model_of("llama")
    task = one_token(VOCAB_SIZE, prompts=6, length=64, seed=2, bos_id=1)
    trace = model.trace(task.batch, statistics=[workbench.statistics.column_mean()], sites=["resid_post"])
    for layer in range(model.spec.n_layers):
        states = trace.site("resid_post", layer)
        assert (states - states[:, :1]).abs().max() < 1e-4 * states.abs().max()
    assert sink_rates([trace]).value[0] == 0.0
    positions = model_of("gpt2").trace(task.batch, sites=["resid_post"]).site("resid_post", 0)
    assert (positions - positions[:, :1]).abs().max() > 0.1


def test_smollm2_loses_its_sink_on_one_token_repeated():
    model = workbench.load("smollm2-135m")
    kinds = {made.__name__: [made(model.tokenizer, prompts=2)] for made in (random_tokens, one_token)}
    rates = sink_study(model, kinds).set_index("prompts").value
    assert rates["one_token"] == 0.0 and rates["random_tokens"] > 0.6


def test_short_prompts_have_no_middle():
    with pytest.raises(RequestError, match="more than 20 tokens"):
        of_toy(sinks.STREAMING_SHARE, length=20)
