"""From measured cells to one run: tables of all cells joined, each row with its cell and its place in the grid.

A table of the run holds the rows of every cell that has a table of that name, in the order of the study, with columns
`cell`, `model` and the grid's axes before the measurement's own (an axis that is a column already is not repeated).
Where p-values make a family, q is taken over all cells. The table `cells` lists every cell: done, failed with its
message, or open.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import RequestError, RunError
from workbench.heads.inference import q_values
from workbench.runs import Run, RunWriter
from workbench.runs.manifest import read_manifest
from workbench.studies.cells import Cell, shown
from workbench.studies.measurements import MEASUREMENTS
from workbench.studies.spec import Study
from workbench.studies.store import Store

KIND = "study"


def collect(study: Study, cells: Sequence[Cell], store: Store, *, command: str | None = None) -> Run:
    """Join what is measured into the study's run, in place of an earlier one of the same study."""
    check_target(study, store)
    found = [(cell, run) for cell in cells if (run := store.read(cell)) is not None]
    if not found:
        reasons = list(dict.fromkeys(filter(None, map(store.error, cells))))
        raise RequestError(
            f"No cell of {study.name} is measured{': ' + ' '.join(reasons[:3]) if reasons else ''}. "
            "Run `workbench study run` first."
        )
    facts = _models(found)
    fingerprint = {"study": study.as_dict(), "cells": [cell.id for cell in cells]}
    with RunWriter.open(
        store.run, kind=KIND, title=study.study.title, fingerprint=fingerprint, overwrite=True, command=command
    ) as writer:
        first = found[0][1].manifest
        writer.manifest |= {
            "model": facts[0], "models": facts, "certificate": first["certificate"],
            "environment": first["environment"], "settings": study.as_dict(),
            "prompts": list({one["sha256"]: one for _, run in found for one in run.manifest["prompts"]}.values()),
        }  # fmt: skip
        writer.table("cells", cell_table(cells, store))
        for name, table in joined(found).items():
            writer.table(name, table)
        writer.done("collected", seconds=sum(sum(run.manifest["seconds"].values()) for _, run in found))
        return writer.finish()


def check_target(study: Study, store: Store) -> None:
    """Refuse a place that holds a run of another kind or study; before anything is measured."""
    if not (store.run / "manifest.json").is_file():
        return
    manifest = read_manifest(store.run)
    name = manifest.get("settings", {}).get("study", {}).get("name") if manifest["kind"] == KIND else None
    if name != study.name:
        what = f"the study {name!r}" if name else f"a run of kind {manifest['kind']!r}"
        raise RunError(f"{store.run} holds {what}, not the study {study.name!r}; choose another path (--out).")


def cell_table(cells: Sequence[Cell], store: Store) -> pd.DataFrame:
    """One row a cell: id, label, measurement, version, model, state, error, and its parameters as JSON."""
    return pd.DataFrame(
        [
            {
                "cell": cell.id, "label": cell.label, "measurement": cell.measurement, "version": cell.version,
                "model": cell.model, "state": store.state(cell), "error": store.error(cell),
                "parameters": cell.parameters,
            }
            for cell in cells
        ]
    )  # fmt: skip


def joined(found: Sequence[tuple[Cell, Run]]) -> dict[str, pd.DataFrame]:
    """The tables of all cells by name, tidy."""
    parts: dict[str, list[pd.DataFrame]] = {}
    families: dict[str, set[str]] = {}
    for cell, run in found:
        for name in run.tables:
            table = run.table(name)
            tags: dict[str, Any] = {"cell": cell.id, "model": cell.model}
            tags |= {axis: value if isinstance(value, str | int | float) else shown(value) for axis, value in cell.axes}
            for at, (axis, value) in enumerate((k, v) for k, v in tags.items() if k not in table):
                table.insert(at, axis, value)
            parts.setdefault(name, []).append(table)
        families.setdefault(cell.measurement, set()).update(
            set(run.tables) & set(MEASUREMENTS[cell.measurement].family)
        )
    tables = {name: _one_type(pd.concat(frames, ignore_index=True)) for name, frames in parts.items()}
    for names in families.values():
        _family([tables[name] for name in sorted(names)])
    return tables


def _family(tables: Sequence[pd.DataFrame]) -> None:
    """q over all p-values of the tables together."""
    if not tables:
        return
    q = q_values(np.concatenate([table["p"].to_numpy(dtype=float) for table in tables]))
    start = 0
    for table in tables:
        table["q"] = q[start : start + len(table)]
        start += len(table)


def _one_type(table: pd.DataFrame) -> pd.DataFrame:
    """Columns that hold text in some rows and numbers in others (an axis that only some blocks have) become text."""
    mixed = [name for name, dtype in table.dtypes.items() if dtype == np.dtype(object)]
    for name in mixed:
        known = table[name].dropna()
        if known.map(type).nunique() > 1:
            table[name] = table[name].map(lambda value: None if pd.isna(value) else str(value))
    return table


def _models(found: Sequence[tuple[Cell, Run]]) -> list[dict[str, Any]]:
    """What is known of each model; refuses cells of one name whose weights or types differ."""
    facts: dict[tuple[str, str | None], tuple[dict[str, Any], Cell]] = {}
    for cell, run in found:
        own = run.manifest["model"]
        known, first = facts.setdefault((cell.model, cell.dtype), (own, cell))
        for key in ("weights_sha256", "dtype"):
            if known[key] != own[key]:
                raise RequestError(
                    f"Cells {first.id} and {cell.id} of {cell.model} were measured with different models ({key} "
                    f"{json.dumps(known[key])} and {json.dumps(own[key])}); remove one of them from the study's .cells "
                    "folder and run it again."
                )
    return [own for own, _ in facts.values()]
