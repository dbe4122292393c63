"""LOCOS: heads that carry an answer from the needle which implies it, whether or not it is written there.

With `u` the unembedding of the answer's token `y_t`, a key gives `phi_tj = A_tj u.(v_j W_O)` to the answer's logit:
directly, past all later layers and the final norm. The score is `phi` on the needle less `phi` off it, scaled to equal
numbers of keys, averaged over the answer's steps. With the values outside a span set to zero, attention's output is
the span's share of `z`; so both sums come from the answer's rows alone, in O(N) memory.

Controls from the same paper, on the same prompts and rows: attention in place of `phi` (`locos_attention`), no
contrast (`locos_dla`), span mass on the answer's steps less the other steps (`locos_contrastive`), and the largest
span mass of the prompt's last 8 rows (`locos_snapkv`), which needs no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.heads.calls import needed_tokenizer, observe_prompts, rows_from
from workbench.heads.detector import Array, Detector, Kind, Part, Progress, PromptScores
from workbench.heads.settings import Settings
from workbench.kernels import StatisticsRequest
from workbench.models import AttentionCall
from workbench.models.architectures import ends, output_weight
from workbench.tasks import NONE, Task
from workbench.tasks.one_hop import one_hop
from workbench.tracing import Model

SPANS = ("needle", "elsewhere")
# Rows at the prompt's end that SnapKV looks at.
OBSERVED = 8


@dataclass(frozen=True)
class Steps:
    """One prompt's rows: where each begins and what it writes; `first` is the first that is computed."""

    first: int
    answer: Int[Tensor, " step"]
    other: Int[Tensor, " rest"]
    observed: Int[Tensor, " row"]
    gold: Int[Tensor, " step"]
    wrong: Int[Tensor, " step"]

    @staticmethod
    def of(task: Task, prompt: int) -> Steps:
        """`wrong` are the tokens of another prompt's answer, as many as the gold ones."""
        reply, end = task.spans["reply"][prompt].tolist()
        answer = task.answer_positions[prompt][task.answer_positions[prompt] != NONE]
        gold = task.answer_ids[prompt][: len(answer)]
        writing = torch.arange(reply - 1, end - 1)
        first = max(0, reply - OBSERVED)
        return Steps(
            first=first,
            answer=answer - first,
            other=writing[~torch.isin(writing, answer)] - first,
            observed=torch.arange(first, reply) - first,
            gold=gold,
            wrong=_wrong(task, prompt, gold),
        )


