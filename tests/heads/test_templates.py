"""Templates against explicit matrices and against TransformerLens' own detector on the same weights."""

from __future__ import annotations

import pytest
import torch

import workbench
from workbench.errors import RequestError
from workbench.heads.detector import Part
from workbench.heads.detectors.templates import TEMPLATES, head_match, random_keys, template_keys
from workbench.heads.repeats import random_repeats
from workbench.models import Batch
from workbench.models.testing import TINY

NAMES = {"previous": "previous_token_head", "duplicate": "duplicate_token_head", "induction": "induction_head"}
OPTIONS = [(False, False), (True, False), (False, True), (True, True)]
TEXT = " seven token sequence seven token sequence, the cat saw the the mat and the cat"


def matrix(ids, template):
    """The template by its definition."""
    size = len(ids)
    found = torch.zeros(size, size, dtype=torch.float64)
    for query in range(size):
        for key in range(query + 1):
            before = key > 0 and ids[key - 1] == ids[query]
            found[query, key] = {
                "previous": key == query - 1,
                "duplicate": key < query and ids[key] == ids[query],
                "induction": before,
            }[template]
    return found


def naive(pattern, ids, template, measure, exclude_bos, exclude_current):
    pattern, wanted = pattern.double().clone(), matrix(ids, template)
    for one in (pattern, wanted):
        if exclude_bos:
            one[:, 0] = 0
        if exclude_current:
            one.fill_diagonal_(0)
    if measure == "mul":
        return (pattern * wanted).sum() / pattern.sum()
    return 1 - (pattern - wanted).abs().sum() / len(ids)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_sums_over_rows_are_the_sums_over_the_matrix(name, side):
    model = workbench.load(TINY[name]())
    prompts = [[5, 6, 5, 7, 7, 6, 5, 9, 6, 5, 7], [8, 8, 8, 4]]
    batch = Batch.from_ids(prompts, side=side)
    patterns = [model.trace([ids], sites=["pattern"]) for ids in prompts]
    for template in NAMES:
        for measure in ("mul", "abs"):
            for bos, current in OPTIONS:
                mine = head_match(model, batch, template, measure, exclude_bos=bos, exclude_current=current)
                for prompt, ids in enumerate(prompts):
                    for layer, head in ((0, 0), (2, 3)):
                        pattern = patterns[prompt].site("pattern", layer)[0, head]
                        expected = naive(pattern, ids, template, measure, bos, current)
                        assert mine[prompt, layer, head].item() == pytest.approx(expected.item(), abs=1e-5)


def test_transformer_lens_finds_the_same_on_smollm2():
    """Its own detector through its bridge to the same weights; its abs is rounded to three decimals."""
    from transformer_lens.head_detector import detect_head
    from transformer_lens.model_bridge.sources.transformers.source import boot

    model = workbench.load("smollm2-135m")
    hf_model, tokenizer = model.attachment.hf_model, model.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    mine = {
        (template, measure, *option): head_match(
            model, [ids], template, measure, exclude_bos=option[0], exclude_current=option[1]
        )[0]
        for template in NAMES
        for measure in ("mul", "abs")
        for option in OPTIONS
    }
    model.detach()
    bridge = boot("HuggingFaceTB/SmolLM2-135M-Instruct", hf_model=hf_model, tokenizer=tokenizer, device="cpu")
    assert bridge.to_tokens(TEXT)[0].tolist() == ids
    _, cache = bridge.run_with_cache(torch.tensor([ids]), remove_batch_dim=True)
    for (template, measure, bos, current), found in mine.items():
        theirs = detect_head(
            bridge, TEXT, NAMES[template], cache=cache, error_measure=measure, exclude_bos=bos,
            exclude_current_token=current,
        )  # fmt: skip
        tolerance = 1e-4 if measure == "mul" else 6e-4
        torch.testing.assert_close(found, theirs.double(), rtol=0, atol=tolerance)
    assert mine["induction", "mul", True, True].max() > 0.1


def test_detectors_measure_the_template_without_exclusions():
    model = workbench.load(TINY["llama"]())
    tasks = [random_repeats(model, 3, 6, 3, seed, 1) for seed in (0, 1)]
    statistics = {s.name: s for one in TEMPLATES for s in one.statistics(tasks[0])}
    assert len(statistics) == 9
    for detector in TEMPLATES:
        parts = [Part(task, model.trace(task.batch, statistics=detector.statistics(task))) for task in tasks]
        scores = detector.score(parts)
        template, measure = detector.name.split("_")
        expected = torch.cat([head_match(model, task.batch, template, measure) for task in tasks])
        assert scores.values == pytest.approx(expected.numpy(), abs=1e-6)
        assert scores.null.shape == scores.values.shape and (scores.null != scores.values).any()


def test_random_keys_are_earlier_ones_and_as_many():
    model = workbench.load(TINY["llama"]())
    task = random_repeats(model, 4, 8, 3, 0, 1)
    keys = template_keys(task.batch, "duplicate")
    drawn = random_keys(task, keys)
    query = torch.arange(keys.shape[1])[:, None]
    assert torch.equal(drawn >= 0, keys >= 0) and (drawn < query).all()
    assert (drawn[drawn >= 0] >= 1).all()


def test_mistakes_are_named(monkeypatch):
    model = workbench.load(TINY["llama"]())
    with pytest.raises(RequestError, match="single token"):
        head_match(model, [[5]], "previous")
    monkeypatch.setattr("workbench.heads.detectors.templates.MOST_ENTRIES", 10)
    with pytest.raises(RequestError, match="occur 4 times"):
        head_match(model, [[5, 5, 5, 5]], "duplicate")


@pytest.mark.usefixtures("unchecked_signatures")
def test_unknown_templates_and_measures_are_named():
    model = workbench.load(TINY["llama"]())
    with pytest.raises(RequestError, match="template='next'"):
        template_keys(model.batch([[5, 6]]), "next")
    with pytest.raises(RequestError, match="measure='sum'"):
        head_match(model, [[5, 6]], "previous", "sum")
