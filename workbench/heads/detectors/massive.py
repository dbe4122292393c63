"""Residual peaks and massive activations: properties of layers and dimensions, so tables and not scores of heads.

A residual peak is the norm of position 0 against the other tokens, layer by layer (Guo et al. 2024,
arXiv 2410.13835). All heads of a layer read the same stream: given to each, one number would pass for as many findings
as there are heads. A massive activation is one entry of a hidden state with |x| > 100 and at least 1000 times the
median of that state (Sun et al. 2024, arXiv 2402.17762); dimensions that carry one in nine of ten texts are D_sink.

`depth` counts layers done: 0 is the embeddings, n_layers the end of the stream, before the final norm (which the last
of Hugging Face's `hidden_states` has behind it). Prompts run one by one, so that one prompt's stream is held at a
time: tokens x width x (layers + 1) numbers in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.heads.inference import bootstrap_mean
from workbench.models import Batch
from workbench.tracing import Model

MAGNITUDE = 100.0
RATIO = 1000.0
SHARE = 0.9
COLUMNS = ("prompt", "depth", "position", "token", "dim", "value", "median", "ratio")


def streams(model: Model, batch: Batch) -> Iterator[tuple[int, list[Float[Tensor, "token width"]]]]:
    """Each prompt's residual stream at every depth, float32, padding left out."""
    last = model.spec.n_layers - 1
    for index in range(len(batch)):
        ids = batch.ids[index, batch.mask[index]]
        trace = model.trace([ids.tolist()], sites=["resid_pre", f"blocks.{last}.hook_resid_post"])
        states = [trace.site("resid_pre", layer)[0].float() for layer in range(last + 1)]
        yield index, [*states, trace.site("resid_post", last)[0].float()]


def residual_peaks(model: Model, batch: Batch, seed: int = 0) -> pd.DataFrame:
    """Norm of position 0 against the others, per depth, over prompts.

    Columns: depth, first (norm at position 0), others (mean norm of all other tokens), ratio (mean over prompts of
    first / others), low, high (95 % bootstrap of the ratio), n. Prompts need two tokens or more.
    """
    shortest = int(batch.lengths.min())
    if shortest < 2:
        raise RequestError(f"A prompt of {shortest} token has no other to compare with; give prompts of 2 or more.")
    first, others = [], []
    for _, states in streams(model, batch):
        norms = torch.stack([torch.linalg.vector_norm(state, dim=-1) for state in states]).double()
        first.append(norms[:, 0])
        others.append(norms[:, 1:].mean(1))
    at_first, at_others = torch.stack(first).numpy(), torch.stack(others).numpy()
    interval = bootstrap_mean(at_first / at_others, seed)
    return pd.DataFrame(
        {
            "depth": np.arange(at_first.shape[1]), "first": at_first.mean(0), "others": at_others.mean(0),
            "ratio": interval.value, "low": interval.low, "high": interval.high, "n": len(at_first),
        }
    )  # fmt: skip


def massive_activations(
    model: Model, batch: Batch, *, magnitude: float = MAGNITUDE, ratio: float = RATIO
) -> pd.DataFrame:
    """Every massive activation: prompt, depth, position (within the prompt), token id, dim, value, median, ratio.

    The median is of |x| over all entries of the prompt's hidden state at that depth, all tokens and dimensions, as in
    the released code. An empty table is a result: the model has none by this criterion.
    """
    if magnitude <= 0 or ratio <= 0:
        raise RequestError(f"magnitude = {magnitude}, ratio = {ratio}: both must be above 0.")
    rows: list[pd.DataFrame] = []
    for prompt, states in streams(model, batch):
        ids = batch.ids[prompt, batch.mask[prompt]]
        for depth, state in enumerate(states):
            size = state.abs()
            median = float(size.median())
            position, dim = torch.nonzero((size > magnitude) & (size >= ratio * median), as_tuple=True)
            if not len(position):
                continue
            value = state[position, dim].double()
            rows.append(
                pd.DataFrame({
                    "prompt": prompt, "depth": depth, "position": position.numpy(), "token": ids[position].numpy(),
                    "dim": dim.numpy(), "value": value.numpy(), "median": median,
                    "ratio": (value.abs() / median).numpy(),
                })
            )  # fmt: skip
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=list(COLUMNS))


def sink_dimensions(massive: pd.DataFrame, prompts: int, share: float = SHARE) -> tuple[int, ...]:
    """D_sink: dimensions with a massive activation, at any depth and position, in at least a share of the prompts."""
    if prompts < 1 or not 0 < share <= 1:
        raise RequestError(f"prompts = {prompts}, share = {share}: give 1 prompt or more and a share in (0, 1].")
    count = massive.groupby("dim")["prompt"].nunique()
    # A count that reaches the share exactly must not fall to rounding.
    return tuple(int(dim) for dim in sorted(count.index[count >= share * prompts - 1e-9]))


def massive_summary(massive: pd.DataFrame) -> pd.DataFrame:
    """Where each dimension's massive activations are: dim, prompts, first and last depth, positions, largest."""
    grouped = massive.groupby("dim")
    return pd.DataFrame(
        {
            "prompts": grouped["prompt"].nunique(),
            "first_depth": grouped["depth"].min(),
            "last_depth": grouped["depth"].max(),
            "positions": grouped["position"].agg(_listed),
            "largest": grouped["value"].agg(lambda values: float(np.abs(values).max())),
        }
    ).reset_index()


def _listed(positions: pd.Series) -> str:
    found = sorted({int(position) for position in positions})
    return " ".join(map(str, found[:8])) + (" ..." if len(found) > 8 else "")
