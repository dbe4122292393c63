"""Evaluation against what must come out: perfect and useless orderings, gates, self-repair, chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from workbench.circuits.circuit import Circuit
from workbench.circuits.completeness import completeness, minimality
from workbench.circuits.evaluation import evaluate
from workbench.circuits.exact import exact_edges
from workbench.circuits.faithfulness import FRACTIONS, area_intervals, areas, faithfulness
from workbench.circuits.forks import Forked, replacement
from workbench.circuits.graph import Graph, Scores
from workbench.circuits.hypotheses import equivalence, hypothesis_tests, independence, minimal_edges
from workbench.circuits.overlap import agreement, cross_tasks, expected_jaccard, jaccard, overlap, stability
from workbench.circuits.recorded import groups
from workbench.circuits.roc import roc
from workbench.circuits.trials import Trials
from workbench.dynamics import planted
from workbench.dynamics.copying import copying, negative_head
from workbench.dynamics.linear import linear_network
from workbench.dynamics.toy import ToyConfig
from workbench.dynamics.truth import Story
from workbench.dynamics.truth import planted as told
from workbench.dynamics.wiring import MAX_POSITIONS, empty_model, spaces
from workbench.errors import RequestError
from workbench.tasks.pairs import Edge

LAYERS, HEADS, KV_HEADS = 9, 8, 4


@pytest.fixture(scope="module")
def haystack():
    """A copying head among 72 heads, 4,825 edges with grouped queries: .1 % of them hold its four edges."""
    values = 5
    at = spaces(marked=1, value=values, end=1, out=values, flag=1)
    config = ToyConfig(
        vocab_size=2 * values + 4, hidden_size=at["flag"].stop, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=values + 1, intermediate_size=None,
        max_position_embeddings=MAX_POSITIONS, scaling=1.0, layer_norm=False, bos_token_id=2 * values + 3,
    )  # fmt: skip
    model = empty_model(config)
    planted._embed_values(model, values, at)
    # Layer 2's head 5 reads key/value head 2.
    planted._copy_value(model, 2, 5, at, 1.0)
    edges = [
        Edge("embed", "L2H5", "q"),
        Edge("embed", "L2KV2", "k"),
        Edge("embed", "L2KV2", "v"),
        Edge("L2H5", "logits"),
    ]
    story = Story("haystack", "one head of many copies", ["embed", "L2H5", "L2KV2"], edges)
    return told(story, model, *planted._value_prompts(values, 0), (1.0, -1.0), [])


def scored(graph, edges, method="made up", **options) -> Scores:
    return Scores(graph, method, "none", "none", 1, 0, edges=np.where(graph.exists, edges, np.nan), **options)


def oracle(truth, sign=1.0) -> Scores:
    graph = Graph.of(truth.model)
    return scored(graph, sign * Circuit.from_known(graph, truth.task.circuit).kept.astype(float), "oracle")


def test_areas_of_known_curves() -> None:
    fractions = np.array(FRACTIONS)
    perfect = areas(fractions, np.ones(10))
    np.testing.assert_allclose([perfect.cpr, perfect.cmd], [0.999, 0.0], atol=1e-12)
    useless = areas(fractions, np.array([0.0] * 9 + [1.0]))
    np.testing.assert_allclose([useless.cpr, useless.cmd], [0.25, 0.749], atol=1e-12)
    # By hand: 1.5 at .5 is off by one half on both sides.
    over = areas(np.array([0.2, 0.5, 1.0]), np.array([[1.0, 1.5, 1.0], [0.0, 0.0, 1.0]]))
    np.testing.assert_allclose(over.cpr, [0.3 * 1.25 + 0.5 * 1.25, 0.25])
    np.testing.assert_allclose(over.cmd, [0.3 * 0.25 + 0.5 * 0.25, 0.3 + 0.25])


def test_a_perfect_ordering_and_a_useless_one(haystack) -> None:
    """MIB's ends: CPR .999 and CMD 0, and .25 and .749 where only the last half has the circuit."""
    model, task = haystack.model, haystack.task
    found = evaluate(
        model, task, [oracle(haystack), replace(oracle(haystack, -1.0), method="worst")], random=0, known=task.circuit
    )
    summary = found.summary().set_index("method")
    np.testing.assert_allclose(summary.loc["oracle", ["cpr", "cmd"]].to_numpy(float), [0.999, 0.0], atol=1e-5)
    np.testing.assert_allclose(summary.loc["worst", "cpr"], 0.25, atol=1e-5)
    assert summary.loc["oracle", "auc_edges"] == 1.0
    assert summary.loc["oracle", "auc_nodes"] == 1.0
    curve = found.curve()
    oracle_rows = curve[(curve.method == "oracle")]
    np.testing.assert_allclose(oracle_rows.value, 1.0, atol=1e-5)
    assert (oracle_rows[oracle_rows.fraction == 0.001].edges == 4).all()
    assert curve.value[curve.fraction == 1].eq(1.0).all()
    worst = curve[(curve.method == "worst") & (curve.ranking == "signed") & (curve.fraction < 1)]
    assert worst.value.eq(0.0).all()
    # Ranked by size they are the same.
    np.testing.assert_allclose(summary.loc["worst", "cmd"], 0.0, atol=1e-5)
    np.testing.assert_allclose(float(found.areas("worst", "signed").value.cmd), 0.749, atol=1e-5)


