"""Information flow routes: what a prediction is made of, from one forward pass (Ferrando & Voita 2024, 2403.00824).

Each write of the residual stream is a sum of parts, and a part counts for as much as it brings the sum closer, in the
L1 norm:  c_j = max(0, |y| - |y - z_j|), over the sum of all c.  At the attention of a layer and a token the parts are
the stream as it was and, for every head and source token, the attention weight times what that head writes of the
source's value (value biases are in it, the projection's is nobody's); at the MLP the stream and the MLP's output.

From the token that is read, routes go back through parts of at least `threshold`, layer by layer, and only what
they reach is worked out.  There are no corrupt prompts and no target token: parts count whether they help or not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.circuits.blocks import Blocks
from workbench.circuits.discovery.found import Found, Progress
from workbench.circuits.forks import writes
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Group, Recorded, groups, record
from workbench.errors import RequestError
from workbench.models import AttentionCall
from workbench.models.architectures import output_weight
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

# No part counts for less, so that parts of nothing are well defined.
LEAST = 1e-5
# Numbers of one comparison of parts with their sum.
ENTRIES = 1 << 22


def proximity(
    parts: Float[Tensor, "*place part d_model"], whole: Float[Tensor, "*place d_model"]
) -> Float[Tensor, "*place part"]:
    """max(0, |y| - |y - z|) in the L1 norm, before it is made to sum to one."""
    near = whole.abs().sum(-1, keepdim=True) - (whole[..., None, :] - parts).abs().sum(-1)
    return near.clamp(min=LEAST)


@torch.no_grad()
def flow_routes(
    model: Model,
    task: PairTask,
    *,
    threshold: float = 0.04,
    renormalise: bool = False,
    edges: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    memory_limit: int | None = None,
) -> Found:
    """Routes of the clean prompts, and scores of nodes and edges.

    `nodes` is the share of the flow that passes through each: 1 at the token that is read, divided at each block in
    proportion to the parts that are kept (`renormalise` makes these sum to one again; otherwise what is cut is lost).
    `edges` has each writer's part of each reader's input, over all tokens (of the logits at the token read), as MIB
    scores them; q, k and v of a layer read the same stream and get the same.  `log` is the graph: one row a kept part,
    with its prompt, layer, block ("attention", "mlp", or "both" where they are parallel), kind ("head", "residual",
    "mlp"), head, query and key tokens, and contribution; the parts of a block at a token sum to one before the cut.
    """
    if not 0 <= threshold < 1:
        raise RequestError(f"threshold={threshold}: a share of at least 0 and below 1 is needed (usually .01 to .1).")
    began = time.perf_counter()
    graph = Graph.of(model)
    nodes = np.zeros((len(task), len(graph.writers)))
    scores = np.full((len(task), *graph.exists.shape), np.nan, dtype=np.float32) if edges else None
    tables, done = [], 0
    for group in groups(task):
        layers = [("resid_pre", layer) for layer in range(model.spec.n_layers)]
        run = record(model, group.cut(task.clean), layers, memory_limit)  # type: ignore[arg-type]
        rows = group.prompts.numpy()
        walk = _Walk(model, graph, group, run, threshold, renormalise)
        tables.append(walk.back())
        nodes[rows] = walk.nodes
        if scores is not None:
            scores[rows] = _read_parts(model, graph, run)
        done += len(rows)
        if progress is not None:
            progress(done, len(task))
    return Found(
        graph, "information flow routes", task.name, "contribution", len(task), seed,
        edges=None if scores is None else scores.mean(0, dtype=np.float64), nodes=nodes.mean(0), per_prompt=scores,
        node_per_prompt=nodes, notes=(f"parts of at least {threshold}; without sign, and without corrupt prompts",),
        work={"forwards": (2 + edges) * len(task), "backwards": 0}, seconds=time.perf_counter() - began,
        direction="none", ablation="none", log=pd.concat(tables, ignore_index=True),
    )  # fmt: skip


@dataclass(eq=False)
class _Layer:
    """One layer run again: its call over all prompts, and the stream in it `[prompt, token, d_model]`."""

    call: AttentionCall
    before: Tensor
    middle: Tensor
    mlp: Tensor | None
    after: Tensor


@dataclass(eq=False)
class _Walk:
    """From the last token back, all prompts of a group together."""

    model: Model
    graph: Graph
    group: Group
    run: Recorded
    threshold: float
    renormalise: bool
    tables: list[pd.DataFrame] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompts, self.tokens = self.run.batch.ids.shape
        self.blocks = Blocks(self.model.attachment, self.tokens)
        self.nodes = np.zeros((self.prompts, len(self.graph.writers)))
        device = self.run.at("resid_pre", 0).device
        # How much of the prediction comes through each token's stream.
        self.flow = torch.zeros(self.prompts, self.tokens, dtype=torch.float64, device=device)
        self.flow[:, -1] = 1.0
        self.reached: Bool[Tensor, "prompt token"] = self.flow > 0

    def back(self) -> pd.DataFrame:
        for layer in reversed(range(self.model.spec.n_layers)):
            seen = self._layer(layer)
            if seen.mlp is not None and not self.model.spec.parallel:
                self._mlp(layer, seen)
            self._attention(layer, seen)
        self.nodes[:, 0] = self.flow.sum(1).cpu().numpy()
        return pd.concat(self.tables, ignore_index=True)

    def _layer(self, layer: int) -> _Layer:
        """The layer once more, for its q, k, v and what it adds."""
        before = self.run.at("resid_pre", layer)
        calls, added = list[AttentionCall](), dict[str, Tensor]()

        def split(value: Tensor) -> Tensor:
            return value[0].reshape(len(value[0]), self.prompts, self.tokens, -1).transpose(0, 1)

        def attend(call: AttentionCall) -> Tensor:
            q, k, v = (split(value) for value in (call.q, call.k, call.v))
            calls.append(replace(call, q=q, k=k, v=v, key_start=None, key_end=None))
            return calls[0].output().transpose(0, 1).flatten(1, 2)[None]

        def note(name: str, value: Tensor) -> Tensor:
            added[name] = value.view_as(before)
            return value

        positions = torch.arange(self.tokens, device=before.device).repeat(self.prompts)
        rewrites = {name: lambda value, name=name: note(name, value) for name in ("attn_out", "mlp_out")}
        after = self.blocks.run(layer, before.flatten(0, 1), positions, attend, rewrites).view_as(before)
        return _Layer(calls[0], before, before + added["attn_out"], added.get("mlp_out"), after)

    def _kept(self, share: Float[Tensor, "reached part"]) -> Float[Tensor, "reached part"]:
        """Normalised contributions with those below the threshold gone."""
        share = share / share.sum(-1, keepdim=True)
        share = torch.where(share >= self.threshold, share, 0)
        return share / share.sum(-1, keepdim=True).clamp(min=LEAST) if self.renormalise else share

    def _mlp(self, layer: int, seen: _Layer) -> None:
        assert seen.mlp is not None
        prompt, token = self.reached.nonzero(as_tuple=True)
        parts = torch.stack([seen.middle[prompt, token], seen.mlp[prompt, token]], 1).double()
        share = self._kept(proximity(parts, seen.after[prompt, token].double()))
        self._note(layer, "mlp", "residual", prompt, token, token, share[:, 0])
        self._note(layer, "mlp", "mlp", prompt, token, token, share[:, 1])
        through = self.flow[prompt, token]
        place = self.graph.layers[layer].mlp_out.start
        np.add.at(self.nodes[:, place], prompt.cpu().numpy(), (through * share[:, 1]).cpu().numpy())
        # The MLP reads the stream of the same token.
        self.flow[prompt, token] = through * share.sum(1)
        self.reached[prompt, token] = share.sum(1) > 0

    def _attention(self, layer: int, seen: _Layer) -> None:
        before, reached = torch.zeros_like(self.flow), torch.zeros_like(self.reached)
        parallel = self.model.spec.parallel and seen.mlp is not None
        whole, block = (seen.after, "both") if parallel else (seen.middle, "attention")
        places = self.graph.layers[layer]
        for prompt, token, heads in self._contributions(layer, seen, whole):
            end = whole[prompt, token].double()
            same = [
                seen.before[prompt, token],
                *([seen.mlp[prompt, token]] if parallel and seen.mlp is not None else []),
            ]
            own = proximity(torch.stack(same, 1).double(), end)
            share = self._kept(torch.cat([own, heads.flatten(1)], 1))
            own, heads = share[:, : len(same)], share[:, len(same) :].view_as(heads)
            through = self.flow[prompt, token]
            for kind, column in zip(("residual", "mlp"), own.T, strict=False):
                self._note(layer, block, kind, prompt, token, token, column)
            row, head, key = heads.nonzero(as_tuple=True)
            self._note(layer, block, "head", prompt[row], token[row], key, heads[row, head, key], head)
            before.index_put_((prompt, token), through * own.sum(1), accumulate=True)
            before.index_put_((prompt[row], key), through[row] * heads[row, head, key], accumulate=True)
            reached[prompt[row], key] = True
            reached[prompt, token] |= own.sum(1) > 0
            who = prompt.cpu().numpy()
            np.add.at(self.nodes[:, places.heads], who, (through[:, None] * heads.sum(2)).cpu().numpy())
            if parallel:
                np.add.at(self.nodes[:, places.mlp_out.start], who, (through * own[:, 1]).cpu().numpy())
        self.flow, self.reached = before, reached

    def _contributions(
        self, layer: int, seen: _Layer, whole: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Float[Tensor, "reached head key"]]]:
        """Prompts and tokens that are reached, some at a time, and what heads bring them from each source token."""
        weight = output_weight(self.model.attachment.layers[layer], self.model.spec.layers[layer]).detach().double()
        group = seen.call.q.shape[1] // seen.call.k.shape[1]
        width = self.tokens * whole.shape[-1]
        for token in self.reached.any(0).nonzero().flatten().tolist():
            call, keys = seen.call, token + 1
            own = replace(call, q=call.q[:, :, token:keys], k=call.k[:, :, :keys], v=call.v[:, :, :keys])
            every = self.reached[:, token].nonzero().flatten()
            for prompt in torch.split(every, max(1, ENTRIES // width)):
                pattern = own.pattern(torch.float64)[prompt, :, 0]
                end = whole[prompt, token].double()
                found = pattern.new_zeros(len(prompt), pattern.shape[1], self.tokens)
                for head in range(pattern.shape[1]):
                    moved = own.v[prompt, head // group].double() @ weight[head]
                    found[:, head, :keys] = proximity(pattern[:, head, :, None] * moved, end)
                if own.window is not None:
                    found[:, :, : max(0, keys - own.window)] = 0
                yield prompt, torch.full_like(prompt, token), found

    def _note(
        self,
        layer: int,
        block: str,
        kind: str,
        prompt: Tensor,
        query: Tensor,
        key: Tensor,
        share: Tensor,
        head: Tensor | None = None,
    ) -> None:
        there = share > 0
        if not bool(there.any()):
            return
        table = pd.DataFrame(
            {
                "prompt": self.group.prompts[prompt[there].cpu()].numpy(),
                "layer": layer,
                "block": block,
                "kind": kind,
                "head": -1 if head is None else head[there].cpu().numpy(),
                "query": query[there].cpu().numpy(),
                "key": key[there].cpu().numpy(),
                "contribution": share[there].cpu().numpy(),
            }
        )
        self.tables.append(table)


def _read_parts(model: Model, graph: Graph, run: Recorded) -> Float[np.ndarray, "prompt writer reader"]:
    """Each writer's part of each reader's input, over tokens; NaN where there is no edge."""
    every = writes(model, run.batch)
    scores = np.full((every.shape[1], *graph.exists.shape), np.nan, dtype=np.float32)
    stream = every[0]
    for places, modules in zip(graph.layers, model.attachment.layers, strict=True):
        before = places.heads.start
        shares = _shares(every[:before], stream)
        scores[:, :before, places.q.start : places.v.stop] = shares
        if model.spec.parallel:
            scores[:, :before, places.mlp] = shares
        stream = stream + every[places.heads].sum(0)
        bias = getattr(modules.projection, "bias", None)
        stream = stream if bias is None else stream + bias.detach()
        if modules.mlp is not None:
            if not model.spec.parallel:
                scores[:, : places.heads.stop, places.mlp] = _shares(every[: places.heads.stop], stream)
            stream = stream + every[places.mlp_out].sum(0)
    scores[:, :, -1:] = _shares(every[:, :, -1:], stream[:, -1:])
    return scores


def _shares(
    every: Float[Tensor, "writer prompt token d_model"], whole: Float[Tensor, "prompt token d_model"]
) -> Float[np.ndarray, "prompt writer 1"]:
    near = torch.stack([proximity(one[:, :, None], whole)[..., 0] for one in every], -1)
    found: np.ndarray = (near / near.sum(-1, keepdim=True)).mean(1)[..., None].float().cpu().numpy()
    return found
