from __future__ import annotations

import hashlib

import pytest
import torch
from jaxtyping import TypeCheckError

from workbench.errors import RequestError
from workbench.models.batch import Batch

ROWS = [[5, 6, 7], [8], [9, 10]]


@pytest.mark.parametrize(
    ("side", "ids", "starts", "positions"),
    [
        ("right", [[5, 6, 7], [8, 0, 0], [9, 10, 0]], [0, 0, 0], [[0, 1, 2], [0, 0, 0], [0, 1, 0]]),
        ("left", [[5, 6, 7], [0, 0, 8], [0, 9, 10]], [0, 2, 1], [[0, 1, 2], [0, 0, 0], [0, 0, 1]]),
    ],
)
def test_padding_on_either_side(side: str, ids: list[list[int]], starts: list[int], positions: list[list[int]]) -> None:
    batch = Batch.from_ids(ROWS, side=side)
    assert batch.ids.tolist() == ids
    assert batch.mask.tolist() == [[token != 0 for token in row] for row in ids]
    assert batch.starts.tolist() == starts
    assert batch.lengths.tolist() == [3, 1, 2]
    assert batch.positions.tolist() == positions
    assert batch.padded
    assert len(batch) == 3


def test_without_padding() -> None:
    batch = Batch.from_ids([[1, 2], [3, 4]], texts=["a b", "c d"])
    assert not batch.padded
    assert batch.positions.tolist() == [[0, 1], [0, 1]]
    assert batch.texts == ("a b", "c d")


@pytest.mark.parametrize(
    ("mask", "runs"),
    [([[True, False, True]], 2), ([[False, False, False]], 0), ([[False, True, False, True, True]], 2)],
)
def test_real_tokens_are_one_run(mask: list[list[bool]], runs: int) -> None:
    with pytest.raises(RequestError, match=f"Prompt 0 has {runs} runs"):
        Batch(torch.ones(1, len(mask[0]), dtype=torch.long), torch.tensor(mask))


def test_a_run_in_the_middle_is_allowed() -> None:
    batch = Batch(torch.tensor([[0, 4, 5, 0]]), torch.tensor([[False, True, True, False]]))
    assert (batch.starts.item(), batch.lengths.item()) == (1, 2)


def test_wrong_requests_name_what_is_wrong() -> None:
    with pytest.raises(RequestError, match="Prompt 1 has no tokens"):
        Batch.from_ids([[1], []])
    with pytest.raises(RequestError, match="at least one prompt"):
        Batch.from_ids([])
    with pytest.raises(RequestError, match="side='middle'"):
        Batch.from_ids([[1]], side="middle")
    with pytest.raises(RequestError, match="2 texts for 1 prompts"):
        Batch.from_ids([[1]], texts=["a", "b"])
    # Under tests the annotation itself may be what complains.
    with pytest.raises((RequestError, TypeCheckError), match="prompt"):
        Batch(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))


def test_the_hash_is_of_the_prompts_and_not_of_what_fills_the_padding() -> None:
    batch = Batch.from_ids(ROWS)
    assert batch.hash == Batch.from_ids(ROWS, pad_id=99).hash
    others = [
        Batch.from_ids(ROWS, side="left"),
        Batch.from_ids([[5, 6, 7], [8], [9, 11]]),
        Batch.from_ids([[5, 6, 7], [8], [9, 10, 0]]),
        Batch.from_ids([[5, 6, 7, 8], [9], [10]]),
    ]
    assert len({batch.hash, *(other.hash for other in others)}) == 5
    # Pinned to the byte: stored runs name their prompts by it.
    stored = b"(1, 2)" + b"\x01\x01" + b"\x01" + bytes(7) + b"\x02" + bytes(7)
    assert Batch.from_ids([[1, 2]]).hash == hashlib.sha256(stored).hexdigest()


def test_select_and_split_keep_the_columns() -> None:
    batch = Batch.from_ids(ROWS, side="left", texts=["a", "b", "c"])
    chosen = batch.select([2, 0])
    assert chosen.ids.tolist() == [[0, 9, 10], [5, 6, 7]]
    assert chosen.texts == ("c", "a")
    pieces = batch.split(2)
    assert [len(piece) for piece in pieces] == [2, 1]
    assert torch.equal(torch.cat([piece.ids for piece in pieces]), batch.ids)
    assert torch.equal(torch.cat([piece.mask for piece in pieces]), batch.mask)
    with pytest.raises(RequestError, match="Prompt 3 does not exist"):
        batch.select([0, 3])
    with pytest.raises(RequestError, match="size=0"):
        batch.split(0)
