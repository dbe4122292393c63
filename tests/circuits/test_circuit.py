"""Circuits: selection, pruning, known and random ones, and as files; exact scores of edges on planted models."""

from __future__ import annotations

import json
from collections import Counter

import networkx
import numpy as np
import pytest

from workbench.circuits import patch_paths
from workbench.circuits.circuit import Circuit, feeding, greedy, top
from workbench.circuits.exact import exact_edges
from workbench.circuits.exchange import read_graphml, read_mib, write_graphml, write_mib
from workbench.circuits.graph import Graph, Scores, layer_of
from workbench.circuits.trials import Trials
from workbench.dynamics import planted
from workbench.dynamics.copying import copying, negative_head
from workbench.dynamics.induction_pairs import handwritten_pairs
from workbench.dynamics.linear import linear_network
from workbench.errors import MemoryRefused, RequestError
from workbench.tasks.known_circuits import GREATER_THAN_GPT2_SMALL, IOI_GPT2_MEDIUM, IOI_GPT2_SMALL
from workbench.tasks.pairs import Edge

TRUTHS = {
    "and": lambda: planted.gate("and"),
    "or": lambda: planted.gate("or"),
    "self-repair": planted.self_repair,
    "cancellation": planted.cancellation,
    "negative": negative_head,
    "induction": handwritten_pairs,
    "copying": lambda: copying((1.0, 2.0, 0.5), 1, "key"),
    "linear": linear_network,
}


@pytest.fixture(scope="module", params=list(TRUTHS))
def truth(request):
    return TRUTHS[request.param]()


def scores_of(graph, seed=0):
    rng = np.random.default_rng(seed)
    edges = np.where(graph.exists, rng.normal(size=graph.exists.shape), np.nan)
    return Scores(graph, "random", "none", "none", 1, seed, edges=edges)


def gpt2_graph(model_named):
    """The graph of GPT-2 small, from its shape."""
    from dataclasses import replace

    spec = model_named("gpt2").spec
    layers = tuple(replace(spec.layers[0], index=layer, heads=12, kv_heads=12) for layer in range(12))
    return Graph.of_spec(replace(spec, layers=layers))


