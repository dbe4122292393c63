"""The graph of writers and readers: which edges there are, and tables of scores on it."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.circuits import Graph, Scores
from workbench.errors import ModelRefused, RequestError
from workbench.models import LayerSpec, Spec
from workbench.tasks.pairs import Edge


def shape(layers: int, heads: int, kv: int | None = None, *, parallel: bool = False) -> Spec:
    own = tuple(LayerSpec(index, heads, kv or heads, 8, 1.0) for index in range(layers))
    return Spec("any", own, heads * 8, 100, None, parallel=parallel)


@pytest.mark.parametrize(("layers", "heads"), [(12, 12), (1, 1), (3, 4)])
def test_the_count_is_that_of_the_formula(layers: int, heads: int) -> None:
    graph = Graph.of_spec(shape(layers, heads))
    pairs = layers * (layers - 1) // 2
    inputs = layers + (heads + 1) * pairs
    expected = 3 * heads * inputs + layers * (1 + heads) + (heads + 1) * pairs + 1 + layers * (heads + 1)
    assert graph.count == len(graph.edges) == expected
    assert len(graph.writers) + 1 == layers * (heads + 1) + 2


def test_gpt2_small_has_32491_edges_and_158_nodes() -> None:
    graph = Graph.of_spec(shape(12, 12))
    assert (graph.count, len(graph.writers) + 1) == (32491, 158)


def test_without_mlps() -> None:
    """The induction toy of the method notes: 81 edges."""
    layers, heads = 2, 4
    graph = Graph.of_spec(shape(layers, heads), (False, False))
    assert graph.count == 81 == 3 * heads * (layers + heads * layers * (layers - 1) // 2) + 1 + layers * heads


def test_a_parallel_block_reads_no_head_of_its_own_layer() -> None:
    parallel, serial = Graph.of_spec(shape(2, 3, parallel=True)), Graph.of_spec(shape(2, 3))
    missing = {edge for edge in serial.edges if edge not in set(parallel.edges)}
    assert missing == {Edge(f"L{layer}H{head}", f"L{layer}.mlp") for layer in range(2) for head in range(3)}
    with pytest.raises(RequestError, match="There is no edge"):
        parallel.place(Edge("L0H0", "L0.mlp"))


def test_grouped_keys_are_nodes_of_their_own() -> None:
    graph = Graph.of_spec(shape(2, 4, 2))
    assert ("L1KV1", "k") in graph.readers
    assert ("L1H1", "k") not in graph.readers
    # 4 q, 2 k and 2 v a layer, from 1 and from 6 writers; the MLPs read 5 and 10, the logits 11.
    assert graph.count == 8 * 1 + 8 * 6 + 5 + 10 + 11
    assert graph.place(Edge("L0H3", "L1KV0", "v")) == (4, graph.reader("L1KV0", "v"))
    assert graph.feeds(graph.reader("L1KV1", "k")) == (graph.writer("L1H2"), graph.writer("L1H3"))
    assert graph.feeds(graph.reader("L0H2", "q")) == (graph.writer("L0H2"),)
    assert graph.feeds(graph.reader("L1.mlp")) == (graph.writer("L1.mlp"),)
    assert graph.feeds(graph.reader("logits")) == ()


def test_slices_cover_every_reader_once() -> None:
    graph = Graph.of_spec(shape(2, 4, 2), (True, False))
    covered = [place for _, _, part in graph.layer_slices() for place in range(part.start, part.stop)]
    assert covered == list(range(len(graph.readers) - 1))
    for layer, through, part in graph.layer_slices():
        assert all(name.startswith(f"L{layer}") and own == through for name, own in graph.readers[part])


def test_every_tiny_model_has_a_graph_or_is_refused(any_model) -> None:
    normed = any_model.spec.architecture in ("gemma2", "gemma3_text", "olmo2")
    if normed:
        with pytest.raises(ModelRefused, match=any_model.spec.architecture):
            Graph.of(any_model)
        return
    graph = Graph.of(any_model)
    assert [node for node, through in graph.readers if through == "q"] == [str(one) for one in any_model.spec.heads()]
    assert bool(graph.exists[:, -1].all())


def test_unknown_names_are_refused() -> None:
    graph = Graph.of_spec(shape(1, 2))
    with pytest.raises(RequestError, match="L3H0"):
        graph.place(Edge("L3H0", "logits"))
    with pytest.raises(RequestError, match="L0H0"):
        graph.reader("L0H0", "k")


def test_the_table_ranks_by_size_and_has_intervals() -> None:
    graph = Graph.of_spec(shape(1, 2), (False,))
    values = np.random.default_rng(0).normal(size=(6, len(graph.writers), len(graph.readers)))
    values[:, ~graph.exists] = np.nan
    scores = Scores(graph, "any", "task", "metric", 6, 0, edges=values.mean(0), per_prompt=values.astype(np.float32))
    table = scores.table()
    assert len(table) == graph.count
    assert list(table["rank"]) == list(range(1, graph.count + 1))
    assert bool((table.score.abs().diff().dropna() <= 0).all())
    assert bool(((table.low <= table.score) & (table.score <= table.high)).all())
    first = table.iloc[0]
    assert scores.of(Edge(first.source, first.target, first.through)) == first.score
    assert set(table[table.source == "embed"].source_layer.isna()) == {True}
    with pytest.raises(RequestError, match="edges"):
        scores.table("nodes")
