"""Name movers and their opposites: does a head that reads a name write that name, or push it down?

The residual stream after block 0 at each name goes, normalised, through a head's W_V W_O, the final norm and the
unembedding; a hit is the name among the five highest logits (copying) or the five lowest (copy suppression: the same
with -OV). Wang et al. 2022, Interpretability in the wild. Attention is not involved: the head is taken to attend fully.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Array, Detector, Kind, Part, Progress, PromptScores
from workbench.heads.settings import Settings
from workbench.heads.weights import HeadWeights, weights_for
from workbench.models import Batch
from workbench.models.projections import PROJECTIONS
from workbench.tasks import Task
from workbench.tasks.encoding import default_prefix, encode
from workbench.tracing import Model

NAMES = tuple(
    """
    Adam Alice Amy Andrew Anna Anthony Barbara Ben Brian Carol Charles Chris Claire Daniel David Diana Edward Elizabeth
    Emily Emma Eric Frank George Grace Hannah Harry Helen Henry Jack Jacob James Jane Jason Jennifer Jessica John Joseph
    Julia Karen Kate Kevin Laura Lisa Lucy Mark Martin Mary Matthew Michael Nancy Nick Nicole Oliver Paul Peter Rachel
    Richard Robert Rose Ruth Sam Sarah Simon Sophie Stephen Susan Thomas Tom Victor William
    """.split()
)
TEMPLATES = (
    "When{io} and{s} went to the market,{s} handed a basket to",
    "After{io} and{s} had talked for a while,{s} lent a book to",
    "Once{io} and{s} were done with the garden,{s} gave the keys to",
    "While{io} and{s} waited for the train,{s} passed a sandwich to",
)
TOP = 5
# Prompts whose logits over the vocabulary are held at once.
_TOGETHER = 8


@dataclass(frozen=True)
class Named:
    """Shares of names among the highest (1) and the lowest (-1) logits, `[prompt, layer, head]`.

    `own` are the names that were read, `other` names that are not in the prompt.
    """

    own: Mapping[int, Array]
    other: Mapping[int, Array]


def name_tokens(tokenizer: Any) -> dict[str, int]:
    """The names that are one token with a leading space."""
    ids = {name: tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in NAMES}
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = {name: row[0] for name, row in ids.items() if len(row) == 1 and row[0] != unknown}
    if len(found) < 5:
        raise RequestError(f"{len(found)} of the {len(NAMES)} names are single tokens; five are needed.")
    return found


def name_prompts(tokenizer: Any, count: int, seed: int) -> Task:
    """Sentences with two names, one of them twice: columns of IO, S and S2 in the spans of these names."""
    if count < 1:
        raise RequestError(f"name_prompts={count}: ask for at least one prompt.")
    names, prefix = name_tokens(tokenizer), default_prefix(tokenizer)
    generator = np.random.default_rng(seed)
    rows, texts, places, others = [], [], [], []
    for index in range(count):
        io, s, *absent = generator.choice(sorted(names), 5, replace=False)
        text = TEMPLATES[index % len(TEMPLATES)].format(io=f" {io}", s=f" {s}")
        found = encode(tokenizer, text)
        ids = list(found.ids)
        at = [place for place, token in enumerate(ids) if token in (names[io], names[s])]
        if [ids[place] for place in at] != [names[io], names[s], names[s]]:
            raise RequestError(f"{text!r}: the tokenizer does not keep the names of this prompt as single tokens.")
        rows.append([*prefix.ids, *ids])
        texts.append(text)
        places.append([len(prefix.ids) + place for place in at])
        others.append([names[name] for name in absent])
    batch, nothing = Batch.from_ids(rows, texts=texts), torch.empty(count, 0, dtype=torch.long)
    where = torch.tensor(places)
    return Task(
        name="names",
        caption=f"{count} sentences with two names, one twice; {prefix.policy}.",
        seed=seed,
        batch=batch,
        specials=prefix.policy,
        answer_ids=nothing,
        answer_positions=nothing,
        spans={label: torch.stack([where[:, i], where[:, i] + 1], dim=1) for i, label in enumerate(("IO", "S", "S2"))},
        settings={"prompts": count, "templates": len(TEMPLATES)},
        info=tuple({"other": int(row[0]), "other2": int(row[1]), "other3": int(row[2])} for row in others),
    )


def _places(task: Task) -> Int[Tensor, "prompt name"]:
    return torch.stack([task.spans[label][:, 0] for label in ("IO", "S", "S2")], dim=1)


def normalised(weights: HeadWeights, residual: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """What folded weights read: the residual stream centred, where the model's norm centres, and of unit size."""
    centres = isinstance(
        weights.attachment.layers[0].block.get_submodule(PROJECTIONS[weights.spec.architecture].norm or ""),
        torch.nn.LayerNorm,
    )
    residual = residual - residual.mean(-1, keepdim=True) if centres else residual
    return residual / residual.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)