def test_all_and_nothing_are_exact(llama, task) -> None:
    graph = Graph.of(llama)
    whole, nothing = (
        Circuit.whole(graph),
        replace(Circuit.whole(graph), kept=np.zeros_like(graph.exists), name="nothing"),
    )
    found = evaluate(llama, task, [whole, nothing], random=2)
    assert found.curve().value.tolist() == [1.0, 0.0]
    assert found.curve().random_as_good.tolist() == [1.0, 1.0]
    assert found.random().value.tolist() == [1.0, 0.0]
    own = llama.trace(task.clean, logits=task.position[:, None]).logits[:, 0]
    np.testing.assert_allclose(found.clean, task.score(own), atol=1e-4)
    other = llama.trace(task.corrupt, logits=task.position[:, None]).logits[:, 0]
    np.testing.assert_allclose(found.baseline, task.score(other), atol=1e-4)


@pytest.mark.parametrize("how", ["top", "greedy"])
def test_exact_scores_find_planted_circuits(haystack, how) -> None:
    """Of all edges the two that change anything come first; q and k read the same in both runs."""
    chosen = [edge for edge in Graph.of(haystack.model).edges if edge.source in ("embed", "L2H5", "L0H0")]
    scores = exact_edges(haystack.model, haystack.task, edges=chosen)
    scores = replace(scores, edges=np.where(scores.graph.exists, np.nan_to_num(scores.edges), np.nan))
    found = evaluate(haystack.model, haystack.task, scores, how=how, random=3, draw="uniform")
    row = found.summary().iloc[0]
    np.testing.assert_allclose([row.cpr, row.cmd], [0.999, 0.0], atol=1e-5)
    # Random circuits that small do not have them.
    random = found.random()
    assert random.value[random.fraction < 0.01].eq(0.0).all()
    assert row.cpr_random < 0.9
    circuit = found.circuit("exact", 0.01)
    assert {Edge("embed", "L2KV2", "v"), Edge("L2H5", "logits")} <= set(circuit.edges)


def test_negative_heads_separate_the_rankings() -> None:
    """Without the head that writes against the answer a circuit is more than faithful."""
    truth = negative_head()
    found = evaluate(truth.model, truth.task, exact_edges(truth.model, truth.task), random=0, fractions=(0.2, 0.5, 1.0))
    curve = found.curve().set_index(["ranking", "fraction"]).value
    np.testing.assert_allclose(curve["signed", 0.5], 2.0 / 1.4, atol=1e-5)
    np.testing.assert_allclose(curve["absolute", 0.5], 1.0, atol=1e-5)
    np.testing.assert_allclose(found.clean.mean() * curve["signed", 0.5], 0.7 * 2.0 / 1.4, atol=1e-5)


