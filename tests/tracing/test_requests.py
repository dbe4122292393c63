"""What is no prompt is refused in words, and what is longer than a model was made for is warned of once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.models.testing import TINY
from workbench.tracing import Model, ablate, load, statistics


def letters(text: str, **_: Any) -> dict[str, list[int]]:
    """A tokenizer: one token a letter, and nothing around them."""
    return {"input_ids": [3 + ord(letter) % 90 for letter in text]}


@pytest.fixture(scope="module")
def model() -> Model:
    model = load(TINY["llama"](max_position_embeddings=8))
    model.tokenizer = letters
    return model


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (None, r"None is no list of prompts; give a list of texts, e\.g\. \['The grey heron'\]"),
        (5, "5 is no list of prompts"),
        ({5, 6}, r"\{5, 6\} is no list of prompts"),
        (b"ab", "b'ab' is no list of prompts"),
        ({"input_ids": [[5]]}, r"A dict is no list of prompts; give its token ids: prompts\['input_ids'\]"),
        ([], "No prompts were given"),
        ("", r"Prompt 0 \(''\) has no tokens; give it some text"),
        (["a", ""], r"Prompt 1 \(''\) has no tokens; give it some text"),
        (["a", None], r"Prompt 1 \(None\) is no text, unlike those before it"),
        ([[5], "a"], r"Prompt 1 \('a'\) is a text, unlike those before it"),
        ([[5], []], "Prompt 1 has no tokens"),
        ([5, 6, 7], r"Prompt 0 \(5\) is no list of token ids; give whole numbers, in a list for each prompt: \[\["),
        ([None], r"Prompt 0 \(None\) is no list of token ids"),
        ([[5], [1.5]], r"Prompt 1 \(\[1\.5\]\) is no list of token ids"),
        ([["a"]], r"Prompt 0 \(\['a'\]\) is no list of token ids"),
        ([[[5]]], r"Prompt 0 \(\[\[5\]\]\) is no list of token ids"),
        ([[2**70]], "Prompt 0 .* is no list of token ids"),
    ],
)
@pytest.mark.usefixtures("unchecked_signatures")
def test_what_is_no_prompt_is_refused_in_words(model: Model, prompts: Any, says: str) -> None:
    for use in (model.trace, model.generate, model.predict_memory):
        with pytest.raises(RequestError, match=says):
            use(prompts)


@pytest.mark.usefixtures("unchecked_signatures")
def test_ids_may_come_in_any_array(model: Model) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for given in (ids, ids.numpy(), list(ids), ids.int().tolist(), ids.tolist()):
        assert torch.equal(model.batch(given).ids, ids)
    with pytest.raises(RequestError, match=r"'a' is a text, not a list of token ids; make a batch by model\.batch"):
        Batch.from_ids(["a"])


def test_a_site_asked_for_as_a_statistic_is_pointed_to(model: Model) -> None:
    trace = model.trace([[5, 6]], sites=["blocks.1.attn.hook_z"], statistics=[statistics.lse()])
    for name in ("z", "blocks.1.attn.hook_z"):
        with pytest.raises(RequestError, match=rf"'{name}' is a captured site.* read it with \.site\('z', 1\)"):
            trace[name]
    with pytest.raises(RequestError, match=r"'v' is a site.* not captured; trace with sites=\['v'\].*site\('v', 0\)"):
        trace["v"]
    with pytest.raises(RequestError, match="No statistic 'zz' in this trace; it has lse"):
        trace["zz"]


@pytest.mark.parametrize("way", ["trace", "generate"])
def test_more_tokens_than_a_rotary_model_was_made_for_are_warned_of_once(
    caplog: pytest.LogCaptureFixture, way: str
) -> None:
    model = load(TINY["llama"](max_position_embeddings=8))

    def run(tokens: int) -> None:
        if way == "trace":
            model.trace([[5] * 3, [5] * tokens])
        else:
            # The last new token is never fed back.
            model.generate([[5] * 3, [5] * (tokens - 2)], 3)

    with caplog.at_level(logging.WARNING, logger="workbench"):
        model.predict_memory([[5] * 20])
        run(8)
        assert not caplog.records
        run(9)
        run(12)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "was made for 8 positions, and a prompt reaches 9" in record.getMessage()


def test_one_statistic_stands_for_a_list_of_one(model: Model) -> None:
    assert torch.equal(model.trace([[5, 6]], statistics=statistics.lse())["lse"],
                       model.trace([[5, 6]], statistics=[statistics.lse()])["lse"])  # fmt: skip


@pytest.mark.parametrize(
    ("request_of", "says"),
    [
        (lambda m: m.trace([[5]], tokens_at_once=0), "tokens_at_once = 0"),
        (lambda m: statistics.first(1.5), "first of 1.5 tokens: give a whole number"),
        (lambda m: statistics.mass("odd", torch.tensor([[1.0, float("nan")]])), r"mass\('odd'\): some weights are NaN"),
        (lambda m: m.trace([[5]], edits=[ablate(["L0H0"]), ablate(["L0H0"], "uniform")]), "L0H0 is ablated twice"),
    ],
)
@pytest.mark.usefixtures("unchecked_signatures")
def test_numbers_that_mean_nothing_are_refused(model: Model, request_of: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        request_of(model)


def test_results_describe_themselves_in_a_line(model: Model) -> None:
    trace = model.trace([[5, 6, 7], [8]], statistics=[statistics.lse()], sites=["z"], loss=True)
    assert repr(trace) == "<Trace of 2 prompts of up to 3 tokens: statistics lse; sites z; loss>"
    assert repr(load(TINY["llama"]()).generate([[5]], 2)).startswith("<Generation of 1 prompts, up to 2 new tokens")
