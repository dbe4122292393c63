"""Measurements of circuits on models made here: what they yield, and what must come out where the answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import workbench
from workbench.circuits import AutoencoderSettings, DiscreteCircuit, LogitAttribution
from workbench.circuits.codes import node_scores
from workbench.dynamics import copying, linear_network
from workbench.errors import RequestError
from workbench.models import Head
from workbench.models.testing import TINY
from workbench.studies.measurements import MEASUREMENTS, Bench, found, letters, pairs, recall, reuse, years
from workbench.studies.measurements.pairs import Pairs, Prepared, check_task, interval_row
from workbench.tasks import PairTask
from workbench.tracing import patch


def prepared_of(model, task) -> Prepared:
    clean, corrupt = (pairs.read(model, task, side) for side in ("clean", "corrupt"))
    return Prepared(task, clean, corrupt, len(task), len(task))


@pytest.fixture
def planted():
    return copying((1.0, 0.5, -0.25, 0.0), 2, "query", final_norm=True)


@pytest.fixture
def bench_of(monkeypatch):
    """A bench whose prepared pairs are a task of its own, whatever is asked."""

    def make(model, task) -> Bench:
        for module in (found, letters, recall, years):
            monkeypatch.setattr(module, "prepare", lambda bench, asked, seed=None: prepared_of(model, task))
        return Bench(model)

    return make


def run(name: str, bench: Bench, **parameters) -> dict[str, pd.DataFrame]:
    measurement = MEASUREMENTS[name]
    tables = measurement.run(bench, measurement.parameters(**parameters), None)
    assert set(tables) <= set(measurement.tables)
    return tables


def test_tasks_and_their_settings_are_checked() -> None:
    check_task("ioi", {"templates": (0,)})
    with pytest.raises(ValueError, match="unknown; choose from"):
        Pairs(task="oi")
    with pytest.raises(ValueError, match="no setting 'template'"):
        Pairs(task="ioi", options={"template": 0})


def test_intervals_hold_their_mean() -> None:
    row = interval_row(np.array([1.0, 2.0, 3.0, 6.0]), 0)
    assert row["value"] == 3.0 and row["low"] < 3 < row["high"] and row["n"] == 4


def test_saturation_of_planted_heads_is_what_is_known() -> None:
    truth = copying((1.0, 0.5, -0.25, 0.0), 2, "query", final_norm=True)
    tables = run("saturation", Bench(truth.model), subject="copying")
    slope = tables["first_order"].query("measure == 'slope'").set_index("method")["value"]
    # The softmax is flat: gradients see nothing, with or without the norm.
    assert abs(slope["gradient"]) < 1e-3 and abs(slope["gradient, final norm frozen"]) < 1e-3
    changes = {(one.method, one.node): float(one.change.mean()) for one in truth.estimates}
    gap = float(truth.clean.mean() - truth.corrupt.mean())
    rows = tables["saturation"].set_index(["method", "node"])
    for label, known in (("pattern anew", "qk fix"), ("pattern anew, final norm frozen", "qk fix, norm frozen")):
        for node in ("L0H0", "L0H1", "L0H2"):
            assert rows.loc[(label, node), "value"] == pytest.approx(-changes[known, f"{node}.q"] / gap, abs=1e-3)
    assert slope["pattern anew"] < slope["pattern anew, final norm frozen"]


def test_a_found_circuit_of_a_linear_net_is_better_than_random_ones(bench_of) -> None:
    truth = linear_network()
    bench = bench_of(truth.model, truth.task)
    tables = run("found_circuit", bench, method="eap", sizes=(4, 12), draws=2, looked_at=12)
    curve = tables["faithfulness"]
    assert set(curve["circuit"]) == {"found", "all but the found"}
    both = curve.pivot(index="edges", columns="circuit", values="value")
    # Effects of disjoint sets of edges that begin at the corrupt run add up in a linear net only for whole paths.
    assert np.isfinite(both.to_numpy()).all()
    assert (curve["control_low"] <= curve["control_high"]).all()
    assert set(tables["circuit_nodes"]["edges"]) <= {12}


def test_rows_set_by_hand_are_what_an_edited_pass_gives() -> None:
    model = workbench.load(TINY["llama"]())
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, 100, (3, 9), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 4] = (corrupt[:, 4] + 1) % 90 + 3
    task = PairTask(
        "rows", "", 0, "", model.batch(clean.tolist()), model.batch(corrupt.tolist()),
        torch.full((3, 1), 5), torch.full((3, 1), 6), torch.full((3,), 8), roles={"END": torch.full((3,), 8)},
        metric="logit_difference",
    )  # fmt: skip
    weights = torch.zeros(3, 9)
    weights[:, 2], weights[:, 6] = 0.5, 0.5
    heads = [Head(0, 1), Head(1, 2)]
    found_values = reuse.overwrite_rows(model, task, [heads], weights)
    rows = torch.zeros(3, 9, dtype=torch.bool)
    rows[:, 8] = True
    edits = []
    for head in heads:
        value = weights[:, None, None].expand(3, model.spec.layers[head.layer].heads, 9, 9)
        edits.append(patch("pattern", value, layer=head.layer, heads=[head.head], positions=rows))
    logits = model.trace(task.clean, edits=edits, logits=task.position[:, None]).logits[:, 0]
    assert found_values[0] == pytest.approx(task.score(logits, "logit_margin").numpy(), abs=1e-4)


def test_wrong_places_need_listed_answers(planted) -> None:
    with pytest.raises(RequestError, match="no listed answers"):
        reuse.wrong_places(planted.task)


def test_compression_keeps_all_with_all_directions(bench_of, planted) -> None:
    bench = bench_of(planted.model, planted.task)
    width = planted.model.spec.layers[0].head_dim
    tables = run("compression", bench, k=2, ranks=(0, width - 1, width), draws=2)
    table = tables["compression"].query("measure == 'share of the metric'").set_index("rank")
    assert width not in table.index
    assert table.loc[width - 1, "value"] > table.loc[0, "value"]


def test_regressions_find_a_planted_gain() -> None:
    rng = np.random.default_rng(0)
    values, zeros = rng.normal(size=(60, 3)), np.zeros(60)
    given = LogitAttribution("", "difference", "clean", ("L0H0", "L0H1", "L0.mlp"), values, zeros, zeros, zeros)
    assert recall._fit(given, "L0.mlp", ["L0H0", "L0H1"], 0)["r2"] < 0.1
    values[:, 2] = 1.5 - 1.0 * values[:, :2].sum(1) + 0.01 * values[:, 2]
    fit = recall._fit(given, "L0.mlp", ["L0H0", "L0H1"], 0)
    assert fit["gain"] == pytest.approx(-1, abs=0.01) and fit["intercept"] == pytest.approx(1.5, abs=0.01)
    assert fit["r2"] > 0.99 and fit["intercept_low"] <= fit["intercept"] <= fit["intercept_high"]


def test_years_are_refused_of_another_task(planted) -> None:
    with pytest.raises(RequestError, match="year_circuit is about greater_than"):
        run("year_circuit", Bench(planted.model), task="ioi")


def test_codes_that_only_positives_have_name_the_planted_heads() -> None:
    rng, positive = np.random.default_rng(0), np.arange(60) < 30
    codes = rng.integers(0, 5, size=(1, 60, 20))
    # Planted heads have other codes in each class; the rest the same ones in both.
    codes[:, positive, :3] += 5
    scores = np.stack([node_scores(one, positive) for one in codes])
    heads = tuple(Head(at // 10, at % 10) for at in range(20))
    circuit = DiscreteCircuit("", heads, codes, positive, scores, np.zeros((1, 20, 20)), AutoencoderSettings(), 0)
    true = np.arange(20) < 3
    apart, recovered = np.where(true, 2.0, 1.0), np.where(true, 0.5, 0.0)
    rows = found._against(circuit, apart, true, recovered, found.Codes(shuffles=10)).set_index("method")
    assert rows.loc["discrete codes", "area"] == 1.0 and rows.loc["means apart", "area"] == 1.0
    assert rows.loc["discrete codes", "control"] < 1.0
