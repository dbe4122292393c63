"""Labelled arrays as zarr 3: numbers, booleans, times and text; never objects.

Text is stored with the `string` type of the zarr extensions, because numpy's fixed-width text has no
specification there, and is read back as fixed-width text. Everything else is read when it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.errors import RequestError, RunCorrupt

from .manifest import to_json

# Booleans, integers, floats, complex numbers, time spans and times.
_PLAIN = "biufcmM"


def write_array(dataset: xr.Dataset, path: Path, name: str) -> None:
    """Write a dataset, refusing every variable that would need pickling."""
    texts: dict[str, Any] = {}
    attributes: dict[str, dict[str, Any]] = {}
    for key, variable in dataset.variables.items():
        where = f"array {name}: {key!r}"
        if not isinstance(key, str):
            raise RequestError(f"{where} names a variable; names are text")
        attributes[key] = to_json(variable.attrs, f"{where} attributes")
        if variable.dtype.kind in "UTO":
            texts[key] = (variable.dims, _text(np.asarray(variable.values), where))
        elif variable.dtype.kind not in _PLAIN:
            raise RequestError(f"{where} has dtype {variable.dtype}; store numbers, booleans, times or text")
    # An index would turn the text of its coordinate back into objects.
    plain = dataset.drop_encoding().drop_indexes(list(dataset.xindexes)).assign(texts)
    plain = plain.drop_indexes(list(plain.xindexes))
    plain.attrs = to_json(dataset.attrs, f"array {name}: attributes")
    for key, values in attributes.items():
        plain[key].attrs = values
    plain.to_zarr(path, mode="w-", zarr_format=3, consolidated=False)


def _text(values: NDArray[Any], where: str) -> NDArray[Any]:
    if values.dtype.kind == "O":
        strangers = {type(item).__name__ for item in values.flat if not isinstance(item, str)}
        if strangers:
            raise RequestError(
                f"{where} holds Python objects ({', '.join(sorted(strangers))}); store numbers, booleans, times or text"
            )
    return values.astype(np.dtypes.StringDType())


def read_array(path: Path) -> xr.Dataset:
    """An array of a run; its numbers are loaded when they are used."""
    try:
        found = xr.open_zarr(path, consolidated=False, chunks=None)
        texts = {
            key: (variable.dims, variable.values.astype(object).astype(str), variable.attrs)
            for key, variable in found.variables.items()
            if variable.dtype.kind == "T"
        }
        dataset: xr.Dataset = found.assign(texts)
        return dataset
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise RunCorrupt(f"{path} cannot be read ({error}); take the run from a copy, or make it again") from error
