"""A small run, written by tests in this process or, as a script, in one that gets killed.

`python job.py PATH [STOP]` writes the run at PATH; at the point STOP it prints "here" and waits for its end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from workbench.runs import Run, RunWriter, writer

STEPS = ("sink", "induction", "echo")
FINGERPRINT = {"settings": {"seed": 0, "eps": 0.3}, "model": "ab12"}


def scores(number: int) -> pd.DataFrame:
    generator = np.random.default_rng(number)
    layer, head = np.divmod(np.arange(12), 4)
    value = generator.random(12)
    return pd.DataFrame(
        {
            "model": "toy",
            "detector": STEPS[number],
            "layer": layer,
            "head": head,
            "value": value,
            "low": value - 0.1,
            "high": value + 0.1,
            "p": np.where(value > 0.5, value, np.nan),
        }
    )


def patterns(number: int) -> xr.Dataset:
    values = np.random.default_rng(number).random((2, 5, 5)).astype(np.float32)
    return xr.Dataset(
        {"pattern": (("example_head", "query", "key"), values)},
        coords={"example": ("example_head", ["prose", "code é"]), "layer": ("example_head", [1, 2])},
        attrs={"detector": STEPS[number]},
    )


def write(path: Path, at: Callable[[str], object] = str, **options: bool) -> Run:
    with RunWriter.open(path, kind="heads", title="A toy é", fingerprint=FINGERPRINT, command="job", **options) as out:
        out.manifest["model"] = {"name": "toy", "weights_sha256": "ab12"}
        out.manifest["certificate"] = {"passed": True, "checks": []}
        out.table("detectors", pd.DataFrame({"detector": STEPS, "threshold": [0.3, np.nan, np.nan]}))
        for number, step in enumerate(STEPS):
            if not out.has(step):
                out.table(f"head_scores/{step}", scores(number))
                out.array(f"patterns_{step}", patterns(number))
                at(f"written {step}")
                out.manifest["prompts"].append({"name": step, "n": 3, "sha256": f"{number:02d}"})
                out.done(step, seconds=1.5)
                at(f"done {step}")
        return out.finish()


if __name__ == "__main__":
    stop = sys.argv[2] if len(sys.argv) > 2 else ""
    replace = writer._replace

    def reach(point: str) -> None:
        if point == stop:
            sys.stdout.write("here\n")
            sys.stdout.flush()
            time.sleep(600)

    def replace_or_stop(final: Path, target: Path, overwrite: bool) -> None:
        reach("ready to rename")
        replace(final, target, overwrite)
        reach("renamed")

    writer._replace = replace_or_stop
    sys.stdout.write("start\n")
    sys.stdout.flush()
    write(Path(sys.argv[1]), reach)
