"""Causal retrieval importance: what one head's output on the intact prompt restores where the needle is gone.

For every prompt and head: the corrupt twin (filler of as many tokens in the needle's place) runs with this head's z,
at all positions, from the intact prompt. The score is how far that moves the logit difference between the answer's
first token and its strongest rival (the corrupt run's likeliest other token). One pass per layer runs as many copies of
the corrupt prompt as the layer has heads, each with another head patched: L passes and L x H prompts for each pair. The
residual stream that enters the layer is given, so that layers before it need not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.heads.calls import needed_tokenizer, unpadded
from workbench.heads.detector import Array, Detector, Kind, Part, Progress, PromptScores
from workbench.heads.detectors.one_hop import LOCOS
from workbench.heads.settings import Settings
from workbench.models import Batch
from workbench.tasks import Task
from workbench.tasks.one_hop import one_hop
from workbench.tracing import Model, Trace, patch


class Restored(NamedTuple):
    """Logit differences (gold less rival): intact `[prompt]`, corrupt `[prompt]`, patched `[prompt, layer, head]`."""

    clean: Array
    corrupt: Array
    patched: Array


def restore(model: Model, task: Task, progress: Progress | None = None) -> Restored:
    """Patch every head's z from each intact prompt into its corrupt twin, which follows it in the task."""
    pairs, heads = len(task) // 2, max(layer.heads for layer in model.spec.layers)
    clean, corrupt = np.zeros(pairs), np.zeros(pairs)
    patched = np.zeros((pairs, model.spec.n_layers, heads))
    for pair in range(pairs):
        at = task.answer_positions[2 * pair, :1]
        gold = int(task.answer_ids[2 * pair, 0])
        intact, broken = (_alone(task.batch, 2 * pair + twin) for twin in (0, 1))
        source, base = (model.trace(one, sites=["z", "resid_pre"], logits=at[None]) for one in (intact, broken))
        assert source.logits is not None and base.logits is not None
        others = base.logits[0, 0].clone()
        others[gold] = -torch.inf
        rival = int(others.argmax())
        clean[pair], corrupt[pair] = _difference(source.logits, gold, rival), _difference(base.logits, gold, rival)
        for layer in range(model.spec.n_layers):
            found = _patched(model, broken, layer, source.site("z", layer), base, at)
            count = len(found)
            patched[pair, layer, :count] = (found[:, gold] - found[:, rival]).double().numpy()
        if progress is not None:
            progress(2 * pair + 2, len(task))
    return Restored(clean, corrupt, patched)


def _patched(
    model: Model, broken: Batch, layer: int, source: Tensor, base: Trace, at: Tensor
) -> Float[Tensor, "head vocab"]:
    """Logits of the corrupt prompt with one head each of this layer as it was on the intact one."""
    heads = source.shape[2]
    # Patching one layer alone leaves the others of it what they were.
    value = base.site("z", layer).repeat(heads, 1, 1, 1)
    head = torch.arange(heads)
    value[head, :, head] = source[0].transpose(0, 1)
    copies = Batch(broken.ids.repeat(heads, 1), broken.mask.repeat(heads, 1))
    edits = [patch("resid_pre", base.site("resid_pre", layer), layer=layer), patch("z", value, layer=layer)]
    logits = model.trace(copies, edits=edits, logits=at.expand(heads, 1)).logits
    assert logits is not None
    return logits[:, 0]


def _alone(batch: Batch, prompt: int) -> Batch:
    return Batch.from_ids([unpadded(batch, prompt)[0].tolist()])


def _difference(logits: Float[Tensor, "1 1 vocab"], gold: int, rival: int) -> float:
    return float(logits[0, 0, gold] - logits[0, 0, rival])


def _tasks(model: Model, settings: Settings) -> list[Task]:
    tokenizer = needed_tokenizer(model, "one-hop")
    size = (settings.patching_prompts, settings.patching_length, settings.seed)
    return [one_hop(tokenizer, *size, corrupt=True)]


def _run(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Any:
    assert task is not None
    return restore(model, task, progress)


def _score(parts: Sequence[Part]) -> PromptScores:
    values = np.concatenate([part.found.patched - part.found.corrupt[:, None, None] for part in parts])
    return PromptScores(values, np.zeros_like(values))


PATCHING = Kind("one_hop_patching", "the same with and without its needle, head by head", _tasks, _run, costly=True)

LOCOS_CRI = Detector(
    name="locos_cri",
    title="Causal restoration by one head (LOCOS control)",
    kind="one_hop_patching",
    probe="answer",
    measures="how far the head's output on the intact prompt moves the answer's logit difference without the needle",
    null="no change",
    unit="logit difference",
    positions="z patched at all positions; logits where the answer begins",
    threshold=None,
    paper=LOCOS.paper,
    url=LOCOS.url,
    score=_score,
    note="The rival is the corrupt run's likeliest token besides the answer's first. The needle is replaced by prose "
    "of as many tokens (the code also scrambles it). Few and short prompts by default, where the paper has 4000 tokens "
    "and 5 depths.",
)