def hits(
    weights: HeadWeights, layer: int, read: Float[Tensor, "row d_model"], ids: Int[Tensor, "row asked"]
) -> dict[int, Bool[Tensor, "row asked head"]]:
    """Whether what each head writes on reading a row has a token among its five highest (1) or lowest (-1) logits."""
    found = weights.queries(layer)
    kept: dict[int, list[Tensor]] = {1: [], -1: []}
    for rows, asked in zip(torch.split(read, _TOGETHER), torch.split(ids, _TOGETHER), strict=True):
        written = (rows @ found.value @ found.output).transpose(0, 1)
        # One flat product: batches of few rows are slow.
        logits = (written.flatten(0, 1) @ weights.unembedding).reshape(*written.shape[:2], -1)
        for sign, of_sign in kept.items():
            top = logits.topk(TOP, dim=-1, largest=sign > 0).indices
            of_sign.append((top[:, None] == asked[:, :, None, None]).any(-1))
    return {sign: torch.cat(of_sign) for sign, of_sign in kept.items()}


def _hits(sign: int) -> Callable[[Sequence[Part]], PromptScores]:
    def score(parts: Sequence[Part]) -> PromptScores:
        (part,) = parts
        found: Named = part.found
        return PromptScores(found.own[sign], found.other[sign])

    return score


def _tasks(model: Model, settings: Settings) -> list[Task]:
    if model.tokenizer is None:
        raise RequestError("Detectors on names need a tokenizer; load the model with one.")
    return [name_prompts(model.tokenizer, settings.name_prompts, settings.seed)]


def _run(
    model: Model, task: Task | None, detectors: Sequence[Detector], settings: Settings, progress: Progress | None
) -> Named:
    """Both detectors read the same logits, so hits are counted here."""
    assert task is not None
    weights, at = weights_for(model, settings), _places(task)
    trace = model.trace(task.batch, sites=["blocks.0.hook_resid_post"], progress=progress)
    residual = trace.site("resid_post", 0)[torch.arange(len(task))[:, None], at].flatten(0, 1)
    read = normalised(weights, residual.to(weights.device, weights.dtype))
    other = torch.tensor([[int(info[key] or 0) for key in ("other", "other2", "other3")] for info in task.info])
    asked = torch.stack([task.batch.ids.gather(1, at), other], dim=-1).flatten(0, 1).to(weights.device)
    layers = [hits(weights, layer, read, asked) for layer in range(model.spec.n_layers)]

    def share(place: int) -> dict[int, Array]:
        """The three names of a prompt together."""
        return {
            sign: weights.padded([one[sign][:, place].reshape(*at.shape, -1).double().mean(1) for one in layers])
            for sign in (1, -1)
        }

    return Named(share(0), share(1))


NAMED = Kind("names", "sentences with names", _tasks, _run)

_PAPER, _URL = "Wang et al. 2022, Interpretability in the wild", "https://arxiv.org/abs/2211.00593"
_NOTE = (
    "The head's own norm weights are folded into W_V, as in the released code; its biases are left out, which that "
    "code adds. The five logits are of the whole vocabulary."
)

NAME_COPYING = Detector(
    name="name_copying",
    title="Name copying",
    kind="names",
    measures="share of names (three a prompt) that are among the five highest logits of what the head would write on "
    "reading them alone",
    null="the same for names that are not in the prompt",
    unit="share of names",
    positions="the three names of each sentence, after block 0",
    threshold=0.95,
    paper=_PAPER,
    url=_URL,
    score=_hits(1),
    note=_NOTE + " The paper's name movers copy more than 95 % of names, its average head less than 20 %; both figures "
    "are as cited elsewhere, and other models may lack such heads.",
)
NAME_SUPPRESSION = Detector(
    name="name_suppression",
    title="Name suppression",
    kind="names",
    measures="share of names (three a prompt) that are among the five lowest logits of what the head would write on "
    "reading them alone",
    null="the same for names that are not in the prompt",
    unit="share of names",
    positions="the three names of each sentence, after block 0",
    threshold=0.95,
    paper=_PAPER,
    url=_URL,
    score=_hits(-1),
    note=_NOTE + " The same measure with -OV: negative name movers, of which GPT-2's L10H7 is the best known (copy "
    "suppression). 98 % for them against 12 % is as cited elsewhere.",
)
