"""What heads select, from layer to layer: whether their heaviest keys persist (TidalDecode), and from which layer on
the last query finds the needle (GemFilter).

TidalDecode (Yang et al. 2024, arXiv 2410.05076): the recall of layer a's choice in layer b is |top-k(a) and top-k(b)|
/ k for the heads of the same index, at the queries that write the answer to a needle. The paper takes k = 256 of
100 000 tokens. GemFilter (Shi et al. 2024, arXiv 2409.17422): a layer scores each key by the raw products of the last
query with it, summed over query heads and averaged over 5 neighbours, and keeps the best 1024; the layer to filter at
is the first whose keys lie at the needle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.calls import observe_prompts
from workbench.heads.detector import Detector, Part, Progress, PromptScores
from workbench.heads.settings import Settings
from workbench.kernels import StatisticsRequest
from workbench.kernels.request import MAX_TOP_K
from workbench.models import AttentionCall
from workbench.tasks import NONE, Task
from workbench.tracing import Model

POOL = 5
# Keys that GemFilter chooses, and the largest share of a shorter text that it may.
GEM_KEYS, GEM_SHARE = 1024, 1 / 32


@dataclass(frozen=True)
class Selections:
    """The heaviest keys of every head at each prompt's answer rows, `keys[prompt][layer]` `[head, row, k]`, and the
    rows themselves; `filters[prompt][layer]` `[key]`, GemFilter's scores of the keys before the answer.

    Rows and keys count from the prompt's first token.
    """

    keys: list[list[Tensor]]
    rows: list[tuple[int, int]]
    filters: list[list[Tensor]]


def filter_scores(call: AttentionCall, row: int) -> Float[Tensor, " key"]:
    """GemFilter's score of each key up to a row: raw products of that query, summed over heads, averaged over 5.

    Neither scaled nor soft-capped; at the ends of the text the missing neighbours count as zero, as in its code.
    """
    q, k = call.q[0, :, row].float(), call.k[0, :, : row + 1].float()
    summed = torch.einsum("k g d, k j d -> j", q.unflatten(0, (len(k), -1)), k)  # type: ignore[no-untyped-call]
    pooled: Tensor = torch.nn.functional.avg_pool1d(summed[None, None], POOL, stride=1, padding=POOL // 2)[0, 0]
    return pooled


def select(model: Model, task: Task, k: int, progress: Progress | None = None) -> Selections:
    """Run each prompt once and keep what the answer's rows select in every layer.

    Raises:
        RequestError: more keys than a pass can rank, or than the shortest prompt has before its answer.
    """
    rows = [_answer_rows(task, prompt) for prompt in range(len(task))]
    shortest = min(first + 1 for first, _ in rows)
    if not 1 <= k <= min(MAX_TOP_K, shortest):
        raise RequestError(
            f"k = {k} keys a head: choose 1 to {min(MAX_TOP_K, shortest)} (at most {MAX_TOP_K}, and no more than the "
            f"{shortest} tokens before the shortest prompt's answer)."
        )
    found = Selections([[] for _ in rows], rows, [[] for _ in rows])

    def read(prompt: int, call: AttentionCall) -> None:
        first, last = rows[prompt]
        window = _rows(call, first, last)
        top = window.statistics(StatisticsRequest(top_k=k)).top_keys
        assert top is not None
        found.keys[prompt].append(top[0].cpu())
        found.filters[prompt].append(filter_scores(call, first).cpu())

    observe_prompts(model, task.batch, read, progress)
    return found


def _answer_rows(task: Task, prompt: int) -> tuple[int, int]:
    """First and last row that write an answer token, counted from the prompt's first token."""
    positions = task.answer_positions[prompt]
    positions = positions[positions != NONE] - task.batch.starts[prompt]
    return int(positions[0]), int(positions[-1])


def _rows(call: AttentionCall, first: int, last: int) -> AttentionCall:
    """The call for rows first to last alone, later keys cut off: what decoding them would have seen."""
    return replace(
        call, q=call.q[:, :, first : last + 1], k=call.k[:, :, : last + 1], v=call.v[:, :, : last + 1]
    )  # fmt: skip


def overlap(a: Int[Tensor, "*lead k"], b: Int[Tensor, "*lead k"]) -> Float[Tensor, "*lead"]:
    """Share of one set of keys that is in the other; -1 stands for none."""
    shared = ((a[..., :, None] == b[..., None, :]) & (a >= 0)[..., None]).any(-1).sum(-1)
    return shared.double() / a.shape[-1]


def _recalls(found: Selections, prompt: int) -> Float[Tensor, "layer layer head"]:
    """Mean over a prompt's rows of the overlap of every two layers' choices, head by head of the same index.

    NaN where one of the layers has no such head.
    """
    layers = found.keys[prompt]
    heads = max(len(keys) for keys in layers)
    matrix = torch.full((len(layers), len(layers), heads), torch.nan, dtype=torch.float64)
    for a, first in enumerate(layers):
        for b, second in enumerate(layers[: a + 1]):
            both = min(len(first), len(second))
            matrix[a, b, :both] = matrix[b, a, :both] = overlap(first[:both], second[:both]).mean(1)
    return matrix


