"""Writing weights by hand: an empty `ToyModel`, and each head's matrices as views to write into."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.dynamics.toy import ToyAttention, ToyConfig, ToyMLP, ToyModel
from workbench.errors import CertificateFailed
from workbench.models import attach_model
from workbench.models.loading import resolve
from workbench.tracing.model import Model

# exp(-30) is 1e-13: what does not match gets nothing that float32 could show.
MATCH_SCORE = 30.0
# Far more than planted prompts have: the certificate's probe of random tokens should meet the circuit somewhere.
MAX_POSITIONS = 48
PROBES = 200


@dataclass(frozen=True)
class HeadWeights:
    """Views into one head's weights; heads of one group share `key` and `value`."""

    query: Float[Tensor, "head_dim d_model"]
    key: Float[Tensor, "head_dim d_model"]
    value: Float[Tensor, "head_dim d_model"]
    output: Float[Tensor, "d_model head_dim"]


def empty_model(config: ToyConfig) -> ToyModel:
    """The model with all weights zero, but for norms, which stay as they begin."""
    with torch.random.fork_rng(devices=[]):
        model = ToyModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
    model.eval()  # type: ignore[no-untyped-call]
    return model


def head_weights(model: ToyModel, layer: int, head: int) -> HeadWeights:
    """Views of head `head` of a layer, to be written into."""
    attention: ToyAttention = model.blocks[layer].attention  # type: ignore[assignment]
    width = attention.head_dim
    own = slice(head * width, (head + 1) * width)
    shared = slice(head // attention.num_key_value_groups * width, (head // attention.num_key_value_groups + 1) * width)
    return HeadWeights(
        attention.query.weight.data[own],
        attention.key.weight.data[shared],
        attention.value.weight.data[shared],
        attention.output.weight.data[:, own],
    )


def mlp_weights(model: ToyModel, layer: int) -> ToyMLP:
    """The MLP of a layer."""
    mlp: ToyMLP = model.blocks[layer].mlp  # type: ignore[assignment]
    return mlp


def spaces(**sizes: int) -> dict[str, range]:
    """Named, disjoint runs of residual coordinates, in order."""
    ends = [0]
    for size in sizes.values():
        ends.append(ends[-1] + size)
    return {name: range(*ends) for name, ends in zip(sizes, pairwise(ends), strict=True)}


def attached(model: ToyModel) -> Model:
    """Attached and certified like any other model.

    The certificate zeroes layers on random tokens and wants to see a change, and a program may have nothing to do on
    them: then the next of `PROBES` draws is taken. Any other check that fails is final.
    """
    for seed in range(PROBES):
        try:
            attachment, certificate = attach_model(model, seed=seed)
        except CertificateFailed as error:
            # Checks are named in order, so that all before this one passed.
            if "is not the model. edit: 0 (" not in str(error) or seed == PROBES - 1:
                raise
        else:
            return Model(attachment, None, resolve(model).source, certificate)
    raise AssertionError("the last draw returns or raises")
