"""A finished trial of the lab as a run, so that reports show it like any other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import pandas as pd
import xarray as xr

from workbench.apps.trials import Trial, read_trial
from workbench.errors import RequestError, RunError
from workbench.reports.trial import plain_heads


class TrialRun:
    """What a report reads of a run (`workbench.reports.RunLike`), out of what `Live.state` tells of a trial."""

    def __init__(self, name: str, state: Mapping[str, Any], model: str | None = None) -> None:
        if state.get("status") != "done":
            raise RequestError(f"The trial {name} is {state.get('status')}: it has nothing to report yet, or any more.")
        self.name, self._asked, self._result = name, dict(state["asked"]), dict(state["result"])
        self._argument = model or str(self._result.get("model"))

    @cached_property
    def trial(self) -> Trial:
        """What was asked."""
        return read_trial(self._asked)

    @property
    def title(self) -> str:
        """For the report's head."""
        heads = plain_heads(self.trial.heads, 4)
        return f"Trial of the ablation lab: {heads} ({self.trial.form}) in {self._result.get('model', 'the model')}"

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """As runs have it, with the trial itself under `trial`."""
        about = self._result.get("about", {})
        model = {"name": self._result.get("model"), **about.get("model", {})}
        return {
            **about, "model": model, "id": self.name, "kind": "trial", "title": self.title, "status": "complete",
            "settings": {name: value for name, value in self._asked.items() if name != "prompt"},
            "trial": {
                "asked": self._asked, "prompt": self._result.get("prompt"),
                "study": self.trial.study(self._argument),
            },
        }  # fmt: skip

    @cached_property
    def _frames(self) -> dict[str, pd.DataFrame]:
        rows = {"verification": self._result.get("probe"), "verification_draws": self._result.get("draws")}
        return {name: pd.DataFrame(list(found)) for name, found in rows.items() if found}

    @property
    def tables(self) -> Collection[str]:
        return list(self._frames)

    @property
    def arrays(self) -> Collection[str]:
        return []

    def has_table(self, name: str) -> bool:
        return name in self._frames

    def table(self, name: str) -> pd.DataFrame:
        if name not in self._frames:
            raise RunError(f"The trial {self.name} has no table {name!r}.")
        return self._frames[name].copy()

    def array(self, name: str) -> xr.Dataset:
        raise RunError(f"The trial {self.name} has no array {name!r}.")
