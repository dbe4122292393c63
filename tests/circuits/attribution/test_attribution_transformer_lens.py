"""The same scores by TransformerLens' attribution patching, nodes and edges, through its bridge to the same weights."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from workbench.circuits import attribute
from workbench.models.testing import TINY, VOCAB_SIZE
from workbench.tracing import load


@pytest.fixture(scope="module")
def bridge():
    from transformer_lens.model_bridge.sources.transformers.source import boot

    words = Tokenizer(WordLevel({str(number): number for number in range(VOCAB_SIZE)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="0")
    found = boot("gpt2", hf_model=TINY["gpt2"](), tokenizer=tokenizer, device="cpu")
    found.eval()
    return found


def writer(node) -> str:
    if node.kind == "embed":
        return "embed"
    return f"L{node.layer}.mlp" if node.kind == "mlp_out" else f"L{node.layer}H{node.head}"


def reader(node) -> tuple[str, str]:
    if node.kind == "logits":
        return "logits", ""
    if node.kind == "mlp_in":
        return f"L{node.layer}.mlp", ""
    through = node.kind[0]
    return f"L{node.layer}{'H' if through == 'q' else 'KV'}{node.head}", through


@pytest.fixture(scope="module")
def theirs(bridge):
    """Theirs has one metric for all pairs, and pairs of one length."""
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    def scores(task, granularity: str):
        answer, foil = int(task.answers[0, 0]), int(task.foils[0, 0])
        return attribution_patch(
            bridge, task.clean.ids, task.corrupt.ids, lambda logits: logits[0, -1, answer] - logits[0, -1, foil],
            EdgeAttributionConfig(granularity=granularity),
        )  # fmt: skip

    return scores


@pytest.fixture
def pair(make_pairs):
    return make_pairs((6,))


def test_nodes_by_token(theirs, pair) -> None:
    found = attribute(load(TINY["gpt2"]()), pair, "atp", direction="denoising", positions=True)
    expected = theirs(pair, "node").node_scores
    assert len(expected) == 6 * len(found.graph.writers)
    mine = [found.positions["nodes"][0, found.graph.writer(writer(node)), node.position] for node in expected]
    np.testing.assert_allclose(mine, list(expected.values()), atol=1e-4)
    assert np.abs(mine).max() > 0.01


def test_edges(theirs, pair) -> None:
    found = attribute(load(TINY["gpt2"]()), pair, "eap", direction="denoising")
    graph, expected = found.graph, np.zeros(found.graph.exists.shape)
    named = set()
    for (one, two), score in theirs(pair, "edge").edge_scores.items():
        assert one.position == two.position
        place = graph.writer(writer(one)), graph.reader(*reader(two))
        named.add(place)
        expected[place] += score
    assert named == set(zip(*np.nonzero(graph.exists), strict=True))
    np.testing.assert_allclose(found.edges[graph.exists], expected[graph.exists], atol=1e-4)
    assert np.abs(expected).max() > 0.01
