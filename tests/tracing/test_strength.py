"""The strength of an ablation: exact at both ends, and in between a mix against explicit patterns in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Head
from workbench.tracing import ablate, patch
from workbench.tracing.edits import HOWS
from workbench.tracing.rotation import mean_queries

LENGTHS = (19, 11)
HEAD = Head(1, 2)
forms = pytest.mark.parametrize("how", HOWS)
few = pytest.mark.parametrize("subject", ["gpt2", "llama", "mistral", "gpt_oss"], indirect=True)


def close(found: Tensor, truth: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=tolerance * max(1.0, float(truth.abs().max())))


def edit_of(how, heads, make_batch, **options):
    return ablate(heads, how, reference=make_batch((20, 20), seed=5), sinks=2, recent=3, **options)


@few
@forms
def test_both_ends_are_exact(subject, make_batch, how: str) -> None:
    """To the bit: nothing at 0, and at 1 what the form gives by itself."""
    model, batch = subject.model, make_batch(LENGTHS)
    heads = [Head(0, 1), HEAD]
    whole = ablate(heads, how, reference=make_batch((20, 20), seed=5), sinks=2, recent=3)
    for strength, edits in ((0.0, []), (1.0, [whole])):
        edit = edit_of(how, heads, make_batch, strength=strength)
        found = model.trace(batch, edits=[edit], logits="all", sites=["z", "pattern"])
        truth = model.trace(batch, edits=edits, logits="all", sites=["z", "pattern"])
        assert torch.equal(found.logits[batch.mask], truth.logits[batch.mask])
        for layer in range(3):
            assert torch.equal(found.site("z", layer)[batch.mask], truth.site("z", layer)[batch.mask])


def replaced(how: str, pattern: Tensor, window: int | None) -> Tensor:
    """The pattern of one head of one prompt that an ablation of the pattern leaves, in float64."""
    length = len(pattern)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    if how == "uniform":
        return seen.double() / seen.sum(1, keepdim=True)
    if how == "to_sink":
        return torch.eye(length, dtype=torch.float64)[seen.int().argmax(1)]
    kept = seen & ((torch.arange(length) < 2) | (distance < 3))
    # What a learned sink takes stays beside the keys in the sum.
    rest = 1 - pattern.sum(1, keepdim=True)
    own = pattern * kept
    return own / (own.sum(1, keepdim=True) + rest)


@few
@pytest.mark.parametrize("how", ["uniform", "to_sink", "streaming"])
@pytest.mark.parametrize("strength", [0.25, 0.8])
def test_forms_of_the_pattern_are_mixed_as_patterns(subject, make_batch, how: str, strength: float) -> None:
    model, batch = subject.model, make_batch(LENGTHS)
    shape = model.spec.layers[HEAD.layer]
    clean = model.trace(batch, sites=["pattern", "v"])
    found = model.trace(batch, edits=[edit_of(how, [HEAD], make_batch, strength=strength)], sites=["z"], logits="all")
    z = model.trace(batch, sites=["z"]).site("z", HEAD.layer).clone()
    for row, length in enumerate(LENGTHS):
        pattern = clean.site("pattern", HEAD.layer)[row, HEAD.head, :length, :length].double()
        v = clean.site("v", HEAD.layer)[row, :length, HEAD.head // shape.group].double()
        truth = ((1 - strength) * pattern + strength * replaced(how, pattern, shape.window)) @ v
        close(found.site("z", HEAD.layer)[row, :length, HEAD.head], truth)
        z[row, :length, HEAD.head] = truth.float()
    # Later layers read the mix.
    given = model.trace(batch, edits=[patch("z", z, layer=HEAD.layer)], logits="all")
    close(found.logits[batch.mask], given.logits[batch.mask].double(), 1e-4)


@few
@pytest.mark.parametrize("how", ["zero", "mean", "resample", "q_mean", "frozen_zero"])
def test_forms_of_the_output_are_mixed_as_outputs(subject, make_batch, how: str) -> None:
    model, batch, strength = subject.model, make_batch(LENGTHS), 0.3
    reference = make_batch((20, 20), seed=5)
    clean = model.trace(batch, sites=["pattern", "z", "v"])
    z = clean.site("z", HEAD.layer).double()[:, :, HEAD.head]
    if how == "mean":
        other = model.trace(reference, sites=["z"]).site("z", HEAD.layer)[:, :, HEAD.head].double().mean((0, 1))
    elif how == "resample":
        other = model.trace(reference, sites=["z"]).site("z", HEAD.layer)[:, : max(LENGTHS), HEAD.head].double()
    elif how == "q_mean":
        values = mean_queries(model, reference, [HEAD])
        alone = model.trace(batch, edits=[ablate([HEAD], how, values=values)], sites=["z"])
        other = alone.site("z", HEAD.layer)[:, :, HEAD.head].double()
    else:
        other = torch.zeros_like(z)
    edit = ablate([HEAD], how, reference=reference, strength=strength)
    found = model.trace(batch, edits=[edit], sites=["z", "pattern"], logits="all")
    truth = (1 - strength) * z + strength * other
    close(found.site("z", HEAD.layer)[:, :, HEAD.head][batch.mask], truth[batch.mask])
    if how == "frozen_zero":
        close(found.site("pattern", 2)[0], clean.site("pattern", 2)[0].double())
    # Elsewhere nothing is mixed.
    rest = [head for head in range(model.spec.layers[1].heads) if head != HEAD.head]
    assert torch.equal(found.site("z", 1)[:, :, rest][batch.mask], clean.site("z", 1)[:, :, rest][batch.mask])


@pytest.mark.parametrize("subject", ["llama"], indirect=True)
def test_strength_acts_at_the_chosen_positions_and_while_decoding(subject, make_batch) -> None:
    model, batch, steps = subject.model, make_batch((5, 12), seed=2), 6
    heads = [Head(0, 1), HEAD]
    edit = ablate(heads, "zero", strength=0.7)
    found = model.generate(batch, steps, edits=[edit], stop_ids=())
    rows = [
        [*ids[mask].tolist(), *new[:-1].tolist()]
        for ids, mask, new in zip(batch.ids, batch.mask, found.ids, strict=True)
    ]
    trace = model.trace(rows, edits=[edit], logits="all")
    for row, length in enumerate(batch.lengths.tolist()):
        assert trace.logits[row, length - 1 : length - 1 + steps].argmax(-1).tolist() == found.ids[row].tolist()
    chosen = torch.arange(batch.ids.shape[1]).expand(2, -1) == 3
    part = model.trace(batch, edits=[ablate([HEAD], positions=chosen, strength=0.5)], sites=["z"]).site("z", 1)
    clean = model.trace(batch, sites=["z"]).site("z", 1)
    close(part[:, 3, HEAD.head], clean[:, 3, HEAD.head].double() / 2)
    assert torch.equal(part[:, 4], clean[:, 4])


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan")])
def test_what_is_no_share_is_refused(strength: float) -> None:
    with pytest.raises(RequestError, match="choose 0"):
        ablate(["L1H1"], strength=strength)
