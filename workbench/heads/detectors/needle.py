"""Copy-paste retrieval: heads whose attention finds the needle token that is about to be written.

Wu et al. count a hit when, at the step that writes token y, the head's heaviest key lies in the needle and holds y
itself. Retrieval rows are those of the token *before* the answer token. Teacher-forced, the gold answer stands in
the prompt and one pass serves all steps; greedy, the model writes the answer itself and a trial counts only if it
succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.answers import decoding_of, prompts_of, span_of
from workbench.heads.detector import Array, Detector, Part, PromptScores, prompts, stacked, traced
from workbench.tasks import Task, accepted
from workbench.tracing import Generation, Statistic
from workbench.tracing import statistics as S


def answer_key_per_row(task: Task) -> Tensor:
    """For each query the key that holds the token to be copied, -1 for rows that write no answer token."""
    if "needle" not in task.keys:
        raise RequestError(
            f"This detector needs prompts whose rows are labelled with the key to be copied (keys 'needle'); "
            f"{task.name} has {', '.join(task.keys) or 'none'}. Use e.g. needle_grid."
        )
    return task.keys["needle"][..., 0]


def permuted_key_per_row(task: Task) -> Tensor:
    """The null: the same rows, with the needle's tokens dealt out in another order (no row keeps its own)."""
    keys = answer_key_per_row(task).clone()
    generator = torch.Generator().manual_seed(task.seed + 3)
    for row in keys:
        at = (row >= 0).nonzero().flatten()
        if len(at) > 1:
            shift = int(torch.randint(1, len(at), (1,), generator=generator))
            row[at] = row[at].roll(shift)
        else:
            row[at] = -1
    return keys


def _statistics(task: Task) -> list[Statistic]:
    return [
        S.argmax(),
        S.at_keys("needle_key", answer_key_per_row(task)),
        S.at_keys("permuted_key", permuted_key_per_row(task)),
    ]


def _hits(part: Part, keys: Tensor) -> Array:
    """Distinct needle tokens that were the heaviest key when they were due, over the tokens that could be copied."""
    ids, span = prompts(part).batch.ids, prompts(part).columns("answer_in_needle")
    heaviest = traced(part)["argmax"]
    due = torch.where(keys >= 0, torch.gather(ids, 1, keys.clamp(min=0)), -1)
    found = torch.gather(ids[:, None, None].expand(*heaviest.shape[:3], -1), 3, heaviest.clamp(min=0))
    inside = torch.gather(span[:, None, None].expand(*heaviest.shape[:3], -1), 3, heaviest.clamp(min=0))
    hit = (found == due[:, None, None]) & inside & (heaviest >= 0)
    # Set semantics, as the paper defines: each key counts once.
    counted = torch.zeros(*heaviest.shape[:3], ids.shape[1])
    counted.scatter_add_(3, torch.where(hit, heaviest, 0), hit.float())
    counts = (keys >= 0).sum(1).clamp(min=1)[:, None, None]
    return np.asarray(((counted > 0).sum(-1) / counts).double().numpy())


def _retrieval(parts: Sequence[Part]) -> PromptScores:
    return PromptScores(
        stacked(parts, lambda part: _hits(part, answer_key_per_row(prompts(part)))),
        stacked(parts, lambda part: _hits(part, permuted_key_per_row(prompts(part)))),
    )


def _copy_mass(parts: Sequence[Part]) -> PromptScores:
    def mean(part: Part, name: str, keys: Tensor) -> Array:
        return np.asarray(traced(part).mean(name, keys >= 0).double().numpy())

    return PromptScores(
        stacked(parts, lambda part: mean(part, "needle_key", answer_key_per_row(prompts(part)))),
        stacked(parts, lambda part: np.nan_to_num(mean(part, "permuted_key", permuted_key_per_row(prompts(part))))),
    )


