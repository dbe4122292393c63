"""KV caches for prompts that begin alike: the path that is being read, and the ends that are written side by side.

`Path` holds the keys of one text in buffers that grow; cutting it back costs nothing, and what is written behind the
cut takes the place of what was there. It keeps every key also of windowed layers, so that any beginning can be gone
back to (attention is told the window all the same).

`Ends` holds several texts of any lengths, each in tensors of its own (no padding), and takes one token of each a
pass: a pass reads every weight of the model once, whether it writes one token or thirty.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from workbench.errors import ModelRefused
from workbench.models import AttentionCall
from workbench.models.memory import free_memory

# Layer of the cache -> keys and values `[kv_head, token, dim]`.
Store = dict[int, tuple[Tensor, Tensor]]


@dataclass
class Text:
    """A prompt, what is written behind it, and the queries of the rows that wrote it (`[head, row, dim]`, by layer).

    `store` has room for `capacity` tokens; it is None while the text is the path.
    """

    index: int
    prompt: list[int]
    written: list[int] = field(default_factory=list)
    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    store: Store | None = None

    @property
    def keys(self) -> int:
        """Tokens whose keys are known: the last one written has not been fed back."""
        return len(self.prompt) + len(self.written) - 1


class _Cache(Cache):
    """Remembers which of its layers was asked last: the one whose attention is about to run."""

    layers: list[Any]
    latest = -1
    returned: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.latest, self.returned = layer_idx, found[0]
        return found

    def layer_of(self, call: AttentionCall) -> int:
        """The cache's layer behind an attention call."""
        if self.returned is None or call.k.data_ptr() != self.returned.data_ptr():
            raise ModelRefused(
                f"Layer {call.layer} attends to keys that its own cache does not hold, so prompts cannot be written "
                "side by side; use Model.generate."
            )
        return self.latest


class Path(_Cache):
    """One text's keys; `cut` it back to any length."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Growing)

    def cut(self, length: int) -> None:
        for layer in self.layers:
            layer.length = min(length, layer.length)

    def copy(self, length: int, capacity: int) -> Store:
        """Its first keys, in tensors with room for more."""
        store: Store = {}
        for place, layer in enumerate(self.layers):
            if layer.is_initialized:
                store[place] = (
                    _with_room(layer.keys[0], length, capacity),
                    _with_room(layer.values[0], length, capacity),
                )
        return store

    def store(self) -> Store:
        """Its keys where they lie."""
        held = enumerate(self.layers)
        return {place: (layer.keys[0], layer.values[0]) for place, layer in held if layer.is_initialized}

    def bytes_per_token(self) -> int:
        """Of all layers."""
        tensors = [part for layer in self.layers for part in (layer.keys, layer.values)]
        return sum(part.shape[1] * part.shape[3] * part.element_size() for part in tensors)


def _with_room(held: Tensor, length: int, capacity: int) -> Tensor:
    room = held.new_empty(held.shape[0], capacity, held.shape[2])
    room[:, :length] = held[:, :length]
    return room


class _Growing(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a path: `[1, kv_head, capacity, dim]`, of which the first `length` tokens are real."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys = self._grown(self.keys, end)
        self.values = self._grown(self.values, end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, held: Tensor, end: int) -> Tensor:
        if held.shape[2] >= end:
            return held
        room = held.new_empty(*held.shape[:2], end + end // 4, held.shape[3])
        room[:, :, : self.length] = held[:, :, : self.length]
        return room

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class Ends(_Cache):
    """The texts that are written side by side; a pass takes one token of each and sees no padding."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.texts: list[Text] = []

    def add(self, text: Text) -> None:
        assert text.store is not None
        self.texts.append(text)
        while len(self.layers) <= max(text.store):
            self.layers.append(_Separate(self.texts, len(self.layers)))

    def bytes(self) -> int:
        """Of all keys and values, with the room for those to come."""
        stores = [text.store for text in self.texts if text.store is not None]
        return sum(part.nbytes for store in stores for pair in store.values() for part in pair)

    def each(self, call: AttentionCall) -> list[AttentionCall]:
        """The call of a pass as each text's own: its query, and all its keys up to the new one."""
        layer, calls = self.layer_of(call), []
        for row, text in enumerate(self.texts):
            assert text.store is not None
            calls.append(
                replace(
                    call,
                    q=call.q[row : row + 1],
                    k=text.store[layer][0][None, :, : text.keys + 1],
                    v=text.store[layer][1][None, :, : text.keys + 1],
                )
            )
        return calls


class _Separate(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of all ends: stores each text's new key in its own tensor and hands on the new ones alone."""

    is_sliding = False

    def __init__(self, texts: list[Text], place: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._texts, self._place = texts, place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for row, text in enumerate(self._texts):
            assert text.store is not None
            keys, values = text.store[self._place]
            keys[:, text.keys] = key_states[row, :, 0]
            values[:, text.keys] = value_states[row, :, 0]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def room(device: torch.device, most: int) -> int:
    """Bytes that ends may take: a quarter of what is free, and not more than `most` but on a GPU."""
    free = free_memory(device)
    share = most if free is None else free // 4
    return share if device.type == "cuda" else min(most, share)