def test_points_are_forked_runs_and_intervals_a_bootstrap(llama, task) -> None:
    graph = Graph.of(llama)
    rng = np.random.default_rng(0)
    scores = scored(graph, rng.normal(size=graph.exists.shape))
    found = evaluate(llama, task, {"mine": scores}, random=3, fractions=(0.2, 0.5, 0.8))
    for row, point in enumerate(found.points):
        for group in groups(task):
            forked = Forked(llama, graph, group.cut(task.clean), replacement(llama, task, group, "patching"))
            logits = forked.run(torch.as_tensor(point.circuit.kept).float()).logits
            np.testing.assert_allclose(
                found.values[row, group.prompts], task.select(group.prompts.tolist()).score(logits), atol=1e-4
            )
    curve = found.curve()
    share = (found.values.mean(1) - found.baseline.mean()) / (found.clean.mean() - found.baseline.mean())
    np.testing.assert_allclose(curve.value, share)
    assert (curve.low <= curve.value).all()
    assert (curve.value <= curve.high).all()
    random = found.random()
    assert (random.low <= random.value).all() and (random.value <= random.high).all()
    assert random.n.eq(3).all()
    assert len(found.per_prompt()) == 6 * len(task)
    again = evaluate(llama, task, {"mine": scores}, random=3, fractions=(0.2, 0.5, 0.8))
    np.testing.assert_array_equal(again.random_values, found.random_values)


def test_scores_of_nodes_make_circuits_of_nodes(haystack) -> None:
    graph = Graph.of(haystack.model)
    nodes = np.zeros(len(graph.writers))
    nodes[0], nodes[graph.writer("L2H5")] = np.nan, 1.0
    scores = Scores(graph, "nodes", "none", "none", 1, 0, nodes=nodes)
    found = evaluate(
        haystack.model, haystack.task, scores, random=0, fractions=(0.01, 0.02, 1.0), known=haystack.task.circuit
    )
    curve = found.curve()
    assert curve[curve.fraction == 0.02].edges.eq(5).all()
    np.testing.assert_allclose(curve.value[curve.fraction == 0.02], 1.0, atol=1e-5)
    # Less than one node: only the embedding is left, which writes to the logits.
    assert curve.edges[curve.fraction == 0.01].tolist() == [1, 1]
    assert found.summary().auc_nodes.tolist() == [1.0]
    assert "auc_edges" not in found.summary()


def test_nothing_to_recover_is_said(llama, task) -> None:
    def flat(logits, prompts):
        return torch.ones(len(logits))

    found = evaluate(llama, task, Circuit.whole(Graph.of(llama)), metric=flat, random=1)
    assert found.curve().value.isna().all()
    assert "no gap to recover" in found.curve().reason[0]
    assert np.isnan(faithfulness(found.values, found.clean, found.baseline).value).all()
    assert np.isnan(area_intervals(np.array([0.5, 1.0]), np.ones((2, 3)), np.ones(3), np.ones(3)).value.cpr)


def test_refused_evaluations(llama, gpt2, task) -> None:
    whole = Circuit.whole(Graph.of(llama))
    for options, match in (
        ({"fractions": (0.5, 0.1)}, "must rise"),
        ({"fractions": (0.5, 1.5)}, "must rise"),
        ({"random": -1}, "random=-1"),
        ({"ablation": "noise"}, "ablation='noise'"),
    ):
        with pytest.raises(RequestError, match=match):
            evaluate(llama, task, whole, **options)
    with pytest.raises(RequestError, match="another shape"):
        evaluate(gpt2, task, whole)
    with pytest.raises(RequestError, match="nothing to evaluate"):
        evaluate(llama, task, [])
    scores = scored(whole.graph, np.zeros(whole.kept.shape))
    with pytest.raises(RequestError, match="threshold"):
        evaluate(llama, task, scores, how="threshold")
    found = evaluate(llama, task, [whole, whole], random=0)
    assert found.curve().method.tolist() == ["whole", "whole #2"]
    with pytest.raises(RequestError, match="is no curve"):
        found.areas("whole", "absolute")
    with pytest.raises(RequestError, match="has no circuit"):
        found.circuit("whole", 0.5, "given")


