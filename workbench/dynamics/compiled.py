"""Programs compiled to weights by tracr (arXiv 2301.05062): circuits that are known because someone wrote them.

The files are in ``datasets/compiled``, one ``NAME.safetensors`` and ``NAME.json`` a program, with the script that made
them and a card; reading them needs neither tracr nor jax.  tracr's architecture is that of `ToyModel` (no norms, ReLU
MLPs, scores times key_size^-0.5), so that compiled programs attach like any other model.  Two things are ours: all
are compiled with causal attention (`reverse` and `sort` are therefore written as a decoder would do it, the output
after the input), and the unembedding maps a program's output values to token ids (values that are no tokens have ids
of their own, ``=3``; a numerical output is the logit of ``=value``).

A node is in the circuit if it writes anything; an edge, if what its source writes is read by that input of its target,
both read off the weights.  Whatever is outside has no effect at all, which makes zero ablation the right one here:
unused coordinates are exactly zero. An edge inside may be idle on given prompts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from workbench.dynamics.toy import ToyConfig, ToyModel
from workbench.dynamics.truth import Edge, GroundTruth, Outcome, known_circuit
from workbench.dynamics.wiring import attached
from workbench.errors import RequestError, SourceError
from workbench.models import Batch
from workbench.tasks.pairs import PairTask

PROGRAMS = ("frac_prevs", "hist", "count", "shift", "detect_pattern", "pair_balance", "reverse", "sort")
FOLDER = Path(__file__).parents[2] / "datasets" / "compiled"
NUMERICAL = "value"


@dataclass(frozen=True)
class Case:
    """Ids of one sequence, start token first, and what the program puts out at each column (None: undefined)."""

    ids: tuple[int, ...]
    outputs: tuple[int | float | None, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled program: its model, vocabulary, cases with outputs, and what each part reads and writes.

    `outputs` of cases are token ids, or numbers for a `numerical` program. `parts` are nodes -> input or "writes" ->
    names of residual coordinates.
    """

    name: str
    does: str
    model: ToyModel
    vocabulary: tuple[str, ...]
    numerical: bool
    parts: Mapping[str, Mapping[str, Sequence[str]]]
    unembedding: tuple[str, ...]
    cases: tuple[Case, ...]

    @property
    def nodes(self) -> frozenset[str]:
        """Heads, with the key/value heads that they read, and MLPs that write anything; and the embedding."""
        heads = [node for node in self.parts if "H" in node]
        return frozenset(["embed", *self.parts, *(head.replace("H", "KV") for head in heads)])

    @property
    def edges(self) -> frozenset[Edge]:
        """From whatever writes a coordinate to whatever reads it later."""
        written = {node: set(part["writes"]) for node, part in self.parts.items()}
        # Tokens, positions and a constant: all that no part writes.
        written["embed"] = {
            label for label in self._read if label.startswith(("tokens:", "indices:")) or label == "one"
        }
        readers: list[tuple[str, str, set[str]]] = [("logits", "", set(self.unembedding))]
        for node, part in self.parts.items():
            inputs = {"in": (node, ""), "q": (node, "q")} | {x: (node.replace("H", "KV"), x) for x in "kv"}
            readers += [(*inputs[x], set(labels)) for x, labels in part.items() if x != "writes"]
        return frozenset(
            Edge(source, target, through)
            for source, coordinates in written.items()
            for target, through, reads in readers
            if coordinates & reads and _order(source) < _order(target)
        )

    @property
    def _read(self) -> set[str]:
        return {
            label for part in self.parts.values() for x, labels in part.items() if x != "writes" for label in labels
        }


def _order(node: str) -> float:
    """Where a node stands: heads of a layer side by side, its MLP after them."""
    if node in ("embed", "logits"):
        return -1.0 if node == "embed" else float("inf")
    layer = int(node[1 : node.index("." if ".mlp" in node else "K" if "KV" in node else "H")])
    return 2.0 * layer + (1.0 if node.endswith(".mlp") else 0.0)


def load_program(name: str, folder: Path | None = None) -> Program:
    """Read a compiled program; `folder` is ``datasets/compiled`` of this checkout unless given."""
    if name not in PROGRAMS:
        raise RequestError(f"{name!r} is no compiled program; choose one of {', '.join(PROGRAMS)}.")
    where = FOLDER if folder is None else folder
    if not (where / f"{name}.json").is_file() or not (where / f"{name}.safetensors").is_file():
        raise SourceError(
            f"{where} lacks {name}.json or {name}.safetensors: the data are in the repository and not in the installed "
            "package; pass folder= the datasets/compiled of a checkout."
        )
    facts = json.loads((where / f"{name}.json").read_text(encoding="utf-8"))
    vocabulary = tuple(facts["vocabulary"])
    return Program(
        name=name,
        does=facts["does"],
        model=_model(facts, load_file(where / f"{name}.safetensors")),
        vocabulary=vocabulary,
        numerical=facts["numerical"],
        parts=facts["parts"],
        unembedding=tuple(facts["unembedding"]),
        cases=tuple(_case(one, vocabulary, facts["outputs"], facts["numerical"]) for one in facts["cases"]),
    )


