"""What a patch changes: spots (a site of a layer, narrowed to a head, a position, a key), and lists of them.

A *change* is what one run differs in: one spot, or several together. Query heads and key/value heads are separate
nodes: z, q and pattern have query heads (`L5H3`), k and v key/value heads (`L5KV1`), so that models with grouped
queries are first-class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from workbench.errors import HeadError, RequestError
from workbench.models import Spec
from workbench.tracing import Site
from workbench.tracing.sites import check_exists, check_layer, head_axis, parse_site, site_shape

PatchSite = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern"]
PATCH_SITES: tuple[PatchSite, ...] = get_args(PatchSite)
RESIDUAL: frozenset[str] = frozenset(["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
# "mask" takes keys away before the softmax, which needs no value from another run: attention knockout.
SpotSite = Literal[PatchSite, "mask"]
IN_ATTENTION: frozenset[str] = frozenset(["z", "q", "k", "v", "pattern", "mask"])
By = Literal["layer", "position", "head", "head_position", "key"]
BYS: tuple[By, ...] = get_args(By)
_NODE = re.compile(r"L(\d+)(?:H(\d+)|KV(\d+)|\.(mlp|attn))")


@dataclass(frozen=True, order=True)
class Spot:
    """A place that a patch overwrites.

    `head` is a query head of z, q and pattern, a key/value head of k and v; None for all of the layer. `position` is
    the token (counted from the prompt's first real one), or a role of the task, or None for all; of a pattern it is
    the destination, whose row is overwritten whole unless `key` names one source (a position or a role). Single
    entries are put in place as they are: the row's sum may change.
    """

    layer: int
    site: SpotSite
    head: int | None = None
    position: int | str | None = None
    key: int | str | None = None

    @property
    def node(self) -> str:
        """`L5H3`, `L5KV1`, `L5.mlp`, `L5.attn`, `L5.resid_pre` ..."""
        if self.head is not None:
            return f"L{self.layer}{'KV' if self.site in ('k', 'v') else 'H'}{self.head}"
        return f"L{self.layer}.{ {'mlp_out': 'mlp', 'attn_out': 'attn'}.get(self.site, self.site) }"

    @property
    def place(self) -> Site:
        """The site whose heads and positions these are."""
        return "pattern" if self.site == "mask" else self.site

    def check(self, spec: Spec) -> None:
        """`HeadError` or `RequestError` for a spot that this model does not have."""
        name = self.place
        check_layer(f"patching {self.site}", self.layer, spec)
        check_exists(name, spec)
        if self.key is not None and (name != "pattern" or self.position is None):
            raise RequestError(f"key={self.key} at {self.site}: only entries of a pattern have a key, at a position.")
        if self.head is None:
            return
        axis = head_axis(name)
        if axis is None:
            raise RequestError(f"head={self.head} at {self.site}: the residual stream has no heads.")
        count = site_shape(name, spec, self.layer, 1, 1)[axis]
        if not 0 <= self.head < count:
            kind = "key/value heads" if self.site in ("k", "v") else "heads"
            raise HeadError(f"{self.node} does not exist: {kind} of layer {self.layer} run from 0 to {count - 1}.")


# What one run differs in.
Change = tuple[Spot, ...]


def spot(
    node: str, site: PatchSite | None = None, position: int | str | None = None, key: int | str | None = None
) -> Spot:
    """`spot("L5H3")` is its z, `spot("L5KV1", "v")`, `spot("L5.mlp")`, `spot("L5.attn", "resid_mid")`."""
    match = _NODE.fullmatch(node.strip())
    if match is None:
        raise HeadError(f"{node!r} names no node; write 'L5H3', 'L5KV1' (a key/value head), 'L5.mlp' or 'L5.attn'.")
    layer, head, kv_head, part = match.groups()
    if kv_head is not None:
        if site not in ("k", "v"):
            raise RequestError(f"{node} is a key/value head; say which of its sites, 'k' or 'v', and not {site!r}.")
        return Spot(int(layer), site, int(kv_head), position, key)
    if head is not None:
        if site in ("k", "v"):
            raise RequestError(f"{node} is a query head, which shares its keys and values; name its KV head: 'L5KV1'.")
        return Spot(int(layer), site or "z", int(head), position, key)
    return Spot(int(layer), site or ("mlp_out" if part == "mlp" else "attn_out"), None, position, key)


def patch_site(text: str, spec: Spec | None = None) -> PatchSite:
    """A site that can be patched, by its own name or that of a hook of TransformerLens without its block."""
    for site in PATCH_SITES:
        if site == text:
            return site
    try:
        named, layer = parse_site(text, spec)
    except RequestError as error:
        if "is no site" not in str(error):
            raise
        nearest = str(error).partition("'blocks.5.attn.hook_z'.")[2]
        raise RequestError(f"{text!r} cannot be patched; choose from {', '.join(PATCH_SITES)}.{nearest}") from error
    if layer is not None:
        raise RequestError(
            f"{text!r} names one layer, and a scan has several; choose site={named!r}, layers=[{layer}]."
        )
    if named == "result":
        raise RequestError(f"{text!r} cannot be patched; choose from {', '.join(PATCH_SITES)}.")
    return named


def scan(
    spec: Spec,
    site: PatchSite | str,
    by: By,
    tokens: int,
    *,
    layers: Iterable[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int | str] | None = None,
) -> list[Change]:
    """One change for each layer; layer and position; layer and head; all three; or each entry of every pattern.

    `tokens` is the length of the longest prompt up to what is read; `layers`, `heads` and `positions` narrow the scan.
    A pattern by position is one destination row of all heads, by head and position one row of one head.
    """
    site = patch_site(site, spec)
    if by not in BYS:
        raise RequestError(f"by={by!r} is no axis of a scan; choose from {', '.join(BYS)}.")
    if by == "key" and site != "pattern":
        raise RequestError(f"by='key' scans entries of patterns; {site} has none. Choose site='pattern'.")
    with_heads, with_positions = by in ("head", "head_position", "key"), by in ("position", "head_position", "key")
    if with_heads and site in RESIDUAL:
        raise RequestError(f"by={by!r} at {site}: the residual stream has no heads; choose by='position'.")
    where: Sequence[int | str | None] = (list(positions or range(tokens))) if with_positions else [None]
    found: list[Change] = []
    for layer in range(spec.n_layers) if layers is None else layers:
        check_layer(f"patching {site}", layer, spec)
        axis = head_axis(site)
        count = 0 if axis is None else site_shape(site, spec, layer, 1, 1)[axis]
        for head in (range(count) if heads is None else heads) if with_heads else [None]:
            for position in where:
                keys = _sources(position) if by == "key" else [None]
                found += [(Spot(layer, site, head, position, key),) for key in keys]
    for (one,) in found:
        one.check(spec)
    return found


def _sources(position: int | str | None) -> Sequence[int]:
    if not isinstance(position, int):
        raise RequestError(f"by='key' needs positions as numbers, not the role {position!r}.")
    return range(position + 1)
