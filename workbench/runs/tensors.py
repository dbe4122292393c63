"""Large tensors as safetensors: mapped from the disk, read slice by slice, never pickled.

For what is too large to load and is read in small parts: the q, k and pooled maps of a stored pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from workbench.errors import RequestError, RunCorrupt

# What numpy has and safetensors can hold.
_TYPES = frozenset(["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"])


def write_tensors(tensors: Mapping[str, NDArray[Any]], file: Path, name: str) -> None:
    """Write named tensors, refusing types that the file cannot hold."""
    if not tensors:
        raise RequestError(f"tensors {name}: there is nothing to write; give at least one tensor")
    for key, value in tensors.items():
        if str(value.dtype) not in _TYPES:
            raise RequestError(f"tensors {name}: {key!r} is {value.dtype}; store numbers or booleans of up to 64 bits")
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file)


class Tensors:
    """A file of tensors, mapped: only what a slice covers is read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._open = cast(Any, safe_open(file, framework="numpy"))
            self.names: tuple[str, ...] = tuple(sorted(self._open.keys()))
        except (OSError, SafetensorError) as error:
            raise RunCorrupt(f"{file} cannot be read ({error}); take the run from a copy, or make it again") from error

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor's axes."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, *parts: slice | int) -> NDArray[Any]:
        """A part of a tensor: one slice (or index) an axis, missing ones mean all of it."""
        found = self._slice(name)
        value: NDArray[Any] = found[parts] if parts else found[:]
        return value

    def _slice(self, name: str) -> Any:
        if name not in self.names:
            raise RequestError(f"{self.file} has no tensor {name!r}; it has {', '.join(self.names)}")
        return self._open.get_slice(name)
