"""Reports of runs about circuits: what they say is what the tables hold, and prompts cannot steer the page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from workbench.reports.build import build
from workbench.reports.circuit_summary import circuits_summary
from workbench.reports.circuits import circuits_view
from workbench.reports.write import render

LAYERS, HEADS = 4, 3
ABOUT = {
    "what": "patch", "task": "toy", "caption": "", "metric": "logit_difference", "n": 12, "clean": 3.0, "corrupt": -1.0,
    "right": 0.75, "sites": ["z"], "by": "head", "directions": ["denoising", "noising"],
    "work": {"rows": 100, "naive_rows": 1250, "runs": 24, "unchanged": 2}, "dropped": {"names": 3},
    "known_circuit": {"model": "gpt2", "paper": "Wang et al. 2022"},
}  # fmt: skip


def effects() -> pd.DataFrame:
    rows = []
    for direction in ("denoising", "noising"):
        for layer in range(LAYERS):
            for head in range(HEADS):
                value = {(3, 1): 0.6, (2, 0): -0.25}.get((layer, head), 0.01 * head)
                rows.append((direction, f"L{layer}H{head}", layer, "z", head, None, None, value))
    frame = pd.DataFrame(rows, columns="direction node layer site head position key recovery".split())
    real = frame["recovery"].abs() > 0.1
    return frame.assign(
        effect=4 * frame["recovery"], effect_low=4 * frame["recovery"] - 0.2, effect_high=4 * frame["recovery"] + 0.2,
        low=frame["recovery"] - 0.05, high=frame["recovery"] + 0.05, p=np.where(real, 0.0005, 0.5),
        q=np.where(real, 0.003, 0.6), n=12, head=frame["head"].astype("Int64"), layer=frame["layer"].astype("Int64"),
    )  # fmt: skip


@pytest.fixture
def patch(demo: Any) -> Any:
    """A run of patches with the model and certificate of the synthetic run."""
    pairs = pd.DataFrame({
        "prompt": [0], "clean_text": ["<script>alert(1)</script> When Mary"], "corrupt_text": ["When\u202e John"],
        "answer": [" Mary"], "foil": [" John"], "clean": [3.0], "corrupt": [-1.0], "right": [True],
    })  # fmt: skip
    manifest = demo.manifest | {"kind": "patch", "circuits": ABOUT}
    return replace(demo, manifest=manifest, frames={"effects": effects(), "pairs": pairs}, datasets={})


def test_other_runs_have_no_such_section(demo: Any) -> None:
    assert circuits_view(demo) is None and 'id="circuits"' not in render(demo)


def test_the_summary_says_what_the_table_holds(patch: Any) -> None:
    said = str(circuits_summary(patch))
    assert "On 12 pairs of <strong>toy</strong>" in said and "answers 75 %" in said
    assert "Of 12 places that were patched clean into corrupt, 2 differ" in said
    assert "<b>L3H1</b> restores most, 0.60 of the gap [0.55 to 0.65]" in said
    assert "<b>L2H0</b> works against the task (−0.25" in said


def test_a_task_that_fails_and_a_gap_that_vanishes_are_told(patch: Any) -> None:
    about = ABOUT | {"right": 0.1, "refusal": "the clean and the corrupt run score alike"}
    failing = replace(
        patch, manifest=patch.manifest | {"circuits": about},
        frames=patch.frames | {"effects": effects().assign(recovery=np.nan, low=np.nan, high=np.nan)},
    )  # fmt: skip
    said = str(circuits_summary(failing))
    assert "mostly fails the task" in said and "The clean and the corrupt run score alike." in said
    assert 'data-figure="patch-map-0"' in render(failing)


def test_too_few_pairs_are_told_once_for_both_directions(patch: Any) -> None:
    few = replace(patch, frames=patch.frames | {"effects": effects().assign(n=4, p=0.5, q=0.9)})
    said = str(circuits_summary(few))
    assert said.count("p cannot fall below 0.12") == 1 == said.count("16 pairs or more")


def test_the_page_has_maps_tables_prompts_and_escapes_them(patch: Any) -> None:
    content = build(patch)
    assert set(content.figures) == {"patches"} and set(content.figures["patches"]) == {"patch-map-0", "patch-points-0"}
    page = render(patch)
    for text in (
        'id="circuits"',
        'href="#circuits"',
        'id="pairs"',
        "Strongest places: z",
        "12.5 times fewer",
        "3 names",
    ):
        assert text in page
    assert "<script>alert(1)" not in page and "\u202e" not in page
    assert "No head of this run has been ablated" not in page and "workbench heads" not in page


def test_negative_results_of_circuits_are_told(patch: Any) -> None:
    curve = pd.DataFrame({
        "method": "EAP", "fraction": [0.01, 0.1, 1.0], "value": [0.1, 0.4, 1.0], "low": [0.0, 0.3, 1.0],
        "high": [0.2, 0.5, 1.0],
    })  # fmt: skip
    random = pd.DataFrame({"fraction": [0.01, 0.1], "low": -0.1, "high": [0.2, 0.95], "n": 4})
    weak = replace(
        patch, manifest=patch.manifest | {"circuits": ABOUT | {"what": "evaluate"}},
        frames={"faithfulness": curve, "random_circuits": random},
    )  # fmt: skip
    assert "No circuit of EAP below the whole model is 80 % faithful" in str(circuits_summary(weak))
    assert "the best, at 10 % of the edges, reaches 0.40 [0.30 to 0.50]" in str(circuits_summary(weak))
    assert "no ROC curve" in "".join(circuits_view(weak).notes)
    few = replace(weak, manifest=patch.manifest | {"circuits": ABOUT | {"what": "evaluate", "n": 4}})
    assert str(circuits_summary(few)).count("With 4 pairs the intervals say little") == 1
    assert "the intervals say little" not in str(circuits_summary(weak))
    strong = replace(weak, frames=weak.frames | {"faithfulness": curve.assign(value=[0.1, 0.9, 1.0])})
    said = str(circuits_summary(strong))
    assert "is 0.90 faithful" in said and "no better than chance" in said
    assert 'data-figure="faithfulness"' in render(strong)


def test_scores_have_a_map_a_graph_and_a_table(patch: Any) -> None:
    edges = pd.DataFrame({
        "source": ["embed", "L0H1"], "target": ["L0H1", "logits"], "through": ["q", ""], "score": [0.5, -0.75],
        "low": [0.4, -0.8], "high": [0.6, -0.7],
    })  # fmt: skip
    about = ABOUT | {"what": "attribute", "method": "EAP"}
    run = replace(patch, manifest=patch.manifest | {"circuits": about}, frames={"edge_scores": edges})
    content = build(run)
    assert {"scores", "graph"} <= set(content.figures)
    assert "EAP gives <b>L0H1 → logits</b> the largest score (−0.75" in str(content.texts["summary"])
    assert (
        "Strongest edges" in render(run) and "Sum of the outgoing" in content.figures["scores"]["node-map"]["caption"]
    )
    nodes = pd.DataFrame({"node": ["embed", "L0H1"], "score": [0.5, -0.75], "low": [0.4, -0.8], "high": [0.6, -0.7]})
    scored = build(replace(run, frames={"node_scores": nodes}))
    assert "Score of the node" in scored.figures["scores"]["node-map"]["caption"] and "graph" not in scored.figures
