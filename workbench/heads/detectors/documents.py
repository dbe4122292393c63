"""Query-focused retrieval heads: whom the words of a query attend to among documents that stand before it.

For every token of a document the attention that it gets from the query span, averaged over the span's rows, less the
same with `N/A` for a query; tokens below mean - 2 std of their document are dropped and the rest is summed. Only the
query's rows are computed against all keys, so the cost is that of as many decoding steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.heads.calls import needed_tokenizer, observe_prompts, rows_from
from workbench.heads.detector import Array, Detector, Kind, Part, Progress, PromptScores, prompts
from workbench.heads.settings import Settings
from workbench.kernels import StatisticsRequest
from workbench.models import AttentionCall
from workbench.tasks import Task
from workbench.tasks.documents import document_queries, document_spans
from workbench.tracing import Model

DEVIATIONS = 2.0


def query_columns(model: Model, task: Task, progress: Progress | None = None) -> Float[Tensor, "prompt layer head key"]:
    """Attention that each key gets from the query span, averaged over the span's rows; 0 at padding."""
    heads = max(layer.heads for layer in model.spec.layers)
    found = torch.zeros(len(task), model.spec.n_layers, heads, task.batch.ids.shape[1])

    def read(prompt: int, call: AttentionCall) -> None:
        first = int(task.spans["query"][prompt, 0])
        sums = rows_from(call, first).statistics(StatisticsRequest(column_sum=True)).column_sum
        assert sums is not None
        rows = call.q.shape[2] - first
        found[prompt, call.layer, : sums.shape[1], : sums.shape[2]] = sums[0].cpu() / rows

    observe_prompts(model, task.batch, read, progress)
    return found


def document_scores(
    calibrated: Float[Tensor, "prompt layer head key"], task: Task
) -> Float[Tensor, "prompt document layer head"]:
    """Calibrated attention summed over each document's tokens, outliers far below its mean dropped."""
    scores = []
    for columns, spans in zip(calibrated.double(), document_spans(task).tolist(), strict=True):
        kept = []
        for first, last in spans:
            tokens = columns[..., first:last]
            floor = tokens.mean(-1, keepdim=True) - DEVIATIONS * tokens.std(-1, keepdim=True)
            kept.append(torch.where(tokens >= floor, tokens, 0.0).sum(-1))
        scores.append(torch.stack(kept))
    return torch.stack(scores)


def _tasks(model: Model, settings: Settings) -> list[Task]:
    tokenizer = needed_tokenizer(model, "documents")
    return list(document_queries(tokenizer, settings.document_prompts, settings.documents, settings.seed))


def _run(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Any:
    assert task is not None
    return query_columns(model, task, progress)


def _score(parts: Sequence[Part]) -> PromptScores:
    found = {str(prompts(part).settings["query"]): part for part in parts}
    asked, none = found["asked"], found["none"]
    # The prompts differ in length only behind the documents.
    width = min(asked.found.shape[-1], none.found.shape[-1])
    scores = document_scores(asked.found[..., :width] - none.found[..., :width], prompts(asked))
    gold = torch.tensor([int(info["gold"] or 0) for info in prompts(asked).info])
    prompt = torch.arange(len(gold))
    values = scores[prompt, gold]
    others = (scores.sum(1) - values) / (scores.shape[1] - 1)
    return PromptScores(_array(values), _array(others))


def _array(values: Tensor) -> Array:
    return np.asarray(values.numpy())


DOCUMENTS = Kind("documents", "documents, then a query", _tasks, _run)

QRHEAD = Detector(
    name="qrhead",
    title="Query-focused retrieval",
    kind="documents",
    probe="answer",
    measures="attention from the query's words to the document that answers it, beyond that from an empty query",
    null="the same for the other documents, averaged",
    unit="attention mass",
    positions="rows of instruction, query and reply header",
    threshold=None,
    paper="Zhang et al. 2025, Query-focused retrieval heads improve long-context reasoning and re-ranking",
    url="https://arxiv.org/abs/2506.09944",
    score=_score,
    note="The paper takes the top 16 heads (1 to 2 %) and no bar. Its documents are paragraphs of NQ or turns of "
    "LongMemEval; ours are short invented notes, so that no model knows the answers. Tokens are dropped by the mean "
    "and the (unbiased) deviation of their own document.",
)
