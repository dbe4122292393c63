"""RazorAttention against sums over explicit patterns, and its selection on tables made by hand."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from workbench.errors import RequestError
from workbench.heads import Settings, detect
from workbench.heads.detectors.razor import kv_scores, razor_heads
from workbench.heads.repeats import random_repeats
from workbench.models.spec import LayerSpec, Spec

PERIOD, COPIES = 9, 4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_the_formulas(name, twin):
    subject = twin(name)
    settings = Settings(bos_id=1, repeat_prompts=2, repeat_length=PERIOD, repeat_copies=COPIES)
    scores = detect(subject.model, ["razor_echo", "razor_induction"], settings=settings)
    task = random_repeats(subject.model, 2, PERIOD, COPIES, 0, 1)
    total = {"razor_echo": 0.0, "razor_induction": 0.0}
    for ids in task.batch.ids:
        patterns, _, _ = subject.run(ids)
        a = torch.stack(patterns)
        rows = range(1 + PERIOD, 1 + PERIOD * COPIES)
        for shift, which in ((0, "razor_echo"), (1, "razor_induction")):
            sums = [
                sum(a[:, :, i, i - m * PERIOD + shift] for m in range(1, COPIES) if i - m * PERIOD >= 1) for i in rows
            ]
            total[which] = total[which] + torch.stack(sums).mean(0) / 2
    for which, expected in total.items():
        rows = scores.table[scores.table.detector == which]
        found = torch.tensor(rows.sort_values(["layer", "head"]).value.to_numpy()).reshape(expected.shape)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_handwritten_induction_head_has_all_the_mass(handwritten, handwritten_settings):
    scores = detect(handwritten, ["razor_echo", "razor_induction", "echo"], settings=handwritten_settings)
    table = scores.table.set_index(["detector", "layer"]).value
    assert table["razor_induction", 1] == pytest.approx(1.0, abs=1e-6)
    assert table["razor_induction", 0] < 0.05 and table["razor_echo", 1] < 0.05
    assert table["razor_echo", 0] == table["echo", 0]


def spec(layers: int, heads: int, kv_heads: int) -> Spec:
    return Spec("made", tuple(LayerSpec(at, heads, kv_heads, 8, 1.0) for at in range(layers)), 8, 11, None)


def scored(**by_detector: list[list[float]]) -> pd.DataFrame:
    rows = [
        (name, layer, head, value)
        for name, table in by_detector.items()
        for layer, values in enumerate(table)
        for head, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["detector", "layer", "head", "value"])


def test_a_kv_head_scores_what_its_best_query_head_does():
    table = kv_scores(scored(razor_echo=[[0.1, 0.4, 0.2, 0.3]]), "razor_echo", spec(1, 4, 2))
    assert table.to_dict("list") == {"layer": [0, 0], "kv_head": [0, 1], "value": [0.4, 0.3], "head": [1, 3]}
    with pytest.raises(RequestError, match="'echo'"):
        kv_scores(scored(razor_echo=[[0.1]]), "echo", spec(1, 1, 1))


def test_selection_takes_the_published_shares_of_all_kv_heads_together():
    """25 layers of 4 KV heads: 1 by echo, 14 by induction, and one that is both counts once."""
    echo, induction = torch.zeros(25, 8), torch.zeros(25, 8)
    echo[3, 6] = 0.9
    for rank in range(15):
        induction[rank, 1] = 0.9 - 0.01 * rank
    scores = scored(razor_echo=echo.tolist(), razor_induction=induction.tolist())
    assert razor_heads(scores, spec(25, 8, 4)) == sorted([(3, 3), *((layer, 0) for layer in range(14))])
    assert razor_heads(scores, spec(25, 8, 4), echo=0.0, induction=0.02) == [(0, 0), (1, 0)]
    with pytest.raises(RequestError, match=r"1\.5"):
        razor_heads(scores, spec(25, 8, 4), echo=1.5)
