"""The forms of ablation that change what a head reads, each against an explicit float64 computation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Head
from workbench.models.architectures import locate
from workbench.tracing import ablate, patch
from workbench.tracing.rotation import Rotation, mean_queries
from workbench.tracing.skip import block_outputs

LENGTHS = (19, 11)
few = pytest.mark.parametrize("subject", ["gpt2", "gpt_neox", "llama", "phi3", "gpt_oss"], indirect=True)
one = pytest.mark.parametrize("subject", ["llama"], indirect=True)
decoding = pytest.mark.parametrize("subject", ["gpt2", "mistral", "gpt_oss"], indirect=True)


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, truth, rtol=0, atol=tolerance * max(1.0, float(truth.abs().max())))


def naive(q: Tensor, k: Tensor, v: Tensor, shape, seen: Tensor, sink: Tensor | None) -> Tensor:
    """One head of one prompt, `[token, dim]`, over the keys that are seen, in float64."""
    scores = q.double() @ k.double().T * shape.scale
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink.double().expand(len(q), 1)], dim=1)
    return scores.softmax(-1)[:, : len(k)] @ v.double()


def causal(length: int, window: int | None) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < (window or length))


def learned_sink(subject, layer: int, head: int) -> Tensor | None:
    found = getattr(locate(subject.own)[layer].attention, "sinks", None)
    return None if found is None else found.detach()[head]


@pytest.mark.parametrize("side", ["right", "left"])
def test_streaming_sees_the_first_and_the_latest_tokens(subject, make_batch, side: str) -> None:
    model, batch = subject.model, make_batch(LENGTHS, side)
    for layer, head, sinks, recent in ((0, 1, 2, 3), (1, 0, 0, 4), (2, 2, 3, 1)):
        edit = ablate([Head(layer, head)], "streaming", sinks=sinks, recent=recent)
        found = model.trace(batch, edits=[edit], sites=["q", "k", "v", "z"])
        shape = model.spec.layers[layer]
        for row, (start, length) in enumerate(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)):
            real = slice(start, start + length)
            q = found.site("q", layer)[row, real, head]
            k, v = (found.site(name, layer)[row, real, head // shape.group] for name in "kv")
            key = torch.arange(length)
            kept = (key < sinks) | (key > key[:, None] - recent)
            truth = naive(q, k, v, shape, causal(length, shape.window) & kept, learned_sink(subject, layer, head))
            close(found.site("z", layer)[row, real, head].double(), truth, 1e-5)


@few
def test_a_wide_stream_changes_nothing(subject, make_batch) -> None:
    model, batch = subject.model, make_batch(LENGTHS)
    clean = model.trace(batch, logits="all").logits[batch.mask]
    for sinks, recent in ((0, 19), (19, 1), (8, 11)):
        edit = ablate(model.spec.heads(), "streaming", sinks=sinks, recent=recent)
        close(model.trace(batch, edits=[edit], logits="all").logits[batch.mask], clean)


def test_the_rotation_is_undone(subject, make_batch) -> None:
    """In the first layer, where one token has one query before rotation, whatever its position."""
    model = subject.model
    ids = torch.full((1, 9), 17)
    rotation, found = Rotation(model.attachment), {}

    def observer(call):
        if call.layer == 0:
            found["turned"], found["plain"] = call.q, rotation.back(0, call.q)
            found["again"] = rotation.forth(0, found["plain"])
        return call.output()

    with torch.no_grad(), rotation.noting([0]), model.attachment.observe(observer):
        model.attachment.hf_model(ids, use_cache=False)
    close(found["again"], found["turned"], 1e-5)
    if model.spec.rotary:
        close(found["plain"], found["plain"][:, :, :1].expand_as(found["plain"]), 1e-4)
        assert float((found["turned"] - found["turned"][:, :, :1]).abs().max()) > 1e-2


@few
@pytest.mark.parametrize("side", ["right", "left"])
def test_q_mean_runs_the_mean_query_at_every_position(subject, make_batch, side: str) -> None:
    model, batch, reference = subject.model, make_batch(LENGTHS, side), make_batch((13, 25, 7), seed=3)
    head = Head(1, 2)
    mean = mean_queries(model, reference, [head])[head]
    # The same mean, of queries turned back one by one.
    rotation, plain = Rotation(model.attachment), []
    for ids, mask in zip(reference.ids, reference.mask, strict=True):

        def observer(call):
            if call.layer == 1:
                plain.append(rotation.back(1, call.q)[0, 2].double())
            return call.output()

        with torch.no_grad(), rotation.noting([1]), model.attachment.observe(observer):
            model.attachment.hf_model(ids[mask][None], use_cache=False)
    close(mean.double(), torch.cat(plain).mean(0), 1e-4)

    found = model.trace(batch, edits=[ablate([head], "q_mean", reference=reference)], sites=["q", "k", "v", "z"])
    shape = model.spec.layers[1]
    for row, (start, length) in enumerate(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)):
        real = slice(start, start + length)
        turned = []

        def turning(call, turned=turned, length=length):
            if call.layer == 1:
                turned.append(rotation.forth(1, mean.expand(1, 1, length, -1))[0, 0])
            return call.output()

        with torch.no_grad(), rotation.noting([1]), model.attachment.observe(turning):
            model.attachment.hf_model(batch.ids[row, real][None], use_cache=False)
        k, v = (found.site(name, 1)[row, real, 2 // shape.group] for name in "kv")
        truth = naive(turned[0], k, v, shape, causal(length, shape.window), learned_sink(subject, 1, 2))
        close(found.site("z", 1)[row, real, 2].double(), truth, 1e-4)


@few
def test_frozen_zero_changes_later_layers_through_values_alone(subject, make_batch) -> None:
    """Against explicit clean patterns put in place of every later one."""
    model, batch = subject.model, make_batch(LENGTHS)
    heads = [Head(0, 1), Head(1, 2)]
    clean = model.trace(batch, sites=["pattern"], logits="all")
    truth = model.trace(
        batch,
        edits=[ablate(heads), *[patch("pattern", clean.site("pattern", layer), layer=layer) for layer in (1, 2)]],
        logits="all",
    )
    found = model.trace(batch, edits=[ablate(heads, "frozen_zero")], sites=["pattern", "z"], logits="all")
    for layer in range(3):
        close(found.site("pattern", layer)[0], clean.site("pattern", layer)[0], 1e-5)
    close(found.logits[batch.mask], truth.logits[batch.mask])
    for head in heads:
        assert not found.site("z", head.layer)[:, :, head.head].any()
    zero = model.trace(batch, edits=[ablate(heads)], logits="all")
    assert float((found.logits - zero.logits)[batch.mask].abs().max()) > 1e-2
    # However the batch is cut into pieces.
    cut = model.trace(batch, edits=[ablate(heads, "frozen_zero")], logits="all", tokens_at_once=12)
    close(cut.logits[batch.mask], found.logits[batch.mask], 1e-5)


@pytest.mark.parametrize("subject", ["gpt2", "qwen3"], indirect=True)
def test_frozen_zero_of_one_head_is_its_direct_and_value_path(subject, make_batch) -> None:
    """In the last layer there is no later pattern to keep: pattern-preserving zero is plain zero."""
    model, batch = subject.model, make_batch(LENGTHS)
    last = [Head(2, 1)]
    a, b = (model.trace(batch, edits=[ablate(last, how)], logits="all").logits for how in ("zero", "frozen_zero"))
    assert torch.equal(a, b)


@decoding
@pytest.mark.parametrize("how", ["q_mean", "streaming"])
def test_they_act_in_every_step_of_decoding(subject, make_batch, how: str) -> None:
    """Also where a sliding cache has dropped the first keys."""
    model, batch, steps = subject.model, make_batch((1, 4, 12, 9), seed=9), 9
    heads = [Head(0, 1), Head(1, 0), Head(2, 2)]
    edit = ablate(heads, how, reference=make_batch((20, 7), seed=10), sinks=2, recent=3)
    found = model.generate(batch, steps, edits=[edit], stop_ids=())
    rows = [
        [*ids[mask].tolist(), *new[:-1].tolist()]
        for ids, mask, new in zip(batch.ids, batch.mask, found.ids, strict=True)
    ]
    trace = model.trace(rows, edits=[edit], logits="all")
    assert found.ids.tolist() != model.generate(batch, steps, stop_ids=()).ids.tolist()
    for row, length in enumerate(batch.lengths.tolist()):
        assert trace.logits[row, length - 1 : length - 1 + steps].argmax(-1).tolist() == found.ids[row].tolist()


@decoding
def test_phases_of_decoding(subject, make_batch) -> None:
    """Prefill is the prompt's own rows, decoding those of the new tokens: a trace limited to these columns agrees."""
    model, batch, steps = subject.model, make_batch((5, 12), seed=2), 8
    heads = [Head(0, 1), Head(1, 0), Head(2, 2)]
    found = {phase: model.generate(batch, steps, edits=[ablate(heads)], phase=phase, stop_ids=()).ids
             for phase in ("both", "prefill", "decode")}  # fmt: skip
    clean = model.generate(batch, steps, stop_ids=()).ids
    assert found["decode"][:, 0].tolist() == clean[:, 0].tolist()
    assert len({tuple(map(tuple, ids.tolist())) for ids in [*found.values(), clean]}) == 4
    for phase, ids in found.items():
        rows = [
            [*prompt[mask].tolist(), *new[:-1].tolist()]
            for prompt, mask, new in zip(batch.ids, batch.mask, ids, strict=True)
        ]
        forced = model.batch(rows)
        own = torch.arange(forced.ids.shape[1])[None] < batch.lengths[:, None]
        positions = {"both": None, "prefill": own, "decode": ~own}[phase]
        trace = model.trace(forced, edits=[ablate(heads, positions=positions)], logits="all")
        for row, length in enumerate(batch.lengths.tolist()):
            assert trace.logits[row, length - 1 : length - 1 + steps].argmax(-1).tolist() == ids[row].tolist()


