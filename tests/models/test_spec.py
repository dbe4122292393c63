from __future__ import annotations

import pytest

from workbench.errors import HeadError
from workbench.models.spec import Head, LayerSpec, Spec


def small_spec() -> Spec:
    layers = (
        LayerSpec(0, heads=6, kv_heads=2, head_dim=8, scale=0.5),
        LayerSpec(1, heads=3, kv_heads=3, head_dim=4, scale=1.0, window=7),
    )
    return Spec("llama", layers, d_model=48, vocab_size=101, max_positions=None)


def test_a_head_reads_and_writes_its_own_name() -> None:
    assert str(Head(18, 6)) == "L18H6"
    assert f"{Head(18, 6)}" == "L18H6"
    assert [Head.parse(text) for text in ("L18H6", " l18h6", "18.6", "18-6")] == [Head(18, 6)] * 4


@pytest.mark.parametrize("text", ["", "L18", "18", "L18H6x", "L-1H6", "L18KV6", "18H6"])
def test_what_is_no_head_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(HeadError, match="L18H6") as caught:
        Head.parse(text)
    assert repr(text) in str(caught.value)


def test_heads_run_layer_by_layer_and_may_differ_in_number() -> None:
    spec = small_spec()
    assert spec.n_layers == 2
    assert spec.heads() == [Head(0, head) for head in range(6)] + [Head(1, head) for head in range(3)]


def test_consecutive_query_heads_share_a_kv_head() -> None:
    spec = small_spec()
    assert spec.layers[0].group == 3
    assert [spec.kv_head(Head(0, head)) for head in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [spec.kv_head(Head(1, head)) for head in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("head", [Head(2, 0), Head(-1, 0), Head(1, 3), Head(0, -1)])
def test_a_head_that_the_model_lacks_is_refused_by_name(head: Head) -> None:
    with pytest.raises(HeadError, match=str(head)):
        small_spec().check(head)
