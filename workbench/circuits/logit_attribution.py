"""Direct logit attribution: what every part of the model writes, read as a share of the answer's logit.

The stream before the final norm is a sum of what the embedding, every head, every output bias and every MLP wrote.
With the norm's scale held where it was in the actual run (`readout`), each of them has a value, and the values add up
to the logit less what the final biases give to any prompt. Signs: positive raises what is asked for.

What is written by way of later parts is not in it (that takes patching), nor what a part does to the scale. Where a
norm follows the output projection (Gemma, OLMo 2), that norm's scale is held as well. Where logits are capped
(Gemma 2), values add up to the logit before the cap. Heads have their value bias in them, as attention sums to one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.circuits.asked import Asked, Run, asked_of
from workbench.circuits.blocks import near
from workbench.circuits.graph import Graph, Scores
from workbench.circuits.inference import mean_effect, q_values, sign_flip_p
from workbench.circuits.readout import Readout, frozen, read_out
from workbench.circuits.recorded import Group, Recorded, by_length, record
from workbench.errors import RequestError
from workbench.models import Attachment
from workbench.models.architectures import ends, output_weight
from workbench.tasks.pairs import PairTask
from workbench.tasks.task import NONE
from workbench.tracing import Model
from workbench.tracing.sites import Site

By = Literal["head", "component"]
Of = Literal["difference", "answer", "foil"]
_NODE = re.compile(r"L(\d+)(?:H(\d+)|\.(\w+))")
# By how much parts may miss the logit, as a share of the largest logit.
MISS = {torch.float64: 1e-6, torch.float32: 1e-3}
COARSE = 5e-2


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What each part of the model gives to a logit, prompt by prompt.

    `values` `[prompt, node]` and `constant` (what the biases of the final norm and of the unembedding give) add up to
    `logits`, the model's own: of the answer, of the foil, or their difference (means, where a prompt has several);
    before any cap. `scale` is what the final norm multiplied by, the same for all nodes of a prompt. `notes` say what
    else was held.
    """

    task: str
    of: Of
    run: str
    nodes: tuple[str, ...]
    values: Float[np.ndarray, "prompt node"]
    constant: Float[np.ndarray, " prompt"]
    logits: Float[np.ndarray, " prompt"]
    scale: Float[np.ndarray, " prompt"]
    notes: tuple[str, ...] = ()
    seed: int = 0

    @property
    def error(self) -> float:
        """The largest difference between the sum of all parts and the model's own logit."""
        return float(np.abs(self.values.sum(1) + self.constant - self.logits).max())

    def table(self) -> pd.DataFrame:
        """One row a node.

        `value` is the mean over prompts with its bootstrap interval, `share` of the mean of all nodes together (NaN
        where they cancel), `p` a sign-flip permutation test over prompts, `q` Benjamini-Hochberg over nodes, `rank`
        from the most positive.
        """
        effects = self.values.T
        found = mean_effect(effects, self.seed)
        p = sign_flip_p(effects, self.seed)
        total = self.values.sum(1).mean()
        size = np.abs(self.values).sum(1).mean()
        share = found.value / total if abs(total) > 1e-6 * size else np.full_like(found.value, np.nan)
        frame = self._places().assign(of=self.of, run=self.run, n=len(self.values))
        frame = frame.assign(value=found.value, low=found.low, high=found.high, share=share, p=p, q=q_values(p))
        return frame.assign(rank=frame["value"].rank(ascending=False, method="first").astype(int))

    def per_prompt(self) -> pd.DataFrame:
        """One row a node and prompt."""
        prompts = len(self.values)
        places = self._places()
        long = places.loc[places.index.repeat(prompts)].reset_index(drop=True)
        return long.assign(prompt=np.tile(np.arange(prompts), len(self.nodes)), value=self.values.T.reshape(-1))

    def scores(self, graph: Graph) -> Scores:
        """Values of a model's writers on its graph, to be compared and evaluated with other methods'.

        Learned positions belong to `embed`; biases of output projections to no writer. Refused by sublayers.
        """
        values = np.zeros((len(self.values), len(graph.writers)))
        for number, node in enumerate(self.nodes):
            if not node.endswith(".bias"):
                values[:, graph.writer("embed" if node == "positions" else node)] += self.values[:, number]
        return Scores(
            graph, "direct logit attribution", self.task, self.of, len(values), self.seed, nodes=values.mean(0),
            node_per_prompt=values, notes=self.notes, work={"forwards": len(values)}, direction="none", ablation="none",
        )  # fmt: skip

    def _places(self) -> pd.DataFrame:
        found = [_NODE.fullmatch(node) for node in self.nodes]
        kinds = [node if match is None else match[3] or "head" for node, match in zip(self.nodes, found, strict=True)]
        layers = [None if match is None else int(match[1]) for match in found]
        heads = [None if match is None or match[2] is None else int(match[2]) for match in found]
        return pd.DataFrame(
            {
                "node": self.nodes,
                "kind": kinds,
                "layer": pd.array(layers, dtype="Int64"),
                "head": pd.array(heads, dtype="Int64"),
            }
        )


