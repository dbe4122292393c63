"""Compiled programs put out what tracr's own evaluation says, and nothing outside their circuits does anything."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from workbench.dynamics.compiled import FOLDER, PROGRAMS, compiled, load_program
from workbench.dynamics.truth import Edge, GroundTruth, Outcome
from workbench.errors import RequestError, SourceError
from workbench.tasks.pairs import right


@cache
def built(name: str) -> GroundTruth:
    return compiled(name, count=12)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_case_comes_out_as_evaluated(name):
    program = load_program(name)
    checked = 0
    for case in program.cases:
        with torch.no_grad():
            logits = program.model(torch.tensor([case.ids])).logits[0]
        value = logits[:, -1] if program.numerical else None
        for column, meant in enumerate(case.outputs):
            if meant is None:
                continue
            found = logits[column].argmax() if value is None else value[column]
            assert float(found) == pytest.approx(meant, abs=1e-4), (case, column)
            checked += 1
    assert checked > 30


@pytest.mark.parametrize("name", PROGRAMS)
def test_pairs_and_outcomes_hold_on_the_attached_model(name, intervene):
    truth = built(name)
    logits = truth.model.trace(truth.task.clean, logits=truth.task.position[:, None]).logits[:, 0]
    if name not in ("frac_prevs", "pair_balance"):
        assert right(truth.task, logits).all()
    torch.testing.assert_close(truth.task.score(logits), truth.clean, atol=1e-4, rtol=0)
    for outcome in truth.outcomes:
        torch.testing.assert_close(intervene(truth, outcome), outcome.metric, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_part_is_in_the_circuit_if_it_writes(name):
    program = load_program(name)
    writing = set()
    for layer, block in enumerate(program.model.blocks):
        width = block.attention.head_dim
        for head in range(program.model.config.num_attention_heads):
            if block.attention.output.weight[:, head * width : (head + 1) * width].any():
                writing.add(f"L{layer}H{head}")
        if block.mlp.outward.weight.any():
            writing.add(f"L{layer}.mlp")
    assert writing == set(program.parts)
    assert {edge.source for edge in program.edges} == program.nodes - {n for n in program.nodes if "KV" in n}


@pytest.mark.parametrize("name", ["frac_prevs", "pair_balance", "detect_pattern"])
def test_edges_outside_the_circuit_have_no_effect(name, intervene):
    truth = built(name)
    spec = truth.model.spec
    writers, outside = ["embed"], []
    for layer in range(spec.n_layers):
        heads = [f"L{layer}H{h}" for h in range(spec.layers[layer].heads)]
        readers = [(h, "q") for h in heads] + [(h.replace("H", "KV"), x) for h in heads for x in "kv"]
        outside += [Edge(w, *reader) for w in writers for reader in readers]
        writers += heads
        outside += [Edge(w, f"L{layer}.mlp") for w in writers]
        writers.append(f"L{layer}.mlp")
    outside = sorted(set(outside + [Edge(w, "logits") for w in writers]) - truth.edges)
    assert outside
    for edge in outside:
        for how, metric in (("zero", truth.clean), ("noising", truth.clean), ("denoising", truth.corrupt)):
            found = intervene(truth, Outcome(how, metric, edges=(edge,)))
            assert torch.allclose(found, metric, atol=1e-4), (how, str(edge))


def test_frac_prevs_is_the_published_circuit():
    program = load_program("frac_prevs")
    assert set(program.parts) == {"L0.mlp", "L1H0"}
    assert program.edges == {
        Edge("embed", "L0.mlp"), Edge("L0.mlp", "L1KV0", "v"), Edge("embed", "L1H0", "q"), Edge("embed", "L1KV0", "k"),
        Edge("L1H0", "logits"),
    }  # fmt: skip


def test_the_card_lists_every_program_with_its_parts():
    card = (FOLDER / "card.md").read_text(encoding="utf-8")
    for name in PROGRAMS:
        facts = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
        assert row.rstrip(" |").endswith(f"| {facts['layers']} | {', '.join(facts['parts'])}")


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(RequestError, match="'dyck'"):
        load_program("dyck")
    with pytest.raises(SourceError, match=r"frac_prevs\.json"):
        load_program("frac_prevs", tmp_path)
    with pytest.raises(RequestError, match="count=0"):
        compiled("shift", count=0)
