"""Attention sinks beyond "position 0 draws 0.3": later ones, learned ones, and why a head rests where it rests.

All detectors on texts share one pass: they read column means, two logits, masses and norms, nothing of size N x N.
Tables by position, domain and layer are in `sink_tables` and `massive`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Array, Detector, Part, PromptScores, prompts, stacked, traced
from workbench.heads.detectors.rows import mean_over, seeing_queries, sees_first, visible_keys
from workbench.heads.detectors.text import another_key, at_column, sink_indicator, sink_statistics
from workbench.kernels import StatisticsRequest
from workbench.tasks import Task
from workbench.tracing import Statistic, Trace
from workbench.tracing import statistics as S
from workbench.tracing.statistics import Measured

HIDDEN_THRESHOLD = 0.1
HIDDEN_ALPHA = 5.0
STREAMING_SINKS = 4
STREAMING_RECENT = 16


def value_write_norm() -> Statistic:
    """Euclidean norm of each key's value through the head's own W_O: what attending to that key alone would write."""

    def read(measured: Measured) -> Tensor:
        assert measured.result_factor is not None
        call = measured.call
        group = call.q.shape[1] // call.v.shape[1]
        values = call.v.float().repeat_interleave(group, dim=1)
        written: Tensor = torch.linalg.vector_norm(
            torch.einsum("b h k d, h d e -> b h k e", values, measured.result_factor), dim=-1
        )
        return written

    return Statistic("value_write_norm", StatisticsRequest(), read, axis="key", needs_result_factor=True)


def hidden_sinks(
    trace: Trace, threshold: float | None = HIDDEN_THRESHOLD, alpha: float = HIDDEN_ALPHA
) -> Bool[Tensor, "prompt layer head key"]:
    """Keys other than position 0 whose column mean exceeds a bar; False at padding.

    `threshold` is the bar of the released code (0.1); None takes the paper's, `alpha` over the prompt's tokens. A key
    seen by fewer than 1 / bar queries is left out: one query that attends to it alone would make it a sink, as the
    last keys of every local head are. `trace` must hold `column_mean`.
    """
    bar = threshold if threshold is not None else alpha / trace.batch.lengths[:, None, None, None].cpu().double()
    if not bool(torch.as_tensor(bar > 0).all()):
        raise RequestError(f"threshold = {threshold}, alpha = {alpha}: the bar of a sink must be above 0.")
    return (trace["column_mean"] > bar) & _countable(trace, bar)


def _countable(trace: Trace, bar: float | Tensor) -> Bool[Tensor, "prompt layer 1 key"]:
    """Keys other than position 0 that at least 1 / bar queries see."""
    later = torch.arange(trace.batch.ids.shape[1]) > trace.batch.starts[:, None].cpu()
    return (seeing_queries(trace) * bar >= 1) & later[:, None, None]


def uniform_columns(trace: Trace) -> Float[Tensor, "prompt layer 1 key"]:
    """Column means of attention spread evenly over what each query sees; 0 at padding."""
    seen, seeing = visible_keys(trace), seeing_queries(trace)
    rows = torch.where(seen > 0, 1.0 / seen.clamp(min=1).double(), 0.0)
    before = torch.nn.functional.pad(rows.cumsum(-1), (1, 0))
    first = torch.arange(rows.shape[-1]).expand_as(seeing)
    total = before.gather(-1, first + seeing) - before.gather(-1, first)
    return torch.where(seeing > 0, total / seeing.clamp(min=1), 0.0)


def _counted(found: Tensor) -> Array:
    return np.asarray(found.sum(-1).double().numpy())


def _hidden(parts: Sequence[Part]) -> PromptScores:
    def even(part: Part) -> Array:
        trace = traced(part)
        found = (uniform_columns(trace) > HIDDEN_THRESHOLD) & _countable(trace, HIDDEN_THRESHOLD)
        return _counted(found.expand_as(trace["column_mean"]))

    def most(part: Part) -> Array:
        """The largest column mean that counts, to rank heads with equally many."""
        trace = traced(part)
        counted = torch.where(_countable(trace, HIDDEN_THRESHOLD), trace["column_mean"].nan_to_num(), 0.0)
        return np.asarray(counted.amax(-1).double().numpy())

    return PromptScores(
        stacked(parts, lambda part: _counted(hidden_sinks(traced(part)))),
        stacked(parts, even),
        ties=stacked(parts, most).mean(axis=0),
    )


def _gap(parts: Sequence[Part]) -> PromptScores:
    """S_i0 less the mean of S_ij over the other keys that the query sees."""

    def one(part: Part) -> Array:
        trace = traced(part)
        first, mean = trace["first_logit"].double(), trace["mean_logit"].double()
        seen = visible_keys(trace)
        others = (mean * seen - first) / (seen - 1).clamp(min=1)
        return np.asarray(mean_over(first - others, sees_first(trace)).numpy())

    found = stacked(parts, one)
    return PromptScores(found, np.zeros_like(found))


def _drain(parts: Sequence[Part]) -> PromptScores:
    def relative(part: Part, another: bool) -> Array:
        """Norm at one key over the mean norm of the keys that are neither this one nor position 0."""
        trace, task = traced(part), prompts(part)
        key = another_key(task) if another else task.batch.starts
        column = torch.arange(task.batch.ids.shape[1])
        rest = (column > task.batch.starts[:, None]) & (column != key[:, None])
        mean = mean_over(trace["value_write_norm"], rest[:, None, None]).numpy()
        ratio: Array = at_column(part, "value_write_norm", key) / mean
        return ratio

    return PromptScores(
        stacked(parts, lambda part: relative(part, False)), stacked(parts, lambda part: relative(part, True))
    )


def _learned(parts: Sequence[Part]) -> PromptScores:
    """Mass on the learned sink; no prompts, and so no score, where no layer has one."""
    layers = traced(parts[0]).spec.layers
    if not any(layer.sinks for layer in layers):
        heads = max(layer.heads for layer in layers)
        return PromptScores(np.empty((0, len(layers), heads)), np.empty((0, len(layers), heads)))
    has = np.array([layer.sinks for layer in layers])[None, :, None]

    def mass(part: Part) -> Array:
        trace = traced(part)
        return np.asarray(mean_over(trace["sink_mass"], visible_keys(trace) > 0).numpy())

    def even(part: Part) -> Array:
        trace = traced(part)
        share = (1.0 / (visible_keys(trace) + 1)).expand_as(trace["sink_mass"])
        return np.where(has, mean_over(share, visible_keys(trace) > 0).numpy(), 0.0)

    return PromptScores(stacked(parts, mass), stacked(parts, even))


def _streaming(parts: Sequence[Part]) -> PromptScores:
    """Mass on the first and the most recent keys, over queries for which these do not meet."""
    both = STREAMING_SINKS + STREAMING_RECENT

    def rows(trace: Trace) -> Tensor:
        place = torch.arange(trace.batch.ids.shape[1]) - trace.batch.starts[:, None]
        found = (place >= both) & trace.batch.mask
        if not found.any(1).all():
            shortest = int(trace.batch.lengths.min())
            raise RequestError(
                f"streaming_share: a prompt of {shortest} tokens has no key between the first {STREAMING_SINKS} and "
                f"the {STREAMING_RECENT} most recent; give prompts of more than {both} tokens (text_length)."
            )
        return found[:, None, None]

    def share(part: Part) -> Array:
        trace = traced(part)
        kept = trace[f"first_{STREAMING_SINKS}"] + trace[f"recent_{STREAMING_RECENT}"]
        return np.asarray(mean_over(kept, rows(trace)).numpy())

    def even(part: Part) -> Array:
        """The share of visible keys that are kept."""
        trace = traced(part)
        place = torch.arange(trace.batch.ids.shape[1]) - trace.batch.starts[:, None]
        seen = visible_keys(trace)
        oldest = place[:, None, None] + 1 - seen
        kept = seen.clamp(max=STREAMING_RECENT) + (STREAMING_SINKS - oldest).clamp(min=0)
        kept = torch.minimum(kept, seen)
        uniform = (kept / seen.clamp(min=1)).expand_as(trace["recent_16"])
        return np.asarray(mean_over(uniform, rows(trace)).numpy())

    return PromptScores(stacked(parts, share), stacked(parts, even))


def _streaming_statistics(task: Task) -> list[Statistic]:
    return [S.first(STREAMING_SINKS), S.recent(STREAMING_RECENT)]


_GU = "Gu et al. 2025, When attention sink emerges in language models"
_GU_URL = "https://arxiv.org/abs/2410.10781"
_GUO = "Guo et al. 2024, Active-dormant attention heads"
_GUO_URL = "https://arxiv.org/abs/2410.13835"

SINK_RANDOM = Detector(
    name="sink_random",
    title="Attention sink on random tokens",
    kind="random_tokens",
    measures="share of prompts of random tokens in which position 0 draws more than 0.3 of the attention (Sink_1^0.3)",
    null="the same test for another key in the first half of the prompt",
    unit="share of prompts",
    positions="all queries that see the key",
    threshold=0.5,
    paper=_GU,
    url=_GU_URL,
    statistics=sink_statistics,
    score=sink_indicator,
    curve="first_1",
    note="As `sink`, without natural text. A start token comes first only where the tokenizer puts one by default.",
)
SINK_ONE_TOKEN = Detector(
    name="sink_one_token",
    title="Attention sink on one token repeated",
    kind="one_token",
    measures="share of prompts of one token repeated in which position 0 draws more than 0.3 of the attention",
    null="the same test for another key in the first half of the prompt",
    unit="share of prompts",
    positions="all queries that see the key",
    threshold=0.5,
    paper=_GU,
    url=_GU_URL,
    statistics=sink_statistics,
    score=sink_indicator,
    curve="first_1",
    note="Never with a start token, which would be unlike the others. Under relative positions all hidden states are "
    "equal, so what is left is what a head likes of distances alone; learned positions keep the sink.",
)
HIDDEN_SINK = Detector(
    name="hidden_sink",
    title="Hidden sinks",
    kind="text",
    measures="keys other than position 0 whose column mean exceeds 0.1, per prompt",
    null="the same count for attention spread evenly over the visible keys",
    unit="positions per prompt",
    positions="keys that at least 10 queries see",
    threshold=None,
    paper="Yu et al. 2024, Unveiling and harnessing hidden attention sinks (ACT)",
    url="https://arxiv.org/abs/2406.15765",
    statistics=lambda task: [S.column_mean()],
    score=_hidden,
    probe="held_out",
    note="The paper's bar is 5 / N, the released runs use 0.1; 0.1 here, `hidden_sinks(trace, None)` for the other. "
    "The code drops the first column above the bar, which is a hidden sink where position 0 is below it; here position "
    "0 is left out and nothing else. Keys seen by fewer than 10 queries are left out: one row could fill them.",
)
SINK_LOGIT_GAP = Detector(
    name="sink_logit_gap",
    title="Sink logit gap",
    kind="text",
    measures="logit of position 0 less the mean logit of the other visible keys",
    null="0, the mean gap of a key drawn at random among the others",
    unit="nats",
    positions="queries after the first that see position 0",
    threshold=None,
    paper=_GUO,
    url=_GUO_URL,
    statistics=lambda task: [S.first_logit(), S.mean_logit()],
    score=_gap,
    curve="first_logit",
    probe="held_out",
    note="The paper averages over queries of one token type on its toy; on text all queries count. Logits are as they "
    "enter the softmax: scaled and soft-capped.",
)
VALUE_DRAIN = Detector(
    name="value_drain",
    title="Value drain",
    kind="text",
    measures="norm of the value of position 0 through W_O over the mean of the other tokens",
    null="the same ratio for another token of the first half of the prompt",
    unit="ratio",
    positions="all tokens but the first, in the denominator",
    threshold=None,
    paper=_GUO,
    url=_GUO_URL,
    statistics=lambda task: [value_write_norm()],
    score=_drain,
    better="lower",
    note="Per query head with its own W_O, values shared as in the model. Descriptive: a drained value makes it free "
    "to attend to position 0. No threshold is published.",
)
LEARNED_SINK = Detector(
    name="learned_sink",
    title="Learned sink",
    kind="text",
    measures="mean probability that goes to the learned sink logit",
    null="what a softmax of equal logits would give the sink",
    unit="attention mass",
    positions="all queries",
    threshold=None,
    paper="OpenAI 2025, gpt-oss model card",
    url="https://arxiv.org/abs/2508.10925",
    statistics=lambda task: [S.sink_mass()],
    score=_learned,
    curve="sink_mass",
    note="Empty (no prompts, no value) for a model without learned sinks; 0 for the layers of a mixed model that have "
    "none.",
)
STREAMING_SHARE = Detector(
    name="streaming_share",
    title="Streaming share",
    kind="text",
    measures="attention to the first 4 and the 16 most recent keys together; the rest is what a streaming cache loses",
    null="the share of the visible keys that these are",
    unit="attention mass",
    positions="queries with a key between the first 4 and the 16 most recent",
    threshold=None,
    paper="Xiao et al. 2024, Efficient streaming language models with attention sinks",
    url="https://arxiv.org/abs/2309.17453",
    statistics=_streaming_statistics,
    score=_streaming,
    curve="recent_16",
    note="The paper keeps 4 + 1020 and more keys and names no heads; 16 fits prompts of 64 tokens. A head of low share "
    "reads the middle of the text, as retrieval heads do. A learned sink's share counts as neither.",
)
SINKS = (
    *(SINK_RANDOM, SINK_ONE_TOKEN, HIDDEN_SINK, SINK_LOGIT_GAP, VALUE_DRAIN, LEARNED_SINK, STREAMING_SHARE),
)  # fmt: skip
