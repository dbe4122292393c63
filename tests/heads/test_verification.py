"""Matched controls, and what is refused before anything runs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

import workbench
from workbench.errors import HeadError, RequestError
from workbench.heads import DETECTORS, detect, matched_heads, verify
from workbench.heads.detection import choose
from workbench.models import Head, LayerSpec, Spec

SPEC = Spec("toy", tuple(LayerSpec(i, 4, 2, 8, 1.0) for i in range(5)), 16, 10, None)


def test_controls_match_layers_and_avoid_the_set():
    heads = (Head(1, 0), Head(1, 1), Head(3, 2))
    for seed in range(50):
        drawn = matched_heads(SPEC, heads, np.random.default_rng(seed))
        assert Counter(head.layer for head in drawn) == {1: 2, 3: 1}
        assert not set(drawn) & set(heads) and len(set(drawn)) == 3


def test_a_crowded_layer_borrows_from_its_neighbours():
    heads = tuple(Head(2, head) for head in range(3))
    drawn = matched_heads(SPEC, heads, np.random.default_rng(0))
    assert {head.layer for head in drawn} <= {1, 2, 3} and len(set(drawn)) == 3


def test_controls_differ_even_where_a_layer_is_exhausted():
    """A whole layer, or nearly: its one set of controls drawn ten times would be one control, not ten."""
    for heads in (tuple(Head(1, head) for head in range(4)), (Head(0, 0),)):
        rng = np.random.default_rng(0)
        sets = {matched_heads(SPEC, heads, rng, sets=10) for _ in range(200)}
        assert len(sets) >= 10
        assert all(len(set(drawn)) == len(heads) and not set(drawn) & set(heads) for drawn in sets)
    # Where the layers suffice, nothing is borrowed.
    plenty = (Head(1, 0), Head(2, 1), Head(3, 2))
    drawn = matched_heads(SPEC, plenty, np.random.default_rng(0), sets=10)
    assert [head.layer for head in drawn] == [1, 2, 3]


def test_the_table_says_how_different_the_controls_were(handwritten, handwritten_probes):
    probe = workbench.heads.build_probe("induction", handwritten, handwritten_probes)
    table = verify(handwritten, ["L0H0"], probe=probe, how="zero").table
    drawn = verify(handwritten, ["L0H0"], probe=probe, how="zero").draws
    first = drawn[drawn["metric"] == table["metric"][0]]
    assert (table["different_draws"] == first["heads"].nunique()).all()
    assert (table["other_layers"] == int((~first["heads"].str.startswith("L0")).any())).all()


def test_strength_grows_from_no_effect_to_the_whole_form(handwritten, handwritten_probes):
    probe = workbench.heads.build_probe("induction", handwritten, handwritten_probes)
    tables = [verify(handwritten, ["L0H0"], probe=probe, how="zero", strength=s).table for s in (0.0, 0.5, 1.0)]
    assert [table["strength"].unique().tolist() for table in tables] == [[0.0], [0.5], [1.0]]
    assert (tables[0][["effect", "control_effect"]] == 0).all(axis=None)
    whole = verify(handwritten, ["L0H0"], probe=probe, how="zero").table
    pd.testing.assert_frame_equal(tables[2], whole)
    effects = [float(table["effect"].iloc[0]) for table in tables]
    assert effects[0] < effects[1] < effects[2]
    with pytest.raises(RequestError, match=r"strength=1\.5"):
        verify(handwritten, ["L0H0"], probe=probe, strength=1.5)


def test_too_few_others_are_refused():
    heads = tuple(Head(layer, head) for layer in range(3) for head in range(4))
    with pytest.raises(RequestError, match="12 heads of 20"):
        matched_heads(SPEC, heads, np.random.default_rng(0))


def test_bad_requests_name_the_value(handwritten, handwritten_probes):
    with pytest.raises(RequestError, match="Did you mean 'induction'"):
        choose(["inducton"])
    with pytest.raises(RequestError, match="need a tokenizer"):
        detect(handwritten, ["sink"])
    with pytest.raises(HeadError, match="L7H0"):
        verify(handwritten, ["L7H0"])
    with pytest.raises(RequestError, match="No heads"):
        verify(handwritten, [])
    with pytest.raises(RequestError, match="draws = 3"):
        verify(handwritten, ["L0H0"], probe=workbench.heads.build_probe("induction", handwritten, handwritten_probes),
               how="zero", draws=3)  # fmt: skip


def test_every_detector_says_what_it_is():
    for name, detector in DETECTORS.items():
        # Not everything was published as a paper: a thread of articles, a forum post, a library's page.
        assert detector.name == name and detector.url.startswith(
            (
                "https://arxiv.org/abs/",
                "https://transformer-circuits.pub/",
                "https://www.lesswrong.com/posts/",
                "https://transformerlensorg.github.io/",
            )
        )
        for text in (
            detector.title,
            detector.measures,
            detector.null,
            detector.unit,
            detector.positions,
            detector.paper,
        ):
            assert text.strip()
