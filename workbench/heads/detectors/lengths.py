"""How attention changes with the number of keys: dilution, low-pass filtering, and the size of logits.

Every row of causal attention over N tokens is the last row of a prompt of its own length, so one long prompt holds
all shorter ones: curves are over the number of visible keys, in logarithmic bins, and a head's growth is the slope
of a line through its bins against the logarithm of that number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Array, Detector, Part, PromptScores, prompts, traced
from workbench.heads.detectors.rows import hides_first
from workbench.kernels import StatisticsRequest
from workbench.models import Batch
from workbench.tracing import Statistic, Trace
from workbench.tracing import statistics as S
from workbench.tracing.statistics import Measured

# Rows with fewer keys than this are left out: they are short prompts of their own kind.
FEWEST_KEYS = 8
BINS_AN_OCTAVE = 2
# A line needs bins to go through.
FEWEST_BINS = 4
COLLAPSE = "Zhou et al. 2024, Length-induced embedding collapse"
COLLAPSE_URL = "https://arxiv.org/abs/2410.24200"
LS = "Hajra 2025, Short-range dependency effects on transformer instability (LS-attention)"
LS_URL = "https://arxiv.org/abs/2505.15548"


def largest_logit() -> Statistic:
    """The row's largest logit in absolute value (scaled, soft-capped; nats)."""

    def read(measured: Measured) -> Tensor:
        most = measured.found.max_logit
        # Logits are odd in q (a soft cap too), so the least of them is the largest of -q, turned round.
        turned = replace(measured.call, q=-measured.call.q).statistics(StatisticsRequest(max_logit=True)).max_logit
        assert most is not None and turned is not None
        return torch.maximum(most.abs(), turned.abs())

    return Statistic("largest_logit", StatisticsRequest(max_logit=True), read)


def low_pass() -> tuple[Statistic, Statistic]:
    """||HC[A V]|| / ||HC[V]|| of each prefix of the prompt, by the head ("low_pass") and by uniform attention.

    HC[X] = X less the mean of its rows; entry i is the ratio over the first i + 1 tokens. 1 at the first, where both
    norms vanish. "low_pass_uniform" is what a head would do that spreads its attention evenly over what it sees.
    """

    def by_head(measured: Measured) -> Tensor:
        output = measured.found.output
        assert output is not None
        return _ratio(output, measured)

    def by_mean(measured: Measured) -> Tensor:
        values = _values(measured).double() * _real(measured)[..., None]
        total = values.cumsum(2)
        window = measured.call.window
        if window is not None and window < total.shape[2]:
            total = total - torch.nn.functional.pad(total, (0, 0, window, 0))[:, :, : total.shape[2]]
        # A learned sink would take a share of its own, which depends on its logit: it is left out here.
        count = _real(measured).double().cumsum(2).clamp(min=1)
        count = count if window is None else count.clamp(max=window)
        return _ratio(total / count[..., None], measured)

    return (
        Statistic("low_pass", StatisticsRequest(output=True), by_head),
        Statistic("low_pass_uniform", StatisticsRequest(output=True), by_mean),
    )


def _values(measured: Measured) -> Float[Tensor, "batch head token dim"]:
    call = measured.call
    return call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], dim=1)


def _real(measured: Measured) -> Tensor:
    """Which tokens are real, `[batch, 1, token]`."""
    call = measured.call
    place = torch.arange(call.k.shape[2], device=call.k.device)[None]
    real = torch.ones(len(call.k), place.shape[1], dtype=torch.bool, device=place.device)
    if call.key_start is not None:
        real &= place >= call.key_start.to(place.device)[:, None]
    if call.key_end is not None:
        real &= place < call.key_end.to(place.device)[:, None]
    return real[:, None]


def _ratio(output: Float[Tensor, "batch head token dim"], measured: Measured) -> Tensor:
    """Square root of the ratio of the two running sums of squared deviations."""
    above, below = (_scatter(vectors, _real(measured)) for vectors in (output, _values(measured)))
    ratio = (above / below.clamp(min=1e-300)).sqrt()
    return torch.where(below > 0, ratio, 1.0).float()


