"""Detectors of the shape of a row: where its peak stands and how high, how local and how even it is, and what kind
of token it falls on (Voita et al. 2019; Clark et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.heads.detector import Array, Detector, Part, PromptScores, prompts, traced
from workbench.heads.detectors.rows import mean_over, visible_keys
from workbench.kernels import StatisticsRequest
from workbench.tasks import TOKEN_CLASSES, Task
from workbench.tracing import Statistic, Trace
from workbench.tracing import statistics as S
from workbench.tracing.statistics import Measured

LOCAL = 32
VOITA = "Voita et al. 2019, Analyzing multi-head self-attention"
VOITA_URL = "https://arxiv.org/abs/1905.09418"
CLARK = "Clark et al. 2019, What does BERT look at?"
CLARK_URL = "https://arxiv.org/abs/1906.04341"
ROWS = "all queries but the first"


def _past_start(top: Tensor, keys: Tensor, measured: Measured) -> Tensor:
    """Of two ranked columns the first whose key is not the prompt's start."""
    start = measured.call.key_start
    first = 0 if start is None else start.to(keys.device)[:, None, None]
    return torch.where(keys[..., 0] == first, top[..., 1], top[..., 0])


def content_argmax() -> Statistic:
    """The heaviest key of each row, the prompt's first token left out (-1 where the query sees nothing else)."""

    def read(measured: Measured) -> Tensor:
        keys = measured.found.top_keys
        assert keys is not None
        return _past_start(keys, keys, measured)

    return Statistic("content_argmax", StatisticsRequest(top_k=2), read, integer=True)


def content_peak() -> Statistic:
    """The largest probability of each row, that of the prompt's first token left out."""

    def read(measured: Measured) -> Tensor:
        keys, mass = measured.found.top_keys, measured.found.top_mass
        assert keys is not None and mass is not None
        return _past_start(mass, keys, measured)

    return Statistic("content_peak", StatisticsRequest(top_k=2), read)


def token_classes(task: Task) -> Statistic:
    """Mass on each class of tokens, a column a class of `TOKEN_CLASSES`."""
    return S.mass("token_classes", torch.stack([task.marks[name] for name in TOKEN_CLASSES], dim=-1))


def distances_back(trace: Trace, name: str) -> Int[Tensor, "prompt layer head query"]:
    """How far back the key lies that a statistic names; -1 where there is none, and in each prompt's first row."""
    keys = trace[name]
    columns = torch.arange(keys.shape[-1])
    return torch.where((keys >= 0) & (visible_keys(trace) > 1), columns - keys, -1)


def _counts(back: Tensor) -> Int[Tensor, "layer head distance"]:
    """Rows at each distance, over all prompts."""
    counts = torch.zeros(*back.shape[1:3], back.shape[3], dtype=torch.long)
    for one in back:
        counts.scatter_add_(2, one.clamp(min=0), (one >= 0).long())
    return counts


def _share_at(back: Tensor, distance: Int[Tensor, "layer head"]) -> Array:
    """Share of each prompt's rows at one distance a head."""
    hit = (back == distance[..., None]).sum(-1).double()
    return np.asarray((hit / (back >= 0).sum(-1).clamp(min=1)).numpy())


def _shuffled(trace: Trace, name: str, seed: int) -> Tensor:
    """`distances_back` of a head whose keys are dealt to the rows at random (those that a row cannot see: none)."""
    keys, columns = trace[name], torch.arange(trace.batch.ids.shape[1])
    generator = torch.Generator().manual_seed(seed)
    dealt = torch.full_like(keys, -1)
    for prompt, real in enumerate(trace.batch.mask.cpu()):
        place = columns[real][1:]
        dealt[prompt][..., place] = keys[prompt][..., place[torch.randperm(len(place), generator=generator)]]
    return torch.where((dealt >= 0) & (dealt <= columns), columns - dealt, -1)


def _positional(name: str) -> Callable[[Sequence[Part]], PromptScores]:
    """Share of rows at the head's commonest distance; the shuffled head has a commonest distance of its own."""

    def score(parts: Sequence[Part]) -> PromptScores:
        real = [distances_back(traced(part), name) for part in parts]
        dealt = [_shuffled(traced(part), name, prompts(part).seed + 3) for part in parts]
        values, null = (
            np.concatenate([_share_at(back, sum(map(_counts, found)).argmax(-1)) for back in found])  # type: ignore[union-attr]
            for found in (real, dealt)
        )
        return PromptScores(values, null)

    return score