@dataclass(frozen=True)
class Trial:
    """One prompt that the model answered right: what it wrote, and each step's heaviest key `[layer, head, step]`."""

    prompt: Int[Tensor, " token"]
    written: Int[Tensor, " step"]
    heaviest: Int[Tensor, "layer head step"]
    span: tuple[int, int]

    def hits(self, written: Int[Tensor, " step"] | None = None) -> Bool[Tensor, "layer head step"]:
        """The heaviest key lies in the span and holds the token that is written at that step."""
        written = self.written if written is None else written
        text = torch.cat([self.prompt, self.written])
        first, last = self.span
        inside = (self.heaviest >= first) & (self.heaviest < last)
        return (text[self.heaviest.clamp(min=0)] == written) & inside

    def copied(self, hits: Bool[Tensor, "layer head step"]) -> Array:
        """Distinct keys of the span that were hit, over its length: the paper's score."""
        first, last = self.span
        counted = torch.zeros(*hits.shape[:2], last - first)
        counted.scatter_add_(2, torch.where(hits, self.heaviest - first, 0), hits.float())
        return np.asarray(((counted > 0).sum(-1) / (last - first)).double().numpy())

    def counted(self, hits: Bool[Tensor, "layer head step"]) -> Array:
        """All hits over the span's length: the score of the published code, which can exceed 1."""
        return np.asarray((hits.sum(-1) / (self.span[1] - self.span[0])).double().numpy())

    def shuffled(self, generator: torch.Generator) -> Int[Tensor, " step"]:
        """The null: what was written, in another order."""
        return self.written[torch.randperm(len(self.written), generator=generator)]


def accepted_trials(part: Part) -> list[tuple[int, Trial]]:
    """The prompts that the model answered right (ROUGE-1 recall above one half), with their place in the task."""
    task, found = prompts(part), part.found
    assert isinstance(found, Generation)
    asked, spans = prompts_of(decoding_of(task)), span_of(task, "answer_in_needle")
    if found.texts is None:
        raise RequestError("Answers are judged as text; load the model with a tokenizer.")
    trials = []
    for index in accepted(found.texts, task.answers).nonzero().flatten().tolist():
        written = found.ids[index][found.ids[index] >= 0]
        heaviest = found["argmax"][index][..., : len(written)]
        first, last = spans[index].tolist()
        trials.append((index, Trial(torch.tensor(asked[index]), written, heaviest, (first, last))))
    return trials


def _each_trial(parts: Sequence[Part], score: Callable[[Trial, Tensor], Array]) -> PromptScores:
    """A score of the hits of each accepted trial, and of those with the written tokens in shuffled order."""
    values, nulls = [], []
    for part in parts:
        generator = torch.Generator().manual_seed(prompts(part).seed + 4)
        for _, trial in accepted_trials(part):
            values.append(score(trial, trial.hits()))
            nulls.append(score(trial, trial.hits(trial.shuffled(generator))))
    return _piled(parts, values, nulls)


def _piled(parts: Sequence[Part], values: list[Array], nulls: list[Array]) -> PromptScores:
    shape = (0, *parts[0].found["argmax"].shape[1:3])
    return PromptScores(np.stack(values) if values else np.zeros(shape), np.stack(nulls) if nulls else np.zeros(shape))


def _greedy(parts: Sequence[Part]) -> PromptScores:
    return _each_trial(parts, lambda trial, hits: trial.copied(hits))


def _active(parts: Sequence[Part]) -> PromptScores:
    return _each_trial(parts, lambda trial, hits: np.asarray(hits.any(-1).double().numpy()))


def elsewhere(task: Task, seed: int) -> Bool[Tensor, "prompt key"]:
    """As many tokens of the haystack as the needle has, from a random place: one run, the needle itself left out."""
    context, needle = task.columns("context"), task.columns("needle")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros_like(needle)
    for index in range(len(task)):
        free, size = (context[index] & ~needle[index]).nonzero().flatten(), int(needle[index].sum())
        if len(free) < size:
            raise RequestError(
                f"{task.name}, prompt {index}: a needle of {size} tokens is longer than the {len(free)} tokens of text "
                "around it, so no equally long span is left to compare with; ask for longer prompts."
            )
        first = int(torch.randint(len(free) - size + 1, (1,), generator=generator))
        chosen[index, free[first : first + size]] = True
    return chosen


def _span_masses(task: Task) -> list[Statistic]:
    span_of(task, "needle")
    return [
        S.argmax(),
        S.mass("needle_mass", task.columns("needle")),
        S.mass("elsewhere_mass", elsewhere(task, task.seed + 5)),
    ]


def _semantic(parts: Sequence[Part]) -> PromptScores:
    """Accepted trials; the steps that write a token which the needle holds."""
    values: list[Array] = []
    nulls: list[Array] = []
    for part in parts:
        task, found = prompts(part), part.found
        for index, trial in accepted_trials(part):
            rows = torch.isin(trial.written, task.batch.ids[index][task.columns("needle")[index]])
            for name, pile in (("needle_mass", values), ("elsewhere_mass", nulls)):
                mass = found[name][index][..., : len(rows)][..., rows]
                pile.append(np.asarray((mass.double().sum(-1) / max(1, int(rows.sum()))).numpy()))
    return _piled(parts, values, nulls)


