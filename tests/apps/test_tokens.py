"""Patterns of short prompts behind the token view: exact against the models' own, bounded, refused with reasons."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
import torch

from workbench import load
from workbench.apps.server import create_app
from workbench.apps.settings import AppSettings
from workbench.apps.tokens import prompts
from workbench.apps.tokens.prompts import clear, from_result, measure, read_prompt
from workbench.apps.tokens.short import MOST_TOKENS, SIDE, ShortPatterns, shown, telling, thumbnail
from workbench.errors import RequestError
from workbench.models import Head
from workbench.models.testing import TINY
from workbench.runs import RunWriter
from workbench.runs.patterns import Masking, pattern_tensors, write_pattern


def quiet(done, total):
    """Nobody watches."""


def triangle(data, count):
    found = np.zeros((count, count), dtype=np.float32)
    found[np.tril_indices(count)] = np.frombuffer(data, dtype="<f4")
    return found


# A soft cap and windows, learned sinks, keys shared by queries, positions that are not rotated.
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama", "gpt2"])
def test_every_head_is_the_models_own_attention(name, tmp_path):
    ids = torch.randint(3, 100, (1, 50), generator=torch.Generator().manual_seed(1))
    eager = TINY[name]()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        own = eager(ids, output_attentions=True).attentions
    model = load(TINY[name]())
    result = measure(model, ids.tolist(), tmp_path, quiet)
    found = from_result(result, tmp_path)
    assert found.heads == tuple(model.spec.heads()) and len(found.texts) == 50
    for head in found.heads:
        values = triangle(found.triangle(head), 50)
        assert np.allclose(values, own[head.layer][0, head.head].numpy(), atol=1e-5)
    for layer in model.spec.layers:
        assert found.windows.get(layer.index) == layer.window
    model.detach()


def test_texts_and_steps_of_a_prompt_are_kept(model_folder, tmp_path):
    model = load(model_folder)
    steps = []
    result = measure(model, "The class statement defines a class", tmp_path, lambda *step: steps.append(step))
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4)]
    ids = model.batch("The class statement defines a class").ids[0].tolist()
    assert result["tokens"] == [model.tokenizer.decode([one]) for one in ids]
    found = from_result(result, tmp_path)
    assert found.start == max(found.heads, key=lambda head: telling(found.matrix(head)))
    model.detach()


def test_long_and_large_prompts_are_refused_with_what_fits(model_folder, tmp_path, monkeypatch):
    model = load(model_folder)
    with pytest.raises(RequestError, match=f"{MOST_TOKENS} can be shown"):
        measure(model, [[5] * (MOST_TOKENS + 1)], tmp_path, quiet)
    # 3 layers of 4 query and 2 key heads of 8 numbers, and 4 numbers a row, 4 bytes each: 624 bytes a token.
    monkeypatch.setattr(prompts, "MOST_BYTES", 10_000)
    with pytest.raises(RequestError, match="16 tokens fit"):
        measure(model, [[5] * 17], tmp_path, quiet)
    assert not list(tmp_path.iterdir())
    measure(model, [[5] * 16], tmp_path, quiet)
    (file,) = tmp_path.iterdir()
    assert 16 * 624 <= file.stat().st_size < 16 * 624 + 2_000
    model.detach()
    for text, words in (
        ("", "no prompt"),
        (" \n", "no prompt"),
        (None, "no prompt"),
        ("x" * 20_001, "20,001 characters"),
    ):
        with pytest.raises(RequestError, match=words):
            read_prompt(text)
    with pytest.raises(RequestError, match="10 are allowed"):
        read_prompt("x" * 11, 10)


def test_the_oldest_patterns_make_room(tmp_path):
    for at in range(4):
        file = tmp_path / f"{at}.safetensors"
        file.write_bytes(b"x" * 100)
        os.utime(file, (1000 + at, 1000 + at))
    clear(tmp_path, 250)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["2.safetensors", "3.safetensors"]
    clear(tmp_path, 10)
    assert [file.name for file in tmp_path.iterdir()] == ["3.safetensors"]


def test_thumbnails_have_the_largest_entry_of_each_cell():
    rng = np.random.default_rng(0)
    values = np.tril(rng.uniform(0, 0.5, (130, 130))).astype(np.float32)
    values[:, 0] = 0.9
    small = thumbnail(values)
    assert small.shape == (44, 44) and len(small) <= SIDE
    top = values[:, 1:].max()
    # Three tokens a cell; the first key is beyond the range.
    assert small[20, 7] == round(255 * np.sqrt(values[60:63, 21:24].max() / top))
    assert (small[:, 0] == 255).all() and not small[3, 4:].any()
    assert thumbnail(np.ones((1, 1), dtype=np.float32)).tolist() == [[255]]


def test_tokens_are_shown_whatever_they_hold():
    assert shown(" the") == "␣the" and shown("a\n") == "a↵" and shown("") == "∅" and shown("   ") == "␣␣␣"
    assert shown("\u202egnp") == "\\u202egnp" and shown("\0") == "\\x00"
    assert shown("x" * 100_000) == "x" * 60 + "…"
    assert shown("<b>'\"") == "<b>'\""


def test_the_head_shown_first_is_no_sink():
    count = 12
    sink, content = np.eye(count, dtype=np.float32) * 0.1, np.eye(count, dtype=np.float32) * 0.1
    sink[3:, 2] = 0.9
    content[8, 3] = content[9, 4] = 0.9
    assert telling(content) > telling(sink)
    assert telling(np.ones((1, 1), dtype=np.float32)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three stored heads on 30 tokens, one of them windowed, and one of another length."""
    folder = tmp_path_factory.mktemp("tokens") / "runs"
    generator = torch.Generator().manual_seed(0)
    with RunWriter.open(folder / "short & sweet", kind="trace", title="T", fingerprint={}) as writer:
        for head, tokens, masking in (((1, 0), 30, Masking(0.5)), ((1, 2), 30, Masking(0.5)),
                                      ((2, 1), 30, Masking(0.5, window=6)), ((3, 0), 20, Masking(0.5)),
                                      ((4, 0), MOST_TOKENS + 1, Masking(0.5))):  # fmt: skip
            q, k = (torch.randn(tokens, 4, generator=generator) for _ in range(2))
            write_pattern(writer, head, pattern_tensors(q, k, masking), masking, model="toy")
        writer.table("tokens", pd.DataFrame({"position": range(30), "token_id": range(30), "text": [" w"] * 30}))
        writer.done("all")
        writer.finish()
    return folder