def positional_offsets(parts: Sequence[Part], name: str = "argmax") -> pd.DataFrame:
    """layer, head, offset (-1 is the previous token), share: each head's commonest place of the peak, over all rows."""
    counts = sum(_counts(distances_back(traced(part), name)) for part in parts)
    assert isinstance(counts, Tensor)
    spec = traced(parts[0]).spec
    rows = []
    for layer, head in ((one.layer, one.head) for one in spec.heads()):
        own = counts[layer, head]
        best = int(own.argmax())
        rows.append({"layer": layer, "head": head, "offset": -best, "share": float(own[best] / own.sum().clamp(min=1))})
    return pd.DataFrame(rows)


def row_scores(
    read: Callable[[Trace], Tensor],
    uniform: Callable[[Trace], Tensor],
) -> Callable[[Sequence[Part]], PromptScores]:
    """Means over rows that have a choice, beside what uniform attention over the visible keys would have there.

    Both give `[prompt, layer, head, query]`; the axes of layers and heads may be of size 1 in what is uniform.
    """

    def one(part: Part) -> tuple[Array, Array]:
        trace = traced(part)
        values, rows = read(trace), visible_keys(trace) > 1
        null = torch.where(values.isnan(), torch.nan, uniform(trace))
        return tuple(np.asarray(mean_over(of, rows).numpy()) for of in (values, null))  # type: ignore[return-value]

    def score(parts: Sequence[Part]) -> PromptScores:
        found = [one(part) for part in parts]
        return PromptScores(*(np.concatenate(side) for side in zip(*found, strict=True)))

    return score


def _seen(trace: Trace) -> Float[Tensor, "prompt layer 1 query"]:
    return visible_keys(trace).clamp(min=1).double()


def _class_share(trace: Trace, column: int) -> Float[Tensor, "prompt layer 1 query"]:
    """Share of the visible keys that belong to a class: the mass that uniform attention gives it."""
    marks = trace.statistics["token_classes"].key_features
    assert marks is not None
    counts = torch.nn.functional.pad(marks[..., column].double().cumsum(1), (1, 0))
    end = torch.arange(marks.shape[1]) + 1
    first = (end - visible_keys(trace)[:, :, 0]).clamp(min=0)
    inside = counts[:, None, 1:] - torch.gather(counts[:, None].expand(-1, first.shape[1], -1), 2, first)
    return inside[:, :, None] / _seen(trace)


def class_masses(parts: Sequence[Part]) -> pd.DataFrame:
    """layer, head, token_class, mass, share: mean mass on each class, and its share of the visible keys."""
    frames = []
    for column, name in enumerate(TOKEN_CLASSES):
        found = _class_scores(column)(parts)
        for head in traced(parts[0]).spec.heads():
            place = (slice(None), head.layer, head.head)
            row = {"layer": head.layer, "head": head.head, "token_class": name}
            frames.append(row | {"mass": found.values[place].mean(), "share": found.null[place].mean()})
    return pd.DataFrame(frames)


def _class_scores(column: int) -> Callable[[Sequence[Part]], PromptScores]:
    return row_scores(lambda trace: trace["token_classes"][..., column], lambda trace: _class_share(trace, column))


def _class_detector(name: str, title: str, words: str) -> Detector:
    return Detector(
        name=f"{name}_mass",
        title=title,
        kind="long_text",
        measures=f"mean attention to tokens {words}",
        null="their share of the visible keys (uniform attention)",
        unit="attention mass",
        positions=ROWS,
        threshold=None,
        paper=CLARK,
        url=CLARK_URL,
        statistics=lambda task: [token_classes(task)],
        score=_class_scores(TOKEN_CLASSES.index(name)),
        note="The paper finds such heads in BERT for [SEP], commas and full stops; it names no bar. The first token "
        "of a prompt belongs to no class but its own.",
    )