@few
def test_layers_before_a_given_stream_do_not_run(subject, make_batch) -> None:
    model, batch, other = subject.model, make_batch(LENGTHS), make_batch(LENGTHS, seed=1)
    stream = model.trace(other, sites=["resid_pre"]).site("resid_pre", 1)
    edits = [patch("resid_pre", stream, layer=1), ablate(["L1H1", "L2H0"])]
    # What blocks put out is found once for each model, by a pass of its own.
    block_outputs(model.attachment)
    ran: list[int] = []
    hooks = [
        layer.attention.register_forward_hook(lambda *_, index=layer.index: ran.append(index))
        for layer in model.attachment.layers
    ]
    own = [vars(layer.block).get("forward") for layer in model.attachment.layers]
    found = model.trace(batch, edits=edits, logits="all")
    short = list(ran)
    ran.clear()
    # Something is read below, so everything runs.
    whole = model.trace(batch, edits=edits, sites=["blocks.0.hook_resid_post"], logits="all")
    for hook in hooks:
        hook.remove()
    assert set(short) == {1, 2} and set(ran) == {0, 1, 2}
    assert torch.equal(found.logits, whole.logits)
    close(found.logits[batch.mask], model.trace(other, edits=edits[1:], logits="all").logits[batch.mask])
    assert own == [vars(layer.block).get("forward") for layer in model.attachment.layers]


@one
@pytest.mark.usefixtures("unchecked_signatures")
def test_what_makes_no_sense_is_refused(subject, make_batch) -> None:
    model, batch = subject.model, make_batch((8, 5))
    with pytest.raises(RequestError, match="sinks=4, recent=0"):
        ablate(["L1H1"], "streaming", recent=0)
    with pytest.raises(RequestError, match=r"how='q_mean'.* needs reference prompts"):
        ablate(["L1H1"], "q_mean")
    with pytest.raises(RequestError, match=r"generate.. cannot ablate with how='frozen_zero'"):
        model.generate(batch, 2, edits=[ablate(["L1H1"], "frozen_zero")])
    with pytest.raises(RequestError, match=r"phase='later' is no phase"):
        model.generate(batch, 2, edits=[ablate(["L1H1"])], phase="later")
