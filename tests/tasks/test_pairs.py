from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.pairs import KnownCircuit, PairTask, at_position, metric, right


def task_of(**changed) -> PairTask:
    made = {
        "name": "made",
        "caption": "two pairs",
        "seed": 0,
        "specials": "none",
        "clean": Batch.from_ids([[0, 1, 2], [0, 3, 4, 5]]),
        "corrupt": Batch.from_ids([[0, 6, 2], [0, 3, 7, 5]]),
        "answers": torch.tensor([[1, -1], [2, 3]]),
        "foils": torch.tensor([[6, 7], [5, -1]]),
        "position": torch.tensor([2, 3]),
        "roles": {"word": torch.tensor([1, 2])},
        "info": ({"template": "a"}, {"template": "b"}),
    }
    return PairTask(**{**made, **changed})


def test_metrics_are_those_computed_by_hand():
    task = task_of()
    logits = torch.arange(16.0).reshape(2, 8).sin() * 3
    expected = torch.stack([
        logits[0, 1] - logits[0, [6, 7]].mean(),
        logits[1, [2, 3]].mean() - logits[1, 5],
    ])  # fmt: skip
    torch.testing.assert_close(metric(task, logits), expected)
    margin = torch.stack([logits[0, 1] - logits[0, [6, 7]].max(), expected[1]])
    torch.testing.assert_close(metric(task, logits, "logit_margin"), margin)
    p = logits.softmax(-1)
    difference = torch.stack([p[0, 1] - p[0, 6] - p[0, 7], p[1, 2] + p[1, 3] - p[1, 5]])
    torch.testing.assert_close(metric(task, logits, "probability_difference"), difference)
    log = torch.stack([p[0, 1].log(), (p[1, 2] + p[1, 3]).log()])
    torch.testing.assert_close(task.score(logits, "log_probability"), log)
    assert right(task, logits).tolist() == [
        bool(logits[0, 1] > logits[0, [6, 7]].max()),
        bool(logits[1, [2, 3]].max() > logits[1, 5]),
    ]


def test_without_foils_only_the_most_likely_token_is_right():
    task = task_of(foils=torch.empty(2, 0, dtype=torch.long), metric="log_probability")
    logits = torch.zeros(2, 8)
    logits[0, 1], logits[1, 7] = 1, 1
    assert right(task, logits).tolist() == [True, False]
    with pytest.raises(RequestError, match="needs; choose log_probability"):
        metric(task, logits, "logit_difference")


def test_logits_of_all_columns_are_read_at_the_position_and_gradients_pass():
    task = task_of()
    logits = torch.randn(2, 4, 8, requires_grad=True)
    torch.testing.assert_close(at_position(task, logits), torch.stack([logits[0, 2], logits[1, 3]]))
    metric(task, logits).sum().backward()
    assert logits.grad[0, 2, 1] == 1 and logits.grad[0, 2, 6] == -0.5 and logits.grad[0, 3].abs().sum() == 0
    with pytest.raises(RequestError, match="fit neither"):
        metric(task, torch.zeros(3, 8))
    with pytest.raises(RequestError, match="'odds' is unknown"):
        metric(task, logits, "odds")


def test_what_changed_groups_and_selection():
    task = task_of()
    assert task.changed.nonzero().tolist() == [[0, 1], [1, 2]]
    assert task.groups.tolist() == [0, 1]
    assert task.select([1, 0, 1]).groups.tolist() == [0, 1, 0]
    one = task.select([1])
    assert one.answers.tolist() == [[2, 3]] and one.info == ({"template": "b"},) and one.roles["word"].tolist() == [2]
    assert task_of(references=task_of().corrupt).select([1]).references.ids.tolist() == [[0, 3, 7, 5]]
    with pytest.raises(RequestError, match="Prompt 2 does not exist"):
        task.select([2])


def test_the_hash_knows_prompts_answers_positions_and_metric():
    task = task_of()
    assert task.hash == task_of().hash
    others = (
        {"answers": torch.tensor([[2, -1], [2, 3]])},
        {"position": torch.tensor([2, 2])},
        {"metric": "logit_margin"},
        {"roles": {"word": torch.tensor([1, 1])}},
        {"corrupt": Batch.from_ids([[0, 7, 2], [0, 3, 7, 5]])},
        {"references": task.corrupt},
    )
    assert len({task.hash, *(replace(task, **one).hash for one in others)}) == 7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corrupt": Batch.from_ids([[0, 6, 2], [0, 3, 7]])}, "Pair 1 of made has 4 clean and 3 corrupt tokens"),
        ({"corrupt": Batch.from_ids([[0, 6, 2]])}, "2 clean and 1 corrupt"),
        ({"corrupt": Batch.from_ids([[0, 6, 2], [0, 3, 7, 5]], side="left")}, "padded otherwise"),
        ({"corrupt": Batch.from_ids([[0, 1, 2], [0, 3, 7, 5]])}, "Pair 0 of made has equal"),
        ({"references": Batch.from_ids([[0, 6, 2], [0, 3, 7]])}, "3 reference tokens"),
        ({"position": torch.tensor([3, 3])}, "position of pair 0 of made is column 3, outside"),
        ({"roles": {"word": torch.tensor([1, 4])}}, "word of pair 1 of made is column 4"),
        ({"roles": {"word": torch.tensor([-1, 2])}}, "column -1"),
        ({"roles": {"word": torch.tensor([1])}}, "one column a pair"),
        ({"answers": torch.tensor([[-1], [2]])}, "Pair 0 of made is without an answer"),
        ({"foils": torch.tensor([[6], [-1]])}, "Pair 1 of made is without a foil"),
        ({"foils": torch.tensor([[6], [3]])}, "Token 3 is both answer and foil of pair 1"),
        ({"foils": torch.tensor([[6], [-2]])}, "must be token ids"),
        ({"metric": "odds"}, "'odds' is unknown"),
        ({"info": ({},)}, "1 entries of info for 2 pairs"),
    ],
)
@pytest.mark.usefixtures("unchecked_signatures")
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(RequestError, match=message):
        task_of(**changed)


def test_heads_of_a_known_circuit_are_listed_once():
    circuit = KnownCircuit("toy", "none", "", {"movers": ("L1H0", "L1H2"), "more": ("L1H2", "L2.mlp")})
    assert circuit.heads == ("L1H0", "L1H2")
