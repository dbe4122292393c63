"""Planted circuits: weights written by hand, so that nodes, edges and effects are known before anything runs.

No training and no randomness but the prompts'.  All but `handwritten_pairs` attend by content: an ending token looks,
with a score of 30, for tokens that carry a mark, and copies their value; a score of 30 leaves 1e-13 for the rest, so
softmaxes are saturated and effects are exact.  Which method has to fail where (x; gradients at the
clean prompts unless said otherwise; the QK fix is that of AtP*, arXiv 2403.00745):

| model | what is planted | zero one | patch one | AtP | QK fix | and norm frozen |
| --- | --- | --- | --- | --- | --- | --- |
| `copying` | heads of given strengths, groups that share keys | | | x: 0 for q, k | | |
| `copying`, final norm | the same before a norm | x: almost 0 | | x: 0 for q, k | x: low | x: high |
| `negative_head` | a head that writes against the answer | | | | | |
| `gate`, AND | an MLP that needs both heads | x: each all | x: denoising 0 | x: twice all, 0 at corrupt | x | x |
| `gate`, OR | an MLP that needs either head | x: 0 | x: noising 0 | x: 0, twice all at corrupt | x | x |
| `self_repair` | a backup behind a main head | x: a quarter | | x: no repair | x | x |
| `cancellation` | direct, and back through a later head | x: 0 | x: 0, not edges | x: 0 | x: 0 | x: 0 |
| `handwritten_pairs` | previous token -> keys of induction | | | x: 0, too much at corrupt | | |
| `linear_network` | no softmax that moves, no norm | | | | | |

A method that is blind by its nature is still right about what it measures: zeroing one head of an OR gate has no
effect, which is why sets have to be ablated together.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from workbench.dynamics.toy import ToyConfig, ToyModel
from workbench.dynamics.truth import PAIRS, Edge, Estimate, GroundTruth, How, Outcome, Story, level, planted
from workbench.dynamics.wiring import MATCH_SCORE, MAX_POSITIONS, empty_model, head_weights, mlp_weights, spaces
from workbench.errors import RequestError

Gate = Literal["and", "or"]
# What the backup head of `self_repair` gives back of what the main head wrote.
REPAIR = 0.75


def gate(kind: str, *, seed: int = 0) -> GroundTruth:
    """Two heads each bring one bit to an MLP that says yes if both are set ("and"), or if either is ("or").

    Clean prompts have both bits set, corrupt ones neither. Taken alone, the parts of an AND look useless to
    denoising, and those of an OR to noising. The MLPs are ReLU(a + b - 1), and min(1, a + b) as ReLU(a + b + 1/2) -
    ReLU(a + b - 1) - 1/2, whose kinks lie off the points where gradients are taken.
    """
    if kind not in get_args(Gate):
        raise RequestError(f"kind={kind!r} is no gate; choose 'and' or 'or'.")
    both, one, none = 1.0, 1.0 if kind == "or" else 0.0, 0.0
    h0, h1, mlp = "L0H0", "L0H1", "L0.mlp"
    outcomes = []
    how: How
    for how, single, end in (("zero", one, none), ("noising", one, none), ("denoising", one, both)):
        outcomes += [Outcome(how, level(single), (head,)) for head in (h0, h1)]
        outcomes += [Outcome(how, level(single), edges=(Edge(head, mlp),)) for head in (h0, h1)]
        outcomes += [Outcome(how, level(end), (h0, h1)), Outcome(how, level(single), ("L0KV0",))]
        if how != "zero":
            outcomes += [Outcome(how, level(end), (mlp,)), Outcome(how, level(end), edges=(Edge(mlp, "logits"),))]
    # Slopes: AND is flat below its kink, OR above it.
    at_clean, at_corrupt = (1.0, 0.0) if kind == "and" else (0.0, 1.0)
    estimates = [Estimate("atp", "noising", head, level(-at_clean)) for head in (h0, h1)]
    estimates += [Estimate("atp", "denoising", head, level(at_corrupt)) for head in (h0, h1)]
    edges = [Edge("embed", f"L0H{i}", "q") for i in range(2)] + [Edge(f"L0H{i}", mlp) for i in range(2)]
    edges += [Edge("embed", f"L0KV{i}", through) for i in range(2) for through in ("k", "v")] + [Edge(mlp, "logits")]
    nodes = ["embed", h0, h1, "L0KV0", "L0KV1", mlp]
    story = Story(f"gate, {kind}", f"two heads bring a bit each to an MLP that takes {kind.upper()}", nodes, edges)
    return planted(story, _gate_model(kind), *_gate_prompts(seed), (both, none), outcomes, estimates, seed)


def _gate_model(kind: str) -> ToyModel:
    """Ids: a unset and set, b unset and set, the end, two fillers, yes, no, the start token."""
    at = spaces(mark=2, bit=2, end=1, got=2, yes=1)
    model = empty_model(_shape(10, at["yes"].stop, layers=1, heads=2, width=2, hidden=2))
    embedding, end = model.token_embedding.weight.data, at["end"][0]
    for i in range(2):
        embedding[[2 * i, 2 * i + 1], at["mark"][i]] = 1.0
        embedding[2 * i + 1, at["bit"][i]] = 1.0
        w = head_weights(model, 0, i)
        w.query[0, end] = MATCH_SCORE
        w.key[0, at["mark"][i]] = 1.0
        w.value[1, at["bit"][i]] = 1.0
        w.output[at["got"][i], 1] = 1.0
    embedding[4, end] = 1.0
    model.unembedding.weight.data[7, at["yes"][0]] = 1.0
    inward, outward = mlp_weights(model, 0).inward, mlp_weights(model, 0).outward
    inward.weight.data[:, list(at["got"])] = 1.0
    inward.bias.data[:] = torch.tensor([0.5, -1.0])
    outward.weight.data[at["yes"][0]] = torch.tensor([0.0, 1.0] if kind == "and" else [1.0, -1.0])
    outward.bias.data[at["yes"][0]] = 0.0 if kind == "and" else -0.5
    return model


def _gate_prompts(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.tensor([[9, 1, 3, 5, 6, 4]]).repeat(PAIRS, 1)
    for row in clean:
        row[1:5] = row[1:5][torch.randperm(4, generator=generator)]
    # A set bit is the odd id after the unset one.
    corrupt = torch.where((clean == 1) | (clean == 3), clean - 1, clean)
    return clean, corrupt, torch.full((PAIRS,), 7), torch.full((PAIRS,), 8)


def self_repair(*, values: int = 5, seed: int = 0) -> GroundTruth:
    """A main head L0H0 copies the answer; a backup L1H0 copies three quarters of it when the main one is silent.

    The backup's query reads a flag that the main head writes with whatever it copies: it looks for the value with a
    score of 30 without the flag, and of -30 with it. Zeroing the main head therefore costs a quarter, zeroing the
    backup nothing, and both together everything. Patching is not repaired: a corrupt value comes with the flag.
    """
    main, backup = "L0H0", "L1H0"
    direct, asks = Edge(main, "logits"), Edge(main, backup, "q")
    zero = {(main,): REPAIR, (backup,): 1.0, (main, backup): 0.0}
    noising = {(main,): -1.0, (backup,): 1.0, (main, backup): -1.0, (f"{backup}.q",): 1.0}
    outcomes = [Outcome("zero", level(value), nodes) for nodes, value in zero.items()]
    outcomes += [Outcome("noising", level(value), nodes) for nodes, value in noising.items()]
    outcomes += [Outcome("denoising", level(-value), nodes) for nodes, value in noising.items()]
    outcomes += [
        Outcome("zero", level(0.0), edges=(direct,)),
        Outcome("zero", level(1.0 + REPAIR), edges=(asks,)),
        Outcome("zero", level(REPAIR), edges=(direct, asks)),
        Outcome("noising", level(-1.0), edges=(direct,)),
        Outcome("noising", level(1.0), edges=(asks,)),
    ]
    # The flag turns a saturated softmax, which a gradient does not see.
    estimates = [
        Estimate("atp", "zero", main, level(-1.0)),
        Estimate("atp", "zero", backup, level(0.0)),
        Estimate("atp", "noising", main, level(-2.0)),
    ]
    edges = [direct, asks, Edge(backup, "logits")]
    edges += [Edge("embed", head, "q") for head in (main, backup)]
    edges += [Edge("embed", f"L{layer}KV0", through) for layer in range(2) for through in ("k", "v")]
    nodes = ["embed", main, backup, "L0KV0", "L1KV0"]
    story = Story("self-repair", "a backup head copies when the main head is silent", nodes, edges)
    model = _repair_model(values)
    return planted(story, model, *_value_prompts(values, seed), (1.0, -1.0), outcomes, estimates, seed)


def _repair_model(values: int) -> ToyModel:
    at = spaces(marked=1, value=values, end=1, out=values, flag=1)
    model = empty_model(_shape(2 * values + 4, at["flag"].stop, layers=2, heads=1, width=values + 1))
    _embed_values(model, values, at)
    for layer, gain in enumerate((1.0, REPAIR)):
        _copy_value(model, layer, 0, at, gain)
    head_weights(model, 0, 0).output[at["flag"][0], 1:] = 1.0
    head_weights(model, 1, 0).query[0, at["flag"][0]] = -2 * MATCH_SCORE
    return model


def cancellation(*, values: int = 5, seed: int = 0) -> GroundTruth:
    """What L0H0 writes goes to the logits and, through L1H0 with the opposite sign, to the logits once more.

    Its effect is zero though both of its edges matter, so that whatever works with nodes gives it nothing; L0H1
    alone makes the difference between clean and corrupt, and L1H0 is a negative head.
    """
    first, carrier, later = "L0H0", "L0H1", "L1H0"
    direct, turned = Edge(first, "logits"), Edge(first, "L1KV0", "v")
    noising = {(first,): 1.0, (carrier,): -1.0, (later,): 3.0, (first, later): 1.0, (first, carrier): -1.0}
    outcomes = [Outcome("noising", level(value), nodes) for nodes, value in noising.items()]
    outcomes += [Outcome("denoising", level(-value), nodes) for nodes, value in noising.items()]
    zero = {(first,): 1.0, (carrier,): 0.0, (later,): 2.0, (first, later): 1.0}
    outcomes += [Outcome("zero", level(value), nodes) for nodes, value in zero.items()]
    for edge, moved in ((direct, -1.0), (turned, 1.0), (Edge(carrier, "logits"), -1.0), (Edge(later, "logits"), 1.0)):
        outcomes.append(Outcome("zero", level(1.0 + moved), edges=(edge,)))
        outcomes.append(Outcome("noising", level(1.0 + 2 * moved), edges=(edge,)))
        outcomes.append(Outcome("denoising", level(-1.0 - 2 * moved), edges=(edge,)))
    estimates = [
        Estimate("atp", "noising", node, level(change))
        for node, change in ((first, 0.0), (carrier, -2.0), (later, 2.0), ("L1KV0.v", 2.0))
    ]
    edges = [direct, turned, Edge(carrier, "logits"), Edge(later, "logits")]
    edges += [Edge("embed", head, "q") for head in (first, carrier, later)] + [Edge("embed", "L1KV0", "k")]
    edges += [Edge("embed", f"L0KV{i}", through) for i in range(2) for through in ("k", "v")]
    nodes = ["embed", first, carrier, later, "L0KV0", "L0KV1", "L1KV0"]
    story = Story("cancellation", "a head whose direct and indirect effects cancel", nodes, edges)
    model = _cancelling_model(values)
    return planted(story, model, *_value_prompts(values, seed), (1.0, -1.0), outcomes, estimates, seed)


def _cancelling_model(values: int) -> ToyModel:
    at = spaces(marked=1, value=values, end=1, out=values, read=values)
    model = empty_model(_shape(2 * values + 4, at["read"].stop, layers=2, heads=2, width=values + 1))
    _embed_values(model, values, at)
    _copy_value(model, 0, 0, at | {"out": at["read"]}, 1.0)
    _copy_value(model, 0, 1, at, 1.0)
    later, end = head_weights(model, 1, 0), at["end"][0]
    later.query[0, end] = MATCH_SCORE
    later.key[0, end] = 1.0
    for value in range(values):
        model.unembedding.weight.data[values + 1 + value, at["read"][value]] = 1.0
        later.value[1 + value, at["read"][value]] = 1.0
        later.output[at["out"][value], 1 + value] = -1.0
    return model


def _shape(vocab: int, size: int, *, layers: int, heads: int, width: int, hidden: int | None = None) -> ToyConfig:
    """No norms, scores as they are, the start token last."""
    return ToyConfig(
        vocab_size=vocab,
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=width,
        intermediate_size=hidden,
        max_position_embeddings=MAX_POSITIONS,
        scaling=1.0,
        layer_norm=False,
        bos_token_id=vocab - 1,
    )


def _embed_values(model: ToyModel, values: int, at: dict[str, range]) -> None:
    """Ids: values, the end, values as answers, two fillers, the start token."""
    for value in range(values):
        model.token_embedding.weight.data[value, [at["marked"][0], at["value"][value]]] = 1.0
        model.unembedding.weight.data[values + 1 + value, at["out"][value]] = 1.0
    model.token_embedding.weight.data[values, at["end"][0]] = 1.0


def _copy_value(model: ToyModel, layer: int, head: int, at: dict[str, range], gain: float) -> None:
    """From the end, look for the token with a value and write the value to `out`."""
    w = head_weights(model, layer, head)
    w.query[0, at["end"][0]] = MATCH_SCORE
    w.key[0, at["marked"][0]] = 1.0
    for value, (read, write) in enumerate(zip(at["value"], at["out"], strict=True)):
        w.value[1 + value, read] = 1.0
        w.output[write, 1 + value] = gain


def _value_prompts(values: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[start, a value among two fillers, end]``; the corrupt prompt has another value."""
    if values < 2:
        raise RequestError(f"values={values}: a pair needs two values.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(values, generator=generator)[:2] for _ in range(PAIRS)])
    filler = 2 * values + 1
    clean = torch.tensor([[2 * values + 3, filler, filler + 1, filler, values]]).repeat(PAIRS, 1)
    corrupt = clean.clone()
    rows, place = torch.arange(PAIRS), 1 + torch.arange(PAIRS) % 3
    clean[rows, place], corrupt[rows, place] = drawn[:, 0], drawn[:, 1]
    return clean, corrupt, values + 1 + drawn[:, 0], values + 1 + drawn[:, 1]
