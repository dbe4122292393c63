"""What a report reads of a run, and how it copes with what a run lacks."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import xarray as xr
from markupsafe import Markup

from workbench.figures.controls import with_controls

_MOST_LISTED = 3
_LISTED = re.compile(rf"L\d+H\d+(?:, L\d+H\d+){{{_MOST_LISTED},}}")


@runtime_checkable
class RunLike(Protocol):
    """The part of `workbench.runs.Run` that reports rely on."""

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    @property
    def title(self) -> str: ...

    @property
    def tables(self) -> Collection[str]: ...

    @property
    def arrays(self) -> Collection[str]: ...

    def table(self, name: str) -> pd.DataFrame: ...

    def has_table(self, name: str) -> bool: ...

    def array(self, name: str) -> xr.Dataset: ...


def frame(run: RunLike, name: str) -> pd.DataFrame | None:
    """A table of the run; None where the run has none or it has no rows."""
    if not run.has_table(name):
        return None
    table = run.table(name)
    if name == "head_scores" and "rank" in table.columns:
        # Equal scores stand in the order of their ranks, so that the first of them is the one to name.
        table = table.sort_values("rank", kind="stable", ignore_index=True)
    return None if table.empty else table


def ablations(run: RunLike) -> pd.DataFrame | None:
    """The table of ablations with what is known of its control sets; None where the run has none."""
    table = frame(run, "verification")
    return None if table is None else with_controls(table, frame(run, "verification_draws"))


def shown_title(run: RunLike) -> str:
    """The run's title; of a longer list of heads in it the first three and how many more there are."""
    return _LISTED.sub(_shortened, run.title)


def _shortened(found: re.Match[str]) -> str:
    names = found[0].split(", ")
    return f"{', '.join(names[:_MOST_LISTED])} and {len(names) - _MOST_LISTED} more"


def model_named(run: RunLike) -> Markup:
    """The model's name and shape, to begin a sentence with."""
    model = run.manifest.get("model", {})
    layers, heads = model.get("layers"), model.get("heads")
    shape = f" ({layers} layers of {heads} heads)" if layers and heads else ""
    return Markup("<strong>{}</strong>{}").format(model.get("name") or "The model", shape)


def head_name(layer: object, head: object) -> str:
    """`L18H6`."""
    return f"L{layer}H{head}"
