"""Changes to a running model, at the same sites where it is read.

`ablate` replaces the output z of chosen heads; `patch` puts a given value at a site. The eight ways to ablate
are different experiments and are never mixed up (names as in the literature's own vocabulary):

| how | z of the head becomes | also known as |
| --- | --- | --- |
| `zero` | 0 | output-zero, classical zero ablation |
| `mean` | its mean over reference prompts | mean ablation |
| `resample` | its z on another prompt | resample ablation |
| `uniform` | the mean of the visible values | Q-zero, logit-zero, uniform mask |
| `to_sink` | the value of the first visible token | attend-to-BOS |
| `q_mean` | what its mean query over reference prompts attends to | Q-mean (LOCOS "mean") |
| `frozen_zero` | 0, all patterns of all heads kept as in the clean run | pattern-preserving zero (Olsson et al.) |
| `streaming` | what it reads in the first and the latest tokens alone | sink + recent mask, streaming head |

Where the softmax has a learned sink, `uniform` leaves it nothing; with a q of zero it would keep its share.
The mean query is taken before rotation and turned to each position; patterns are kept by keeping q and k of every
later layer, so that what a head removes reaches later layers through their values alone.

Of a `strength` s below 1, z becomes (1 - s) z + s z_ablated, where z is the head's output in the edited run. z is
linear in the pattern, so that for `uniform`, `to_sink`, `q_mean` and `streaming` this is the same mix of patterns; with
`frozen_zero`, patterns are kept at every s. s = 0 leaves the model's own numbers to the bit, s = 1 is the whole form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import HeadError, RequestError
from workbench.models import AttentionCall, Batch, Head, Spec
from workbench.tracing.rotation import Rotation, one_head
from workbench.tracing.sites import Site, check_exists, check_layer, head_axis, parse_site, site_shape
from workbench.tracing.streaming import streamed_output

How = Literal["zero", "mean", "resample", "uniform", "to_sink", "q_mean", "frozen_zero", "streaming"]
HOWS: tuple[How, ...] = get_args(How)
# Tokens that a streaming head keeps unless told otherwise: StreamingLLM's sinks, and fewer recent ones than the
# distances over which short probes ask for retrieval.
SINKS, RECENT = 4, 32


@dataclass(frozen=True, eq=False)
class Ablation:
    """z of `heads` replaced, at `positions` of each prompt (everywhere if None).

    `values` are per head: `[dim]`, `[token, dim]` or `[prompt, token, dim]`, for `mean` and `resample`; or
    they are made from `reference` prompts when the trace starts. `resample` takes what stands in the same
    column of the reference, prompt by prompt (of its one prompt, if it has one). For `q_mean` they are mean queries
    before rotation. `frozen` holds each layer's clean q and k for `frozen_zero`, made when the trace starts;
    `sinks` and `recent` are how many tokens `streaming` leaves; `strength` is the share of the replacement.
    """

    heads: tuple[Head, ...]
    how: How
    positions: Bool[Tensor, "prompt token"] | None = None
    values: Mapping[Head, Tensor] | None = None
    reference: Batch | None = None
    sinks: int = SINKS
    recent: int = RECENT
    frozen: Mapping[int, tuple[Tensor, Tensor]] | None = None
    strength: float = 1.0

    @property
    def takes_values(self) -> bool:
        return self.how in ("mean", "resample", "q_mean")

    @property
    def unresolved(self) -> bool:
        """Whether reference prompts, or the clean prompts, are still to be run."""
        missing = self.frozen is None if self.how == "frozen_zero" else self.takes_values and self.values is None
        return missing and self.strength > 0

    @property
    def layers(self) -> set[int]:
        """Layers in which something changes."""
        return {head.layer for head in self.heads} | set(self.frozen or ())

    def in_layer(self, layer: int) -> list[Head]:
        return [head for head in self.heads if head.layer == layer]

    def check(self, spec: Spec) -> None:
        for head in self.heads:
            spec.check(head)
            if self.takes_values and self.values is not None and head not in self.values:
                raise HeadError(f"ablate(how={self.how!r}): values has none for {head}; give one a head.")

    def laid_out(self, spec: Spec, batch: Batch) -> Ablation:
        """The same with values as `[prompt, token, dim]` of this batch, or `RequestError`."""
        _check_positions("ablate", self.positions, batch)
        if not self.takes_values or self.values is None:
            return self
        prompts, tokens = batch.ids.shape
        values = {}
        for head in self.heads:
            value = self.values[head]
            # Reference prompts may be longer, and more.
            cut = value[..., :tokens, :] if value.ndim > 1 else value
            cut = cut[:prompts] if value.ndim > 2 else cut
            what = f"ablate: the value for {head}"
            values[head] = _expanded(cut, (prompts, tokens, spec.layers[head.layer].head_dim), value, what)
        return replace(self, values=values)


@dataclass(frozen=True, eq=False)
class Patch:
    """`value` put at a site of one layer; `heads` (key/value heads for k and v) and `positions` narrow it."""

    site: Site
    layer: int
    value: Tensor
    heads: tuple[int, ...] | None = None
    positions: Bool[Tensor, "prompt token"] | None = None
    named: str = ""

    def check(self, spec: Spec) -> None:
        parse_site(self.named or self.site, spec)
        check_layer(f"patch({self.site})", self.layer, spec)
        check_exists(self.site, spec)
        if self.heads is None:
            return
        axis = head_axis(self.site)
        if axis is None:
            raise RequestError(f"patch({self.site!r}, heads={list(self.heads)}): the residual has no heads.")
        count = site_shape(self.site, spec, self.layer, 1, 1)[axis]
        for head in self.heads:
            if not 0 <= head < count:
                raise HeadError(
                    f"patch({self.site!r}, layer={self.layer}): head {head} does not exist; "
                    f"they run from 0 to {count - 1}."
                )

    def laid_out(self, spec: Spec, batch: Batch) -> Patch:
        """The same with its value in the site's shape for this batch, or `RequestError`.

        With `heads`, the value is of the whole site or of these heads alone.
        """
        what = f"patch({self.site!r}, layer={self.layer})"
        _check_positions(what, self.positions, batch)
        shape = list(site_shape(self.site, spec, self.layer, *batch.ids.shape))
        value, axis = self.value, head_axis(self.site)
        if self.heads is not None and axis is not None:
            if value.ndim >= -axis and value.shape[axis] == shape[axis]:
                value = value.index_select(axis, torch.tensor(self.heads, device=value.device))
            shape[axis] = len(self.heads)
        return replace(self, value=_expanded(value, tuple(shape), self.value, what))


Edit = Ablation | Patch


def listed(edits: Edit | Sequence[Edit]) -> Sequence[Edit]:
    """One edit stands for a list of one."""
    return [edits] if isinstance(edits, Ablation | Patch) else edits


def ablate(
    heads: Iterable[Head | str],
    how: How = "zero",
    *,
    positions: Bool[Tensor, "prompt token"] | None = None,
    values: Mapping[Head, Tensor] | None = None,
    reference: Batch | None = None,
    sinks: int = SINKS,
    recent: int = RECENT,
    strength: float = 1.0,
) -> Ablation:
    """Ablate heads (`"L5H3"` or `Head(5, 3)`).

    `mean`, `resample` and `q_mean` need `values` or `reference` prompts; `streaming` leaves the first `sinks` tokens
    and the last `recent`, the query's own among them; `strength` from 0 to 1 mixes the head with its replacement.
    """
    heads = [heads] if isinstance(heads, str) else heads
    chosen = tuple(dict.fromkeys(Head.parse(head) if isinstance(head, str) else Head(*head) for head in heads))
    if how not in HOWS:
        raise RequestError(f"how={how!r} is no ablation; choose one of {', '.join(HOWS)}.")
    if sinks < 0 or recent < 1:
        raise RequestError(f"sinks={sinks}, recent={recent}: a streaming head sees at least its own token (recent=1).")
    check_strength(strength)
    made = Ablation(chosen, how, positions, values, reference, sinks, recent, strength=float(strength))
    if made.takes_values and values is None and reference is None:
        raise RequestError(f"ablate(how={how!r}) needs reference prompts: pass reference=model.batch([...]).")
    return made


def check_strength(strength: float) -> None:
    """Refuse what is no share."""
    if not 0 <= strength <= 1:
        raise RequestError(f"strength={strength}: choose 0 (the model as it is) to 1 (the whole ablation).")


def patch(
    site: str,
    value: Tensor,
    *,
    layer: int | None = None,
    heads: Iterable[int] | None = None,
    positions: Bool[Tensor, "prompt token"] | None = None,
) -> Patch:
    """Put `value` (shaped as the site, see `SHAPES`) at `site`: `"blocks.5.attn.hook_z"`, or "z" with layer=5.

    A value with leading axes of size one, or without them, serves all prompts (and tokens).
    """
    name, named = parse_site(site)
    if layer is None and named is None:
        raise RequestError(f"patch({site!r}) needs a layer: pass layer=5 or name 'blocks.5.attn.hook_z'.")
    if layer is not None and named is not None and layer != named:
        raise RequestError(f"patch({site!r}, layer={layer}) names two layers; give one.")
    where = named if layer is None else layer
    assert where is not None
    chosen = None if heads is None else tuple(dict.fromkeys(heads))
    return Patch(name, where, value, chosen, positions, site)


def _check_positions(what: str, positions: Tensor | None, batch: Batch) -> None:
    if positions is not None and positions.shape != batch.ids.shape:
        raise RequestError(
            f"{what}: positions of shape {tuple(positions.shape)} for a batch of {tuple(batch.ids.shape)} "
            "[prompt, token]; give one truth value a token."
        )


def _expanded(value: Tensor, shape: tuple[int, ...], given: Tensor, what: str) -> Tensor:
    """`value` in all of `shape`, without a copy."""
    try:
        return value.expand(shape)
    except RuntimeError:
        raise RequestError(f"{what} has shape {tuple(given.shape)}, which does not fit {shape}.") from None


def apply_ablation(
    z: Float[Tensor, "batch head query dim"],
    call: AttentionCall,
    edit: Ablation,
    rows: slice,
    rotation: Rotation,
    first: Tensor | None = None,
) -> Tensor:
    """z with the ablated heads of this layer replaced; `rows` are this piece's prompts in the batch.

    While decoding, `first` is the column of each prompt's first token among the keys of the call.
    """
    heads = edit.in_layer(call.layer)
    if not heads or edit.strength == 0:
        return z
    z = z.clone()
    for head in heads:
        value = _replacement(z[:, head.head], call, edit, head, rows, rotation, first)
        value = _mixed(z[:, head.head], value, edit.strength)
        z[:, head.head] = masked(z[:, head.head], value, edit.positions, rows)
    return z


def _mixed(z: Tensor, value: Tensor, strength: float) -> Tensor:
    """(1 - s) z + s value, in float32 at least; the value itself at 1."""
    if strength == 1:
        return value.to(z.dtype)
    wide = torch.promote_types(z.dtype, torch.float32)
    return torch.lerp(z.to(wide), value.to(wide), strength).to(z.dtype)


def _replacement(
    z: Tensor, call: AttentionCall, edit: Ablation, head: Head, rows: slice, rotation: Rotation, first: Tensor | None
) -> Tensor:
    if edit.how in ("zero", "frozen_zero"):
        return torch.zeros_like(z)
    group = call.q.shape[1] // call.k.shape[1]
    if edit.how == "uniform":
        return uniform_output(call, head.head // group)
    if edit.how == "to_sink":
        return first_visible_value(call, head.head // group)
    if edit.how == "streaming":
        return streamed_output(call, head.head, edit.sinks, edit.recent, first)
    assert edit.values is not None
    value = edit.values[head]
    # One vector while decoding; in a trace, laid out on the batch.
    value = (value if value.ndim == 1 else value[rows, : z.shape[1]]).to(z).expand_as(z)
    if edit.how == "q_mean":
        return one_head(call, head.head, rotation.forth(call.layer, value[:, None])[:, 0])
    return value


def frozen_call(call: AttentionCall, edit: Ablation, rows: slice) -> AttentionCall:
    """The call with the clean run's q and k, where the edit keeps this layer's patterns."""
    if edit.frozen is None or call.layer not in edit.frozen or edit.strength == 0:
        return call
    q, k = (
        site[rows, : given.shape[2]].transpose(1, 2).to(given)
        for site, given in zip(edit.frozen[call.layer], (call.q, call.k), strict=True)
    )
    return replace(call, q=q, k=k)


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