RETRIEVAL = Detector(
    name="retrieval",
    title="Retrieval (copy-paste)",
    probe="needle",
    kind="needle",
    measures="share of the answer's tokens that were the head's heaviest key when they were due (gold answer given)",
    null="the same with the needle's tokens in another order",
    unit="share of tokens",
    positions="rows that write the answer",
    threshold=0.1,
    paper="Wu et al. 2024, Retrieval head mechanistically explains long-context factuality",
    url="https://arxiv.org/abs/2404.15574",
    statistics=_statistics,
    score=_retrieval,
    curve="needle_key",
    note="Each needle token counts once, as the paper defines; its code counts every hit and can exceed 1. Teacher-"
    "forced: every trial counts, whether or not the model would have succeeded.",
)
COPY_MASS = Detector(
    name="copy_mass",
    title="Copy mass",
    probe="needle",
    kind="needle",
    measures="mean attention to the needle token that is due (gold answer given)",
    null="mean attention to another of the needle's answer tokens",
    unit="attention mass",
    positions="rows that write the answer",
    threshold=0.1,
    paper="after Wu et al. 2024; mass in place of the heaviest key, as in Zhu et al. 2025, CompressKV",
    url="https://arxiv.org/abs/2508.02401",
    statistics=_statistics,
    score=_copy_mass,
    curve="needle_key",
    note="Graded where the copy-paste score is all or nothing: a head behind a strong sink still shows. CompressKV "
    "sums the mass on the whole needle; here it is the due token's, so that the null is sharp. The threshold is ours.",
)
RETRIEVAL_GREEDY = Detector(
    name="retrieval_greedy",
    title="Retrieval (greedy)",
    probe="needle",
    kind="needle_greedy",
    measures="share of the needle's answer tokens that were the head's heaviest key when the model wrote them itself",
    null="the same with the written tokens in shuffled order",
    unit="share of tokens",
    positions="decoding steps of accepted trials (ROUGE-1 recall above 0.5)",
    threshold=0.1,
    paper="Wu et al. 2024, Retrieval head mechanistically explains long-context factuality",
    url="https://arxiv.org/abs/2404.15574",
    statistics=lambda task: [S.argmax()],
    score=_greedy,
    note="As the paper runs it: greedy decoding, failed trials left out, each token of the needle's answer once (the "
    "published code counts every hit, so that a trial can exceed 1; its released scores reach 1.79). The needle's span "
    "is its answer, as in the code. Heads from 0.1 are retrieval heads, from 0.5 strong ones. ROUGE without stemming.",
)
ACTIVATION_FREQUENCY = Detector(
    name="activation_frequency",
    title="Activation frequency (retrieval)",
    probe="needle",
    kind="needle_greedy",
    measures="share of accepted trials in which the head's heaviest key was the token being written at least once",
    null="the same with the written tokens in shuffled order",
    unit="share of trials",
    positions="decoding steps of accepted trials (ROUGE-1 recall above 0.5)",
    threshold=None,
    paper="Wu et al. 2024, Retrieval head mechanistically explains long-context factuality",
    url="https://arxiv.org/abs/2404.15574",
    statistics=lambda task: [S.argmax()],
    score=_active,
    note="Beside `retrieval_greedy`, on the same run: a head with a high frequency and a low score retrieves some "
    "tokens only; one far from frequency 1 depends on the context. No bar is published; the paper "
    "singles out frequency 1.",
)
SEMANTIC_RETRIEVAL = Detector(
    name="semantic_retrieval",
    title="Semantic retrieval",
    probe="needle",
    kind="needle_greedy",
    measures="mean attention to the whole needle at the steps that write a token which the needle holds",
    null="mean attention to an equally long span elsewhere in the haystack",
    unit="attention mass",
    positions="decoding steps of accepted trials that write a token of the needle",
    threshold=None,
    paper="Zhu et al. 2025, CompressKV: semantic retrieval heads",
    url="https://arxiv.org/abs/2508.02401",
    statistics=_span_masses,
    score=_semantic,
    note="The paper sums the mass over those steps; the mean here is that sum over their number, so that trials of any "
    "length compare. Its code adds the mass once for every token of the span that equals the written one (repeated "
    "tokens several times) and takes the answer's words as the span; the whole needle here. No bar is published: the "
    "paper takes the top 4 heads of each layer.",
)
