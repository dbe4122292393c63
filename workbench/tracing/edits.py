"""Changes to a running model, at the same sites where it is read.

`ablate` replaces the output z of chosen heads; `patch` puts a given value at a site. The five ways to ablate are
different experiments and are never mixed up (names as in the literature's own vocabulary):

| how | z of the head becomes | also known as |
| --- | --- | --- |
| `zero` | 0 | output-zero, classical zero ablation |
| `mean` | its mean over reference prompts | mean ablation |
| `resample` | its z on another prompt | resample ablation |
| `uniform` | the mean of the visible values | Q-zero, logit-zero, uniform mask |
| `to_sink` | the value of the first visible token | attend-to-BOS |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import HeadError, RequestError
from workbench.models import AttentionCall, Batch, Head, Spec
from workbench.tracing.sites import Site, parse_site

How = Literal["zero", "mean", "resample", "uniform", "to_sink"]
HOWS: tuple[How, ...] = get_args(How)


@dataclass(frozen=True, eq=False)
class Ablation:
    """z of `heads` replaced, at `positions` of each prompt (everywhere if None).

    `values` are per head: `[dim]`, `[token, dim]` or `[prompt, token, dim]`, for `mean` and `resample`; or they
    are made from `reference` prompts when the trace starts.
    """

    heads: tuple[Head, ...]
    how: How
    positions: Bool[Tensor, "prompt token"] | None = None
    values: Mapping[Head, Tensor] | None = None
    reference: Batch | None = None

    def in_layer(self, layer: int) -> list[Head]:
        return [head for head in self.heads if head.layer == layer]

    def check(self, spec: Spec) -> None:
        for head in self.heads:
            spec.check(head)


@dataclass(frozen=True, eq=False)
class Patch:
    """`value` put at a site of one layer; `heads` and `positions` narrow it."""

    site: Site
    layer: int
    value: Tensor
    heads: tuple[int, ...] | None = None
    positions: Bool[Tensor, "prompt token"] | None = None
    named: str = ""

    def check(self, spec: Spec) -> None:
        parse_site(self.named or self.site, spec)
        if not 0 <= self.layer < spec.n_layers:
            raise HeadError(
                f"patch({self.site!r}, layer={self.layer}): layers run from 0 to {spec.n_layers - 1}."
            )
        if self.site == "resid_mid" and spec.parallel:
            raise RequestError("resid_mid does not exist where attention and MLP read the same residual.")


Edit = Ablation | Patch


def ablate(
    heads: Iterable[Head | str],
    how: How = "zero",
    *,
    positions: Bool[Tensor, "prompt token"] | None = None,
    values: Mapping[Head, Tensor] | None = None,
    reference: Batch | None = None,
) -> Ablation:
    """Ablate heads (`"L5H3"` or `Head(5, 3)`); `mean` and `resample` need `values` or `reference` prompts."""
    chosen = tuple(
        dict.fromkeys(Head.parse(head) if isinstance(head, str) else Head(*head) for head in heads)
    )
    if how not in HOWS:
        raise RequestError(f"how={how!r} is no ablation; choose one of {', '.join(HOWS)}.")
    if how in ("mean", "resample") and values is None and reference is None:
        raise RequestError(f"ablate(how={how!r}) needs reference prompts: pass reference=model.batch([...]).")
    return Ablation(chosen, how, positions, values, reference)


def patch(
    site: str,
    value: Tensor,
    *,
    layer: int | None = None,
    heads: Iterable[int] | None = None,
    positions: Bool[Tensor, "prompt token"] | None = None,
) -> Patch:
    """Put `value` (shaped as the site, see `SHAPES`) at `site`, e.g. `"blocks.5.attn.hook_z"` or ("z", layer=5)."""
    name, named = parse_site(site)
    layer = named if layer is None else layer
    if layer is None:
        raise RequestError(f"patch({site!r}) needs a layer: pass layer=5 or name 'blocks.5.attn.hook_z'.")
    return Patch(name, layer, value, None if heads is None else tuple(heads), positions, site)


def apply_ablation(
    z: Float[Tensor, "batch head query dim"], call: AttentionCall, edit: Ablation, rows: slice
) -> Tensor:
    """z with the ablated heads of this layer replaced; `rows` are this piece's prompts in the batch."""
    heads = edit.in_layer(call.layer)
    if not heads:
        return z
    z = z.clone()
    for head in heads:
        value = _replacement(z[:, head.head], call, edit, head, rows)
        z[:, head.head] = masked(z[:, head.head], value.to(z.dtype), edit.positions, rows)
    return z


def _replacement(z: Tensor, call: AttentionCall, edit: Ablation, head: Head, rows: slice) -> Tensor:
    if edit.how == "zero":
        return torch.zeros_like(z)
    group = call.q.shape[1] // call.k.shape[1]
    if edit.how == "uniform":
        return uniform_output(call, head.head // group)
    if edit.how == "to_sink":
        return first_visible_value(call, head.head // group)
    assert edit.values is not None
    value = edit.values[head].to(z)
    if value.ndim == 3:
        value = value[rows, : z.shape[1]]
    elif value.ndim == 2:
        value = value[: z.shape[1]]
    try:
        return value.expand_as(z)
    except RuntimeError:
        raise RequestError(
            f"ablate: the value for {head} has shape {tuple(value.shape)}, which does not fit {tuple(z.shape)} "
            "[prompt, token, head_dim]; use reference prompts at least as long and as many."
        ) from None


def uniform_output(call: AttentionCall, kv_head: int) -> Float[Tensor, "batch query dim"]:
    """The mean of the values that each query sees: a head whose logits are all equal."""
    low, high = _visible_bounds(call)
    sums = torch.nn.functional.pad(call.v[:, kv_head].double().cumsum(1), (0, 0, 1, 0))
    total = _rows(sums, high) - _rows(sums, low)
    return total / (high - low).clamp(min=1)[..., None]


def first_visible_value(call: AttentionCall, kv_head: int) -> Float[Tensor, "batch query dim"]:
    """The value of the prompt's first token, or of the first that the window still shows."""
    return _rows(call.v[:, kv_head], _visible_bounds(call)[0])


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return torch.gather(values, 1, index[..., None].expand(-1, -1, values.shape[-1]))


def _visible_bounds(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """First visible key and one past the last, per prompt and query (padding rows see their own key)."""
    batch, queries, keys = len(call.q), call.q.shape[2], call.k.shape[2]
    own = torch.arange(keys - queries, keys, device=call.q.device).expand(batch, -1)
    start = torch.zeros_like(own) if call.key_start is None else call.key_start[:, None].expand_as(own)
    if call.window is not None:
        start = torch.maximum(start, own - call.window + 1)
    return torch.minimum(start, own), own + 1


def masked(old: Tensor, new: Tensor, positions: Tensor | None, rows: slice) -> Tensor:
    """`new` at the chosen positions of `[prompt, token, ...]`, `old` elsewhere."""
    if positions is None:
        return new
    chosen = positions[rows, : old.shape[1]].to(old.device)
    return torch.where(chosen.reshape(*chosen.shape, *[1] * (old.ndim - 2)), new, old)
