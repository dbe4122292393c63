"""A network that is linear on its prompts: patching, attribution and sums over paths must all agree.

Attention patterns depend on positions alone (queries and keys read coordinates that no token and no node writes), there
is no norm, and each MLP's ReLUs stay open for every prompt by their biases.  Clean and corrupt prompts differ in tokens
only, so every effect is a product of matrices, worked out here in float64 from the weights without running the model.
Zero ablation is linear as well, but for the biases, which stay.

All nodes and edges matter, except queries and keys.  Effects of sets of edges add up; those of edges into the logits
sum to the whole gap.
"""

from __future__ import annotations

import re

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.dynamics.toy import ToyConfig, ToyModel
from workbench.dynamics.truth import PAIRS, Edge, Estimate, GroundTruth, Outcome, known_circuit
from workbench.dynamics.wiring import attached, empty_model, head_weights, mlp_weights
from workbench.models import Batch
from workbench.tasks.pairs import PairTask

LAYERS, HEADS, KV_HEADS = 2, 4, 2
VOCAB, TOKENS, CONTENT, HEAD_DIM, HIDDEN = 12, 6, 10, 5, 7
# Above anything that an MLP reads on these prompts.
OPEN = 8.0


def linear_network(*, seed: int = 0) -> GroundTruth:
    """Two layers of four query heads on two key/value heads and an MLP each, random weights, every effect known."""
    generator = torch.Generator().manual_seed(seed)
    model = _model(generator)
    clean = torch.randint(0, VOCAB, (PAIRS, TOKENS), generator=generator)
    # Some of the tokens are others in the corrupt prompt, one of them always.
    swap = torch.rand(PAIRS, TOKENS, generator=generator) < 0.5
    swap[:, 2] = True
    shift = torch.randint(1, VOCAB, (PAIRS, TOKENS), generator=generator)
    corrupt = torch.where(swap, (clean + shift) % VOCAB, clean)
    answers = torch.stack([torch.randperm(VOCAB, generator=generator)[:2] for _ in range(PAIRS)])
    sums = _Sums(model, clean, corrupt, answers)
    outcomes, estimates = sums.told()
    nodes = ["embed"] + [f"L{layer}H{h}" for layer in range(LAYERS) for h in range(HEADS)]
    nodes += [f"L{layer}KV{g}" for layer in range(LAYERS) for g in range(KV_HEADS)]
    nodes += [f"L{layer}.mlp" for layer in range(LAYERS)]
    caption = "a linear network: fixed patterns, no norm, open ReLUs"
    everywhere = torch.ones_like(clean, dtype=torch.bool)
    task = PairTask(
        name="linear",
        caption=caption,
        seed=seed,
        specials="none",
        clean=Batch(clean, everywhere),
        corrupt=Batch(corrupt, everywhere),
        answers=answers[:, :1],
        foils=answers[:, 1:],
        position=torch.full((PAIRS,), TOKENS - 1),
        circuit=known_circuit("linear", caption, nodes, sums.edges),
    )
    return GroundTruth(
        "linear", attached(model), task, frozenset(nodes), frozenset(sums.edges),
        sums.clean.float(), sums.corrupt.float(), tuple(outcomes), tuple(estimates),
    )  # fmt: skip