def test_roc_of_perfect_reversed_tied_and_given_rankings(llama) -> None:
    graph = Graph.of(llama)
    rng = np.random.default_rng(1)
    truth = Circuit(graph, graph.exists & (rng.random(graph.exists.shape) < 0.2), "truth")
    noise = rng.random(graph.exists.shape)
    assert roc(scored(graph, np.where(truth.kept, 2.0, 1.0) + 0.5 * noise), truth).auc == 1.0
    # The sign does not matter: edges that work against the task belong to the circuit.
    assert roc(scored(graph, np.where(truth.kept, -2.0, 1.0) + 0.5 * noise), truth).auc == 1.0
    assert roc(scored(graph, np.where(truth.kept, 1.0, 2.0) + 0.5 * noise), truth).auc == 0.0
    # Nothing is told apart: the staircase goes from (0, 0) straight to (1, 1).
    assert roc(scored(graph, np.ones(graph.exists.shape)), truth).auc == 0.0
    one = Circuit(graph, truth.kept.copy(), "half")
    one.kept[tuple(np.argwhere(truth.kept)[::2].T)] = False
    point = roc([one], truth)
    np.testing.assert_allclose(point.auc, one.size / truth.size)
    assert (np.diff(point.fpr) >= 0).all() and (np.diff(point.tpr) >= 0).all()
    from sklearn.metrics import roc_auc_score

    ranked = roc(scored(graph, noise), truth)
    expected = roc_auc_score(truth.kept[graph.exists], noise[graph.exists])
    # Without ties each step up is a point, and the staircase is the whole curve.
    np.testing.assert_allclose(ranked.auc, expected, atol=1e-9)
    few = Circuit.from_nodes(graph, ["L1H3", "L2.mlp"])
    nodes = roc(scored(graph, few.kept + 0.1 * noise), few, "nodes")
    assert nodes.auc == 1.0
    with pytest.raises(RequestError, match="has all of the edges"):
        roc([truth], Circuit.whole(graph))
    with pytest.raises(RequestError, match="of='heads'"):
        roc([truth], truth, "heads")


def test_overlap_by_hand(llama) -> None:
    graph = Graph.of(llama)
    one = Circuit.from_edges(graph, [Edge("embed", "L0H0", "q"), Edge("L0H0", "logits"), Edge("L1.mlp", "logits")])
    two = Circuit.from_edges(graph, [Edge("L0H0", "logits"), Edge("L2H1", "logits")])
    row = overlap({"one": one, "two": two}).iloc[0]
    assert (row.edges, row.shared, row.of_one, row.of_other) == (0.25, 1, 1 / 3, 0.5)
    assert row.nodes == 1 / 3
    np.testing.assert_allclose(row.edges_by_chance, (6 / graph.count) / (5 - 6 / graph.count))
    assert jaccard(np.zeros(3, bool), np.zeros(3, bool)) == 1.0
    assert expected_jaccard(0, 0, 9) == 1.0
    assert expected_jaccard(9, 9, 9) == 1.0


def test_random_circuits_overlap_as_expected(llama) -> None:
    graph = Graph.of(llama)
    chosen = [
        Circuit.from_scores(scored(graph, np.random.default_rng(seed).random(graph.exists.shape)), 60, prune=False)
        for seed in range(40)
    ]
    np.testing.assert_allclose(agreement(chosen), expected_jaccard(60, 60, graph.count), rtol=0.05)
    assert agreement([chosen[0], chosen[0]]) == 1.0
    with pytest.raises(RequestError, match="two or more"):
        agreement(chosen[:1])


