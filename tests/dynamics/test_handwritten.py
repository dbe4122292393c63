"""Every number here can be worked out by hand from the weights (see the module's docstring)."""

from __future__ import annotations

import pytest
import torch

from workbench.dynamics import ToyModel, handwritten_induction
from workbench.errors import RequestError

VOCAB, BOS, SEGMENT = 9, 8, 6


@pytest.fixture(scope="module")
def model() -> ToyModel:
    return handwritten_induction()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    segment = torch.stack([torch.randperm(BOS, generator=generator)[:SEGMENT] for _ in range(400)])
    return torch.cat([torch.full((400, 1), BOS), segment, segment], dim=1)


def accuracy(model: ToyModel, ids: torch.Tensor, first: int = 1) -> float:
    """On the whole second copy; its last token is followed by the segment's first again."""
    segment = ids[:, first : first + SEGMENT]
    with torch.no_grad():
        predicted = model(ids).logits.argmax(-1)[:, -SEGMENT:]
    return float((predicted == segment.roll(-1, dims=1)).float().mean())


def matrices(model: ToyModel, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W_QK (query side first) and W_OV (output side first), in the residual basis."""
    attention = model.blocks[layer].attention
    return (
        (attention.query.weight.T @ attention.key.weight).detach(),
        (attention.output.weight @ attention.value.weight).detach(),
    )


def test_the_second_copy_is_predicted_without_error(model, ids):
    assert accuracy(model, ids) == 1.0


@pytest.mark.parametrize(("vocab", "positions"), [(5, 14), (20, 8), (9, 14)])
def test_other_sizes_work_too(vocab, positions):
    model = handwritten_induction(vocab, positions)
    ids = torch.tensor([[vocab - 1, 2, 0, 1, 2, 0, 1]])
    with torch.no_grad():
        assert model(ids).logits.argmax(-1)[0, -3:].tolist() == [0, 1, 2]


def test_both_heads_have_saturated_patterns(model, ids, measure_patterns):
    first, second = measure_patterns(model, ids)[:, :, 0]
    query = torch.arange(1, 13)
    previous = first[:, query, query - 1]
    induction = second[:, query[SEGMENT:], query[SEGMENT:] - SEGMENT + 1]
    torch.testing.assert_close(previous, torch.ones_like(previous), atol=1e-6, rtol=0)
    torch.testing.assert_close(induction, torch.ones_like(induction), atol=1e-6, rtol=0)


def test_without_the_previous_token_head_nothing_is_known(model, ids, zero_heads):
    with zero_heads(model, [(0, 0)]):
        # Uniform attention is left: right only where the tie between six tokens falls right.
        assert accuracy(model, ids) == pytest.approx(0.025, abs=0.02)
    with zero_heads(model, [(1, 0)]):
        assert accuracy(model, ids) <= 0.2


def test_without_a_start_token_the_first_token_precedes_itself(model, ids):
    assert accuracy(model, ids[:, 1:], first=0) == pytest.approx(0.93, abs=0.02)


def test_composition_is_through_keys_alone(model):
    _, written = matrices(model, 0)
    qk, ov = matrices(model, 1)

    def score(reading: torch.Tensor) -> float:
        return float((reading @ written).norm() / (reading.norm() * written.norm()))

    assert score(qk) == pytest.approx(VOCAB**-0.5, abs=1e-6)
    assert score(qk.T) == 0.0
    assert score(ov) == 0.0


def test_too_small_sizes_are_refused():
    with pytest.raises(RequestError, match="vocab=2"):
        handwritten_induction(vocab=2)
