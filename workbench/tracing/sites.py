"""Named places in a transformer, with the names and shapes of TransformerLens.

Positions are `[prompt, token]`. `q` and `k` are what enters the softmax: after rotation and norms, so
TransformerLens calls them `hook_rot_q` and `hook_rot_k` in rotary models.
"""

from __future__ import annotations

import difflib
import re
from typing import Literal, get_args

from workbench.errors import HeadError, RequestError
from workbench.models import Spec
from workbench.models.architectures import ARCHITECTURES

Site = Literal["q", "k", "v", "pattern", "z", "result", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
SITES: tuple[Site, ...] = get_args(Site)
ATTENTION_SITES: frozenset[Site] = frozenset(["q", "k", "v", "pattern", "z", "result"])

SHAPES: dict[Site, str] = {
    "q": "prompt token head head_dim",
    "k": "prompt token kv_head head_dim",
    "v": "prompt token kv_head head_dim",
    "pattern": "prompt head query key",
    "z": "prompt token head head_dim",
    "result": "prompt token head d_model",
    "resid_pre": "prompt token d_model",
    "attn_out": "prompt token d_model",
    "resid_mid": "prompt token d_model",
    "mlp_out": "prompt token d_model",
    "resid_post": "prompt token d_model",
}
_HOOK = re.compile(r"(?:blocks\.(\d+)\.)?(.+)")
# What TransformerLens calls each place: its own names, and the newer ones of its bridge's components.
HOOKS: dict[str, Site] = {
    "hook_resid_pre": "resid_pre",
    "hook_in": "resid_pre",
    "hook_attn_out": "attn_out",
    "attn.hook_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
    "attn.hook_q": "q",
    "attn.q.hook_out": "q",
    "attn.hook_rot_q": "q",
    "attn.hook_k": "k",
    "attn.k.hook_out": "k",
    "attn.hook_rot_k": "k",
    "attn.hook_v": "v",
    "attn.v.hook_out": "v",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "z",
    "attn.o.hook_in": "z",
    "attn.hook_result": "result",
}
# Names that stand for a place of the block only behind `blocks.5.`; alone they could be any module's.
_OF_BLOCK = frozenset(["hook_in", "hook_out"])
# A module's own output, which is what reaches the stream only where no norm follows it.
_BEFORE_NORM = {"attn.hook_out": "attention_write", "mlp.hook_out": "mlp_write"}


def parse_site(text: str, spec: Spec | None = None) -> tuple[Site, int | None]:
    """`"z"` -> ("z", None), all layers; `"blocks.5.attn.hook_z"` -> ("z", 5); checked against any `spec`.

    Names of hooks are those of TransformerLens, with or without their block (`hook_resid_pre`, `attn.hook_z`), and of
    the components of its bridge (`blocks.5.attn.o.hook_in`).
    """
    for site in SITES:
        if site == text:
            return site, None
    match = _HOOK.fullmatch(text)
    name = "" if match is None else _full_name(match[2])
    if match is None or name not in HOOKS or (match[1] is None and name in _OF_BLOCK):
        raise RequestError(_unknown(text))
    layer = None if match[1] is None else int(match[1])
    if spec is not None:
        _check_name(text, name, layer, spec)
    return HOOKS[name], layer


def _full_name(name: str) -> str:
    """With `attn.` before what is inside attention, without it before what is not."""
    own = name.removeprefix("attn.")
    if f"attn.{own}" in HOOKS and own not in HOOKS:
        return f"attn.{own}"
    return own if own in HOOKS and name not in HOOKS else name


def _check_name(text: str, name: str, layer: int | None, spec: Spec) -> None:
    if layer is not None:
        check_layer(text, layer, spec)
    site = HOOKS[name]
    if site in ("q", "k") and "rot" not in name and spec.rotary:
        raise RequestError(f"{text!r} is {site} before rotation; we hold it as it enters the softmax: hook_rot_{site}.")
    row = ARCHITECTURES.get(spec.architecture)
    if row is not None and name in _BEFORE_NORM and "norm" in getattr(row, _BEFORE_NORM[name]):
        raise RequestError(
            f"{text!r} is what goes into a norm in {spec.architecture}; what that adds to the stream is hook_{site}."
        )


def _unknown(text: str) -> str:
    match = _HOOK.fullmatch(text)
    name = text if match is None else match[2]
    block = "" if match is None or match[1] is None else f"blocks.{match[1]}."
    known = {hook: f"{block}{hook}" for hook in HOOKS if block or hook not in _OF_BLOCK}
    known |= {site: site for site in SITES} if not block else {}
    shorter = {hook.rsplit("hook_")[-1]: hook for hook in reversed(known) if "." not in hook.removeprefix("attn.")}
    near = difflib.get_close_matches(name, known, n=1) or [
        shorter[one] for one in difflib.get_close_matches(name.rsplit("hook_")[-1], shorter, n=1)
    ]
    nearest = f" The nearest name is {known[near[0]]!r}." if near else ""
    return f"{text!r} is no site; sites are {', '.join(SITES)}, or as in 'blocks.5.attn.hook_z'.{nearest}"


def check_layer(text: str, layer: int, spec: Spec) -> None:
    """`HeadError` for a layer that the model does not have."""
    if not 0 <= layer < spec.n_layers:
        raise HeadError(f"{text!r} of layer {layer}: layers run from 0 to {spec.n_layers - 1}.")


def check_exists(site: Site, spec: Spec) -> None:
    """`RequestError` for a place that this model does not have."""
    if site == "resid_mid" and spec.parallel:
        raise RequestError("resid_mid does not exist where attention and MLP read the same residual.")


def site_shape(site: Site, spec: Spec, layer: int, prompts: int, tokens: int) -> tuple[int, ...]:
    """The sizes behind `SHAPES`."""
    shape = spec.layers[layer]
    sizes = {
        "prompt": prompts,
        "token": tokens,
        "query": tokens,
        "key": tokens,
        "head": shape.heads,
        "kv_head": shape.kv_heads,
        "head_dim": shape.head_dim,
        "d_model": spec.d_model,
    }
    return tuple(sizes[axis] for axis in SHAPES[site].split())


def head_axis(site: Site) -> int | None:
    """Which axis, counted from the last, runs over heads; None in the residual stream."""
    axes = SHAPES[site].split()
    places = [place - len(axes) for place, axis in enumerate(axes) if axis in ("head", "kv_head")]
    return places[0] if places else None