def _model(facts: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> ToyModel:
    config = ToyConfig(
        vocab_size=len(facts["vocabulary"]),
        hidden_size=facts["width"],
        num_hidden_layers=facts["layers"],
        num_attention_heads=facts["heads"],
        head_dim=facts["head_dim"],
        intermediate_size=facts["mlp"],
        max_position_embeddings=facts["positions"],
        layer_norm=False,
        bos_token_id=facts["vocabulary"].index("BOS"),
    )
    with torch.random.fork_rng(devices=[]):
        model = ToyModel(config)
    model.load_state_dict(weights)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _case(case: Mapping[str, Any], vocabulary: tuple[str, ...], ids: Mapping[str, int], numerical: bool) -> Case:
    outputs = [one if one is None else float(one) if numerical else ids[str(one)] for one in case["output"]]
    # The start token puts nothing out.
    return Case(tuple(vocabulary.index(str(one)) for one in ("BOS", *case["input"])), (None, *outputs))


def compiled(name: str, *, count: int = 30, seed: int = 0, folder: Path | None = None) -> GroundTruth:
    """A compiled program with pairs of its own cases: equally long, with different outputs at the last column.

    The metric is logit(output) less logit(the corrupt prompt's output); for a numerical program its value, less the
    logit of a token that is always 0.
    """
    program = load_program(name, folder)
    drawn = _pairs(program.cases, count, seed)
    task = _task(program, drawn, seed)
    if program.numerical:
        clean, corrupt = (torch.tensor([float(pair[i].outputs[-1] or 0.0) for pair in drawn]) for i in (0, 1))
    else:
        clean, corrupt = torch.ones(len(drawn)), -torch.ones(len(drawn))
    outcomes = _outcomes(program, clean, corrupt)
    return GroundTruth(name, attached(program.model), task, program.nodes, program.edges, clean, corrupt, outcomes)


def _outcomes(program: Program, clean: torch.Tensor, corrupt: torch.Tensor) -> tuple[Outcome, ...]:
    """What idle parts do (nothing), and what the one part does that alone writes the output (everything)."""
    config = program.model.config
    every = [f"L{layer}H{h}" for layer in range(config.num_hidden_layers) for h in range(config.num_attention_heads)]
    every += [f"L{layer}.mlp" for layer in range(config.num_hidden_layers)]
    idle = [node for node in every if node not in program.parts]
    last = [node for node, part in program.parts.items() if set(part["writes"]) & set(program.unembedding)]
    found = [Outcome("zero", clean, tuple(idle))] if idle else []
    if len(last) == 1:
        found += [
            Outcome("zero", torch.zeros_like(clean), (last[0],)),
            Outcome("noising", corrupt, (last[0],)),
            Outcome("denoising", clean, (last[0],)),
        ]
    return tuple(found)


def _pairs(cases: tuple[Case, ...], count: int, seed: int) -> list[tuple[Case, Case]]:
    """Different pairs in random order, each case paired with any that fits."""
    fitting = [
        (one, two)
        for one in cases
        for two in cases
        if len(one.ids) == len(two.ids) and None not in (one.outputs[-1], two.outputs[-1])
        and one.outputs[-1] != two.outputs[-1]
    ]  # fmt: skip
    if not 1 <= count <= len(fitting):
        raise RequestError(f"count={count}: between 1 and {len(fitting)} pairs can be drawn from these cases.")
    return random.Random(seed).sample(fitting, count)


def _task(program: Program, drawn: list[tuple[Case, Case]], seed: int) -> PairTask:
    clean, corrupt = (Batch.from_ids([pair[i].ids for pair in drawn]) for i in (0, 1))
    if program.numerical:
        # The padding token never stands in a prompt, and nothing writes its logit.
        answers = torch.full((len(drawn), 1), program.vocabulary.index(f"={NUMERICAL}"))
        foils = torch.full((len(drawn), 1), program.vocabulary.index("compiler_pad"))
    else:
        answers, foils = (torch.tensor([[pair[i].outputs[-1]] for pair in drawn]) for i in (0, 1))
    return PairTask(
        name=program.name,
        caption=program.does,
        seed=seed,
        specials="BOS at column 0",
        clean=clean,
        corrupt=corrupt,
        answers=answers,
        foils=foils,
        position=clean.lengths - 1,
        circuit=known_circuit(program.name, program.does, program.nodes, program.edges),
    )
