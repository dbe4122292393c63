"""Maps of patches, pictures of circuits, and curves of how good they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.figures import (
    DARK,
    caption_of,
    circuit_graph,
    contribution_bars,
    faithfulness_curve,
    has_map,
    patch_maps,
    roc_curve,
    score_map,
)

ABOUT = {"task": "toy", "metric": "logit_difference", "clean": 2.0, "corrupt": -1.0, "n": 7, "method": "EAP"}


def effects(*, head: bool = True, position: bool = False) -> pd.DataFrame:
    """Two layers, two heads, two roles, both directions; L1H0 restores 0.8 and L0H1 hurts by 0.5."""
    rows = []
    for direction in ("denoising", "noising"):
        for layer in (0, 1):
            for h in (0, 1) if head else (None,):
                for place in ("S2", "END") if position else (None,):
                    value = {(1, 0): 0.8, (0, 1): -0.5}.get((layer, h), 0.1) if head else 0.1 * (layer + 1)
                    value = value / 2 if place == "END" else value
                    node = f"L{layer}H{h}" if head else f"L{layer}.resid_pre"
                    rows.append((direction, node, layer, "z", h, place, 3 * value, value, value - 0.1, value + 0.1))
    columns = "direction node layer site head position effect recovery low high".split()
    frame = pd.DataFrame(rows, columns=columns).assign(effect_low=0.0, effect_high=1.0, p=0.01, q=0.02, n=7)
    return frame.assign(head=frame["head"].astype("Int64"), layer=frame["layer"].astype("Int64"))


def cells(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if trace.type == "heatmap"]


def test_both_directions_side_by_side_around_zero() -> None:
    figure = patch_maps(effects(), ABOUT, dark=True)
    left, right = cells(figure)
    np.testing.assert_allclose(left.z, [[0.1, -0.5], [0.8, 0.1]])
    np.testing.assert_allclose(right.z, left.z)
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-0.8, 0.8) and [c for _, c in axis.colorscale] == list(DARK.diverging)
    assert [note.text.split("<")[1] for note in figure.layout.annotations] == ["b>Restored", "b>Broken"]
    ring = next(trace for trace in figure.data if trace.name == "strongest")
    assert (ring.x, ring.y) == ((0,), (1,))
    assert list(left.customdata[1, 0]) == ["L1H0", "+0.800", "0.700 to 0.900", "0.02", "7"]
    said = caption_of(figure)
    for part in ("z is patched", "restored by clean", "broken by corrupt", "toy, logit difference", "n = 7", "2.00"):
        assert part in said


def test_positions_by_role_and_by_token() -> None:
    figure = patch_maps(effects(head=False, position=True), ABOUT)
    assert list(figure.layout.xaxis.ticktext) == ["S2", "END"]
    np.testing.assert_allclose(cells(figure)[0].z, [[0.1, 0.05], [0.2, 0.1]])
    numbered = effects(head=False, position=True).replace({"position": {"S2": "0", "END": "1"}})
    tokens = pd.DataFrame({"position": [0, 1], "token": [" <b>", "x"], "role": ["", "END"]})
    shown = patch_maps(numbered, ABOUT, tokens=tokens)
    assert list(shown.layout.xaxis.ticktext) == ["␣&lt;b&gt;", "x <b>END</b>"]


def test_heads_by_position_keep_the_strongest_in_the_models_order() -> None:
    figure = patch_maps(effects(position=True), ABOUT)
    assert list(figure.layout.yaxis.ticktext) == ["L0H0", "L0H1", "L1H0", "L1H1"]
    np.testing.assert_allclose(cells(figure)[0].z[2], [0.8, 0.4])


def test_without_a_gap_the_change_itself_is_drawn() -> None:
    figure = patch_maps(effects().assign(recovery=np.nan), ABOUT)
    np.testing.assert_allclose(cells(figure)[0].z[1, 0], 2.4)
    assert caption_of(figure).startswith("Change of the metric")


def test_one_axis_makes_no_map() -> None:
    alone = effects(head=False)
    assert not has_map(alone) and has_map(effects())
    with pytest.raises(RequestError, match="one axis only"):
        patch_maps(alone, ABOUT)


EDGES = pd.DataFrame(
    [
        ("embed", "L0H1", "q", 0.5),
        ("L0H1", "L2KV0", "v", -0.9),
        ("L2H1", "logits", "", 1.0),
        ("L0H1", "L1.mlp", "", 0.01),
    ],
    columns=["source", "target", "through", "score"],
)


def test_a_circuit_shows_its_strongest_edges_and_says_how_many() -> None:
    figure = circuit_graph(EDGES, ABOUT, most=3, group=2)
    nodes = next(trace for trace in figure.data if trace.name == "nodes")
    assert set(nodes.hovertext) == {"embed", "L0H1", "L2KV0", "L2H1", "logits"}
    edges = next(trace for trace in figure.data if trace.name == "edges")
    assert [row[0] for row in edges.customdata] == ["L2H1 -&gt; logits", "L0H1 -&gt; L2KV0.v", "embed -&gt; L0H1.q"]
    lines = {
        trace.line.dash: trace.line.width for trace in figure.data if (trace.legendgroup or "") in ("helps", "hurts")
    }
    assert set(lines) == {"solid", "dot"} and {trace.legendgroup for trace in figure.data} >= {"helps", "hurts"}
    # Layer 2 has a key/value head and its query head: tied.
    assert any(trace.name == "key/value heads of query heads" for trace in figure.data)
    assert "The 3 strongest edges by EAP" in caption_of(figure) and "1 weaker ones of 4" in caption_of(figure)
    heights = dict(zip(nodes.hovertext, nodes.y, strict=True))
    assert heights["embed"] < heights["L0H1"] < heights["L2H1"] < heights["logits"]


def test_scores_by_layer_and_head_with_mlps_apart() -> None:
    nodes = pd.DataFrame({"node": ["embed", "L0H1", "L1.mlp", "L1H0"], "score": [9.0, -0.5, 0.25, 0.125]})
    figure = score_map(nodes, ABOUT)
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "MLP"]
    np.testing.assert_array_equal(cells(figure)[0].z, [[np.nan, -0.5, np.nan], [0.125, np.nan, 0.25]])
    assert figure.layout.coloraxis.cmax == 0.5 and "Without a cell: embed" in caption_of(figure)


def test_faithfulness_beside_random_circuits() -> None:
    curve = pd.DataFrame({"method": "EAP", "fraction": [0.01, 0.1, 1.0], "value": [0.2, 0.9, 1.0]})
    curve = curve.assign(low=curve["value"] - 0.1, high=curve["value"] + 0.1)
    random = pd.DataFrame({"fraction": [0.01, 0.1], "low": [-0.1, 0.0], "high": [0.1, 0.3], "n": 5})
    figure = faithfulness_curve(curve, ABOUT, random=random)
    line = next(trace for trace in figure.data if trace.name == "EAP")
    assert list(line.y) == [0.2, 0.9, 1.0] and list(line.x) == [0.01, 0.1, 1.0]
    np.testing.assert_allclose(line.error_y.array, 0.1)
    band = next(trace for trace in figure.data if trace.name == "random circuits")
    assert band.fill == "tonexty" and list(band.y) == [0.1, 0.3]
    assert figure.layout.xaxis.type == "log" and "5 random circuits" in caption_of(figure)


def test_rankings_are_lines_of_their_own() -> None:
    curve = pd.DataFrame({
        "method": "EAP", "ranking": ["absolute", "absolute", "signed", "signed"], "fraction": [0.1, 1.0, 0.1, 1.0],
        "value": [0.2, 1.0, 0.7, 1.0], "low": 0.0, "high": 1.0,
    })  # fmt: skip
    random = pd.DataFrame(
        {"fraction": [0.1, 0.1, 1.0, 1.0], "low": [-0.1, -0.3, 1, 1], "high": [0.1, 0.05, 1, 1], "n": 2}
    )
    lines = {trace.name: list(trace.y) for trace in faithfulness_curve(curve, ABOUT, random=random).data if trace.name}
    assert lines["EAP, by size"] == [0.2, 1.0] and lines["EAP, by sign"] == [0.7, 1.0]
    # One band over all random circuits of a share.
    assert lines["random circuits"] == [0.1, 1.0]


def test_roc_has_its_area_and_its_source() -> None:
    points = pd.DataFrame(
        {"method": "EAP", "fpr": [0.0, 0.5, 1.0], "tpr": [0.5, 1.0, 1.0], "auc": 0.875, "of": "edges"}
    )
    figure = roc_curve(points, ABOUT | {"known_circuit": {"paper": "Wang et al. 2022"}})
    assert "EAP (area 0.88)" in [trace.name for trace in figure.data] or "EAP (area 0.87)" in [
        trace.name for trace in figure.data
    ]
    assert "edges" in caption_of(figure) and "Wang et al. 2022" in caption_of(figure)


def test_contributions_are_sorted_and_cut() -> None:
    parts = pd.DataFrame({"node": [f"L0H{i}" for i in range(30)], "value": np.linspace(-1, 2, 30)})
    figure = contribution_bars(parts, ABOUT, most=5)
    bar = figure.data[0]
    assert len(bar.x) == 5 and list(bar.x) == sorted(bar.x) and max(bar.x) == 2.0
    assert "The 5 largest of 30" in caption_of(figure)