@torch.no_grad()
def direct_logit_attribution(
    model: Model,
    task: PairTask | Asked,
    *,
    by: By = "head",
    of: Of | None = None,
    run: Run = "clean",
    seed: int = 0,
    memory_limit: int | None = None,
) -> LogitAttribution:
    """What every head and MLP, or every sublayer (`by="component"`), gives to the logit that the task reads.

    Args:
        task: pairs, of which one `run` is read, or prompts of one's own (`ask`).
        by: "head": `embed`, `L5H3`, `L5.bias` (of the output projection, no head's), `L5.mlp`; "component": `embed`,
            `L5.attn`, `L5.mlp`. Learned positions (`positions`) stand apart from `embed` where a model has them.
        of: the answer's logit less the foil's ("difference", the default where there are foils), or either alone.
        memory_limit: bytes that the recorded run may take.

    Raises:
        RequestError: where the parts do not add up to the model's logit, so that none of them can be trusted.
    """
    if by not in get_args(By):
        raise RequestError(f"by={by!r}: choose from {', '.join(get_args(By))}.")
    asked = asked_of(task, run)
    chosen = chosen_contrast(asked, of)
    found: list[tuple[Group, LogitAttribution]] = []
    for group in by_length(asked.batch, asked.position):
        base = record(model, group.cut(asked.batch), _sites(model, by), memory_limit)
        readout = group_readout(model, asked, group, base, chosen)
        nodes, values = zip(*_parts(model.attachment, base, readout, by), strict=True)
        logits, notes = own_logits(model, asked, group, base, chosen)
        own = LogitAttribution(
            asked.name,
            chosen,
            run_name(task, run),
            nodes,
            torch.stack(values, 1).cpu().numpy(),
            readout.constant.cpu().numpy(),
            logits,
            readout.scale.cpu().numpy(),
            (*held(model), *notes),
            seed,
        )
        _refuse_miss(model, own)
        found.append((group, own))
    return _joined(len(asked), found)


def run_name(task: PairTask | Asked, run: Run) -> str:
    """Which run results are of."""
    return "asked" if isinstance(task, Asked) else run


def chosen_contrast(asked: Asked, of: Of | None) -> Of:
    """What is asked for, refused where the prompts do not have it."""
    if of is not None and of not in get_args(Of):
        raise RequestError(f"of={of!r}: choose from {', '.join(get_args(Of))}.")
    if of in ("difference", "foil") and not asked.contrast:
        raise RequestError(f"{asked.name} has prompts without a foil, which of={of!r} needs; use of='answer'.")
    return of or ("difference" if asked.contrast else "answer")


def _ids(asked: Asked, group: Group, of: Of) -> tuple[Tensor, Tensor]:
    """Ids for and against, of the prompts of a group."""
    answers, foils = asked.answers[group.prompts], asked.foils[group.prompts]
    nothing = torch.full_like(foils[:, :1] if foils.shape[1] else answers[:, :1], NONE)
    if of == "answer":
        return answers, nothing
    return (answers, foils) if of == "difference" else (foils, nothing)


def group_readout(model: Model, asked: Asked, group: Group, base: Recorded, of: Of) -> Readout:
    """How the logit is read off the last layer's stream at the token that is read."""
    stream = base.at("resid_post", model.spec.n_layers - 1)[:, -1]
    return read_out(model.attachment, stream, *(ids.to(stream.device) for ids in _ids(asked, group, of)))


def own_logits(
    model: Model, asked: Asked, group: Group, base: Recorded, of: Of
) -> tuple[Float[np.ndarray, " prompt"], tuple[str, ...]]:
    """The model's own logit or difference, before its cap, and what is to be said about that."""
    logits, attachment = base.logits, model.attachment
    cap = getattr(attachment.hf_model.config, "final_logit_softcapping", None)
    notes: tuple[str, ...] = ()
    if cap is not None:
        end, stream = ends(attachment.hf_model), base.at("resid_post", model.spec.n_layers - 1)[:, -1]
        uncapped = cast(Tensor, end.unembedding(stream if end.final_norm is None else end.final_norm(stream)))
        if not near(torch.tanh(uncapped / cap) * cap, logits.to(uncapped)):
            raise RequestError(f"{model.spec.architecture}: its logits are not tanh-capped at {cap:g}, as it says.")
        logits, notes = uncapped, (f"logits are those before the model caps them at {cap:g}",)
    sums = []
    for ids in _ids(asked, group, of):
        ids = ids.to(logits.device)
        there = (ids != NONE).double()
        sums.append((logits.double().gather(1, ids.clamp(min=0)) * there).sum(1) / there.sum(1).clamp(min=1))
    return (sums[0] - sums[1]).cpu().numpy(), notes


