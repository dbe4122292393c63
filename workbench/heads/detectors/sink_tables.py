"""Tables of attention sinks: every position's share, the model's one number, and what makes position 0 the sink.

1. `sink_table`: per head and position k, the share of prompts with alpha_k > epsilon.
2. `sink_rates`: Sink_k^epsilon of the model, the mean of that over heads, with an interval over prompts.
3. `sink_anatomy`: per head, logit, keys, values and their angle at position 0 against all other tokens.

alpha_k is the mean of column k over the queries that see it. As in the released code of Gu et al. 2025
(arXiv 2410.10781) the indicator is taken per prompt and then averaged. Positions count from 0 here, k from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Array
from workbench.heads.detectors.rows import mean_over, sees_first, visible_keys
from workbench.heads.detectors.sinks import value_write_norm
from workbench.heads.inference import bootstrap_mean
from workbench.kernels import StatisticsRequest
from workbench.models import Batch
from workbench.tasks import Task
from workbench.tracing import Model, Statistic, Trace
from workbench.tracing import statistics as S
from workbench.tracing.statistics import Measured

EPSILON = 0.3


def column_means(trace: Trace, positions: int) -> Float[Tensor, "prompt layer head position"]:
    """alpha of the first positions of each prompt, counted from the prompt's own start; NaN beyond its end."""
    if positions < 1:
        raise RequestError(f"positions = {positions}: ask for 1 or more.")
    means = trace["column_mean"]
    columns = trace.batch.starts[:, None].cpu() + torch.arange(positions)
    inside = columns < means.shape[-1]
    index = columns.clamp(max=means.shape[-1] - 1)[:, None, None].expand(*means.shape[:3], -1)
    return torch.where(inside[:, None, None], means.gather(3, index), float("nan"))


def sink_table(traces: Sequence[Trace], epsilon: float = EPSILON, positions: int = 64) -> pd.DataFrame:
    """For each head and position: in what share of prompts it draws more than epsilon.

    Traces must hold `column_mean`. Columns: layer, head, k (from 1, as in the paper), position (from 0), share, alpha
    (mean over prompts), n (prompts that have this position). The last positions of a prompt are seen by few queries,
    and the very last by itself alone, so that local heads are "sinks" there.
    """
    _check_epsilon(epsilon)
    alpha = torch.cat([column_means(trace, positions) for trace in traces]).double()
    there = ~alpha.isnan()
    n = there.sum(0)
    share = (alpha > epsilon).sum(0) / n
    mean = torch.where(there, alpha, 0.0).sum(0) / n
    layer, head, position = np.nonzero((n > 0).numpy())
    return pd.DataFrame(
        {
            "layer": layer, "head": head, "k": position + 1, "position": position,
            "share": share.numpy()[layer, head, position], "alpha": mean.numpy()[layer, head, position],
            "n": n.numpy()[layer, head, position], "epsilon": epsilon,
        }
    )  # fmt: skip


def sink_rates(traces: Sequence[Trace], epsilon: float = EPSILON, positions: int = 1, seed: int = 0) -> pd.DataFrame:
    """Sink_k^epsilon of the model: k, value, low, high (95 % bootstrap over prompts), n; shares, not per cent."""
    _check_epsilon(epsilon)
    alpha = torch.cat([column_means(trace, positions) for trace in traces]).double()
    there = ~alpha.isnan()
    rows = []
    for position in range(positions):
        heads = there[..., position].flatten(1)
        kept = heads.any(1)
        if not kept.any():
            break
        found = (alpha[..., position].flatten(1) > epsilon).sum(1)[kept] / heads.sum(1)[kept]
        interval = bootstrap_mean(found.double().numpy()[:, None], seed)
        rows.append(
            {
                "k": position + 1, "position": position, "epsilon": epsilon, "value": interval.value[0],
                "low": interval.low[0], "high": interval.high[0], "n": int(kept.sum()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def sink_study(model: Model, kinds: Mapping[str, Sequence[Task]], epsilon: float = EPSILON) -> pd.DataFrame:
    """`sink_rates` at k = 1 on each kind of prompts (natural, random tokens, one token), one row each."""
    frames = []
    for kind, tasks in kinds.items():
        traces = [model.trace(task.batch, statistics=[S.column_mean()]) for task in tasks]
        row = sink_rates(traces, epsilon)
        row.insert(0, "prompts", kind)
        frames.append(row.assign(caption=" ".join(task.caption for task in tasks)))
    return pd.concat(frames, ignore_index=True)


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < 1:
        raise RequestError(f"epsilon = {epsilon}: a column mean lies between 0 and 1; the paper takes 0.3.")


def key_norm() -> Statistic:
    """Euclidean norm of each key vector as it enters the softmax, as the query head sees it."""

    def read(measured: Measured) -> Tensor:
        call = measured.call
        norms: Tensor = torch.linalg.vector_norm(call.k.float(), dim=-1)
        return norms.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)

    return Statistic("key_norm", StatisticsRequest(), read, axis="key")


def first_cosine() -> Statistic:
    """Cosine between each query and the key of the prompt's first token, whether or not a window hides it."""

    def read(measured: Measured) -> Tensor:
        call = measured.call
        batch = torch.arange(len(call.q), device=call.q.device)
        start = torch.zeros_like(batch) if call.key_start is None else call.key_start.to(batch)
        first = call.k[batch, :, start].float().repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)
        return torch.nn.functional.cosine_similarity(call.q.float(), first[:, :, None], dim=-1)

    return Statistic("first_cosine", StatisticsRequest(), read)


def anatomy_statistics() -> list[Statistic]:
    """What `sink_anatomy` reads."""
    return [
        *(S.column_mean(), S.first_logit(), S.mean_logit(), S.value_norm()),
        *(value_write_norm(), key_norm(), first_cosine()),
    ]


def sink_anatomy(model: Model, batch: Batch) -> pd.DataFrame:
    """Why position 0: one row a head, means over prompts.

    Columns: alpha (alpha_1), logit_gap (nats), first_cosine (between queries and key 0), and of keys, values and
    values through W_O the norm at position 0 and the mean norm of the others (`*_first`, `*_others`). A small key
    with a large cosine explains the logit; a small value makes it harmless (Gu et al. 2025; Guo et al. 2024).
    """
    trace = model.trace(batch, statistics=anatomy_statistics())
    column = torch.arange(batch.ids.shape[1])
    first = (column == batch.starts[:, None].cpu())[:, None, None]
    others = (column > batch.starts[:, None].cpu())[:, None, None]
    seen, rows = visible_keys(trace), sees_first(trace)
    rest = (trace["mean_logit"].double() * seen - trace["first_logit"]) / (seen - 1).clamp(min=1)
    found: dict[str, Any] = {
        "alpha": _over_prompts(mean_over(trace["column_mean"], first)),
        "logit_gap": _over_prompts(mean_over(trace["first_logit"] - rest, rows)),
        "first_cosine": _over_prompts(mean_over(trace["first_cosine"], rows)),
    }
    for name in ("key_norm", "value_norm", "value_write_norm"):
        found[f"{name}_first"] = _over_prompts(mean_over(trace[name], first))
        found[f"{name}_others"] = _over_prompts(mean_over(trace[name], others))
    heads = model.spec.heads()
    layer, head = np.array([h.layer for h in heads]), np.array([h.head for h in heads])
    return pd.DataFrame({"layer": layer, "head": head} | {name: value[layer, head] for name, value in found.items()})


def _over_prompts(values: Float[Tensor, "prompt layer head"]) -> Array:
    """Mean over the prompts that have a value."""
    return np.asarray(values.nanmean(0).numpy())
