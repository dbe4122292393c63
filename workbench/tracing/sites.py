"""Named places in a transformer, with the names and shapes of TransformerLens.

Positions are `[prompt, token]`. `q` and `k` are what enters the softmax: after rotation and norms, so TransformerLens
calls them `hook_rot_q` and `hook_rot_k` in rotary models.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from workbench.errors import HeadError, RequestError
from workbench.models import Spec

Site = Literal[
    "q", "k", "v", "pattern", "z", "result", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"
]
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
    """`"z"` -> ("z", None), all layers; `"blocks.5.attn.hook_z"` -> ("z", 5); checked against `spec` if given."""
    match = _HOOK.fullmatch(text)
    if match is None:
        return _known(text), None
    layer, name = int(match[1]), match[3]
    if spec is not None and not layer < spec.n_layers:
        raise HeadError(f"{text!r}: layers run from 0 to {spec.n_layers - 1}.")
    if name in ("q", "k") and spec is not None and spec.rotary:
        raise RequestError(
            f"{text!r} is {name} before rotation; we hold it as it enters the softmax: hook_rot_{name}."
        )
    return _ROTATED.get(name) or _known(name), layer


def _known(name: str) -> Site:
    for site in SITES:
        if site == name:
            return site
    raise RequestError(f"{name!r} is no site; sites are {', '.join(SITES)}, or as in 'blocks.5.attn.hook_z'.")