def _wrong(task: Task, prompt: int, gold: Tensor) -> Tensor:
    """The first other answer of the task that shares no token with this one, repeated to its length."""
    for step in range(1, len(task)):
        other = task.answer_ids[(prompt + step) % len(task)]
        other = other[other != NONE]
        if not torch.isin(other, gold).any():
            return other.repeat(-(-len(gold) // len(other)))[: len(gold)]
    return gold


class OneHopReader:
    """Collects the scores of every prompt and head, and their nulls, `[prompt, layer, head]` each."""

    def __init__(self, model: Model, task: Task) -> None:
        self.task, self.attachment = task, model.attachment
        self._unembedding = cast(Tensor, ends(model.attachment.hf_model).unembedding.weight)
        self._shape = (len(task), model.spec.n_layers, max(layer.heads for layer in model.spec.layers))
        self.found: dict[str, Float[Tensor, "prompt layer head"]] = {}

    @property
    def scores(self) -> dict[str, Array]:
        """By name, as float64."""
        return {name: np.asarray(value.double().numpy()) for name, value in self.found.items()}

    def read(self, prompt: int, call: AttentionCall) -> None:
        """All scores of one layer on one prompt."""
        steps, weight = Steps.of(self.task, prompt), self._weight(call.layer)
        rows = rows_from(call, steps.first)
        masks = torch.zeros(len(SPANS), call.k.shape[2], device=call.q.device)
        for mask, span in zip(masks, SPANS, strict=True):
            first, last = self.task.spans[span][prompt].tolist()
            mask[first:last] = 1.0
        marks = torch.cat([masks, torch.ones_like(masks[:1])])
        whole = rows.statistics(StatisticsRequest(output=True), key_features=marks.T[None])
        assert whole.output is not None and whole.features is not None
        mass, total = whole.features[0], whole.features[0, ..., -1]
        gold, wrong = (self._direct(weight, whole.output[0], steps.answer, ids) for ids in (steps.gold, steps.wrong))
        self._put(prompt, call.layer, "dla", gold.mean(-1), wrong.mean(-1))
        for at, name in enumerate(("", "_null")):
            ratio = self._ratio(call, masks[at], steps)
            part = self._direct(weight, self._part(rows, masks[at]), steps.answer, steps.gold)
            self._keep(prompt, call.layer, f"locos{name}", (part - ratio * (gold - part)).mean(-1))
            on = mass[:, :, at]
            here = on[:, steps.answer]
            self._keep(
                prompt, call.layer, f"attention{name}", (here - ratio * (total[:, steps.answer] - here)).mean(-1)
            )
            self._keep(prompt, call.layer, f"contrastive{name}", here.mean(-1) - on[:, steps.other].mean(-1))
            self._keep(prompt, call.layer, f"snapkv{name}", on[:, steps.observed].amax(-1))

    def _weight(self, layer: int) -> Float[Tensor, "head dim d_model"]:
        return output_weight(self.attachment.layers[layer], self.attachment.spec.layers[layer]).float()

    def _direct(
        self, weight: Tensor, z: Float[Tensor, "head row dim"], rows: Tensor, ids: Tensor
    ) -> Float[Tensor, "head step"]:
        """What z of these rows gives to the logits of these tokens: o.(W_O u)."""
        directions = self._unembedding[ids.to(self._unembedding.device)].float().to(weight.device)
        onto = torch.einsum("h d m, s m -> h s d", weight, directions)
        return (z[:, rows].to(onto) * onto).sum(-1)

    def _part(self, rows: AttentionCall, mask: Float[Tensor, " key"]) -> Float[Tensor, "head row dim"]:
        """The part of z that comes from a span: attention whose values are zero elsewhere."""
        inside = replace(rows, v=rows.v * mask.to(rows.v.dtype)[:, None])
        output = inside.statistics(StatisticsRequest(output=True)).output
        assert output is not None
        return output[0]

    def _ratio(self, call: AttentionCall, mask: Tensor, steps: Steps) -> Float[Tensor, " step"]:
        """|N| / (|keys| - |N|) over the keys that each step sees."""
        row = steps.answer.to(mask.device) + steps.first
        low = torch.zeros_like(row) if call.window is None else (row - call.window + 1).clamp(min=0)
        counts = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        inside = counts[row + 1] - counts[low]
        outside = row + 1 - low - inside
        return inside / outside.clamp(min=1)

    def _put(self, prompt: int, layer: int, name: str, value: Tensor, null: Tensor) -> None:
        self._keep(prompt, layer, name, value)
        self._keep(prompt, layer, f"{name}_null", null)

    def _keep(self, prompt: int, layer: int, name: str, value: Float[Tensor, " head"]) -> None:
        self.found.setdefault(name, torch.zeros(self._shape))[prompt, layer, : len(value)] = value.detach().cpu()


def _tasks(model: Model, settings: Settings) -> list[Task]:
    tokenizer = needed_tokenizer(model, "one-hop")
    return [one_hop(tokenizer, settings.one_hop_prompts, settings.one_hop_length, settings.seed)]


def _run(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Any:
    assert task is not None
    reader = OneHopReader(model, task)
    observe_prompts(model, task.batch, reader.read, progress)
    return reader.scores


def _score(name: str) -> Callable[[Sequence[Part]], PromptScores]:
    def score(parts: Sequence[Part]) -> PromptScores:
        return PromptScores(
            np.concatenate([part.found[name] for part in parts]),
            np.concatenate([part.found[f"{name}_null"] for part in parts]),
        )

    return score


ONE_HOP = Kind("one_hop", "a needle that implies the answer, the reply given", _tasks, _run)
_PAPER = "LOCOS: Logit-contribution detection of retrieval heads (2026)"
_URL = "https://arxiv.org/abs/2607.01002"
_ELSEWHERE = "the same for as many tokens elsewhere in the text"
_NOTE = (
    "Prompts are ours (answers that stand nowhere in the prompt), short, and teacher-forced: every trial counts, where "
    "the paper decodes NoLiMa and keeps trials with a ROUGE-1 recall of one half. The paper ranks and takes the top 50."
)

LOCOS = Detector(
    name="locos",
    title="LOCOS",
    kind="one_hop",
    probe="answer",
    measures="what the needle's tokens give to the answer's logit through the head, beyond what as many others give",
    null=_ELSEWHERE,
    unit="logit (before the final norm)",
    positions="rows that write the answer",
    threshold=None,
    paper=_PAPER,
    url=_URL,
    score=_score("locos"),
    note=f"{_NOTE} As in its code: raw unembedding rows, the final norm is not folded in, nor is a norm after W_O; "
    "keys are those that the row sees.",
)
LOCOS_ATTENTION = Detector(
    name="locos_attention",
    title="Span attention (LOCOS control)",
    kind="one_hop",
    probe="answer",
    measures="attention to the needle, beyond that to as many other tokens",
    null=_ELSEWHERE,
    unit="attention mass",
    positions="rows that write the answer",
    threshold=None,
    paper=_PAPER,
    url=_URL,
    score=_score("attention"),
    note=f"{_NOTE} LOCOS with phi = A: what the values add is the difference.",
)
LOCOS_DLA = Detector(
    name="locos_dla",
    title="Direct logit attribution (LOCOS control)",
    kind="one_hop",
    probe="answer",
    measures="what the head gives to the answer's logit directly, from all tokens together",
    null="the same for another prompt's answer",
    unit="logit (before the final norm)",
    positions="rows that write the answer",
    threshold=None,
    paper=_PAPER,
    url=_URL,
    score=_score("dla"),
    note=f"{_NOTE} No contrast between spans, and no centring over the vocabulary: a head that always writes the word "
    "scores, too; hence the null.",
)
LOCOS_CONTRASTIVE = Detector(
    name="locos_contrastive",
    title="Contrastive span mass (LOCOS control)",
    kind="one_hop",
    probe="answer",
    measures="attention to the needle on the answer's steps less that on the reply's other steps",
    null=_ELSEWHERE,
    unit="attention mass",
    positions="rows that write the reply",
    threshold=None,
    paper=_PAPER,
    url=_URL,
    score=_score("contrastive"),
    note=f"{_NOTE} Span mass; the code's top-k variant is not offered. The other steps are the reply's lead-in and its "
    "full stop.",
)
LOCOS_SNAPKV = Detector(
    name="locos_snapkv",
    title="Largest span mass before decoding (LOCOS control)",
    kind="one_hop",
    probe="answer",
    measures="the largest attention to the needle of any of the prompt's last 8 rows",
    null=_ELSEWHERE,
    unit="attention mass",
    positions="the prompt's last 8 rows, no reply needed",
    threshold=None,
    paper=_PAPER,
    url=_URL,
    score=_score("snapkv"),
    note=f"{_NOTE} In a chat turn these rows are largely the template's own tokens.",
)