def _chance(found: Selections, prompt: int, k: int) -> float:
    """The overlap of two random choices: k over the number of keys, on average over the rows."""
    first, last = found.rows[prompt]
    return float(np.mean([k / (row + 1) for row in range(first, last + 1)]))


def layer_recall(model: Model, task: Task, k: int = 16) -> pd.DataFrame:
    """layer, other, head, recall, chance: the share of a layer's k heaviest keys that the other layer also chooses.

    Means over prompts and answer rows. TidalDecode re-uses a layer's choice in the layers after it, so the row of a
    selection layer is what it would find there.
    """
    found = select(model, task, k)
    mean = torch.stack([_recalls(found, prompt) for prompt in range(len(task))]).mean(0)
    layer, other, head = np.nonzero(~mean.isnan().numpy())
    chance = float(np.mean([_chance(found, prompt, k) for prompt in range(len(task))]))
    return pd.DataFrame(
        {"layer": layer, "other": other, "head": head, "recall": mean.numpy()[layer, other, head], "chance": chance}
    )


def filter_layers(model: Model, task: Task, keys: int | None = None, seed: int = 0) -> pd.DataFrame:
    """layer, prompt, keys, distance, inside, chance: how near each layer's filter comes to the needle.

    `distance`: tokens from the needle's answer to the nearest chosen key (0: one lies in it); `inside`: share of its
    tokens that are chosen; `chance`: the mean distance of as many random keys. The last query before the answer
    chooses. `keys`: 1024 as published, but no more than 1/32 of the text.
    """
    if "answer_in_needle" not in task.spans:
        raise RequestError(f"{task.name} has no span 'answer_in_needle'; filter layers are found on needle prompts.")
    found, rng, rows = select(model, task, 1), np.random.default_rng(seed), []
    for prompt, scores in enumerate(found.filters):
        span = task.spans["answer_in_needle"][prompt] - task.batch.starts[prompt]
        first, last = int(span[0]), int(span[1])
        count = len(scores[0])
        wanted = min(count, keys or max(1, min(GEM_KEYS, round(count * GEM_SHARE))))
        random = [_distance(rng.choice(count, wanted, replace=False), first, last) for _ in range(100)]
        for layer, score in enumerate(scores):
            chosen = score.topk(wanted).indices.numpy()
            rows.append(
                {
                    "layer": layer, "prompt": prompt, "keys": wanted, "distance": _distance(chosen, first, last),
                    "inside": float(((chosen >= first) & (chosen < last)).sum() / (last - first)),
                    "chance": float(np.mean(random)),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _distance(keys: np.ndarray[Any, np.dtype[np.int64]], first: int, last: int) -> int:
    """Tokens from a span to the nearest of some keys."""
    return int(np.maximum(np.maximum(first - keys, keys - (last - 1)), 0).min())


def filter_layer(table: pd.DataFrame, within: float = 1.0) -> int | None:
    """The smallest layer whose mean distance is at most `within` tokens; None if there is none."""
    mean = table.groupby("layer")["distance"].mean()
    near = mean[mean <= within]
    return None if near.empty else int(near.index.min())


def run_selections(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Selections:
    """The run of the kind `needle_layers`."""
    assert task is not None
    return select(model, task, settings.selected_keys, progress)


def _persistence(parts: Sequence[Part]) -> PromptScores:
    values, null = [], []
    for part in parts:
        found = part.found
        assert isinstance(found, Selections)
        for prompt, layers in enumerate(found.keys):
            if len(layers) < 2:
                raise RequestError("Persistence compares layers, and this model has one; leave 'persistence' out.")
            recalls = _recalls(found, prompt)
            recalls[range(len(layers)), range(len(layers))] = torch.nan
            values.append(recalls.nanmean(1).numpy())
            null.append(np.full_like(values[-1], _chance(found, prompt, layers[0].shape[-1])))
    return PromptScores(np.stack(values), np.stack(null))


PERSISTENCE = Detector(
    name="persistence",
    title="Persistent choice of keys",
    kind="needle_layers",
    measures="share of the head's heaviest keys that heads of the same index in other layers choose too, on average",
    null="the overlap of random choices",
    unit="share of keys",
    positions="rows that write the answer",
    threshold=None,
    paper="Yang et al. 2024, TidalDecode",
    url="https://arxiv.org/abs/2410.05076",
    score=_persistence,
    note="The paper takes 256 keys of 100 000 and reports matrices of layers (see `layer_recall`); here 16 keys of a "
    "short prompt, over all other layers, before and after. Heads of one index in different layers have nothing else "
    "in common: first tokens and recent ones, which all heads choose, make up most of the overlap.",
)
LAYERS = (PERSISTENCE,)
