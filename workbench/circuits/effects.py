"""What patches did: the metric of every change on every prompt, in both directions, and what follows from it.

Signs are the same in both directions: positive means that the place helps the task. Denoising (clean into corrupt)
counts what is restored, noising (corrupt into clean) what is broken; both as shares of the gap between the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench.circuits.inference import gap_doubt, gap_refusal, mean_effect, q_values, recovery, sign_flip_p
from workbench.circuits.spots import Change
from workbench.models.snippet import snippet

Array = np.ndarray[Any, np.dtype[np.float64]]
Direction = Literal["denoising", "noising"]
# Rows of a direction that a notebook shows.
_SHOWN = 10
DIRECTIONS: tuple[Direction, ...] = ("denoising", "noising")


@dataclass(frozen=True)
class Work:
    """Counted work: tokens that went through a layer, and how many naive patching would have sent.

    `runs` are (change, prompt) pairs, `unchanged` those that cannot change anything and were not run.
    """

    rows: int = 0
    naive_rows: int = 0
    runs: int = 0
    unchanged: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.rows + other.rows,
            self.naive_rows + other.naive_rows,
            self.runs + other.runs,
            self.unchanged + other.unchanged,
        )

    @property
    def saved(self) -> float:
        """How many times less than naive patching."""
        return self.naive_rows / max(1, self.rows)


@dataclass(frozen=True, eq=False)
class Effects:
    """The metric under each change.

    `values[direction]` is `[change, prompt]`, NaN where a change does not exist in a prompt (a position beyond its
    end); `clean` and `corrupt` are the two runs' own. `labels` are what a change is called where it is not a single
    spot. `route` says how it was computed.
    """

    task: str
    metric: str
    changes: tuple[Change, ...]
    values: Mapping[Direction, Float[np.ndarray, "change prompt"]]
    clean: Float[np.ndarray, " prompt"]
    corrupt: Float[np.ndarray, " prompt"]
    labels: tuple[str, ...] = ()
    route: str = ""
    work: Work = field(default_factory=Work)
    seed: int = 0

    def effect(self, direction: Direction) -> Float[np.ndarray, "change prompt"]:
        """Per prompt, in units of the metric, positive where the place helps."""
        values = self.values[direction]
        effects: Array = values - self.corrupt if direction == "denoising" else self.clean - values
        return effects

    @property
    def refusal(self) -> str:
        """Why recovery is NaN throughout; empty where it is not."""
        return gap_refusal(self.clean, self.corrupt) or gap_doubt(self.clean, self.corrupt, self.seed)

    def table(self) -> pd.DataFrame:
        """One row a change and direction.

        `value` is the metric under the change, `effect` its change (positive helps), `recovery` the effect over the
        gap (ratio of means, never clipped) with its interval, `p` a sign-flip permutation test over prompts, `q`
        Benjamini-Hochberg within the direction, `reason` why a recovery is missing.
        """
        return pd.concat([self._rows(direction) for direction in self.values], ignore_index=True)

    def _rows(self, direction: Direction) -> pd.DataFrame:
        effects = self.effect(direction)
        there = ~np.isnan(effects)
        columns: dict[str, Any] = {
            name: np.full(len(effects), np.nan)
            for name in ("value", "effect", "effect_low", "effect_high", "recovery", "low", "high", "p")
        }
        reason = np.full(len(effects), "", dtype=object)
        # Changes that exist in the same prompts share their resamples.
        patterns, which = np.unique(there, axis=0, return_inverse=True)
        for number, prompts in enumerate(patterns):
            rows = np.flatnonzero(which.reshape(-1) == number)
            if not prompts.any():
                reason[rows] = "no prompt has this place"
                continue
            part, clean, corrupt = effects[np.ix_(rows, prompts)], self.clean[prompts], self.corrupt[prompts]
            raw = mean_effect(part, self.seed)
            reason[rows] = self.refusal or gap_refusal(clean, corrupt) or gap_doubt(clean, corrupt, self.seed)
            normalised = recovery(part, clean, corrupt, self.seed)
            columns["value"][rows] = self.values[direction][np.ix_(rows, prompts)].mean(1)
            columns["effect"][rows], columns["effect_low"][rows], columns["effect_high"][rows] = raw
            if not reason[rows][0]:
                columns["recovery"][rows], columns["low"][rows], columns["high"][rows] = normalised
            columns["p"][rows] = sign_flip_p(part, self.seed)
        frame = self._places()
        frame.insert(0, "direction", direction)
        frame = frame.assign(metric=self.metric, n=there.sum(1), **columns)
        return frame.assign(q=q_values(columns["p"]), reason=reason)

    def _places(self) -> pd.DataFrame:
        first = [change[0] if len(change) == 1 else None for change in self.changes]
        names = self.labels or tuple(" ".join(spot.node for spot in change) for change in self.changes)
        return pd.DataFrame(
            {
                "node": names,
                "layer": pd.array([None if one is None else one.layer for one in first], dtype="Int64"),
                "site": [" ".join(dict.fromkeys(spot.site for spot in change)) for change in self.changes],
                "head": pd.array([None if one is None else one.head for one in first], dtype="Int64"),
                "position": [None if one is None or one.position is None else str(one.position) for one in first],
                "key": pd.array([None if one is None else one.key for one in first], dtype="Int64"),
            }
        )

    def _repr_html_(self) -> str:
        """The largest effects of each direction, for notebooks; `workbench.show` draws them all."""
        table = self.table()
        order = table["effect"].abs().sort_values(ascending=False, kind="stable").index
        names = ["direction", "node", "site", "position", "effect", "effect_low", "effect_high", "recovery", "q", "n"]
        rows = table.loc[order, names].groupby("direction", sort=False).head(_SHOWN)
        more = f"{len(table):,} changes in .table(); the {len(rows)} largest are shown. {self.refusal}"
        return snippet(f"Patches on {self.task}: {self.metric}", rows, more)

    def per_prompt(self) -> pd.DataFrame:
        """One row a change, direction and prompt: the metric as measured, and the two runs' own."""
        prompts = len(self.clean)
        places, parts = self._places(), []
        for direction, values in self.values.items():
            long = places.loc[places.index.repeat(prompts)].reset_index(drop=True)
            long.insert(0, "direction", direction)
            parts.append(
                long.assign(
                    prompt=np.tile(np.arange(prompts), len(values)),
                    value=values.reshape(-1),
                    effect=self.effect(direction).reshape(-1),
                    clean=np.tile(self.clean, len(values)),
                    corrupt=np.tile(self.corrupt, len(values)),
                )
            )
        return pd.concat(parts, ignore_index=True)

    def grid(self, direction: Direction, axes: Sequence[str] = ("layer", "position")) -> Float[np.ndarray, ...]:
        """Mean effects laid out by attributes of single spots (integers), NaN where there is none."""
        places = [tuple(int(getattr(change[0], axis)) for axis in axes) for change in self.changes]
        grid = np.full(tuple(int(most) + 1 for most in np.max(places, axis=0)), np.nan)
        effects = self.effect(direction)
        there = ~np.isnan(effects)
        with np.errstate(invalid="ignore"):
            means = np.where(there, effects, 0.0).sum(1) / there.sum(1)
        for place, mean in zip(places, means, strict=True):
            grid[place] = mean
        return grid