def _scatter(vectors: Tensor, real: Tensor) -> Float[Tensor, "batch head token"]:
    """Sum of squared distances from their mean of the first n real vectors, for every n; in float64.

    Added up from squares (each new vector's distance to the mean of those before it), so that nothing cancels.
    """
    x = vectors.double() * real[..., None]
    count = real.double().cumsum(2)
    before = (count - real.double()).clamp(min=1)
    mean_before = (x.cumsum(2) - x) / before[..., None]
    step = (x - mean_before).square().sum(-1) * ((count - 1) / count.clamp(min=1)).clamp(min=0)
    return (step * real).cumsum(2)


def bins_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """The logarithmic bin of each row by its number of keys `[prompt, query]` (-1: too few), and the bins' edges."""
    columns = torch.arange(batch.ids.shape[1]) - batch.starts[:, None].cpu() + 1
    seen = torch.where(batch.mask.cpu(), columns, 0)
    octaves = torch.log2(seen.clamp(min=1).double() / FEWEST_KEYS) * BINS_AN_OCTAVE
    # Edges belong to the bin that they open, whatever the logarithm rounds to.
    place = torch.where(seen >= FEWEST_KEYS, (octaves + 1e-9).floor(), -1.0).long()
    count = int(place.max()) + 1
    edges = FEWEST_KEYS * 2.0 ** (torch.arange(count + 1).double() / BINS_AN_OCTAVE)
    return place, edges


def _binned(values: Tensor, place: Tensor, count: int) -> Float[Tensor, "prompt layer head bin"]:
    """Means over each bin's rows; NaN in a bin without any."""
    chosen = ~values.isnan() & (place >= 0)[:, None, None]
    index = place.clamp(min=0)[:, None, None].expand_as(values)
    shape = (*values.shape[:3], count)
    total = torch.zeros(shape, dtype=torch.float64).scatter_add_(3, index, torch.where(chosen, values.double(), 0.0))
    rows = torch.zeros(shape, dtype=torch.float64).scatter_add_(3, index, chosen.double())
    return total / rows


def length_curves(trace: Trace, name: str) -> pd.DataFrame:
    """layer, head, statistic, keys, low, high, value: a statistic against the number of tokens so far.

    Means over prompts of the mean in each logarithmic bin [low, high); `keys` is its middle.
    """
    place, edges = bins_of(trace.batch)
    means = _binned(trace[name], place, len(edges) - 1).nanmean(0)
    layer, head, at = np.nonzero(~means.isnan().numpy())
    low, high = edges[:-1].numpy(), edges[1:].numpy()
    return pd.DataFrame(
        {
            "layer": layer, "head": head, "statistic": name, "keys": np.sqrt(low * high)[at], "low": low[at],
            "high": high[at], "value": means.numpy()[layer, head, at],
        }
    )  # fmt: skip


def slopes(values: Float[Tensor, "prompt layer head query"], batch: Batch) -> Float[Tensor, "prompt layer head"]:
    """Slope of a row statistic per unit of ln(number of tokens so far): least squares through the bins' means,
    each bin at the mean of its rows' logarithms.

    Raises:
        RequestError: prompts too short for a line.
    """
    needed, shortest = FEWEST_KEYS * 2 ** ((FEWEST_BINS - 1) / BINS_AN_OCTAVE), int(batch.lengths.min())
    if shortest < needed:
        raise RequestError(
            f"A prompt has {shortest} tokens; how attention changes with length needs {int(np.ceil(needed))} or more."
        )
    place, edges = bins_of(batch)
    means, keys = (_binned(x, place, len(edges) - 1) for x in (values, _log_keys(batch, values)))
    there = ~means.isnan()
    weight = there.double() / there.sum(-1, keepdim=True)
    keys = keys.nan_to_num()
    centred = keys - (weight * keys).sum(-1, keepdim=True)
    above = (weight * centred * means.nan_to_num()).sum(-1)
    return above / (weight * centred.square()).sum(-1)