def test_exact_scores_are_what_was_planted(truth) -> None:
    found = exact_edges(truth.model, truth.task)
    known = {one.edges[0]: one for one in truth.outcomes if len(one.edges) == 1 and one.how == "noising"}
    for edge, outcome in known.items():
        place = found.graph.place(edge)
        np.testing.assert_allclose(found.per_prompt[:, *place], (truth.clean - outcome.metric).numpy(), atol=1e-4)
    # Whatever is not in the circuit has no effect at all.
    outside = [edge for edge in found.graph.edges if edge not in truth.edges]
    assert outside
    np.testing.assert_allclose([found.of(edge) for edge in outside], 0, atol=1e-5)
    np.testing.assert_allclose(found.clean, truth.clean, atol=1e-4)
    np.testing.assert_allclose(found.corrupt, truth.corrupt, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_exact_scores_are_strict_paths(model_named, task, name) -> None:
    model = model_named(name)
    chosen = [Edge("embed", "L1KV1", "v"), Edge("L0H2", "L2H3", "q"), Edge("L1.mlp", "logits"), Edge("L0H1", "L2.mlp")]
    found = exact_edges(model, task, edges=chosen)
    assert np.isnan(found.edges).sum() == found.edges.size - 4
    from workbench.circuits import Spot

    spots = [[Spot(1, "v", 1)], [Spot(2, "q", 3)], "logits", [Spot(2, "mlp_out")]]
    for edge, spot in zip(chosen, spots, strict=True):
        path = patch_paths(model, task, [edge.source], spot, form="strict", direction="noising")
        place = found.graph.place(edge)
        np.testing.assert_allclose(found.per_prompt[:, *place], path.effect("noising")[0], atol=2e-4)
    assert found.work["exact"] == 4 * len(task)


def test_planted_circuits_do_the_task_alone(truth) -> None:
    trials = Trials(truth.model, truth.task)
    known = Circuit.from_known(trials.graph, truth.task.circuit)
    assert set(known.edges) == truth.edges
    assert set(known.nodes) == truth.nodes
    empty = known.without(trials.graph.writers)
    values = trials.values(np.stack([one.kept for one in (known, known.pruned(), empty, Circuit.whole(trials.graph))]))
    np.testing.assert_allclose(values[:2], np.broadcast_to(truth.clean, (2, len(truth.task))), atol=1e-4)
    assert (values[2] == trials.baseline).all()
    assert (values[3] == trials.clean).all()
    np.testing.assert_allclose(values[2:], np.stack([truth.corrupt, truth.clean]), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_pruning_changes_no_result(model_named, task, name) -> None:
    """Edges that lead nowhere, or come from nowhere, have no effect on what a circuit does."""
    trials = Trials(model_named(name), task)
    scores = scores_of(trials.graph)
    found = [Circuit.from_scores(scores, n, prune=False) for n in (20, 60, 150)]
    pruned = [one.pruned() for one in found]
    assert all(one.size < other.size for one, other in zip(pruned, found, strict=True))
    values = trials.values(np.stack([one.kept for one in (*found, *pruned)]))
    np.testing.assert_allclose(values[:3], values[3:], atol=1e-4)
    # Groups of one mask each give the same.
    np.testing.assert_allclose(np.concatenate([trials.values(one.kept[None]) for one in found]), values[:3], atol=1e-4)
    for one in pruned:
        _check_connected(one)


def _check_connected(circuit) -> None:
    graph, feeds = circuit.graph, feeding(circuit.graph)
    for writer in np.flatnonzero(circuit.writers):
        assert writer == 0 or circuit.kept[:, feeds[writer]].any()
    for reader in np.flatnonzero(circuit.kept.any(0)):
        assert reader == len(graph.readers) - 1 or circuit.writers[feeds[:, reader]].any()


def test_selection_by_hand(llama) -> None:
    graph = Graph.of(llama)
    edges = np.where(graph.exists, 0.0, np.nan)
    ranked = {
        Edge("L1H0", "logits"): 5.0, Edge("embed", "L1KV0", "v"): -4.0, Edge("embed", "L0H0", "q"): 3.0,
        Edge("L0H0", "L1H0", "q"): 2.0, Edge("L2.mlp", "logits"): -1.0,
    }  # fmt: skip
    for edge, score in ranked.items():
        edges[graph.place(edge)] = score
    scores = Scores(graph, "hand", "none", "none", 1, 0, edges=edges)

    def chosen(n, how="top", **options):
        return {str(edge) for edge in Circuit.from_scores(scores, n, how, **options).edges}

    assert chosen(3, prune=False) == {"L1H0->logits", "embed->L1KV0.v", "embed->L0H0.q"}
    # L0H0 writes nothing that is read.
    assert chosen(3) == {"L1H0->logits", "embed->L1KV0.v"}
    assert chosen(3, signed=True, prune=False) == {"L1H0->logits", "embed->L0H0.q", "L0H0->L1H0.q"}
    assert chosen(3, signed=True) == {"L1H0->logits", "embed->L0H0.q", "L0H0->L1H0.q"}
    assert chosen(4, "greedy") == {"L1H0->logits", "embed->L1KV0.v", "L0H0->L1H0.q", "embed->L0H0.q"}
    assert chosen(1.5, "threshold") == {"L1H0->logits", "embed->L1KV0.v", "embed->L0H0.q", "L0H0->L1H0.q"}
    # The last MLP is alone: nothing comes in.
    assert chosen(1.0, "threshold") == chosen(1.5, "threshold")
    assert chosen(graph.count) == {str(edge) for edge in graph.edges}
    nodes = Circuit.from_scores(scores, 4, "greedy").nodes
    assert nodes == ("embed", "L0H0", "L1H0", "L1KV0")


def test_greedy_circuits_lead_to_the_logits(llama) -> None:
    graph = Graph.of(llama)
    values = scores_of(graph, 3).edges
    for n in (1, 7, 60, graph.count):
        kept = greedy(graph, values, n)
        assert kept.sum() == n
        reads = kept.any(1) @ feeding(graph)
        assert reads[np.flatnonzero(kept.any(0))[:-1]].all()


def test_refused_selections(llama) -> None:
    scores = scores_of(Graph.of(llama))
    for n in (-1, 1.5, 10_000):
        with pytest.raises(RequestError, match="whole number"):
            Circuit.from_scores(scores, n)
    with pytest.raises(RequestError, match="how='best'"):
        Circuit.from_scores(scores, 3, "best")
    with pytest.raises(RequestError, match="no node of this graph"):
        Circuit.from_nodes(scores.graph, ["L9H9"])
    with pytest.raises(RequestError, match="not edges"):
        Circuit.from_scores(Scores(scores.graph, "nodes", "", "", 1, 0), 3)
    with pytest.raises(RequestError, match="how='any'"):
        Circuit.whole(scores.graph).random_like(0, "any")


def test_nodes_bring_their_edges_and_key_value_heads(llama) -> None:
    found = Circuit.from_nodes(Graph.of(llama), ["L0H4", "L1.mlp", "L2H1"])
    assert set(found.nodes) == {"embed", "L0H4", "L0KV1", "L1.mlp", "L2H1", "L2KV0"}
    assert Edge("L0H4", "L2KV0", "k") in found.edges
    assert Edge("L0H4", "L1.mlp") in found.edges
    assert Edge("embed", "logits") in found.edges
    assert found.size == 3 + 2 + 3 * 3 + 4
    only = Circuit.from_nodes(Graph.of(llama), ["L0H4", "L0KV0"])
    assert {str(edge) for edge in only.edges} == {
        "embed->L0H4.q",
        "embed->L0KV0.k",
        "embed->L0KV0.v",
        "embed->logits",
        "L0H4->logits",
    }


def test_published_circuits(model_named) -> None:
    graph = gpt2_graph(model_named)
    assert graph.count == 32_491
    ioi = Circuit.from_known(graph, IOI_GPT2_SMALL)
    assert set(IOI_GPT2_SMALL.heads) == {node for node in ioi.nodes if "H" in node}
    assert Edge("L5H5", "L8KV6", "v") in ioi.edges
    assert ioi.pruned().size == ioi.size
    # 5 heads before them read embed by q, k and v; 4 by q; 13 movers by k and v, and so on.
    assert Counter(edge.target for edge in ioi.edges)["logits"] == 13
    years = Circuit.from_known(graph, GREATER_THAN_GPT2_SMALL)
    assert Edge("embed", "L0.mlp") in years.edges
    assert Edge("L0.mlp", "L9KV1", "k") in years.edges
    assert any("no edges" in note for note in years.notes)
    assert Edge("L9H1", "L8.mlp") not in years.edges
    with pytest.raises(RequestError, match="L12H3"):
        Circuit.from_known(graph, IOI_GPT2_MEDIUM)


@pytest.mark.parametrize("how", ["matched", "uniform", "connected"])
def test_random_circuits_have_equal_size(llama, how) -> None:
    own = Circuit.from_scores(scores_of(Graph.of(llama)), 60)
    found = [own.random_like(seed, how) for seed in range(4)]
    assert {one.size for one in found} == {own.size}
    assert (own.random_like(0, how).kept == found[0].kept).all()
    assert not (found[1].kept == found[0].kept).all()

    def kinds(circuit):
        ends = ((edge.source, edge.target, edge.through) for edge in circuit.edges)
        return Counter(
            (layer_of(one), one[-4:] == ".mlp", layer_of(two), two[-4:] == ".mlp", by) for one, two, by in ends
        )

    assert (how == "matched") == all(kinds(one) == kinds(own) for one in found)


def test_top_takes_no_missing_scores() -> None:
    values = np.array([[np.nan, 1.0], [2.0, -np.inf]])
    assert top(values, 4).tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mistral"])
def test_mib_json_round_trip(model_named, tmp_path, name) -> None:
    """With grouped queries as well; the file has an edge for each query head."""
    graph, path = Graph.of(model_named(name)), tmp_path / "circuit.json"
    own = Circuit.from_scores(scores_of(graph), 80)
    write_mib(own, path, 48)
    found = read_mib(graph, path)
    assert (found.kept == own.kept).all()
    np.testing.assert_allclose(found.scores, own.scores)
    document = json.loads(path.read_text())
    heads, layers, blocks = graph.layers[0].q.stop, len(graph.layers), name == "gpt_neox"
    assert document["cfg"]["parallel_attn_mlp"] == blocks
    s = layers + (heads + 1) * layers * (layers - 1) // 2
    mlp = layers * (1 + (0 if blocks else heads)) + (heads + 1) * layers * (layers - 1) // 2
    assert len(document["edges"]) == 3 * heads * s + mlp + 1 + layers * (heads + 1)
    assert {"input->a0.h0<q>", "m0->a1.h1<v>", "a2.h0->logits"} <= set(document["edges"])
    assert document["nodes"]["logits"]["in_graph"]


def test_broken_json_is_refused(llama, gpt2, tmp_path) -> None:
    path, graph = tmp_path / "circuit.json", Graph.of(llama)
    with pytest.raises(RequestError, match="is no file"):
        read_mib(graph, path)
    write_mib(Circuit.whole(Graph.of(gpt2)), path, 48)
    with pytest.raises(RequestError, match="n_heads is 4"):
        read_mib(graph, path)
    document = json.loads(path.read_text()) | {"edges": {"a0.h0->a0.h1<q>": {"in_graph": True}}}
    for text, match in (
        ("{", "no JSON"),
        ("[]", "no table 'cfg'"),
        (json.dumps(document), "no edge of this model"),
        (json.dumps(document | {"edges": {"input->m0": {"score": 1.0}}}), "in_graph"),
    ):
        path.write_text(text)
        with pytest.raises(RequestError, match=match):
            read_mib(Graph.of(gpt2), path)


def test_graphml_round_trip_and_networkx_reads_it(llama, tmp_path) -> None:
    from dataclasses import replace

    graph, path = Graph.of(llama), tmp_path / "circuit.graphml"
    own = replace(Circuit.from_scores(scores_of(graph), 80), name="<a & \"b\"> 'c'\u00e9")
    write_graphml(own, path)
    found = read_graphml(graph, path)
    assert (found.kept == own.kept).all()
    assert (found.name, found.method) == (own.name, own.method)
    np.testing.assert_array_equal(found.scores[own.kept], own.scores[own.kept])
    other = networkx.read_graphml(path, force_multigraph=True)
    assert {(one, two, data["through"]) for one, two, data in other.edges(data=True)} == {tuple(e) for e in own.edges}
    assert all(data["kept"] for *_, data in other.edges(data=True))
    assert other.nodes["L2.mlp"]["layer"] == 2
    write_graphml(own, path, every=True)
    found = read_graphml(graph, path)
    assert (found.kept == own.kept).all()
    np.testing.assert_array_equal(found.scores, own.scores)


def test_broken_graphml_is_refused(llama, tmp_path) -> None:
    graph, path = Graph.of(llama), tmp_path / "circuit.graphml"
    head = '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">'
    edge = '<edge source="{}" target="{}"><data key="through">q</data><data key="score">{}</data></edge>'
    for text, match in (
        ("<a", "no XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "document type"),
        (f"{head}</graphml>", "no graph"),
        (f"{head}<graph>{edge.format('L1H0', 'L0H0', 1)}</graph></graphml>", "no edge from L1H0"),
        (f"{head}<graph>{edge.format('L7H0', 'L0H0', 1)}</graph></graphml>", "writes nothing"),
        (f"{head}<graph>{edge.format('L0H0', 'L1H0', 'much')}</graph></graphml>", "no number"),
    ):
        path.write_text(text)
        with pytest.raises(RequestError, match=match):
            read_graphml(graph, path)


def test_memory_is_asked_for_first(llama, task) -> None:
    with pytest.raises(MemoryRefused, match="Take fewer prompts"):
        Trials(llama, task, memory_limit=1000)
    # Little room means fewer runs at once, and the same values.
    masks = np.random.default_rng(0).random((9, *Graph.of(llama).exists.shape)) < 0.5
    tight, wide = Trials(llama, task, memory_limit=1 << 20), Trials(llama, task)
    np.testing.assert_allclose(tight.values(masks), wide.values(masks), atol=1e-4)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_other_replacements(model_named, ablation) -> None:
    """Nothing kept: every write at its mean, or nothing but biases."""
    truth = linear_network()
    trials = Trials(truth.model, truth.task, ablation=ablation)
    assert (trials.values(trials.graph.exists[None]) == trials.clean).all()
    known = {one.edges[0]: one for one in truth.outcomes if len(one.edges) == 1 and one.how == "zero"}
    if ablation == "zero":
        assert known
        found = exact_edges(truth.model, truth.task, ablation="zero", edges=list(known))
        for edge, outcome in known.items():
            place = found.graph.place(edge)
            np.testing.assert_allclose(found.per_prompt[:, *place], truth.clean - outcome.metric, atol=1e-4)
    assert np.abs(trials.baseline - trials.clean).max() > 1e-2