@pytest.fixture(scope="module")
def client(folder):
    return create_app(AppSettings(folder)).server.test_client()


def test_the_server_gives_stored_patterns_exactly(client, folder):
    from workbench.runs import Run
    from workbench.runs.patterns import open_pattern

    about = client.get("/tokens/about?run=short+%26+sweet&pattern=l1h2").get_json()
    assert about["heads"] == ["L1H0", "L1H2", "L2H1"] and about["start"] == "L1H2"
    assert about["windows"] == {"2": 6} and about["tokens"] == ["␣w"] * 30 and about["cell"] == 1
    answer = client.get("/tokens/weights?run=short+%26+sweet&pattern=l1h2&head=L2H1")
    values = triangle(answer.data, 30)
    stored = open_pattern(Run.open(folder / "short & sweet"), "l2h1")
    q, k = (stored.tensors.read(name).astype(np.float64) for name in ("q", "k"))
    logits = q @ k.T * 0.5
    row, key = np.indices(logits.shape)
    logits[(key > row) | (key <= row - 6)] = -np.inf
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    assert np.allclose(values, expected, atol=1e-6) and answer.headers["Cache-Control"] == "no-store"
    small = client.get("/tokens/small?run=short+%26+sweet&pattern=l1h2&layer=1").data
    assert len(small) == 2 * 30 * 30 and max(small) == 255
    # Patterns of another prompt have tokens of their own, or none.
    other = client.get("/tokens/about?run=short+%26+sweet&pattern=l3h0").get_json()
    assert other["heads"] == ["L3H0"] and other["tokens"][7] == "␣7"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("about", "Neither a run nor a job"),
        ("about?run=..%2F..%2Fetc", "no run"),
        ("about?run=short+%26+sweet&pattern=l9h9", "stores no pattern"),
        ("about?run=short+%26+sweet&pattern=l4h0", "zoomable map"),
        ("about?run=short+%26+sweet&example=prose", "keeps no patterns"),
        ("weights?run=short+%26+sweet&pattern=l1h0&head=L0H0", "There is no pattern of L0H0"),
        ("weights?run=short+%26+sweet&pattern=l1h0&head=%3Cb%3E", "names no head"),
        ("small?run=short+%26+sweet&pattern=l1h0&layer=-1", "layer's number"),
        ("small?run=short+%26+sweet&pattern=l1h0&layer=7", "no pattern of that layer"),
        ("about?job=..%2F..%2Fpasswd", "identifier"),
        ("about?job=AAAAAAAAAAAAAAAA", "no trial"),
    ],
)
def test_wrong_requests_are_refused_with_the_reason(client, query, words):
    answer = client.get("/tokens/" + query)
    assert answer.status_code in (400, 404) and words in answer.get_json()["error"]


def test_patterns_that_were_cleared_away_say_so(tmp_path):
    result = {"patterns": "A" * 16, "layers": [], "tokens": [], "start": "L0H0"}
    with pytest.raises(RequestError, match="cleared away"):
        from_result(result, tmp_path)
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    with pytest.raises(RequestError, match="cleared away"):
        from_result(result | {"patterns": "../secret"}, tmp_path / "patterns")


def test_only_heads_that_are_there_are_given():
    only = ShortPatterns(("a",), (Head(0, 1),), lambda head: np.ones((1, 1), dtype=np.float32), Head(0, 1))
    assert only.named("l0h1") == Head(0, 1)
    with pytest.raises(RequestError, match="those of L0H1"):
        only.named("L0H0")
