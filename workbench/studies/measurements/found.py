"""Circuits found and put to the test: `found_circuit` with its curve of faithfulness, and `discrete_codes`.

Scores are made on some pairs and tried on others. A circuit runs with everything outside of it replaced by what it is
on the corrupt prompt; random circuits of the same size, with edges between the same layers and kinds of parts, stand
against it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from workbench.circuits import AutoencoderSettings, Circuit, DiscreteCircuit, attribute, discrete_sae, patch_activations
from workbench.circuits.codes import curve, node_scores
from workbench.circuits.discrete_sae import mean_outputs
from workbench.circuits.faithfulness import faithfulness
from workbench.circuits.graph import Scores
from workbench.circuits.trials import Trials
from workbench.errors import RequestError
from workbench.heads.detector import Array, Progress
from workbench.studies.measurements.base import PROBE_SEED, Bench, Measurement, Tables, spearman
from workbench.studies.measurements.pairs import Pairs, prepare
from workbench.tasks import PairTask
from workbench.tracing import Model

Truth = np.ndarray[Any, np.dtype[np.bool_]]


class Found(Pairs):
    """A method's edges, the best of them in circuits of several `sizes`, tried on `held_out` other pairs."""

    method: str = "eap-ig"
    steps: Annotated[int, Field(ge=1)] = 5
    held_out: Annotated[int, Field(ge=4)] = 6
    sizes: Annotated[tuple[int, ...], Field(min_length=1)] = (50, 200, 800, 3200, 12800)
    draws: Annotated[int, Field(ge=2)] = 2
    looked_at: int = 800


def _found(bench: Bench, asked: Found, progress: Progress | None) -> Tables:
    model, found = bench.model, prepare(bench, asked)
    scores = attribute(model, found.task, asked.method, steps=asked.steps, seed=asked.seed)
    if scores.edges is None:
        raise RequestError(f"method = {asked.method!r} scores nodes; take one of edges, e.g. 'eap-ig'.")
    sizes = [size for size in asked.sizes if size < scores.graph.count]
    held = prepare(bench, asked.model_copy(update={"prompts": asked.held_out}), seed=PROBE_SEED + asked.seed)
    trials = Trials(model, held.task)
    tables = {
        "faithfulness": _curve(trials, scores, sizes, asked, progress),
        "circuit_nodes": _nodes(scores, asked.looked_at),
    }
    return {name: table.assign(method=asked.method, caption=held.caption) for name, table in tables.items()}


def _curve(trials: Trials, scores: Scores, sizes: list[int], asked: Found, progress: Progress | None) -> pd.DataFrame:
    """f over the number of edges, with that of the rest of the model and of random circuits."""
    rows: list[dict[str, Any]] = []
    for done, size in enumerate(sizes, start=1):
        circuit = Circuit.from_scores(scores, size, "greedy", signed=True)
        drawn = [circuit.random_like(asked.seed * 1000 + draw, "matched") for draw in range(asked.draws)]
        masks = np.stack([circuit.kept, *(one.kept for one in drawn), scores.graph.exists & ~circuit.kept])
        f = faithfulness(trials.values(masks), trials.clean, trials.baseline, asked.seed)
        random = f.value[1 : 1 + asked.draws]
        rows += [
            {
                "circuit": label, "edges": size, "kept": circuit.size, "share": size / scores.graph.count,
                "nodes": len(circuit.nodes), "value": float(f.value[at]), "low": float(f.low[at]),
                "high": float(f.high[at]), "control": float(random.mean()), "control_low": float(random.min()),
                "control_high": float(random.max()), "n": len(trials.clean),
            }
            for label, at in (("found", 0), ("all but the found", len(masks) - 1))
        ]  # fmt: skip
        if progress is not None:
            progress(done, len(sizes))
    return pd.DataFrame(rows)


def _nodes(scores: Scores, size: int) -> pd.DataFrame:
    """Writers of the circuit of so many edges, with their scores."""
    size = min(size, scores.graph.count)
    circuit = Circuit.from_scores(scores, size, "greedy", signed=True)
    table = scores.table("nodes")
    return table[table["node"].isin(circuit.nodes)].assign(edges=size)


