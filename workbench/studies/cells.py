"""A cell: one measurement with fixed parameters on one model, and the name that its content gives it.

The identity of a cell is the measurement with its version, the model's name, the type of the weights, and every
parameter, defaults included. Its id is the beginning of the SHA-256 of that in canonical JSON: the same on any machine,
and another as soon as anything that decides the numbers is another. Where a study lists it does not count, so that
adding, removing and reordering cells never asks for one anew.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from workbench.errors import RequestError

ID_DIGITS = 16


@dataclass(frozen=True)
class Cell:
    """One measurement with fixed parameters on one model.

    `parameters` is canonical JSON; `axes` are the values that tell the cell from others of its grid.
    """

    measurement: str
    version: int
    model: str
    dtype: str | None
    parameters: str
    axes: tuple[tuple[str, Any], ...] = field(default=(), compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the numbers, as JSON holds it."""
        return {
            "measurement": self.measurement,
            "version": self.version,
            "model": self.model,
            "dtype": self.dtype,
            "parameters": json.loads(self.parameters),
        }

    @property
    def id(self) -> str:
        """The content hash that names the cell."""
        return hashlib.sha256(canonical(self.identity).encode()).hexdigest()[:ID_DIGITS]

    @property
    def label(self) -> str:
        """The measurement and its place in the grid: `verify detector=retrieval how=zero`."""
        return " ".join([self.measurement, *(f"{name}={shown(value)}" for name, value in self.axes)])


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same text for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def shown(value: Any) -> str:
    """A parameter's value in a label; a list has its items joined."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of a grid's values, the last name changing fastest; one empty one without a grid."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def unique(cells: Sequence[Cell]) -> list[Cell]:
    """Each cell once, at its first place."""
    return list({cell.id: cell for cell in reversed(cells)}.values())[::-1]


def told_apart(cells: Sequence[Cell]) -> list[Cell]:
    """The same, where cells share a label with the parameters that differ among those added to it."""
    counts = Counter(cell.label for cell in cells)
    found = []
    for cell in cells:
        if counts[cell.label] > 1:
            alike = [json.loads(other.parameters) for other in cells if other.label == cell.label]
            own = json.loads(cell.parameters)
            differ = [name for name in own if any(other.get(name) != own[name] for other in alike)]
            plain = [name for name in differ if not isinstance(own[name], dict)] or differ
            cell = replace(cell, axes=(*cell.axes, *((name, _text(own[name])) for name in plain)))
        found.append(cell)
    return found


def _text(value: Any) -> Any:
    return canonical(value) if isinstance(value, dict) else value


def by_model(cells: Sequence[Cell]) -> list[Cell]:
    """The same with the cells of one model together, in the order in which models appear: each is loaded once."""
    order = list(dict.fromkeys((cell.model, cell.dtype) for cell in cells))
    return sorted(cells, key=lambda cell: order.index((cell.model, cell.dtype)))


def chosen(cells: Sequence[Cell], wanted: Sequence[str]) -> list[Cell]:
    """The cells that are named by the beginning of an id, by a measurement, or by words of their label."""
    if not wanted:
        return list(cells)
    kept: dict[str, Cell] = {}
    for text in wanted:
        words = set(text.split())
        found = [cell for cell in cells if words and (cell.id.startswith(text) or words <= set(cell.label.split()))]
        if not found:
            raise RequestError(
                f"No cell {text!r}. Name the beginning of an id, or words of a label as in {cells[0].label!r}; "
                "`workbench study show` lists the cells."
            )
        kept |= {cell.id: cell for cell in found}
    return [cell for cell in cells if cell.id in kept]
