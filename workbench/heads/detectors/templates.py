"""TransformerLens' head detector: how well attention on a text matches a template of zeros and ones.

Templates P `[query, key]`: `previous` P[i, i-1] = 1; `duplicate` P[i, j] = 1 where j < i holds the same token;
`induction` the duplicate template one column to the right, still causal. Two measures of the match with a pattern A:

* `mul`: sum(A P) / sum(A), the share of attention that follows the template;
* `abs`: 1 - sum|A - P| / T over T tokens: 1 for the template itself, lower for attention elsewhere.

Both can leave out the first column and the diagonal, in A and in P. As P holds zeros and ones, sum|A - P| =
sum(A) + sum(P) - 2 sum(A P), and all sums come from row statistics: no pattern is formed. Unlike
`transformer_lens.head_detector`, `abs` is not rounded to three decimals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Array, Detector, Part, PromptScores, prompts, stacked, traced
from workbench.models import Batch
from workbench.tasks import Task
from workbench.tracing import Model, Statistic, Trace
from workbench.tracing import statistics as S

Template = Literal["previous", "duplicate", "induction"]
Measure = Literal["mul", "abs"]
# Entries of a template that are listed at most: all duplicates of all tokens grow with the square of a text.
MOST_ENTRIES = 1 << 26


def template_keys(batch: Batch, template: Template) -> Int[Tensor, "prompt query slot"]:
    """The ones of a template: for each query the columns of its keys, -1 for none."""
    if template not in get_args(Template):
        raise RequestError(f"template={template!r}: choose from {', '.join(get_args(Template))}.")
    width = batch.ids.shape[1]
    columns = torch.arange(width)
    if template == "previous":
        before = columns - 1
        return torch.where(batch.mask.cpu() & (before >= batch.starts.cpu()[:, None]), before, -1)[..., None]
    shift = 1 if template == "induction" else 0
    rows = [_earlier(ids, mask) for ids, mask in zip(batch.ids.tolist(), batch.mask.tolist(), strict=True)]
    slots = max((len(keys) for row in rows for keys in row), default=0)
    if len(rows) * width * slots > MOST_ENTRIES:
        raise RequestError(
            f"The {template} template of {len(rows)} prompts of up to {width} tokens, some of which occur {slots + 1} "
            f"times, has room for {len(rows) * width * slots} keys and {MOST_ENTRIES} are allowed; cut the prompts."
        )
    found = torch.full((len(rows), width, max(slots, 1)), -1)
    for prompt, row in enumerate(rows):
        for query, keys in enumerate(row):
            found[prompt, query, : len(keys)] = torch.tensor(keys, dtype=torch.long) + shift
    return found


def _earlier(ids: list[int], mask: list[bool]) -> list[list[int]]:
    """For each token the columns where it stood before."""
    seen: dict[int, list[int]] = {}
    found: list[list[int]] = []
    for column, (token, real) in enumerate(zip(ids, mask, strict=True)):
        places = seen.setdefault(token, []) if real else []
        found.append(list(places))
        places.append(column)
    return found


def kept_keys(
    batch: Batch, keys: Int[Tensor, "prompt query slot"], exclude_bos: bool, exclude_current: bool
) -> Int[Tensor, "prompt query slot"]:
    """Keys without those in the first column or on the diagonal."""
    if exclude_bos:
        keys = torch.where(keys == batch.starts.cpu()[:, None, None], -1, keys)
    if exclude_current:
        keys = torch.where(keys == torch.arange(keys.shape[1])[:, None], -1, keys)
    return keys


def _sums(batch: Batch, keys: Tensor, name: str) -> list[Statistic]:
    return [S.at_keys(name, keys), S.first(1), S.offset(0), S.sink_mass()]


def match(
    trace: Trace, name: str, keys: Int[Tensor, "prompt query slot"], measure: Measure, *, exclude_bos: bool = False,
    exclude_current: bool = False,
) -> Float[Tensor, "prompt layer head"]:  # fmt: skip
    """The match of each head with a template whose mass was measured as `name`, from sums over rows."""
    if measure not in get_args(Measure):
        raise RequestError(f"measure={measure!r}: choose from {', '.join(get_args(Measure))}.")
    batch = trace.batch

    def total(statistic: str) -> Tensor:
        return trace[statistic].double().nansum(-1)

    lengths = batch.lengths.cpu().double()[:, None, None]
    attention = lengths - total("sink_mass")
    if exclude_bos:
        attention = attention - total("first_1")
    if exclude_current:
        attention = attention - total("offset_0")
    if exclude_bos and exclude_current:
        # The first query's own column is both.
        starts = batch.starts.cpu()[:, None, None, None].expand(*trace["offset_0"].shape[:3], 1)
        attention = attention + trace["offset_0"].double().gather(3, starts)[..., 0]
    if measure == "mul":
        return total(name) / attention
    ones = (keys >= 0).sum((1, 2)).double()[:, None, None]
    return 1 - (attention + ones - 2 * total(name)) / lengths


def head_match(
    model: Model,
    texts: Any,
    template: Template,
    measure: Measure = "mul",
    *,
    exclude_bos: bool = False,
    exclude_current: bool = False,
) -> Float[Tensor, "prompt layer head"]:
    """The match of every head with a template on any prompts, prompt by prompt.

    Args:
        texts: anything that `Model.trace` takes.
        template: `previous`, `duplicate` or `induction`.
        measure: `mul` or `abs`.
        exclude_bos, exclude_current: leave out the first column, or the diagonal.
    """
    batch = model.batch(texts)
    if int(batch.lengths.min()) < 2:
        raise RequestError("A prompt of a single token has no template; give each prompt two tokens or more.")
    keys = kept_keys(batch, template_keys(batch, template), exclude_bos, exclude_current)
    found = model.trace(batch, statistics=_sums(batch, keys, "template"))
    return match(found, "template", keys, measure, exclude_bos=exclude_bos, exclude_current=exclude_current)


def random_keys(task: Task, keys: Int[Tensor, "prompt query slot"]) -> Int[Tensor, "prompt query slot"]:
    """As many keys a query, drawn from those before it with the first token left out where there is another."""
    generator = torch.Generator().manual_seed(task.seed + 3)
    start, column = task.batch.starts[:, None, None], torch.arange(keys.shape[1])[:, None]
    first = torch.where(column - start >= 2, start + 1, start)
    drawn = first + (torch.rand(keys.shape, generator=generator) * (column - first)).long()
    return torch.where((keys >= 0) & (column > start), drawn, -1)


def _names(template: Template) -> tuple[str, str]:
    return f"template_{template}", f"random_{template}"


def _statistics(template: Template) -> Callable[[Task], Sequence[Statistic]]:
    def statistics(task: Task) -> Sequence[Statistic]:
        keys, (name, null) = template_keys(task.batch, template), _names(template)
        return [*_sums(task.batch, keys, name), S.at_keys(null, random_keys(task, keys))]

    return statistics


def _score(template: Template, measure: Measure) -> Callable[[Sequence[Part]], PromptScores]:
    def of(part: Part, name: str) -> Array:
        keys = template_keys(prompts(part).batch, template)
        found: Array = match(traced(part), name, keys, measure).numpy()
        return found

    def score(parts: Sequence[Part]) -> PromptScores:
        own, null = _names(template)
        return PromptScores(stacked(parts, lambda part: of(part, own)), stacked(parts, lambda part: of(part, null)))

    return score


_WHAT: dict[Template, str] = {
    "previous": "the token just before",
    "duplicate": "earlier occurrences of the current token",
    "induction": "tokens after earlier occurrences of the current token",
}
_MEASURES: dict[Measure, str] = {
    "mul": "share of all attention on natural text that goes to {what}",
    "abs": "1 less the mean over queries of |A - P|, P having a one at {what} on natural text",
}


def _detector(template: Template, measure: Measure) -> Detector:
    return Detector(
        name=f"{template}_{measure}",
        title=f"{template.capitalize()} template ({measure})",
        kind="text",
        measures=_MEASURES[measure].format(what=_WHAT[template]),
        null="a template with as many ones a query at random earlier keys",
        unit="attention mass" if measure == "mul" else "1 less mean absolute difference",
        positions="all queries, the first included",
        threshold=None,
        paper="Nanda et al., TransformerLens (head_detector)",
        url="https://transformerlensorg.github.io/TransformerLens/",
        statistics=_statistics(template),
        score=_score(template, measure),
        probe="induction" if measure == "mul" else None,
        curve=_names(template)[0] if measure == "mul" else None,
        note="The sum runs over all queries, also those without a target, so that on text with few repeats the best "
        "head stays low. The start token and the query's own are kept, as by default there; abs is not rounded.",
    )


TEMPLATES = tuple(_detector(template, measure) for template in get_args(Template) for measure in get_args(Measure))
