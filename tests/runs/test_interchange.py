"""Other tools' formats: round trips, the shapes that their own code writes, and clear refusals."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.heads.agreement import agreement
from workbench.runs import interchange
from workbench.runs.headvis import Shown, read_headvis, write_headvis
from workbench.runs.interchange import read_duo, read_retrieval_head, write_duo, write_retrieval_head

LAYERS, HEADS, GROUP = 3, 6, 3


@pytest.fixture
def scores(seed):
    rng = np.random.default_rng(seed)
    layer, head = (axis.ravel() for axis in np.indices((LAYERS, HEADS)))
    names = ("retrieval", "induction")
    return pd.concat(
        [
            pd.DataFrame({"model": "m", "detector": name, "layer": layer, "head": head, "value": rng.random(len(head))})
            for name in names
        ],
        ignore_index=True,
    )


@pytest.fixture
def about():
    return pd.DataFrame({"detector": ["retrieval", "induction"], "measures": ["copied", "<b>followed</b>"]})


def values(table, detector):
    return table[table.detector == detector].sort_values(["layer", "head"])["value"].to_numpy()


def test_retrieval_head_round_trip(scores, tmp_path):
    file = write_retrieval_head(scores, "retrieval", tmp_path / "scores.json")
    raw = json.loads(file.read_text())
    assert set(raw) == {f"{layer}-{head}" for layer in range(LAYERS) for head in range(HEADS)}
    found = read_retrieval_head(file)
    assert np.array_equal(values(found.table, "retrieval"), values(scores, "retrieval"))
    assert found.table.n.eq(1).all() and found.table[["low", "high", "q", "null"]].isna().all(axis=None)
    best = found.table.sort_values("value").iloc[-1]
    assert found.top("retrieval", 1) == [(best.layer, best["head"])]


def test_retrieval_head_lists_are_trials(tmp_path):
    file = tmp_path / "released.json"
    file.write_text('{"16-19": [1.0, 0.5, 0.0], "11-15": [0.25, 0.25, 0.25]}')
    table = read_retrieval_head(file, "copy", "llama").table.set_index(["layer", "head"])
    assert table.loc[(16, 19), "value"] == 0.5 and table.loc[(16, 19), "n"] == 3
    assert table.loc[(16, 19), "low"] < 0.5 < table.loc[(16, 19), "high"]
    assert tuple(table.loc[(11, 15), ["low", "high"]]) == (0.25, 0.25)
    assert set(table.model) == {"llama"} and set(table.detector) == {"copy"}


@pytest.mark.parametrize("join", ["mean", "max"])
def test_duo_joins_the_query_heads_of_a_kv_head_and_gives_them_back(scores, tmp_path, join):
    folder = write_duo(scores, "retrieval", tmp_path / "duo", GROUP, join=join, config={"seed": 42})
    grid = values(scores, "retrieval").reshape(LAYERS, HEADS // GROUP, GROUP)
    wanted = getattr(grid, join)(axis=2)
    # As the original reads it.
    alphas = np.loadtxt(folder / "full_attention_heads.tsv", dtype=float, delimiter="\t")
    assert np.array_equal(alphas, wanted)
    found, config = read_duo(folder, GROUP)
    assert config == {"sink_size": 64, "recent_size": 256, "seed": 42}
    read = values(found.table, "duo").reshape(LAYERS, HEADS)
    assert all(read[layer, head] == wanted[layer, head // GROUP] for layer in range(LAYERS) for head in range(HEADS))
    again, _ = read_duo(write_duo(found.table, "duo", tmp_path / "again", GROUP), GROUP)
    assert np.allclose(values(again.table, "duo"), values(found.table, "duo"), atol=1e-15)


def test_duo_as_released_is_clipped(tmp_path):
    (tmp_path / "config.json").write_text('{"sink_size": 128, "recent_size": 256, "config_name": null}')
    (tmp_path / "full_attention_heads.tsv").write_text("-9.58e-05\t5.585937500000000000e-01\n1.002\t0\n")
    found, _ = read_duo(tmp_path, 2)
    assert values(found.table, "duo").tolist() == [0, 0, 0.55859375, 0.55859375, 1, 1, 0, 0]


def test_headvis_round_trip(scores, about, tmp_path):
    attention = np.tril(np.arange(1.0, 17).reshape(4, 4)) / 40
    attention[3, 0] = 0.001
    shown = Shown(7, ("<s>", "the", " cat", "</script>"), attention)
    scores.loc[(scores.layer == 2) & (scores["head"] == 5) & (scores.detector == "induction"), "value"] = np.nan
    folder = write_headvis(scores, about, tmp_path / "data", model="tiny", sequences={(1, 2): [shown]})
    found = read_headvis(folder)
    for name in ("retrieval", "induction"):
        known = values(scores, name)
        assert np.array_equal(values(found.scores.table, name), known[~np.isnan(known)])
    assert found.config["heads"] == [[layer, head] for layer in range(LAYERS) for head in range(HEADS)]
    assert found.config["metric_descriptions"]["retrieval"] == "copied"
    assert list(found.sequences) == [(1, 2)]
    (one,) = found.sequences[1, 2]
    assert (one.id, one.tokens) == (shown.id, shown.tokens)
    # The one weight below the bar is left out, the others are rounded.
    assert one.attention == pytest.approx(np.where(attention < 0.005, 0, attention), abs=5e-5)
    assert len(agreement(found.scores.table, found.scores.detectors, resamples=5).correlations) == 1


def test_headvis_head_files_have_the_shapes_of_its_contract(scores, about, tmp_path):
    attention = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    tokens = ("<s>", "a", "b", "a", "b")
    folder = write_headvis(scores, about, tmp_path, model="m", sequences={(0, 0): [Shown(0, tokens, attention)]})
    head = json.loads((folder / "heads" / "L0H0.json").read_text())
    (one,) = head["sequences"]
    assert one["attention_indices"] == sorted(q * 5 + k for q in range(5) for k in range(q + 1))
    # Position 0 and the diagonal do not count: row 2 on key 1.
    assert one["max_activation"] == round(1 / 3, 4) and one["interval"] == 10 and one["seq_len"] == 5
    histogram = head["qk_distance_histogram"]
    assert len(histogram["bin_edges"]) == len(histogram["bin_values"]) + 1 and sum(histogram["bin_values"]) == 15
    assert histogram["bin_values"][:2] == [5, 4]
    keys = {row["token"]: row["weight"] for row in head["top_key_tokens"]}
    assert keys["<s>"] == pytest.approx(1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5, abs=1e-4)
    empty = json.loads((folder / "heads" / "L2H5.json").read_text())
    assert empty["sequences"] == [] and empty["top_query_tokens"] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "one object"),
        ("{}", "one object"),
        ("{", "no JSON"),
        ('{"L1H2": [1]}', "names no head"),
        ('{"1-2": 0.5}', "list of numbers"),
        ('{"1-2": []}', "has no score"),
        ('{"1-2": ["__import__(1)"]}', "finite numbers"),
        ('{"1-2": [NaN]}', "finite numbers"),
        ('{"1-2": [true]}', "finite numbers"),
        ('{"1-2": [1], "1-2": [2]}', "comes twice"),
        ('{"1-2": [1], "01-2": [2]}', "L1H2 comes twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_retrieval_head_files_are_refused(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        read_retrieval_head(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("tsv", "config", "message"),
    [
        ("1\t2\n1\n", '{"sink_size": 1, "recent_size": 2}', "line 2: 1 heads"),
        ("1\tx\n", '{"sink_size": 1, "recent_size": 2}', "only numbers"),
        ("1\tnan\n", '{"sink_size": 1, "recent_size": 2}', "finite"),
        ("", '{"sink_size": 1, "recent_size": 2}', "is empty"),
        ("1\n", '{"sink_size": true, "recent_size": 2}', "sink_size"),
        ("1\n", '{"recent_size": 2}', "sink_size"),
    ],
)
def test_malformed_duo_folders_are_refused(tmp_path, tsv, config, message):
    (tmp_path / "full_attention_heads.tsv").write_text(tsv)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RequestError, match=message):
        read_duo(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_indices": [25]}, "outside the 3 x 3"),
        ({"attention_values": [0.1, 0.2]}, "one length"),
        ({"seq_len": 4}, "number of tokens"),
        ({"tokens": [1, 2, 3]}, "list of texts"),
        ({"attention_values": None}, "list of numbers"),
    ],
)
def test_malformed_headvis_sequences_are_refused(scores, about, tmp_path, change, message):
    shown = Shown(0, ("a", "b", "c"), np.eye(3))
    folder = write_headvis(scores, about, tmp_path, model="m", sequences={(0, 0): [shown]})
    file = folder / "heads" / "L0H0.json"
    head = json.loads(file.read_text())
    head["sequences"][0] |= {"attention_indices": [0], "attention_values": [1.0]} | change
    file.write_text(json.dumps(head))
    with pytest.raises(RequestError, match=message):
        read_headvis(folder)


def test_what_cannot_be_written_is_refused(scores, tmp_path):
    with pytest.raises(RequestError, match=r"No scores of 'sink'.* retrieval, induction"):
        write_retrieval_head(scores, "sink", tmp_path / "x.json")
    with pytest.raises(RequestError, match="group=4 does not divide 6"):
        write_duo(scores, "retrieval", tmp_path, 4)
    with pytest.raises(RequestError, match="0 to 1"):
        write_duo(scores.assign(value=scores.value * 3), "retrieval", tmp_path, GROUP)
    with pytest.raises(RequestError, match="needs every one"):
        write_duo(scores.drop(index=3), "retrieval", tmp_path, GROUP)


def test_large_files_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(interchange, "MOST_BYTES", 10)
    (tmp_path / "large.json").write_text('{"1-2": [1.0, 2.0]}')
    with pytest.raises(RequestError, match="19 bytes"):
        read_retrieval_head(tmp_path / "large.json")
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_retrieval_head(tmp_path / "none.json")
