"""Every planted effect against the running model: through `Model.trace` for interventions, naively for gradients."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from workbench.dynamics.copying import copying, negative_head
from workbench.dynamics.induction_pairs import handwritten_pairs
from workbench.dynamics.linear import HEADS, LAYERS, OPEN, linear_network
from workbench.dynamics.planted import REPAIR, cancellation, gate, self_repair
from workbench.dynamics.truth import Edge, GroundTruth
from workbench.errors import RequestError
from workbench.tasks.pairs import right

BUILDERS = {
    "copying query": lambda: copying(corrupt="query"),
    "copying key": lambda: copying(corrupt="key"),
    "copying value": lambda: copying(corrupt="value"),
    "copying one group": lambda: copying((1.0, 2.0, 0.5), 1, "key"),
    "norm query": lambda: copying((1.0, 2.0, 3.0, 2.0), 2, "query", final_norm=True),
    "norm key": lambda: copying((2.0, 2.0, 2.0, 2.0), 2, "key", final_norm=True),
    "norm value": lambda: copying((2.0, 2.0, 2.0, 2.0), 4, "value", final_norm=True),
    "negative": negative_head,
    "and": lambda: gate("and"),
    "or": lambda: gate("or"),
    "self-repair": self_repair,
    "cancellation": cancellation,
    "induction": handwritten_pairs,
    "induction, one head": lambda: handwritten_pairs((10.0,)),
    "linear": linear_network,
}


@cache
def built(name: str) -> GroundTruth:
    return BUILDERS[name]()


@pytest.fixture(params=list(BUILDERS))
def truth(request) -> GroundTruth:
    return built(request.param)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_model_does_what_it_claims(truth):
    for batch, metric in ((truth.task.clean, truth.clean), (truth.task.corrupt, truth.corrupt)):
        logits = truth.model.trace(batch, logits=truth.task.position[:, None]).logits[:, 0]
        close(truth.task.score(logits), metric)
        if batch is truth.task.clean and truth.name != "linear":
            assert right(truth.task, logits).all()
    assert truth.model.certificate.passed


def test_every_effect_is_the_measured_one(truth, intervene):
    assert truth.outcomes
    for outcome in truth.outcomes:
        found = intervene(truth, outcome)
        assert torch.allclose(found, outcome.metric, atol=1e-5, rtol=1e-5), (
            outcome.how, outcome.nodes, [str(edge) for edge in outcome.edges], found, outcome.metric
        )  # fmt: skip


def test_outcomes_are_said_once(truth):
    said = [(one.how, frozenset((*one.nodes, *one.edges))) for one in truth.outcomes]
    assert len(said) == len(set(said))


def test_heads_outside_the_circuit_do_nothing(truth):
    spec = truth.model.spec
    heads = {str(head) for head in spec.heads()}
    kv = {f"L{layer.index}KV{h}" for layer in spec.layers for h in range(layer.kv_heads)}
    inside = heads & truth.nodes
    assert truth.nodes <= heads | kv | {"embed"} | {f"L{layer.index}.mlp" for layer in spec.layers}
    for head in spec.heads():
        output = truth.model.attachment.hf_model.blocks[head.layer].attention.output.weight
        width = spec.layers[head.layer].head_dim
        assert bool(output[:, head.head * width : (head.head + 1) * width].any()) == (str(head) in inside)
    assert {edge.source for edge in truth.edges} <= truth.nodes
    assert {edge.target for edge in truth.edges} <= truth.nodes | {"logits"}


# --- naive gradients -----------------------------------------------------------------------------------------------


def run(truth: GroundTruth, ids: Tensor, frozen: Tensor | None = None, given: dict | None = None) -> dict[str, Tensor]:
    """The model in float64, all of whose sites keep their gradients; `frozen` is a scale of the final norm, `given`
    replaces sites."""
    model = truth.model.attachment.hf_model
    config, given, sites = model.config, given or {}, {}
    w = {name: value.detach().double() for name, value in model.state_dict().items()}

    def site(name: str, value: Tensor) -> Tensor:
        value = given.get(name, value)
        sites[name] = value if value.requires_grad else value.requires_grad_()
        sites[name].retain_grad()
        return sites[name]

    prompts, tokens = ids.shape
    x = site("embed", w["token_embedding.weight"][ids] + w["position_embedding.weight"][:tokens])
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        at = f"blocks.{layer}"
        q, k, v = (
            site(f"{layer}.{n[0]}", (x @ w[f"{at}.attention.{n}.weight"].T).view(prompts, tokens, -1, config.head_dim))
            for n in ("query", "key", "value")
        )
        scores = torch.einsum("b q h d, b k h d -> b h q k", q, k.repeat_interleave(group, 2)) * config.scaling
        pattern = site(f"{layer}.pattern", scores.masked_fill(future, -torch.inf).softmax(-1))
        z = site(f"{layer}.z", torch.einsum("b h q k, b k h d -> b q h d", pattern, v.repeat_interleave(group, 2)))
        x = x + z.flatten(2) @ w[f"{at}.attention.output.weight"].T
        if config.intermediate_size:
            hidden = (x @ w[f"{at}.mlp.inward.weight"].T + w[f"{at}.mlp.inward.bias"]).relu()
            x = x + site(f"{layer}.mlp", hidden @ w[f"{at}.mlp.outward.weight"].T + w[f"{at}.mlp.outward.bias"])
    if config.final_layer_norm or config.layer_norm:
        x = x - x.mean(-1, keepdim=True)
        sites["scale"] = (x.pow(2).mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        x = x / (sites["scale"] if frozen is None else frozen)
    sites["logits"] = x @ w["unembedding.weight"].T
    return sites


def metric(truth: GroundTruth, logits: Tensor) -> Tensor:
    """In float64, unlike the task's own."""
    rows = logits[torch.arange(len(logits)), truth.task.position]
    return (rows.gather(1, truth.task.answers) - rows.gather(1, truth.task.foils))[:, 0]


