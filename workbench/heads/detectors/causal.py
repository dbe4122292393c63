"""What depends on a head: its ablation alone, in three forms, and the gate that it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from workbench.heads.causal import SingleEffects
from workbench.heads.detector import Array, Detector, Part, PromptScores, stacked
from workbench.heads.gating import Gates
from workbench.tracing.edits import How

OTHERS = "the mean over the other heads of the same layer (of the model, where a layer has one head)"


def others(values: Array) -> Array:
    """For each head the mean over the other heads of its layer, `[prompt, layer, head]`; NaN stays."""
    there = ~np.isnan(values)
    filled = np.where(there, values, 0.0)
    total, count = filled.sum(2, keepdims=True), there.sum(2, keepdims=True)
    all_total, all_count = filled.sum((1, 2), keepdims=True), there.sum((1, 2), keepdims=True)
    alone = count == 1
    total, count = np.where(alone, all_total, total), np.where(alone, all_count, count)
    mean = (total - filled) / np.maximum(count - 1, 1)
    return np.asarray(np.where(there, mean, np.nan))


def _effects(how: How) -> Callable[[Sequence[Part]], PromptScores]:
    def score(parts: Sequence[Part]) -> PromptScores:
        def one(part: Part) -> Array:
            assert isinstance(part.found, SingleEffects)
            return part.found.effects[how]

        values = stacked(parts, one)
        return PromptScores(values, others(values))

    return score


def _gates(name: str) -> Callable[[Sequence[Part]], PromptScores]:
    def score(parts: Sequence[Part]) -> PromptScores:
        def one(part: Part) -> Array:
            assert isinstance(part.found, Gates)
            return np.asarray(getattr(part.found, name))

        values = stacked(parts, one)
        return PromptScores(values, others(values))

    return score


_NOTE = (
    "Heads that stand in for one another hide from single ablation, and self-repair makes effects smaller (IOI: all "
    "three name movers together cost 5 % of the logit difference); verify ablates sets. "
)
ABLATION_ZERO = Detector(
    name="ablation_zero",
    title="Ablated alone, zero",
    kind="causal",
    measures="how much the loss of repeated random tokens rises when this head's output is zero",
    null=OTHERS,
    unit="nats per token",
    positions="queries of the second copy",
    threshold=None,
    paper="Michel et al. 2019, Are sixteen heads really better than one?",
    url="https://arxiv.org/abs/1905.10650",
    score=_effects("zero"),
    probe="induction",
    note=_NOTE + "Zero is off the distribution and takes the head's mean away as well.",
)
ABLATION_MEAN = replace(
    ABLATION_ZERO,
    name="ablation_mean",
    title="Ablated alone, mean",
    measures="how much the loss of repeated random tokens rises when this head's output is its mean",
    paper="Wang et al. 2022, Interpretability in the wild",
    url="https://arxiv.org/abs/2211.00593",
    score=_effects("mean"),
    note=_NOTE + "The mean is over all tokens of the same prompts, not position by position over a template.",
)
ABLATION_RESAMPLE = replace(
    ABLATION_ZERO,
    name="ablation_resample",
    title="Ablated alone, resample",
    measures="how much the loss of repeated random tokens rises when this head's output is that on the next prompt",
    paper="Zhang and Nanda 2023, Towards best practices of activation patching",
    url="https://arxiv.org/abs/2309.16042",
    score=_effects("resample"),
    note=_NOTE + "Column by column; prompts share their layout, so a head that reads positions alone loses nothing.",
)
GATE_FACILITATING = Detector(
    name="gate_facilitating",
    title="Gate, facilitating",
    kind="gating",
    measures="gate that stays open although removing is rewarded",
    null=OTHERS,
    unit="gate",
    positions="answers of repeated random tokens; intervals are over starting points, not prompts",
    threshold=0.5,
    paper="Nam et al. 2025, Causal head gating",
    url="https://arxiv.org/abs/2505.13737",
    score=_gates("facilitating"),
    probe="induction",
    note="The public package's penalty pushes the other way than its comments say; here both pushes follow the "
    "definition. The paper's formulas of the scores could not be read: down, 1 - up and up * (1 - down) are ours, and "
    "so is the bar of one half. Fewer updates and masks than the package's 500 and 10.",
)
GATE_INTERFERING = replace(
    GATE_FACILITATING,
    name="gate_interfering",
    title="Gate, interfering",
    measures="one less the gate that keeping is rewarded for: how far it stays shut all the same",
    score=_gates("interfering"),
    probe=None,
)
GATE_IRRELEVANT = replace(
    GATE_FACILITATING,
    name="gate_irrelevant",
    title="Gate, irrelevant",
    measures="how far the gate follows both pushes",
    score=_gates("irrelevant"),
    probe=None,
)
CAUSAL = (ABLATION_ZERO, ABLATION_MEAN, ABLATION_RESAMPLE, GATE_FACILITATING, GATE_INTERFERING, GATE_IRRELEVANT)