def _model(generator: torch.Generator) -> ToyModel:
    """Tokens write the first `CONTENT` coordinates, positions the others; only queries and keys read the latter."""
    config = ToyConfig(
        vocab_size=VOCAB,
        hidden_size=CONTENT + TOKENS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=HIDDEN,
        max_position_embeddings=TOKENS,
        layer_norm=False,
        bos_token_id=None,
    )
    model = empty_model(config)

    def draw(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(*shape, generator=generator) / float(shape[-1]) ** 0.5
        return drawn

    model.token_embedding.weight.data[:, :CONTENT] = draw(VOCAB, CONTENT)
    model.position_embedding.weight.data[:, CONTENT:] = torch.eye(TOKENS)
    model.unembedding.weight.data[:, :CONTENT] = draw(VOCAB, CONTENT)
    for layer in range(LAYERS):
        for head in range(HEADS):
            w = head_weights(model, layer, head)
            w.query[:, CONTENT:] = 4 * draw(HEAD_DIM, TOKENS)
            w.output[:CONTENT] = draw(CONTENT, HEAD_DIM) / 2
            if head % (HEADS // KV_HEADS) == 0:
                w.key[:, CONTENT:] = 4 * draw(HEAD_DIM, TOKENS)
                w.value[:, :CONTENT] = draw(HEAD_DIM, CONTENT)
        mlp = mlp_weights(model, layer)
        mlp.inward.weight.data[:, :CONTENT] = draw(HIDDEN, CONTENT)
        mlp.inward.bias.data[:] = OPEN
        mlp.outward.weight.data[:CONTENT] = draw(CONTENT, HIDDEN) / 2
        mlp.outward.bias.data[:] = -OPEN * mlp.outward.weight.data.sum(1)
    return model


class _Sums:
    """Products of matrices, in float64: writes go forward, the metric's weights backward."""

    def __init__(self, model: ToyModel, clean: Tensor, corrupt: Tensor, answers: Tensor) -> None:
        self.model = model
        unembedding = model.unembedding.weight.detach().double()
        self.final = torch.zeros(PAIRS, TOKENS, CONTENT + TOKENS, dtype=torch.float64)
        self.final[:, -1] = unembedding[answers[:, 0]] - unembedding[answers[:, 1]]
        self.writes = [self._forward(ids) for ids in (clean, corrupt)]
        self.clean, self.corrupt = (self._dot(sum(one.values()), self.final) for one in self.writes)  # type: ignore[arg-type]
        self.before, self.middle, self.after = self._backward()
        self.edges = self._edges()

    @staticmethod
    def _dot(write: Tensor, weight: Tensor) -> Float[Tensor, " prompt"]:
        return (write * weight).sum((1, 2))

    def _head(self, layer: int, head: int) -> tuple[Tensor, Tensor]:
        """The pattern `[token, token]`, which is the same for all prompts, and W_O W_V."""
        w = head_weights(self.model, layer, head)
        position = self.model.position_embedding.weight.detach().double()
        scores = (position @ w.query.double().T) @ (position @ w.key.double().T).T * HEAD_DIM**-0.5
        future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1), w.output.double() @ w.value.double()

    def _mlp(self, layer: int) -> Tensor:
        mlp = mlp_weights(self.model, layer)
        found: Tensor = mlp.outward.weight.detach().double() @ mlp.inward.weight.detach().double()
        return found

    def _through(self, layer: int, head: int, write: Tensor) -> Tensor:
        pattern, moved = self._head(layer, head)
        return torch.einsum("q k, p k d, e d -> p q e", pattern, write, moved)

    def _forward(self, ids: Tensor) -> dict[str, Tensor]:
        """What each node writes; biases cancel within each MLP."""
        start = self.model.token_embedding.weight.detach().double()[ids]
        found = {"embed": start + self.model.position_embedding.weight.detach().double()}
        stream = found["embed"].clone()
        for layer in range(LAYERS):
            heads = {f"L{layer}H{h}": self._through(layer, h, stream) for h in range(HEADS)}
            stream = stream + sum(heads.values())
            added = stream @ self._mlp(layer).T
            stream = stream + added
            found |= heads | {f"L{layer}.mlp": added}
        return found

    def _into_heads(self, layer: int, weight: Tensor, heads: range) -> Tensor:
        """The metric's weight on what these heads' values read."""
        total = torch.zeros_like(weight)
        for head in heads:
            pattern, moved = self._head(layer, head)
            total += torch.einsum("q k, p q e, e d -> p k d", pattern, weight, moved)
        return total

    def _backward(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The metric's weight on the stream before each layer, between its attention and MLP, and after it."""
        before, middle, after = [], [], []
        weight = self.final
        for layer in reversed(range(LAYERS)):
            after.append(weight)
            weight = weight + weight @ self._mlp(layer)
            middle.append(weight)
            weight = weight + self._into_heads(layer, weight, range(HEADS))
            before.append(weight)
        return before[::-1], middle[::-1], after[::-1]

    def _edges(self) -> list[Edge]:
        writers, found = ["embed"], []
        for layer in range(LAYERS):
            found += [Edge(w, f"L{layer}KV{g}", "v") for w in writers for g in range(KV_HEADS)]
            writers += [f"L{layer}H{h}" for h in range(HEADS)]
            found += [Edge(w, f"L{layer}.mlp") for w in writers]
            writers.append(f"L{layer}.mlp")
        return found + [Edge(w, "logits") for w in writers]

    def _reader(self, edge: Edge) -> Tensor:
        """The metric's weight on what the edge's target reads."""
        if edge.target == "logits":
            return self.final
        layer = int(edge.target[1])
        if edge.target.endswith(".mlp"):
            return self.after[layer] @ self._mlp(layer)
        return self._into_heads(layer, self.middle[layer], self._group(int(edge.target[-1])))

    @staticmethod
    def _group(kv_head: int) -> range:
        size = HEADS // KV_HEADS
        return range(kv_head * size, (kv_head + 1) * size)

    def told(self) -> tuple[list[Outcome], list[Estimate]]:
        """All nodes and edges one by one, under all three interventions; attribution is exact."""
        clean, corrupt = self.writes
        outcomes: list[Outcome] = []
        for name in clean:
            layer = 0 if name == "embed" else int(name[1])
            weight = self.before[0] if name == "embed" else (self.after if ".mlp" in name else self.middle)[layer]
            three = self._three((name,), (), clean[name], corrupt[name], weight)
            # Without its embedding a token has no position either, and patterns are others.
            outcomes += [one for one in three if name != "embed" or one.how != "zero"]
        for layer in range(LAYERS):
            for g in range(KV_HEADS):
                both = [sum(run[f"L{layer}H{h}"] for h in self._group(g)) for run in self.writes]
                name = f"L{layer}KV{g}"
                outcomes += self._three((name,), (), both[0], both[1], self.middle[layer])  # type: ignore[arg-type]
                outcomes += self._three((f"{name}.v",), (), both[0], both[1], self.middle[layer])  # type: ignore[arg-type]
                outcomes += [
                    Outcome("noising", self.clean.float(), (f"{name}.k",)),
                    Outcome("denoising", self.corrupt.float(), (f"{name}.k",)),
                ]
        for edge in self.edges:
            outcomes += self._three((), (edge,), clean[edge.source], corrupt[edge.source], self._reader(edge))
        base = {"zero": self.clean, "noising": self.clean, "denoising": self.corrupt}
        # A key/value head set to zero takes its keys along, which moves patterns to first order but not in truth.
        estimates = [
            Estimate("atp", one.how, one.nodes[0], (one.metric - base[one.how]).float())
            for one in outcomes
            if one.nodes and not (one.how == "zero" and re.fullmatch(r"L\d+KV\d+", one.nodes[0]))
        ]
        return outcomes, estimates

    def _three(
        self, nodes: tuple[str, ...], edges: tuple[Edge, ...], clean: Tensor, corrupt: Tensor, weight: Tensor
    ) -> list[Outcome]:
        gap = self._dot(clean - corrupt, weight)
        return [
            Outcome("zero", (self.clean - self._dot(clean, weight)).float(), nodes, edges),
            Outcome("noising", (self.clean - gap).float(), nodes, edges),
            Outcome("denoising", (self.corrupt + gap).float(), nodes, edges),
        ]