def attributed(truth: GroundTruth, estimate) -> Tensor:
    ids = {"clean": truth.task.clean.ids, "corrupt": truth.task.corrupt.ids}
    base, other = ("corrupt", "clean") if estimate.how == "denoising" else ("clean", "corrupt")
    start, end = run(truth, ids[base]), run(truth, ids[other])
    if estimate.method.endswith("norm frozen"):
        start = run(truth, ids[base], frozen=start["scale"].detach())
    metric(truth, start["logits"]).sum().backward()
    layer, _, node = estimate.node.partition("H" if "H" in estimate.node else "KV" if "KV" in estimate.node else ".")
    layer = layer.removeprefix("L")
    if estimate.node == "embed":
        places = [("embed", slice(None))]
    elif node == "mlp":
        places = [(f"{layer}.mlp", slice(None))]
    else:
        head, _, part = node.partition(".")
        parts = part or ("z" if "H" in estimate.node else "kv")
        places = [(f"{layer}.{name}", (slice(None), slice(None), int(head))) for name in parts]
    total = torch.zeros(len(ids["clean"]), dtype=torch.float64)
    for name, where in places:
        if estimate.method.startswith("qk fix") and name[-1] in "qk":
            changed = start[name].detach().clone()
            changed[where] = end[name].detach()[where]
            pattern = run(truth, ids[base], given={name: changed})[f"{layer}.pattern"].detach()
            gradient, moved = start[f"{layer}.pattern"].grad, pattern - start[f"{layer}.pattern"].detach()
        else:
            to = torch.zeros_like(end[name]) if estimate.how == "zero" else end[name].detach()
            gradient, moved = start[name].grad[where], (to - start[name].detach())[where]
        total += (gradient * moved).flatten(1).sum(1)
    return total


def test_first_order_estimates_are_those_of_the_gradient(truth):
    for estimate in truth.estimates:
        found = attributed(truth, estimate)
        assert torch.allclose(found.float(), estimate.change, atol=2e-5, rtol=1e-5), (
            estimate.method, estimate.how, estimate.node, found, estimate.change
        )  # fmt: skip


def wrong(truth: GroundTruth, method: str, how: str, node: str) -> float:
    """Estimated less exact effect, as a share of the gap."""
    (one,) = [e for e in truth.estimates if (e.method, e.how, e.node) == (method, how, node)]
    return float((one.change - truth.effect(how, node)).mean() / (truth.clean - truth.corrupt).mean())


# --- what each was planted for -------------------------------------------------------------------------------------


def test_groups_move_together_and_each_input_carries_its_own_corruption():
    by_query, by_key, by_value = (built(f"copying {name}") for name in ("query", "key", "value"))
    for truth in (by_key, by_value):
        shares = [truth.recovery("noising", name) for name in ("L0H0", "L0H1", "L0H2", "L0KV0", "L0KV1")]
        assert shares == pytest.approx([0.8, 0.4, -0.2, 1.2, -0.2])
    assert by_query.recovery("noising", "L0H0.q") == pytest.approx(0.8)
    assert by_query.recovery("noising", "L0KV0") == 0
    assert by_key.recovery("noising", "L0KV0.k") == pytest.approx(1.2)
    assert by_key.recovery("noising", "L0KV0.v") == by_key.recovery("noising", "L0H0.q") == 0
    assert by_value.recovery("noising", "L0KV0.v") == pytest.approx(1.2)
    assert by_value.recovery("noising", "L0KV0.k") == 0


