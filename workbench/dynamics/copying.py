"""Planted heads that copy: of given strengths, in groups that share keys and values, and before a final norm.

One layer; what each input of attention carries, and what a head adds, follows from the weights. See `planted` for
which methods have to fail here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from workbench.dynamics.toy import ToyConfig, ToyModel
from workbench.dynamics.truth import PAIRS, Edge, Estimate, GroundTruth, Outcome, Story, level, planted
from workbench.dynamics.wiring import MATCH_SCORE, MAX_POSITIONS, empty_model, head_weights, spaces
from workbench.errors import RequestError

Corruption = Literal["query", "key", "value"]


def copying(
    gains: Sequence[float] = (1.0, 0.5, -0.25, 0.0),
    kv_heads: int = 2,
    corrupt: str = "query",
    *,
    final_norm: bool = False,
    values: int = 5,
    seed: int = 0,
) -> GroundTruth:
    """One layer of heads that copy the value of the colour that the last token asks for, each with its own strength.

    Prompts are ``[start, (colour, value), (other colour, other value), cue]``.  The answer is the value under the
    asked colour, the foil the other, and corrupt prompts swap them in one of three ways, each of which goes through
    one input of attention alone: another cue ("query"), colours swapped ("key"), values swapped ("value").

    `gains` are the heads' strengths (0: the head does nothing); consecutive heads share `kv_heads` key/value heads,
    whose effect is that of their whole group.  With `final_norm` the logits are read after a norm whose scale the
    copied values dominate, as at the end of a trained model: the second saturation.
    """
    if corrupt not in get_args(Corruption):
        raise RequestError(f"corrupt={corrupt!r} is no input of attention; choose 'query', 'key' or 'value'.")
    if values < 2 or not gains or len(gains) % kv_heads or (gap := sum(gains)) <= 0:
        raise RequestError(
            f"gains={tuple(gains)}, kv_heads={kv_heads}, values={values}: needs a multiple of kv_heads heads whose "
            "strengths add up to more than 0, and two values."
        )
    model = _copying_model(tuple(gains), kv_heads, values, final_norm)
    clean, other, answers, foils = _copying_prompts(values, corrupt, seed)
    width = model.config.hidden_size

    def scale(right: float, wrong: float) -> float:
        # Coordinates come in pairs of opposite sign: the mean is 0; the cue's own pair stands beside the copies.
        return ((2 + 2 * (right**2 + wrong**2)) / width + model.config.layer_norm_eps) ** 0.5 if final_norm else 1.0

    def metric(right: float, wrong: float) -> float:
        return (right - wrong) / scale(right, wrong)

    parts = _copying_parts(tuple(gains), kv_heads)
    outcomes = [Outcome("zero", level(metric(gap - gain, 0.0)), (f"L0H{h}",)) for h, gain in enumerate(gains)]
    outcomes.append(Outcome("zero", level(0.0), tuple(f"L0H{h}" for h in range(len(gains)))))
    estimates = []
    for node, through, moved in parts:
        reached = moved if corrupt in through else 0.0
        outcomes.append(Outcome("noising", level(metric(gap - reached, reached)), (node,)))
        outcomes.append(Outcome("denoising", level(metric(reached, gap - reached)), (node,)))
        # At the clean point: along the answer the scale of the norm grows as well; along the foil it does not yet.
        full = scale(gap, 0.0)
        answer = reached / full - (reached * gap**2 * 2 / (width * full**3) if final_norm else 0.0)
        live, frozen = -(answer + reached / full), -2 * reached / full
        hidden = node.endswith((".q", ".k")) or (node.startswith("L0KV") and corrupt != "value")
        estimates += [
            Estimate("atp", "noising", node, level(0.0 if hidden else live)),
            Estimate("qk fix", "noising", node, level(live)),
        ]
        if final_norm:
            estimates.append(Estimate("qk fix, norm frozen", "noising", node, level(frozen)))
    nodes, edges = _live(gains, kv_heads)
    for edge in edges:
        node = edge.source if edge.target == "logits" else f"{edge.target}.{edge.through}"
        outcomes += [Outcome(one.how, one.metric, edges=(edge,)) for one in outcomes if one.nodes == (node,)]
    story = Story("copying", f"heads of strengths {tuple(gains)} copy a value; corrupt: {corrupt}", nodes, edges)
    ends = (metric(gap, 0.0), metric(0.0, gap))
    return planted(story, model, clean, other, answers, foils, ends, outcomes, estimates, seed)


def _live(gains: Sequence[float], kv_heads: int) -> tuple[list[str], list[Edge]]:
    """Nodes and edges through which anything is copied."""
    heads = [h for h, gain in enumerate(gains) if gain]
    kv = sorted({h // (len(gains) // kv_heads) for h in heads})
    edges = [Edge("embed", f"L0H{h}", "q") for h in heads] + [Edge(f"L0H{h}", "logits") for h in heads]
    edges += [Edge("embed", f"L0KV{g}", through) for g in kv for through in ("k", "v")]
    return ["embed", *(f"L0H{h}" for h in heads), *(f"L0KV{g}" for g in kv)], edges


def negative_head(strength: float = 0.3, *, seed: int = 0) -> GroundTruth:
    """A head that copies with strength 1, one that writes against it, one that does nothing.

    Noising the negative head raises the metric, and a circuit without it is better than the model: selection by
    signed and by absolute scores differ.
    """
    if not 0 < strength < 1:
        raise RequestError(f"strength={strength}: the negative head needs one between 0 and 1.")
    return copying((1.0, -strength, 0.0), 3, "value", seed=seed)


def _copying_model(gains: tuple[float, ...], kv_heads: int, values: int, final_norm: bool) -> ToyModel:
    """Ids: 2 x values marked tokens, two cues, values as answers, the start token."""
    at = spaces(colour=2, value=values, cue=2, out=values)
    half = at["out"].stop
    config = ToyConfig(
        vocab_size=3 * values + 3,
        # Each coordinate has an opposite, so that norms have nothing to subtract.
        hidden_size=2 * half,
        num_hidden_layers=1,
        num_attention_heads=len(gains),
        num_key_value_heads=kv_heads,
        head_dim=values + 2,
        max_position_embeddings=MAX_POSITIONS,
        scaling=1.0,
        layer_norm=False,
        final_layer_norm=final_norm,
        bos_token_id=3 * values + 2,
    )
    model = empty_model(config)
    embedding, unembedding = model.token_embedding.weight.data, model.unembedding.weight.data
    for colour in range(2):
        embedding[2 * values + colour, at["cue"][colour]] = 1.0
        for value in range(values):
            embedding[colour * values + value, [at["colour"][colour], at["value"][value]]] = 1.0
    for value in range(values):
        unembedding[2 * values + 2 + value, at["out"][value]] = 1.0
    embedding[:, half:] = -embedding[:, :half]
    for head, gain in enumerate(gains):
        w = head_weights(model, 0, head)
        for colour in range(2):
            w.query[colour, at["cue"][colour]] = MATCH_SCORE
            w.key[colour, at["colour"][colour]] = 1.0
        for value in range(values):
            w.value[2 + value, at["value"][value]] = 1.0
            w.output[at["out"][value], 2 + value] = gain
            w.output[half + at["out"][value], 2 + value] = -gain
    return model


def _copying_prompts(values: int, corrupt: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, rows = 3 * values + 2, []
    for index in range(PAIRS):
        asked = index % 2
        x, y = torch.randperm(values, generator=generator)[:2].tolist()
        marks = [(asked, x), (1 - asked, y)]
        other = {
            "query": marks,
            "key": [(1 - colour, value) for colour, value in marks],
            "value": [(colour, x + y - value) for colour, value in marks],
        }[corrupt]
        cue = 1 - asked if corrupt == "query" else asked
        turned = index % 4 > 1
        first, second = ([c * values + v for c, v in (seen[::-1] if turned else seen)] for seen in (marks, other))
        rows.append(
            ([start, *first, 2 * values + asked], [start, *second, 2 * values + cue], 2 * values + 2 + x,
             2 * values + 2 + y)
        )  # fmt: skip
    clean, other_ids, answers, foils = zip(*rows, strict=True)
    return torch.tensor(clean), torch.tensor(other_ids), torch.tensor(answers), torch.tensor(foils)


def _copying_parts(gains: tuple[float, ...], kv_heads: int) -> list[tuple[str, tuple[str, ...], float]]:
    """Node, the corruptions that reach it, and the strength of all heads that go with it."""
    group = len(gains) // kv_heads
    parts: list[tuple[str, tuple[str, ...], float]] = []
    for head, gain in enumerate(gains):
        parts += [(f"L0H{head}", ("query", "key", "value"), gain), (f"L0H{head}.q", ("query",), gain)]
    for g in range(kv_heads):
        total = sum(gains[g * group : (g + 1) * group])
        parts += [
            (f"L0KV{g}", ("key", "value"), total),
            (f"L0KV{g}.k", ("key",), total),
            (f"L0KV{g}.v", ("value",), total),
        ]
    return parts
