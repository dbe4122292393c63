"""Head scores of a run as pages want them: a row a head, a column a detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from workbench.apps.address import Query
from workbench.apps.context import Context
from workbench.errors import RequestError
from workbench.reports.catalogue import Catalogue, catalogue


@dataclass(frozen=True, eq=False)
class Scores:
    """`long` is the run's table; `wide` has `layer`, `head` and a column a detector, `q` the same of q-values."""

    long: pd.DataFrame
    wide: pd.DataFrame
    q: pd.DataFrame
    known: Catalogue

    @property
    def names(self) -> list[str]:
        """Detectors with any value, in the catalogue's order."""
        return [info.name for info in self.known if info.name not in self.known.silent]

    @property
    def titles(self) -> dict[str, str]:
        """What detectors are called."""
        return self.known.titles()

    def info(self, name: str) -> dict[str, Any]:
        """A detector's row as figures want it."""
        return vars(self.known.get(name))


def scores_of(context: Context, name: str) -> Scores:
    """The head scores of a run, arranged once and kept."""
    run = context.library.run(name)
    if not run.has_table("head_scores"):
        raise RequestError(f"The run {name} ({run.kind}) has no head scores; make some with `workbench atlas MODEL`.")

    def arrange() -> Scores:
        long = run.table("head_scores")
        wide, q = (
            long.pivot_table(index=["layer", "head"], columns="detector", values=value, dropna=False, observed=True)
            .reset_index()
            .rename_axis(columns=None)
            for value in ("value", "q")
        )
        return Scores(long, wide, q, catalogue(run))

    return context.library.computed(name, ("scores",), arrange)


def scored_runs(context: Context) -> list[str]:
    """Complete runs that have head scores, the newest first."""
    table = context.library.table()
    names = [str(name) for name in table.loc[table["status"] == "complete", "name"]]
    return [name for name in names if context.library.run(name).has_table("head_scores")]


def scored_run(context: Context, query: Query) -> list[str]:
    """The run that an address names, else the newest with head scores."""
    return [query["run"]] if query.get("run") else scored_runs(context)[:1]
