"""Attention through all layers at once, for short prompts: rollout and flow (Abnar & Zuidema 2020, arXiv 2005.00928).

Both work on one graph: position i of layer l is joined to the positions j below it by `0.5 mean_h A_ij + 0.5 [i = j]`,
the half for the residual stream. Rollout multiplies the layers' matrices; flow is the maximum flow from a position of
the top to a token of the input, with these numbers as capacities. They hold full matrices of every layer, so long
prompts are refused. In causal models both concentrate on the first token, which every position can reach in every
layer: beside each value stands the same with that token left out and the others made to sum to 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.detector import Array
from workbench.models import Batch
from workbench.tracing import Model

# Tokens: rollout holds a matrix a layer, flow solves a problem a token.
LONGEST_ROLLOUT, LONGEST_FLOW = 1024, 256
# Capacities are whole numbers of this part of 1; scipy counts flow in 32 bits.
FLOW_STEPS = 1 << 24


def layer_matrices(model: Model, prompt: str | list[int], limit: int = LONGEST_ROLLOUT) -> Float[Tensor, "layer i j"]:
    """`0.5 mean_h A + 0.5 I` of every layer, in float64; each row sums to 1, a learned sink's share being left out.

    Raises:
        RequestError: a prompt longer than `limit` tokens, or several prompts.
    """
    batch: Batch = model.batch([prompt] if isinstance(prompt, str) else [list(prompt)])
    tokens = int(batch.lengths[0])
    if tokens > limit:
        raise RequestError(
            f"A prompt of {tokens} tokens: this needs the full attention of every layer and takes {limit} at most; "
            "cut the prompt, or use a detector, which streams."
        )
    trace = model.trace(batch, sites=["pattern"])
    patterns = [trace.site("pattern", layer)[0].double() for layer in range(model.spec.n_layers)]
    mean = torch.stack([(a / a.sum(-1, keepdim=True)).mean(0) for a in patterns])
    return 0.5 * mean + 0.5 * torch.eye(tokens, dtype=torch.float64)


def rolled_out(matrices: Float[Tensor, "layer i j"]) -> Float[Tensor, "layer i j"]:
    """The product of each layer's matrix and all below it."""
    found = [matrices[0]]
    for matrix in matrices[1:]:
        found.append(matrix @ found[-1])
    return torch.stack(found)


def without_first(values: Array) -> Array:
    """Shares of all tokens but the first, made to sum to 1 (zero where nothing is left); 0 for the first."""
    rest = values.copy()
    rest[..., 0] = 0.0
    whole = rest.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(rest, whole, out=np.zeros_like(rest), where=whole > 0))


def rollout(model: Model, prompt: str | list[int], row: int = -1) -> pd.DataFrame:
    """layer, query, key, token, share, share_without_first: how much of a position each input token makes up.

    `row` is the position looked at, by default the last; -1 counts from the end. Layers are those above which one
    stands: layer 0 is the output of the first.
    """
    found = rolled_out(layer_matrices(model, prompt))
    at = _row(row, found.shape[1])
    shares = np.asarray(found[:, at].numpy())
    return _table(model, prompt, at, shares, range(len(shares)))


def flow(model: Model, prompt: str | list[int], row: int = -1, layers: tuple[int, ...] | None = None) -> pd.DataFrame:
    """layer, query, key, token, share, share_without_first: the maximum flow from a position to each input token.

    `layers`: those above which one stands; the top by default, since each costs a problem a token. Shares are flows
    over their sum. Capacities are rounded to 2^-24, so a flow is off by at most 2^-25 for each edge of its cut.

    Raises:
        RequestError: a prompt of more than `LONGEST_FLOW` tokens, a layer or row that is not there.
    """
    matrices = layer_matrices(model, prompt, LONGEST_FLOW)
    chosen = (len(matrices) - 1,) if layers is None else layers
    wrong = [layer for layer in chosen if not 0 <= layer < len(matrices)]
    if wrong:
        raise RequestError(f"Layer {wrong[0]}: layers run from 0 to {len(matrices) - 1}.")
    at = _row(row, matrices.shape[1])
    flows = np.stack([flows_from(matrices[: layer + 1], at) for layer in chosen])
    table = _table(model, prompt, at, flows / flows.sum(axis=-1, keepdims=True), chosen)
    table.insert(4, "flow", flows[:, : at + 1].ravel())
    return table


def flows_from(matrices: Float[Tensor, "layer i j"], row: int) -> Float[np.ndarray, " token"]:
    """Maximum flow from `row` above the last matrix to each token below the first; 0 for tokens after it."""
    count, layers = row + 1, len(matrices)
    steps = (matrices[:, :count, :count].numpy() * FLOW_STEPS).round().astype(np.int32)
    layer, i, j = np.nonzero(steps)
    # Node (l, i) is the output of layer l - 1 at position i; (0, j) is an input token.
    tails, heads = (layer + 1) * count + i, layer * count + j
    size = (layers + 1) * count
    graph = csr_array((steps[layer, i, j], (tails, heads)), shape=(size, size))
    source = layers * count + row
    found = np.zeros(matrices.shape[1])
    for token in range(count):
        found[token] = maximum_flow(graph, source, token).flow_value / FLOW_STEPS
    return found


def _row(row: int, tokens: int) -> int:
    if not -tokens <= row < tokens:
        raise RequestError(f"Row {row} of a prompt of {tokens} tokens; give 0 to {tokens - 1}, or -1 for the last.")
    return row % tokens


def _table(
    model: Model, prompt: str | list[int], row: int, shares: Array, layers: tuple[int, ...] | range
) -> pd.DataFrame:
    """One line a layer and token up to the row."""
    ids = model.batch([prompt] if isinstance(prompt, str) else [list(prompt)]).ids[0].tolist()
    tokenizer: Any = model.tokenizer
    words = [str(token) if tokenizer is None else tokenizer.decode([token]) for token in ids]
    rest, keys = without_first(shares), range(row + 1)
    return pd.DataFrame(
        [
            (layer, row, key, words[key], shares[place, key], rest[place, key])
            for place, layer in enumerate(layers)
            for key in keys
        ],
        columns=["layer", "query", "key", "token", "share", "share_without_first"],
    )