def test_the_negative_head_hurts_and_the_idle_one_does_nothing():
    truth = built("negative")
    assert {name: sign for name, sign in truth.helps.items() if "H" in name and ".q" not in name} == {
        "L0H0": 1, "L0H1": -1, "L0H2": 0,
    }  # fmt: skip
    assert float(truth.effect("noising", "L0H1").min()) > 0
    assert "L0H2" not in truth.nodes


@pytest.mark.parametrize(
    ("kind", "noising", "denoising"), [("and", [1, 1, 1], [0, 0, 1]), ("or", [0, 0, 1], [1, 1, 1])]
)
def test_gates_have_the_textbook_table(kind, noising, denoising):
    truth = built(kind)
    sets = [("L0H0",), ("L0H1",), ("L0H0", "L0H1")]
    assert [truth.recovery("noising", *one) for one in sets] == noising
    assert [truth.recovery("denoising", *one) for one in sets] == denoising


def test_a_backup_hides_the_main_head_from_zeroing_alone():
    truth = built("self-repair")
    assert truth.recovery("zero", "L0H0") == pytest.approx((1 - REPAIR) / 2)
    assert truth.recovery("zero", "L1H0") == 0
    assert truth.recovery("zero", "L0H0", "L1H0") == pytest.approx(0.5)
    assert truth.recovery("noising", "L0H0") == pytest.approx(1)
    assert wrong(truth, "atp", "zero", "L0H0") == pytest.approx(-REPAIR / 2)


def test_cancelling_paths_leave_a_node_without_effect_and_its_edges_with_all():
    truth = built("cancellation")
    assert truth.recovery("noising", "L0H0") == 0
    assert truth.recovery("noising", Edge("L0H0", "logits")) == pytest.approx(1)
    assert truth.recovery("noising", Edge("L0H0", "L1KV0", "v")) == pytest.approx(-1)


def test_gradients_miss_what_a_saturated_softmax_hides():
    truth = built("induction")
    assert truth.recovery("noising", "L1KV0.k") == pytest.approx(1)
    assert wrong(truth, "atp", "noising", "L1KV0.k") == pytest.approx(1)
    assert wrong(truth, "atp", "denoising", "L1KV0.k") == pytest.approx(2)
    assert wrong(truth, "qk fix", "noising", "L1KV0.k") == pytest.approx(0)


def test_a_dominated_norm_takes_another_half_and_freezing_it_gives_too_much():
    truth = built("norm key")
    exact = truth.recovery("noising", "L0KV0")
    assert exact == pytest.approx(0.5, abs=1e-6)
    assert wrong(truth, "atp", "noising", "L0KV0") == pytest.approx(exact)
    # The half that runs along the answer is lost in the norm's scale.
    assert wrong(truth, "qk fix", "noising", "L0KV0") == pytest.approx(exact / 2, abs=0.01)
    single = built("norm value")
    assert single.recovery("zero", "L0H0") < 0.01
    assert wrong(single, "atp", "noising", "L0H0") > 0.04
    assert wrong(single, "qk fix, norm frozen", "noising", "L0H0") < -0.04


def test_everything_adds_up_in_the_linear_network():
    truth = built("linear")
    gap = truth.clean - truth.corrupt
    into_logits = sum(truth.effect("noising", edge) for edge in truth.edges if edge.target == "logits")
    close(-into_logits, gap)
    close(-truth.effect("noising", "embed"), gap)
    for head in range(HEADS):
        out = [edge for edge in truth.edges if edge.source == f"L1H{head}"]
        # Along its edges a node does what it does as a whole; key/value heads are not passed through twice.
        close(sum(truth.effect("noising", edge) for edge in out), truth.effect("noising", f"L1H{head}"))
    assert float(gap.abs().min()) > 1e-3


def test_the_linear_network_is_linear():
    truth = built("linear")
    model = truth.model.attachment.hf_model
    for batch in (truth.task.clean, truth.task.corrupt):
        for layer in range(LAYERS):
            read = truth.model.trace(batch, sites=["resid_mid"]).site("resid_mid", layer)
            assert float((model.blocks[layer].mlp.inward(read).detach() - OPEN).abs().max()) < OPEN


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: copying(corrupt="token"), "'token'"),
        (lambda: copying((1.0, -1.0)), "add up to more than 0"),
        (lambda: copying((1.0, 1.0, 1.0), 2), "multiple of"),
        (lambda: negative_head(1.5), "strength=1.5"),
        (lambda: gate("xor"), "'xor'"),
        (lambda: self_repair(values=1), "values=1"),
        (lambda: handwritten_pairs((1.0, -1.0)), "no gap"),
        (lambda: built("or").outcome("noising", "L9H9"), "L9H9"),
        (lambda: built("or").outcome("patching", "L0H0"), "'patching'"),
    ],
)
def test_what_cannot_be_is_refused(build, says):
    with pytest.raises(RequestError, match=says):
        build()
