"""Kinds of prompts: each is built once and run once for all detectors that share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from workbench.errors import RequestError
from workbench.heads.answers import written_answers
from workbench.heads.causal import CAUSAL, GATING
from workbench.heads.detector import Detector, Kind, Progress
from workbench.heads.detectors.chunks import CHUNKS
from workbench.heads.detectors.documents import DOCUMENTS
from workbench.heads.detectors.evaluators import EVALUATORS
from workbench.heads.detectors.gates import GATES
from workbench.heads.detectors.given import json_objects, reasoning_needles, run_given
from workbench.heads.detectors.influence import run_influence
from workbench.heads.detectors.layers import run_selections
from workbench.heads.detectors.names import NAMED
from workbench.heads.detectors.one_hop import ONE_HOP
from workbench.heads.detectors.patching import PATCHING
from workbench.heads.detectors.successor import SUCCESSION
from workbench.heads.plain import one_token_prompts, random_prompts
from workbench.heads.repeats import random_repeats
from workbench.heads.settings import Settings
from workbench.heads.weights import WEIGHTS
from workbench.tasks import NEEDLES, PUBLISHED_NEEDLES, Task, long_texts, needle_grid, text_domains
from workbench.tracing import Model, Statistic


def tokenizer_of(model: Model, kind: str) -> Any:
    """The model's tokenizer, which prompts of text need."""
    if model.tokenizer is None:
        raise RequestError(f"Detectors on {kind} prompts need a tokenizer; load the model with one.")
    return model.tokenizer


def wanted_statistics(task: Task, detectors: Sequence[Detector]) -> list[Statistic]:
    """What the detectors need of one pass, each once.

    Raises:
        RequestError: two detectors mean different things by one name.
    """
    wanted: dict[str, tuple[Statistic, str]] = {}
    for detector in detectors:
        for one in detector.statistics(task):
            first, owner = wanted.setdefault(one.name, (one, detector.name))
            if not _same(first, one):
                raise RequestError(
                    f"Detectors {owner!r} and {detector.name!r} ask for different statistics called {one.name!r}; run "
                    "them one by one, or give each its own name."
                )
    return [statistic for statistic, _ in wanted.values()]


def _same(one: Statistic, other: Statistic) -> bool:
    """Whether two statistics of one name measure the same, as far as can be told without running them."""
    plain = ("request", "axis", "columns", "needs_result_factor", "integer")
    if any(getattr(one, name) != getattr(other, name) for name in plain):
        return False
    if (one.of_values is None) != (other.of_values is None) or len(one.given) != len(other.given):
        return False
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one.given, other.given, strict=True))


def run_traced(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Any:
    """One trace of the task."""
    assert task is not None
    sites = tuple(dict.fromkeys(site for detector in detectors for site in detector.sites))
    return model.trace(task.batch, statistics=wanted_statistics(task, detectors), sites=sites, progress=progress)


def _run_greedy(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Any:
    assert task is not None
    return written_answers(model, task, wanted_statistics(task, detectors), settings.greedy_tokens, progress)


def _run_given(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Any:
    assert task is not None
    return run_given(model, task, wanted_statistics(task, detectors), progress)


def _reasoning(model: Model, settings: Settings) -> list[Task]:
    return reasoning_needles(tokenizer_of(model, "needle_reasoning"), settings)


def _json(model: Model, settings: Settings) -> list[Task]:
    return json_objects(tokenizer_of(model, "json"), settings)


def _texts(model: Model, settings: Settings) -> list[Task]:
    tokenizer = tokenizer_of(model, "text")
    found = text_domains(
        tokenizer, prompts=settings.text_prompts, length=settings.text_length, seed=settings.seed
    )  # fmt: skip
    return list(found.values())


def _repeats(model: Model, settings: Settings) -> list[Task]:
    size = (settings.repeat_prompts, settings.repeat_length, settings.repeat_copies)
    return [random_repeats(model, *size, settings.seed, settings.bos_id)]


def _needles(model: Model, settings: Settings) -> list[Task]:
    tokenizer = tokenizer_of(model, "needle")
    return [needle_grid(tokenizer, settings.needle_lengths, settings.needle_depths, settings.seed)]


def _greedy_needles(model: Model, settings: Settings) -> list[Task]:
    tokenizer = tokenizer_of(model, "needle_greedy")
    needles = PUBLISHED_NEEDLES if settings.published_needles else NEEDLES
    return [needle_grid(tokenizer, settings.greedy_lengths, settings.needle_depths, settings.seed, needles)]


def _long_texts(model: Model, settings: Settings) -> list[Task]:
    tokenizer = tokenizer_of(model, "long_text")
    return [long_texts(tokenizer, settings.long_prompts, settings.long_length, settings.seed)]


# In the order in which they run.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("text", "short texts of two domains", _texts, run_traced, traced=True),
        Kind("long_text", "long texts, prose and code", _long_texts, run_traced, traced=True),
        Kind("random_tokens", "random tokens", random_prompts, run_traced, traced=True),
        Kind("one_token", "one token repeated", one_token_prompts, run_traced, traced=True),
        Kind("repeated", "repeated random tokens", _repeats, run_traced, traced=True),
        Kind("needle", "a needle in a haystack, the answer given", _needles, run_traced, traced=True),
        Kind("needle_greedy", "a needle in a haystack, the answer decoded", _greedy_needles, _run_greedy),
        Kind("needle_layers", "a needle in a haystack, layer by layer", _greedy_needles, run_selections),
        Kind("needle_influence", "a needle in a haystack, with gradients", _greedy_needles, run_influence),
        WEIGHTS,
        SUCCESSION,
        NAMED,
        EVALUATORS,
        Kind("needle_reasoning", "needles of two facts, the answer given", _reasoning, _run_given),
        Kind("json", "a value of a JSON object, the value given", _json, _run_given),
        CAUSAL,
        GATING,
        DOCUMENTS,
        ONE_HOP,
        CHUNKS,
        PATCHING,
        GATES,
    )
}
