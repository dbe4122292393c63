"""Query-focused retrieval against explicit patterns, and on documents whose scores are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.heads import DETECTORS, Settings, detect
from workbench.heads.detector import Part
from workbench.heads.detectors.documents import document_scores, query_columns


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_columns_are_means_over_the_query_rows_of_explicit_patterns(name, twin, random_task):
    subject = twin(name)
    task = random_task([40, 31], answers=0, query=[[28, 40], [25, 31]])
    found = query_columns(subject.model, task)
    for prompt, length in enumerate((40, 31)):
        patterns, _, _ = subject.run(task.batch.ids[prompt, :length])
        first = int(task.spans["query"][prompt, 0])
        for layer, pattern in enumerate(patterns):
            expected = pattern[:, first:].mean(1)
            heads = len(expected)
            torch.testing.assert_close(found[prompt, layer, :heads, :length].double(), expected, atol=1e-5, rtol=1e-4)
    assert found[1, :, :, 31:].abs().max() == 0


def test_outliers_below_two_deviations_are_dropped_and_the_rest_summed(random_task):
    task = random_task([30], answers=0, document_0=[[2, 12]], document_1=[[12, 20]])
    task = type(task)(**{**task.__dict__, "settings": {"documents": 2}})
    columns = torch.zeros(1, 1, 1, 30)
    columns[0, 0, 0, 2:12] = torch.tensor([0.1] * 9 + [-5.0])
    columns[0, 0, 0, 12:20] = torch.tensor([0.1, 0.2, -0.1, 0.0, 0.3, 0.1, 0.0, 0.1])
    scores = document_scores(columns, task)[0, :, 0, 0]
    values = np.array([0.1] * 9 + [-5.0])
    assert values[-1] < values.mean() - 2 * values.std(ddof=1)
    np.testing.assert_allclose(scores.numpy(), [0.9, 0.7], atol=1e-6)


def test_score_is_the_gold_documents_and_null_the_mean_of_the_others(random_task):
    spans = {"document_0": [[0, 4]] * 2, "document_1": [[4, 8]] * 2, "document_2": [[8, 12]] * 2}
    task = random_task([20, 20], answers=0, query=[[12, 20]] * 2, **spans)
    tasks = {
        query: type(task)(
            **{
                **task.__dict__,
                "settings": {"documents": 3, "query": query},
                "info": ({"gold": 1}, {"gold": 2}),
            }
        )
        for query in ("asked", "none")
    }
    asked, none = torch.full((2, 1, 1, 20), 0.2), torch.full((2, 1, 1, 18), 0.1)
    asked[0, ..., 4:8] = 0.5
    found = DETECTORS["qrhead"].score([Part(tasks["none"], none), Part(tasks["asked"], asked)])
    np.testing.assert_allclose(found.values[:, 0, 0], [4 * 0.4, 4 * 0.1], atol=1e-6)
    np.testing.assert_allclose(found.null[:, 0, 0], [4 * 0.1, 4 * 0.1], atol=1e-6)


def test_runs_from_text_to_table(reader):
    scores = detect(reader, ["qrhead"], settings=Settings(document_prompts=3, documents=2))
    assert len(scores.table) == 12 and scores.table.value.notna().all() and (scores.table.n == 3).all()
    assert DETECTORS["qrhead"].probe == "answer"
