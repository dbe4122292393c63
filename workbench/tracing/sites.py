"""Named places in a transformer, with the names and shapes of TransformerLens.

Positions are `[prompt, token]`. `q` and `k` are what enters the softmax: after rotation and norms, so
TransformerLens calls them `hook_rot_q` and `hook_rot_k` in rotary models.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from workbench.errors import HeadError, RequestError
from workbench.models import Spec

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
_HOOK = re.compile(r"blocks\.(\d+)\.(attn\.)?hook_(\w+)")
_ROTATED: dict[str, Site] = {"rot_q": "q", "rot_k": "k"}


def parse_site(text: str, spec: Spec | None = None) -> tuple[Site, int | None]:
    """`"z"` -> ("z", None), all layers; `"blocks.5.attn.hook_z"` -> ("z", 5); checked against any `spec`."""
    match = _HOOK.fullmatch(text)
    if match is None:
        return _known(text), None
    layer, name = int(match[1]), match[3]
    if spec is not None:
        check_layer(text, layer, spec)
    if name in ("q", "k") and spec is not None and spec.rotary:
        raise RequestError(f"{text!r} is {name} before rotation; we hold it as it enters the softmax: hook_rot_{name}.")
    return _ROTATED.get(name) or _known(name), layer


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


def _known(name: str) -> Site:
    for site in SITES:
        if site == name:
            return site
    raise RequestError(f"{name!r} is no site; sites are {', '.join(SITES)}, or as in 'blocks.5.attn.hook_z'.")
