"""What each q of a head, and each k and v of a KV head, sends back to the stream, before the norm in front of them.

One pass of the layer's projections gives the gradient of their outputs, in which heads stand side by side; from there
each head goes its own way, through its own rows of the projection's weight and the norm's Jacobian. With all heads
this takes the operations of one backward pass of the projections, where a pass for each head would take heads times
as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.circuits.attribution.passes import Gradients, Part, Pass, projection_paths
from workbench.circuits.attribution.rules import norm_parts
from workbench.models import LayerSpec
from workbench.models.projections import PROJECTIONS, Projections
from workbench.tracing import Model

_QKV: tuple[Part, ...] = ("q", "k", "v")


def head_forks(
    model: Model, one: Pass, gradients: Gradients, layer: int, frozen: bool
) -> Float[Tensor, "reader row token d_model"]:
    """q of every head, k of every KV head, v of every KV head, in this order; `frozen` takes the norm's scale as
    given."""
    row, shape = PROJECTIONS[model.spec.architecture], model.spec.layers[layer]
    modules = model.attachment.layers[layer]
    calls: Mapping[Part, Tensor] = {"q": one.calls[layer].q, "k": one.calls[layer].k, "v": one.calls[layer].v}
    cotangents = [gradients.parts[part, layer].transpose(1, 2) for part in _QKV]
    outputs = one.projected[layer]
    inner = torch.autograd.grad(
        [calls[part] for part in _QKV], outputs, cotangents, retain_graph=True, materialize_grads=True
    )
    paths = projection_paths(row)
    columns = _columns(row, shape)
    found = []
    for number, part in enumerate(_QKV):
        place = number if len(paths) > 1 else 0
        module = modules.attention.get_submodule(paths[place])
        weight = cast(Tensor, module.weight).detach()
        own = columns[part].to(weight.device)
        rows = (weight.T if modules.transposed else weight)[own]
        each = inner[place].flatten(0, -2)[:, own].transpose(0, 1)
        found.append(torch.bmm(each, rows.to(each.dtype)))
    return _through_norm(model, one, layer, torch.cat(found), frozen).reshape(-1, *one.streams[layer].shape)


def _columns(row: Projections, shape: LayerSpec) -> Mapping[Part, Int[Tensor, "head dim"]]:
    """Which entries of its projection's output belong to a head."""
    counts: Mapping[Part, int] = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
    width, offset, found = shape.head_dim, 0, dict[Part, Tensor]()
    for number, part in enumerate(_QKV):
        first = torch.arange(counts[part]) * width
        if row.packing == "heads":
            first = first * 3 + number * width
        elif row.packing == "blocks":
            first, offset = first + offset, offset + counts[part] * width
        found[part] = first[:, None] + torch.arange(width)
    return found


def _through_norm(
    model: Model, one: Pass, layer: int, heads: Float[Tensor, "reader place d_model"], frozen: bool
) -> Float[Tensor, "reader place d_model"]:
    """From the norm's output back to its input."""
    path = PROJECTIONS[model.spec.architecture].norm
    norm = None if path is None else model.attachment.layers[layer].block.get_submodule(path)
    if norm is None or isinstance(norm, nn.Identity):
        return heads
    with torch.no_grad():
        stream = one.streams[layer].detach().flatten(0, 1)
        parts = norm_parts(model.spec.architecture, norm, stream, one.normed[layer].detach().flatten(0, 1))
        back = heads * parts.scale if parts.gain is None else heads * (parts.gain * parts.scale)
        if not frozen:
            # The scale falls as the input grows along itself.
            along = torch.einsum("h n d, n d -> h n", back, parts.centred)
            back.addcmul_(along[..., None], parts.centred * (parts.scale**2 / stream.shape[-1]), value=-1)
        return back - back.mean(-1, keepdim=True) if parts.centres else back