def held(model: Model) -> tuple[str, ...]:
    """Which norms are held at the scale of the run."""
    notes = []
    if not isinstance(ends(model.attachment.hf_model).final_norm, nn.Identity | None):
        notes.append("the final norm's scale is that of the actual run; centring, where it centres, is exact")
    if any(layer.attention_write is not layer.projection for layer in model.attachment.layers):
        notes.append("so is the scale of the norm after each output projection")
    return tuple(notes)


def _sites(model: Model, by: By) -> Iterator[tuple[Site, int]]:
    """What the run has to hold."""
    yield "resid_pre", 0
    yield "resid_post", model.spec.n_layers - 1
    for layer in model.attachment.layers:
        if by == "head":
            yield "z", layer.index
        else:
            yield "attn_out", layer.index
        if layer.mlp_write is not None:
            yield "mlp_out", layer.index


def _parts(attachment: Attachment, base: Recorded, readout: Readout, by: By) -> Iterator[tuple[str, Tensor]]:
    """Name and value `[prompt]` of every part."""
    yield from _embedded(attachment, base, readout)
    for layer in attachment.layers:
        if by == "component":
            yield f"L{layer.index}.attn", _dot(base.at("attn_out", layer.index)[:, -1], readout.vector)
        else:
            yield from _heads(attachment, layer.index, base.at("z", layer.index)[:, -1], readout)
        if layer.mlp_write is not None:
            yield f"L{layer.index}.mlp", _dot(base.at("mlp_out", layer.index)[:, -1], readout.vector)


def _embedded(attachment: Attachment, base: Recorded, readout: Readout) -> Iterator[tuple[str, Tensor]]:
    """What enters layer 0: the token's embedding, and apart from it what learned positions add."""
    entering = base.at("resid_pre", 0)[:, -1]
    if attachment.spec.rotary:
        yield "embed", _dot(entering, readout.vector)
        return
    embedding = ends(attachment.hf_model).embedding
    token = cast(Tensor, embedding(base.batch.ids[:, -1].to(entering.device)))
    yield "embed", _dot(token, readout.vector)
    yield "positions", _dot(entering - token, readout.vector)


def head_readings(
    attachment: Attachment, layer: int, z: Float[Tensor, "prompt head dim"], readout: Readout
) -> tuple[Float[Tensor, "prompt head dim"], Tensor | None]:
    """The vectors that read each head's z, and what the output projection's bias gives (None without one)."""
    modules = attachment.layers[layer]
    reading = readout.vector
    if modules.attention_write is not modules.projection:
        raw = cast(Tensor, modules.projection(z.flatten(1)))
        after = frozen(attachment, modules.attention_write, raw)
        if after.bias is not None:
            raise RequestError(f"layer {layer}: the norm after the output projection has a bias, which is no head's.")
        reading = after.pulled(reading)
    weight = output_weight(modules, attachment.spec.layers[layer]).detach().double()
    bias = cast("Tensor | None", getattr(modules.projection, "bias", None))
    constant = None if bias is None else reading @ bias.detach().double()
    return torch.einsum("hed,pd->phe", weight, reading), constant


def _heads(attachment: Attachment, layer: int, z: Tensor, readout: Readout) -> Iterator[tuple[str, Tensor]]:
    readings, bias = head_readings(attachment, layer, z, readout)
    values = (z.double() * readings).sum(-1)
    for head in range(values.shape[1]):
        yield f"L{layer}H{head}", values[:, head]
    if bias is not None:
        yield f"L{layer}.bias", bias


def _dot(part: Float[Tensor, "prompt d_model"], vector: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " prompt"]:
    return (part.to(vector) * vector).sum(-1)


def _refuse_miss(model: Model, found: LogitAttribution) -> None:
    allowed = MISS.get(model.attachment.dtype, COARSE) * max(1.0, float(np.abs(found.logits).max()))
    if not found.error <= allowed:
        raise RequestError(
            f"{model.spec.architecture}: the parts miss the model's logit by {found.error:.3g}, so that something is "
            "written to the stream, or done to logits, that is not known here. Use activation patching instead."
        )


def _joined(prompts: int, found: list[tuple[Group, LogitAttribution]]) -> LogitAttribution:
    """Groups put back into the order of the task."""
    order = np.argsort(np.concatenate([group.prompts.numpy() for group, _ in found]))
    assert len(order) == prompts

    def whole(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        values: np.ndarray[Any, np.dtype[np.float64]] = np.concatenate([getattr(one, name) for _, one in found])[order]
        return values

    first = found[0][1]
    return LogitAttribution(
        first.task, first.of, first.run, first.nodes, whole("values"), whole("constant"), whole("logits"),
        whole("scale"), first.notes, first.seed,
    )  # fmt: skip
