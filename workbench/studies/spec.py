"""`study.toml`: what a study asks, of which model, and its grid of cells.

```toml
[study]
name = "ablation-forms"
title = "Do the forms of ablation agree?"
question = "..."
paper = "..."
model = "smollm2-135m"

[[cells]]                       # a block: one measurement on a grid
measurement = "verify"
set = { detector = "induction", k = 8 }
grid = { how = ["zero", "mean"], seed = [0, 1] }   # four cells

[figure]
draw = "ablation"
table = "verification"
```

`measurement` names an entry of `workbench.studies.measurements.MEASUREMENTS`; `set` and `grid` hold its parameters,
those that vary under `grid`. A block may name models of its own (`models = [...]`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from workbench.errors import RequestError
from workbench.studies.cells import Cell, canonical, combinations, told_apart, unique
from workbench.studies.measurements import MEASUREMENTS, Measurement

FILE = "study.toml"
NAME = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
# How a study's figure is drawn; `workbench.reports.study` has a function for each.
Draw = Literal["ablation", "dose", "agreement", "contrast", "maps", "points", "lines"]
Text = Annotated[str, Field(min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class About(_Table):
    """The table `[study]`."""

    name: Annotated[str, Field(pattern=f"^{NAME}$", max_length=60)]
    title: Text
    question: Text
    paper: str = ""
    url: str = ""
    model: Text = "smollm2-135m"
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None


class Block(_Table):
    """One `[[cells]]`: a measurement, its fixed parameters, and those that vary."""

    measurement: str
    fixed: dict[str, Any] = Field(default={}, alias="set")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    models: tuple[Text, ...] = ()

    @field_validator("measurement")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in MEASUREMENTS:
            raise RequestError(f"No measurement {name!r}.{_near(name, MEASUREMENTS)}")
        return name


class Figure(_Table):
    """The table `[figure]`: how the study's figure is drawn, from which table and rows, with which options."""

    draw: Draw
    table: Text
    where: dict[str, str | int | float | bool | list[str | int | float]] = {}
    options: dict[str, str | int | float | bool | list[str]] = {}


class Study(_Table):
    """A study as its file says it."""

    study: About
    blocks: Annotated[tuple[Block, ...], Field(alias="cells", min_length=1)]
    figure: Figure | None = None

    @property
    def name(self) -> str:
        """The study's short name."""
        return self.study.name

    def cells(self, model: str | None = None, dtype: str | None = None) -> list[Cell]:
        """Every cell, each once; `model` and `dtype` take the place of all that the file names."""
        found = []
        for number, block in enumerate(self.blocks, start=1):
            measurement = MEASUREMENTS[block.measurement]
            where = f"cells[{number}] ({block.measurement})"
            both = sorted(set(block.fixed) & set(block.grid))
            if both:
                raise RequestError(f"{where}: {both[0]!r} is under set and under grid; leave it under one of them.")
            models = (model,) if model else block.models or (self.study.model,)
            for name in models:
                for point in combinations(block.grid):
                    axes = point if len(models) == 1 else {"model": name, **point}
                    parameters = _parameters(measurement, {**block.fixed, **point}, where)
                    found.append(
                        Cell(measurement.name, measurement.version, name, dtype or self.study.dtype, parameters,
                             tuple(axes.items()))
                    )  # fmt: skip
        return told_apart(unique(found))

    def as_dict(self) -> dict[str, Any]:
        """The study as JSON holds it, under the names of its file."""
        return self.model_dump(mode="json", by_alias=True)


def read_study(path: str | Path) -> Study:
    """A study from its file, or from the folder that holds it; every cell's parameters are checked."""
    given = Path(path).expanduser()
    file = given / FILE if given.is_dir() else given
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"There is no study at {file}; name a folder that holds a {FILE}, or the file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read ({error}); name a {FILE}.") from error
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{file} is no TOML: {error}. Correct that place.") from error
    try:
        study = Study.model_validate(content)
        study.cells()
    except ValidationError as error:
        raise RequestError(f"{file}: {_first(error, Study)}") from None
    except RequestError as error:
        raise RequestError(f"{file}: {error}") from None
    return study


def _parameters(measurement: Measurement, given: Mapping[str, Any], where: str) -> str:
    """All parameters of a measurement in canonical JSON, checked, defaults filled in."""
    try:
        made = measurement.parameters.model_validate(dict(given))
    except ValidationError as error:
        raise RequestError(f"{where}: {_first(error, measurement.parameters)}") from None
    return canonical(made.model_dump(mode="json"))


def _first(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem in a sentence: where, the value, and what would do."""
    found = error.errors(include_url=False)[0]
    place = found["loc"]
    where = _where(place)
    if found["type"] == "extra_forbidden":
        known = _keys(model, place[:-1])
        return f"{_where(place[:-1]) or 'it'} has no key {str(place[-1])!r}.{_near(str(place[-1]), known)}"
    if found["type"] == "missing":
        return f"{where} is missing; write {place[-1]} = ... there."
    cause = found.get("ctx", {}).get("error")
    if isinstance(cause, Exception):
        return f"{where}: {cause}" if where else str(cause)
    return f"{where} = {_short(found['input'])}: {found['msg'][:1].lower()}{found['msg'][1:]}."


def _keys(model: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The keys that a table of the file may have; place is its path."""
    nested: dict[str, type[BaseModel]] = {"study": About, "cells": Block, "figure": Figure}
    table = nested.get(str(place[0]), model) if place and model is Study else model
    fields = table.model_fields
    return [one.alias or name for name, one in fields.items()]


def _where(place: Sequence[int | str]) -> str:
    """`("cells", 0, "set")` as `cells[1].set`: blocks count from 1, as in the file."""
    text = ""
    for part in place:
        text += f"[{part + 1}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _near(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    found = get_close_matches(name, list(known), n=1)
    return f"{f' Did you mean {found[0]!r}?' if found else ''} There are {', '.join(known)}."


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