def test_stability_of_equal_prompts_and_of_noise(llama) -> None:
    graph = Graph.of(llama)
    rng = np.random.default_rng(0)
    same = rng.normal(size=graph.exists.shape).astype(np.float32)
    steady = scored(graph, same, per_prompt=np.repeat(same[None], 8, axis=0))
    found = stability(steady, 50, resamples=20)
    row = found.table().iloc[0]
    assert (row.jaccard, row.pairwise, row.nodes, bool(row.stable)) == (1.0, 1.0, 1.0, True)
    assert set(found.frequency[found.circuit.kept]) == {1.0}
    assert found.edges().kept.all()
    # Pure noise: each resample has other edges, though not wholly so, as they share prompts.
    noise = rng.normal(size=(8, *graph.exists.shape)).astype(np.float32)
    loose = stability(scored(graph, noise.mean(0), per_prompt=noise), 50, resamples=20)
    assert loose.pairwise < 0.6
    assert loose.pairwise > loose.chance
    assert not loose.table().stable[0]
    assert stability(scored(graph, noise.mean(0), per_prompt=noise), 50, resamples=20).pairwise == loose.pairwise
    with pytest.raises(RequestError, match="kept no scores"):
        stability(scored(graph, same), 50)
    with pytest.raises(RequestError, match="at least 2"):
        stability(steady, 50, resamples=1)


def test_circuits_on_each_others_tasks() -> None:
    """Values swapped go through v, keys swapped through k: each task's circuit does not do the other's."""
    tasks = {corrupt: copying((1.0, 2.0), 1, corrupt) for corrupt in ("value", "key")}
    model = tasks["value"].model
    graph = Graph.of(model)
    parts = {"value": "v", "key": "k"}
    circuits = {
        name: Circuit.from_edges(graph, [Edge("embed", "L0KV0", one), Edge("L0H0", "logits"), Edge("L0H1", "logits")])
        for name, one in parts.items()
    }
    found = cross_tasks(model, {name: truth.task for name, truth in tasks.items()}, circuits).set_index(
        ["circuit", "task"]
    )
    np.testing.assert_allclose(found.value.unstack().to_numpy(), np.eye(2)[::-1][::-1], atol=1e-5)
    np.testing.assert_allclose(found.overlap.unstack().to_numpy(), [[1.0, 0.5], [0.5, 1.0]])


def test_completeness_misses_the_backup() -> None:
    """Without its main head the model is repaired, a circuit without the backup is not."""
    truth = planted.self_repair()
    trials = Trials(truth.model, truth.task, ablation="zero")
    whole = Circuit.from_known(trials.graph, truth.task.circuit)
    table = completeness(trials, whole, draws=4, searches=2)
    np.testing.assert_allclose(table.difference, 0, atol=1e-5)
    partly = whole.without(["L1H0"]).pruned()
    table = completeness(trials, partly, draws=4, searches=2)
    assert abs(table.difference[0]) < 1e-5
    greedy = table[table.search == "greedy"].iloc[0]
    assert greedy.nodes == "L0H0"
    np.testing.assert_allclose(
        [greedy.model, greedy.circuit, greedy.difference], [planted.REPAIR, 0, -planted.REPAIR], atol=1e-5
    )
    with pytest.raises(RequestError, match="'L1H0' writes nothing"):
        completeness(trials, partly, nodes=["L1H0"])


def test_minimality_sees_parts_that_stand_in_for_each_other() -> None:
    """Of an OR each head alone is idle, and matters where the other one is gone."""
    truth = planted.gate("or")
    trials = Trials(truth.model, truth.task)
    table = minimality(trials, Circuit.from_known(trials.graph, truth.task.circuit), draws=0).set_index("node")
    np.testing.assert_allclose(table.alone[["L0H0", "L0H1"]], 0, atol=1e-5)
    np.testing.assert_allclose(table.effect, 1, atol=1e-5)
    assert "L0H1" in table.without["L0H0"]
    assert table.without["L0.mlp"] == ""
    extra = Circuit.whole(trials.graph)
    table = minimality(
        Trials(negative_head().model, negative_head().task), Circuit.whole(Graph.of(negative_head().model))
    )
    assert (table.set_index("node").effect[["L0H1"]] < 0).all()
    with pytest.raises(RequestError, match="neither heads nor MLPs"):
        minimality(trials, replace(extra, kept=extra.kept & (np.arange(len(extra.kept)) == 0)[:, None]))


