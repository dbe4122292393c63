"""The shape of a model, as far as attention goes: heads, layers, and what each layer's softmax sees.

Plain data without torch. Layers are described one by one, because released models mix windowed and full
layers, and scales and head widths need not follow from the residual width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from workbench.errors import HeadError

# "L18H6" is ours; "18.6" and "18-6" are how other tools and published score files write it.
_HEAD = re.compile(r"[Ll](\d+)[Hh](\d+)|(\d+)[.-](\d+)")


class Head(NamedTuple):
    """A query head, zero-based."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read `L18H6`, and `18.6` or `18-6` as other tools write it."""
        match = _HEAD.fullmatch(text.strip())
        if match is None:
            raise HeadError(f"{text!r} names no head; write layer and head as in 'L18H6', both counted from zero.")
        layer, head = (int(group) for group in match.groups() if group is not None)
        return cls(layer, head)


@dataclass(frozen=True)
class LayerSpec:
    """What one layer's attention computes: softmax(cap(scale * q k) over the visible keys) v.

    Attributes:
        heads, kv_heads: query heads, and key/value heads that `group` consecutive query heads share.
        head_dim: width of one head's q, k and v.
        scale: factor on q k *as passed to the attention function*: 1.0 for OPT, whose q comes already scaled.
        window: keys that a query sees, itself included; None for all before it.
        softcap: c in c * tanh(score / c), applied before the mask; None for none.
        sinks: the softmax has one more, learned, logit a head, so rows of the pattern sum to less than one.
    """

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Spec:
    """A model's layers and sizes.

    `rotary` tells that q and k are rotated by position before they meet, and `parallel` that attention and
    MLP read the same residual (there is no `resid_mid` between them).
    """

    architecture: str
    layers: tuple[LayerSpec, ...]
    d_model: int
    vocab_size: int
    max_positions: int | None
    rotary: bool = True
    parallel: bool = False

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def heads(self) -> list[Head]:
        """Every query head, layer by layer."""
        return [Head(layer.index, head) for layer in self.layers for head in range(layer.heads)]

    def check(self, head: Head) -> Head:
        """The head itself, or `HeadError` if the model does not have it."""
        return check_head(head, [layer.heads for layer in self.layers])

    def kv_head(self, head: Head) -> int:
        """Index, within its layer, of the key/value head that this query head reads."""
        self.check(head)
        return head.head // self.layers[head.layer].group


def check_head(head: Head, heads: Sequence[int]) -> Head:
    """The head itself, or `HeadError` if a model with so many `heads`, layer by layer, does not have it."""
    layer, index = head
    if not 0 <= layer < len(heads):
        raise HeadError(f"{head} does not exist: layers run from 0 to {len(heads) - 1}.")
    if not 0 <= index < heads[layer]:
        raise HeadError(f"{head} does not exist: heads of layer {layer} run from 0 to {heads[layer] - 1}.")
    return head