def _log_keys(batch: Batch, values: Tensor) -> Tensor:
    """ln(number of tokens so far) wherever there is a value."""
    seen = (torch.arange(batch.ids.shape[1]) - batch.starts[:, None].cpu() + 1).clamp(min=1)
    return torch.where(values.isnan(), torch.nan, seen.double().log()[:, None, None])


def _shuffled(values: Tensor, batch: Batch, seed: int) -> Tensor:
    """Each prompt's rows in random order, the same for all heads."""
    generator, out = torch.Generator().manual_seed(seed), values.clone()
    for prompt, real in enumerate(batch.mask.cpu()):
        place = torch.arange(values.shape[-1])[real]
        out[prompt][..., place] = values[prompt][..., place[torch.randperm(len(place), generator=generator)]]
    return out


def _growth(read: Callable[[Trace], Tensor]) -> Callable[[Sequence[Part]], PromptScores]:
    def one(part: Part) -> tuple[Array, Array]:
        trace = traced(part)
        values = read(trace)
        null = _shuffled(values, trace.batch, prompts(part).seed + 4)
        return np.asarray(slopes(values, trace.batch).numpy()), np.asarray(slopes(null, trace.batch).numpy())

    def score(parts: Sequence[Part]) -> PromptScores:
        found = [one(part) for part in parts]
        return PromptScores(*(np.concatenate(side) for side in zip(*found, strict=True)))

    return score


def _first_where_seen(trace: Trace) -> Tensor:
    """Attention to position 0; NaN where a window hides it."""
    return trace["first_1"].masked_fill(hides_first(trace), torch.nan)


def _last(trace: Trace, name: str) -> Array:
    """A row statistic at each prompt's last token."""
    values = trace[name]
    end = (trace.batch.starts + trace.batch.lengths - 1).cpu()
    index = end[:, None, None, None].expand(*values.shape[:3], 1)
    return np.asarray(torch.gather(values, 3, index)[..., 0].double().numpy())


def _low_pass_scores(parts: Sequence[Part]) -> PromptScores:
    return PromptScores(
        np.concatenate([_last(traced(part), "low_pass") for part in parts]),
        np.concatenate([_last(traced(part), "low_pass_uniform") for part in parts]),
    )


def _largest(parts: Sequence[Part]) -> PromptScores:
    """The prompt's largest |logit|; the null is its mean logit, in absolute value, at the row that has it."""
    values, null = [], []
    for part in parts:
        logits, means = traced(part)["largest_logit"].nan_to_num(-1.0), traced(part)["mean_logit"]
        best = logits.max(-1, keepdim=True)
        values.append(best.values[..., 0].double().numpy())
        null.append(torch.gather(means, 3, best.indices)[..., 0].abs().double().numpy())
    return PromptScores(np.concatenate(values), np.concatenate(null))


