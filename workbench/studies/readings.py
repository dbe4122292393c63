"""What every head's circuits read and write in tokens, as a table of a run (`workbench.runs.readings`)."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from workbench.heads.readings import CIRCUITS, CircuitDirections, circuit_directions
from workbench.heads.weights import HeadWeights, read_weights
from workbench.runs import RunWriter
from workbench.runs.readings import TABLE
from workbench.studies.measuring import CANNOT
from workbench.tracing import Model

# A token of a vocabulary may be long; what tells it apart is not.
_MOST_TEXT = 40


def write_readings(writer: RunWriter, model: Model) -> None:
    """The strongest directions of all heads; where weights cannot be read, the manifest says why."""
    if model.tokenizer is None:
        return
    try:
        writer.table(TABLE, readings_table(model, read_weights(model)))
    except CANNOT as error:
        writer.manifest["no_readings"] = str(error)


def readings_table(model: Model, weights: HeadWeights) -> pd.DataFrame:
    """A row a head, circuit, direction and sign."""
    rows: list[dict[str, Any]] = []
    for layer in weights.spec.layers:
        for circuit in CIRCUITS if layer.heads else ():
            for head, found in enumerate(circuit_directions(weights, layer.index, circuit)):
                rows += [
                    {"layer": layer.index, "head": head, "circuit": circuit, **row}
                    for row in direction_rows(model, found)
                ]
    texts = pd.DataFrame(rows)
    for side in ("reads", "writes"):
        texts[side] = texts[side].map(json.dumps)
    return texts


def direction_rows(model: Model, found: CircuitDirections) -> list[dict[str, Any]]:
    """Directions of one head as plain values: direction, sign, share, and tokens as text."""
    return [
        {
            "direction": direction,
            "sign": 1 if sign == 0 else -1,
            "share": float(found.share[direction]),
            "reads": token_texts(model, found.reads[direction, sign].tolist()),
            "writes": token_texts(model, found.writes[direction, sign].tolist()),
        }
        for direction in range(len(found.share))
        for sign in (0, 1)
    ]


def token_texts(model: Model, ids: list[int]) -> list[str]:
    """Tokens as text, cut where they are long; their numbers where there is no tokenizer."""
    if model.tokenizer is None:
        return [str(one) for one in ids]
    return [str(model.tokenizer.decode([one]))[:_MOST_TEXT] for one in ids]