PUNCTUATION_MASS = _class_detector("punctuation", "Mass on punctuation", "of punctuation and symbols")
NEWLINE_MASS = _class_detector("newline", "Mass on line breaks", "with a line break and no word")
DIGIT_MASS = _class_detector("digits", "Mass on digits", "of digits")
POSITIONAL = Detector(
    name="positional",
    title="Positional",
    kind="long_text",
    measures="share of queries whose heaviest key stands at one and the same distance, the head's commonest",
    null="the same with the heaviest keys dealt to the queries at random, and the commonest distance found again",
    unit="share of queries",
    positions=ROWS,
    threshold=0.9,
    paper=VOITA,
    url=VOITA_URL,
    statistics=lambda task: [S.argmax()],
    score=_positional("argmax"),
    probe="held_out",
    note="The paper's heads were those of an encoder and stood at -1 or +1; any distance counts here (see "
    "`positional_offsets`), 0, the query's own key, included. Where position 0 is a sink, see 'positional_content'.",
)
POSITIONAL_CONTENT = Detector(
    name="positional_content",
    title="Positional, sink left out",
    kind="long_text",
    measures="the same for the heaviest key but the prompt's first token",
    null=POSITIONAL.null,
    unit=POSITIONAL.unit,
    positions=ROWS,
    threshold=0.9,
    paper=VOITA,
    url=VOITA_URL,
    statistics=lambda task: [content_argmax()],
    score=_positional("content_argmax"),
    probe="held_out",
    note="Ours: in decoders most heads have their heaviest key at position 0, and where they look besides it is hidden "
    "from the published score.",
)
CONFIDENCE = Detector(
    name="confidence",
    title="Confidence",
    kind="long_text",
    measures="mean of the largest attention weight, that of the prompt's first token left out",
    null="one over the number of visible keys (uniform attention)",
    unit="attention mass",
    positions=ROWS,
    threshold=None,
    paper=VOITA,
    url=VOITA_URL,
    statistics=lambda task: [content_peak()],
    score=row_scores(lambda trace: trace["content_peak"], lambda trace: 1.0 / _seen(trace)),
    curve="content_peak",
    probe="held_out",
    note="The paper leaves out the end token, which is the sink of its encoder; here the sink is the first token.",
)
LOCALITY = Detector(
    name="locality",
    title=f"Locality at {LOCAL}",
    kind="long_text",
    measures=f"mean attention to the {LOCAL} most recent keys, the query's own included",
    null="their share of the visible keys (uniform attention)",
    unit="attention mass",
    positions=ROWS,
    threshold=None,
    paper=CLARK,
    url=CLARK_URL,
    statistics=lambda task: [S.recent(LOCAL)],
    score=row_scores(lambda trace: trace[f"recent_{LOCAL}"], lambda trace: LOCAL / _seen(trace).clamp(min=LOCAL)),
    curve=f"recent_{LOCAL}",
    note="A width of 32 is ours.",
)
MEAN_DISTANCE = Detector(
    name="mean_distance",
    title="Mean distance",
    kind="long_text",
    measures="mean distance from a query to what it attends to",
    null="that of uniform attention over the visible keys",
    unit="tokens",
    positions=ROWS,
    threshold=None,
    paper=CLARK,
    url=CLARK_URL,
    statistics=lambda task: [S.distance()],
    score=row_scores(lambda trace: trace["distance"], lambda trace: (_seen(trace) - 1) / 2),
    better="lower",
    curve="distance",
    note="Descriptive; a sink at position 0 counts with its whole distance, so that idle heads look far-sighted.",
)
ENTROPY_SHARE = Detector(
    name="entropy_share",
    title="Normalised entropy",
    kind="long_text",
    measures="mean entropy of a row over that of uniform attention, H / ln of the number of visible keys",
    null="1, uniform attention",
    unit="share of the largest entropy",
    positions=ROWS,
    threshold=None,
    paper=CLARK,
    url=CLARK_URL,
    statistics=lambda task: [S.entropy()],
    score=row_scores(
        lambda trace: (trace["entropy"] / _seen(trace).clamp(min=2).log()).float(),
        lambda trace: torch.ones_like(_seen(trace)),
    ),
    better="lower",
    note="Comparable between lengths, where the entropy itself is not.",
)
SHAPE = (
    POSITIONAL, POSITIONAL_CONTENT, CONFIDENCE, LOCALITY, MEAN_DISTANCE, ENTROPY_SHARE, PUNCTUATION_MASS, NEWLINE_MASS,
    DIGIT_MASS,
)  # fmt: skip