_SHUFFLED = "the same slope with each prompt's rows in random order"
_POSITIONS = f"queries with {FEWEST_KEYS} keys or more, in bins of half an octave, each bin once"
DILUTION = Detector(
    name="dilution",
    title="Dilution of the peak",
    kind="long_text",
    measures="fall of the logarithm of a row's largest weight per unit of ln(number of keys): 1 for uniform attention, "
    "0 for a head that keeps its peak",
    null=_SHUFFLED,
    unit="per e-fold of length",
    positions=_POSITIONS,
    threshold=None,
    paper=f"after {COLLAPSE}",
    url=COLLAPSE_URL,
    statistics=lambda task: [S.max_prob()],
    score=_growth(lambda trace: -trace["max_prob"].clamp(min=1e-30).log()),
    curve="max_prob",
    note="The slope and its scale are ours; the paper speaks of the norm of what attention lets pass ('low_pass').",
)
ENTROPY_GROWTH = Detector(
    name="entropy_growth",
    title="Growth of entropy",
    kind="long_text",
    measures="rise of a row's entropy per unit of ln(number of keys): 1 for uniform attention, 0 for attention to a "
    "fixed number of keys",
    null=_SHUFFLED,
    unit="nats per e-fold of length",
    positions=_POSITIONS,
    threshold=None,
    paper=f"after {COLLAPSE}",
    url=COLLAPSE_URL,
    statistics=lambda task: [S.entropy()],
    score=_growth(lambda trace: trace["entropy"]),
    curve="entropy",
    note="The slope is ours.",
)
FIRST_TOKEN_GROWTH = Detector(
    name="first_token_growth",
    title="Growth of the first token's share",
    kind="long_text",
    measures="rise of the attention to position 0 per unit of ln(number of keys)",
    null=_SHUFFLED,
    unit="attention mass per e-fold of length",
    positions=_POSITIONS,
    threshold=None,
    paper=f"after {COLLAPSE}",
    url=COLLAPSE_URL,
    statistics=lambda task: [S.first(1)],
    score=_growth(_first_where_seen),
    better="either",
    curve="first_1",
    note="Either sign: a sink loses mass as keys are added, or gains it where the head finds ever less to do.",
)
LOW_PASS = Detector(
    name="low_pass",
    title="Low-pass ratio",
    kind="long_text",
    measures="size of what varies between tokens in A V over that in V, ||HC[A V]|| / ||HC[V]||, over the whole prompt",
    null="the same for uniform attention over the visible keys",
    unit="ratio",
    positions="all queries of the prompt together",
    threshold=None,
    paper=COLLAPSE,
    url=COLLAPSE_URL,
    statistics=lambda task: list(low_pass()),
    score=_low_pass_scores,
    better="either",
    curve="low_pass",
    note="HC[X] is X less the mean of its rows. A ratio above 1 is possible in causal attention, whose matrix has rows "
    "of very different length; the paper's bound is for encoders.",
)
LOW_PASS_GROWTH = Detector(
    name="low_pass_growth",
    title="Growth of the low-pass ratio",
    kind="long_text",
    measures="change of the low-pass ratio of the first n tokens per unit of ln n: negative where longer texts pass "
    "less of what varies",
    null=_SHUFFLED,
    unit="ratio per e-fold of length",
    positions=_POSITIONS,
    threshold=None,
    paper=COLLAPSE,
    url=COLLAPSE_URL,
    statistics=lambda task: list(low_pass()),
    score=_growth(lambda trace: trace["low_pass"]),
    better="lower",
    curve="low_pass",
    note="Each prefix of a causal prompt is a prompt of its own, so one pass gives the ratio at every length.",
)
LARGEST_LOGIT = Detector(
    name="largest_logit",
    title="Largest logit",
    kind="long_text",
    measures="largest absolute logit of any query and key in the prompt, scaled and soft-capped as in the model",
    null="the mean logit of that query, in absolute value",
    unit="nats",
    positions="all queries",
    threshold=None,
    paper=LS,
    url=LS_URL,
    statistics=lambda task: [largest_logit(), S.mean_logit()],
    score=_largest,
    curve="largest_logit",
    note="Followed over training steps in the paper (read in abstract only); here of one model, per prompt.",
)
LOGIT_GROWTH = Detector(
    name="logit_growth",
    title="Growth of the largest logit",
    kind="long_text",
    measures="rise of a row's largest absolute logit per unit of ln(number of keys)",
    null=_SHUFFLED,
    unit="nats per e-fold of length",
    positions=_POSITIONS,
    threshold=None,
    paper=LS,
    url=LS_URL,
    statistics=lambda task: [largest_logit()],
    score=_growth(lambda trace: trace["largest_logit"]),
    curve="largest_logit",
    note="A logit that grows as fast as ln n keeps its share of n keys: entropy growth 0.",
)
LENGTHS = (
    DILUTION, ENTROPY_GROWTH, FIRST_TOKEN_GROWTH, LOW_PASS, LOW_PASS_GROWTH, LARGEST_LOGIT, LOGIT_GROWTH,
)  # fmt: skip
