"""Ablation chart and its verdicts."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.figures import ablation_chart, caption_of, verdict
from workbench.figures.controls import whence, with_controls


def traces(figure: Any, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.name == name and trace.x[0] is not None]


def test_verdicts(verification: pd.DataFrame) -> None:
    kinds = [verdict(row).kind for row in verification.to_dict("records")]
    assert kinds == ["shown", "inside", "reverse", "unsure"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"q": 0.2}, "unsure"),
        ({"low": -0.1}, "unsure"),
        ({"better": "higher"}, "reverse"),
        ({"control_high": float("nan")}, "uncontrolled"),
        ({"control_high": 1.0}, "inside"),
        ({"q": float("nan")}, "shown"),
    ],
)
def test_verdict_changes_with_one_fact(verification: pd.DataFrame, change: dict[str, Any], kind: str) -> None:
    row = verification.iloc[0].to_dict() | change
    assert verdict(row).kind == kind


def test_inside_is_said_in_words(verification: pd.DataFrame) -> None:
    said = verdict(verification.iloc[1].to_dict())
    assert said.label == "inside control range"
    assert "10 draws of matched random heads (−0.100 to 0.200)" in said.sentence


def test_every_draw_and_effect_is_a_point(verification: pd.DataFrame, draws: pd.DataFrame) -> None:
    figure = ablation_chart(verification, draws, metric="loss")
    points = traces(figure, "one random draw")[0]
    assert sorted(points.x) == sorted(draws["effect"])
    shown = traces(figure, "detector's heads, effect shown")[0]
    hollow = traces(figure, "detector's heads, effect not shown")[0]
    assert (list(shown.x), shown.marker.symbol) == ([1.0], "diamond")
    assert (sorted(hollow.x), hollow.marker.symbol) == ([-0.5, 0.1], "diamond-open")
    assert shown.error_x.array[0] == pytest.approx(0.2)
    assert shown.error_x.arrayminus[0] == pytest.approx(0.2)


def test_draws_stay_in_the_row_of_their_ablation(verification: pd.DataFrame, draws: pd.DataFrame) -> None:
    points = traces(ablation_chart(verification, draws, metric="loss"), "one random draw")[0]
    rows = {round(height) for x, height in zip(points.x, points.y, strict=True) if x > 0}
    assert rows == {2}, "the first ablation of the table is the top row"


def test_control_range_is_drawn(verification: pd.DataFrame) -> None:
    band = traces(ablation_chart(verification, metric="recall"), "range of random draws")[0]
    assert list(band.x)[:2] == [-0.1, 0.1]


def test_p_and_q_stand_beside_each_row(verification: pd.DataFrame) -> None:
    texts = [note.text for note in ablation_chart(verification).layout.annotations]
    assert texts[0] == "p 0.001<br>q 0.004"
    assert len(texts) == 4


def test_metrics_have_panels_and_say_which_way_is_worse(verification: pd.DataFrame) -> None:
    layout = ablation_chart(verification).layout
    assert layout.xaxis.title.text == "change in loss (nats)   worse →"
    assert layout.xaxis2.title.text == "← worse   change in recall"


def test_caption_and_refusal(verification: pd.DataFrame) -> None:
    assert "mean over 8 prompts" in caption_of(ablation_chart(verification))
    with pytest.raises(RequestError, match="accuracy"):
        ablation_chart(verification, metric="accuracy")


def test_heads_chosen_by_hand_are_called_so(verification: pd.DataFrame) -> None:
    figure = ablation_chart(verification.head(1).assign(detector="chosen"))
    assert traces(figure, "heads chosen by hand, effect shown")
    assert "the heads chosen by hand are ablated" in caption_of(figure)
    assert figure.layout.yaxis.ticktext[0].startswith("<b>Chosen by hand</b>")
    assert "2 heads, mean" in figure.layout.yaxis.ticktext[0]


def test_more_than_the_controls_mean_but_within_their_range_stays_open(verification: pd.DataFrame) -> None:
    row = verification.iloc[0].to_dict() | {"control_low": -0.47, "control_effect": 0.3, "control_high": 1.5}
    said = verdict(row)
    assert (said.kind, said.label) == ("inside", "inside control range")
    assert "more than random heads do on average (+0.30)" in said.sentence
    assert "the claim stays open" in said.sentence
    assert "nothing particular" in verdict(row | {"low": 0.2}).sentence
    better = {"better": "higher", "effect": -0.4, "low": -0.6, "high": -0.2, "control_low": -0.5, "control_high": 0.1}
    assert "stays open" in verdict(row | better | {"control_effect": -0.1}).sentence
    assert "nothing particular" in verdict(row | better | {"control_effect": -0.3}).sentence


@pytest.mark.parametrize(
    ("different", "said"),
    [(1, "the one set of matched"), (4, "4 different sets of matched"), (10, "10 draws of matched")],
)
def test_different_control_sets_are_counted(verification: pd.DataFrame, different: int, said: str) -> None:
    found = verdict(verification.iloc[0].to_dict() | {"different_draws": different})
    assert said in found.sentence
    assert found.label == ("effect shown" if different == 10 else "too few controls")


def test_older_runs_get_their_control_sets_from_the_draws(verification: pd.DataFrame, draws: pd.DataFrame) -> None:
    rows = with_controls(verification, draws.assign(heads="L2H0 L3H1"))
    assert rows["different_draws"].tolist()[:2] == [1, 1]
    assert rows["other_layers"].tolist()[:2] == [0, 2]
    assert whence(rows.head(1).to_dict("records")) == " of the same layers"
    assert "of the nearest ones" in whence(rows.head(2).to_dict("records"))
    assert whence(rows.tail(1).to_dict("records")) == "", "nothing is claimed of controls without a record"
    caption = caption_of(ablation_chart(verification, draws.assign(heads="L2H0 L3H1"), metric="loss"))
    assert "beside the one set of as many random heads of the same layers or, where" in caption