def test_sign_test_is_a_binomial_one() -> None:
    rng = np.random.default_rng(0)
    model = rng.normal(size=30)
    better = np.where(np.arange(30) < 22, 1.0, -1.0)
    found = equivalence(model + better, model, tolerance=0.0)
    np.testing.assert_allclose(found.p, stats.binomtest(22, 30, 0.5).pvalue, rtol=1e-9)
    assert found.statistic == 22 / 30
    assert equivalence(model, model) == (0.5, 1.0)
    assert equivalence(model + better, model).p > found.p
    np.testing.assert_allclose(equivalence(model - 1.0, model).p, 0.6**30 + 0.4**30)
    with pytest.raises(RequestError, match="tolerance"):
        equivalence(model, model, 0.5)


def test_dependence_is_found_and_independence_is_not() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=60)
    # No correlation, and yet dependent.
    assert independence(one, one**2 + 0.1 * rng.normal(size=60), 199).p <= 0.01
    p = [independence(rng.normal(size=20), rng.normal(size=20), 99, seed).p for seed in range(40)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert independence(np.ones(5), one[:5], 99).p == 1.0
    with pytest.raises(RequestError, match="3 or more"):
        independence(one[:2], one[:2])


def test_a_planted_circuit_passes_and_a_random_one_does_not(haystack) -> None:
    trials = Trials(haystack.model, haystack.task)
    own = Circuit.from_known(trials.graph, haystack.task.circuit)
    table = hypothesis_tests(trials, own, random=39, draw="uniform").set_index("test")
    assert table.passed.all()
    np.testing.assert_allclose(table.statistic[["sufficiency", "necessity"]], [0.0, 2.0], atol=1e-5)
    np.testing.assert_allclose(table.p[["sufficiency", "necessity"]], 1 / 40)
    np.testing.assert_allclose(table.null[["sufficiency", "necessity"]], [2.0, 0.0], atol=1e-5)
    other = hypothesis_tests(trials, own.random_like(3, "uniform"), random=9, draw="uniform").set_index("test")
    assert not other.passed[["equivalence", "sufficiency", "necessity"]].any()
    edges = minimal_edges(trials, own, paths=39).set_index(["source", "target", "through"])
    # The two edges along which something differs matter; the others read the same in both runs.
    assert edges.p["embed", "L2KV2", "v"] == edges.p["L2H5", "logits", ""] == 1 / 40
    assert edges.p["embed", "L2H5", "q"] == edges.p["embed", "L2KV2", "k"] == 1.0
    some = minimal_edges(trials, own, edges=2, paths=3)
    assert len(some) == 2
    assert set(zip(some.source, some.target, some.through, strict=True)) <= set(edges.index)
    with pytest.raises(RequestError, match="has no edges"):
        minimal_edges(trials, replace(own, kept=np.zeros_like(own.kept)))
    with pytest.raises(RequestError, match="all paths"):
        minimal_edges(trials, Circuit.whole(trials.graph), paths=1)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_other_ablations_have_their_own_ends(ablation) -> None:
    truth = linear_network()
    graph = Graph.of(truth.model)
    circuits = [Circuit.whole(graph), Circuit.from_known(graph, truth.task.circuit)]
    found = evaluate(truth.model, truth.task, circuits, ablation=ablation, random=1)
    # Queries and keys read nothing but positions, which means keep; nothing else is missing.
    same = np.abs(found.values - found.clean).max(1) < 1e-4
    assert same.tolist() == [True, ablation == "mean"]
    assert found.curve().ablation.eq(ablation).all()
    np.testing.assert_allclose(found.clean, truth.clean, atol=1e-4)