class Codes(Pairs):
    """Discrete codes of head outputs, against patching: heads whose noising moves the metric by `matters` of the gap.

    `drawn` prompts of each class are coded, `trainings` autoencoders are trained, and as many orders of the labels are
    shuffled as controls.
    """

    coded: Annotated[int, Field(ge=10)] = 60
    trainings: Annotated[int, Field(ge=1)] = 3
    epochs: Annotated[int, Field(ge=1)] = 200
    features: Annotated[int, Field(ge=2)] = 200
    matters: Annotated[float, Field(gt=0, lt=1)] = 0.03
    shuffles: Annotated[int, Field(ge=2)] = 20
    negatives: Literal["references", "corrupt"] = "corrupt"


def _codes(bench: Bench, asked: Codes, progress: Progress | None) -> Tables:
    """How well codes that only positives have tell the heads that patching finds: the area under the ROC curve.

    `control_*` are shuffled labels; "means apart" ranks heads by how far the classes' mean outputs lie apart, in
    standard deviations, which needs no autoencoder.
    """
    model, found = bench.model, prepare(bench, asked)
    effects = patch_activations(model, found.task, "z", "head", direction="noising")
    recovered = effects.effect("noising").mean(1) / float(effects.clean.mean() - effects.corrupt.mean())
    true = np.abs(recovered) >= asked.matters
    if not true.any() or true.all():
        raise RequestError(
            f"{int(true.sum())} of {len(true)} heads move the metric by {asked.matters}; change matters."
        )
    if progress is not None:
        progress(1, 2)
    coded = prepare(bench, asked.model_copy(update={"prompts": asked.coded}), seed=PROBE_SEED + asked.seed)
    settings = AutoencoderSettings(features=asked.features, epochs=asked.epochs)
    codes = discrete_sae(
        model, coded.task, negatives=asked.negatives, settings=settings, trainings=asked.trainings, seed=asked.seed
    )
    apart = _means_apart(model, coded.task, asked.negatives)
    table = codes.nodes().set_index("node").loc[[change[0].node for change in effects.changes]].reset_index()
    table = table.assign(recovery=recovered, matters=true)
    return {
        "code_nodes": table.assign(caption=coded.caption),
        "code_agreement": _against(codes, apart, true, recovered, asked).assign(task=asked.task, caption=coded.caption),
    }


def _means_apart(model: Model, task: PairTask, negatives: str) -> Array:
    """Distance of the classes' mean outputs by head, over the spread within them."""
    others = task.references if negatives == "references" else task.corrupt
    if others is None:
        raise RequestError(f"{task.name} has no reference prompts; use negatives = 'corrupt'.")
    one, two = (mean_outputs(model, batch).double() for batch in (task.clean, others))
    spread = (one.var(0).sum(-1) + two.var(0).sum(-1)).sqrt().clamp(min=1e-9)
    found: Array = ((one.mean(0) - two.mean(0)).norm(dim=-1) / spread).numpy()
    return found


def _against(codes: DiscreteCircuit, apart: Array, true: Truth, recovered: Array, asked: Codes) -> pd.DataFrame:
    rng, shuffled = np.random.default_rng(asked.seed), []
    for _ in range(asked.shuffles):
        order = rng.permutation(codes.positive)
        shuffled.append(float(np.mean([curve(node_scores(one, order), true).area for one in codes.codes])))
    control = {
        "control": float(np.mean(shuffled)), "control_low": min(shuffled), "control_high": max(shuffled),
    }  # fmt: skip
    rows = []
    for label, scores in (("discrete codes", codes.node_scores), ("means apart", apart[None])):
        areas = [curve(one, true).area for one in scores]
        low, high = _over_heads(scores.mean(0), true, asked.seed)
        rows.append(
            {
                "method": label, "area": float(np.mean(areas)), "low": low, "high": high,
                "over_trainings": float(np.std(areas)), **control, "true": int(true.sum()), "heads": len(true),
                "rank_correlation": float(np.mean([spearman(one, np.abs(recovered)) for one in scores])),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _over_heads(scores: Array, true: Truth, seed: int) -> tuple[float, float]:
    """Interval of the area over heads, drawn within those that matter and those that do not."""
    rng, sides, drawn = np.random.default_rng(seed), (np.flatnonzero(true), np.flatnonzero(~true)), []
    for _ in range(499):
        pick = np.concatenate([rng.choice(side, len(side)) for side in sides])
        drawn.append(curve(scores[pick], true[pick]).area)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


FOUND = (
    Measurement("found_circuit", 1, "a circuit and its faithfulness", Found, _found, ("faithfulness", "circuit_nodes")),
    Measurement(
        "discrete_codes", 1, "codes of heads against patching", Codes, _codes, ("code_nodes", "code_agreement")
    ),
)
