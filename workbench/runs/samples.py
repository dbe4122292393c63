"""Scores prompt by prompt, kept with a run so that two runs on the same prompts can be compared prompt by prompt.

One array a kind of prompts, `prompt_scores_<kind>`: a variable a detector, `[prompt, layer, head]` in float32; for
detectors that contrast two samples, `<detector>.second` is the other one. The attribute `prompts` holds the hashes of
the kind's tasks, `count` how many prompts they have: rows of two runs stand for the same prompts where those are the
same and no prompt was left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

if TYPE_CHECKING:
    from workbench.heads.detector import PromptScores
    from workbench.tasks import Task

    from .run import Run
    from .writer import RunWriter

_PREFIX, _SECOND = "prompt_scores_", ".second"


@dataclass(frozen=True, eq=False)
class Samples:
    """One detector's scores `[prompt, layer, head]`, of which prompts, and the second sample of a contrast."""

    values: NDArray[np.float64]
    prompts: tuple[str, ...]
    second: NDArray[np.float64] | None = None
    count: int = 0

    def same_rows(self, other: Samples) -> bool:
        """Whether each row is of the same prompt in both."""
        whole = all(
            len(one.values) + len(() if one.second is None else one.second) == one.count for one in (self, other)
        )
        shapes = [(one.values.shape, None if one.second is None else one.second.shape) for one in (self, other)]
        return whole and shapes[0] == shapes[1] and bool(self.prompts) and self.prompts == other.prompts


def write_samples(writer: RunWriter, kind: str, samples: Mapping[str, PromptScores], tasks: Sequence[Task]) -> None:
    """Keep what detectors of a kind found on each prompt; nothing is written where none found that."""
    variables: dict[str, Any] = {}
    for name, found in samples.items():
        given = {name: found.values} | ({f"{name}{_SECOND}": found.null} if found.unpaired else {})
        for key, values in given.items():
            # One axis a number of prompts: detectors of a kind may have rows of their own.
            variables[key] = ((f"of_{len(values)}", "layer", "head"), np.asarray(values, dtype=np.float32))
    if variables:
        about = {"prompts": [task.hash for task in tasks], "count": sum(map(len, tasks))}
        writer.array(f"{_PREFIX}{kind}", xr.Dataset(variables, attrs=about))


def read_samples(run: Run) -> dict[str, Samples]:
    """By detector, what a run keeps of single prompts; runs from before that was kept have none."""
    found: dict[str, Samples] = {}
    for array in run.arrays:
        if not array.startswith(_PREFIX):
            continue
        dataset = run.array(array)
        prompts = tuple(map(str, dataset.attrs.get("prompts", ())))
        for key in map(str, dataset.data_vars):
            if not key.endswith(_SECOND):
                other = f"{key}{_SECOND}"
                second = _numbers(dataset, other) if other in dataset else None
                found[key] = Samples(_numbers(dataset, key), prompts, second, int(dataset.attrs.get("count", 0)))
    return found


def _numbers(dataset: xr.Dataset, name: str) -> NDArray[np.float64]:
    return np.asarray(dataset[name].to_numpy(), dtype=np.float64)
