"""Runs on disk: written so that a kill costs one step at most, read back with their checksums proven.

A run is a folder: `manifest.json` (provenance, certificate), `tables/<name>.parquet`, `arrays/<name>.zarr`,
`tensors/<name>.safetensors` (mapped, for what is too large to load).
`RunWriter` makes one, `Run` reads one, `list_runs` and `compare_runs` look at several. Nothing is pickled.
"""

from __future__ import annotations

from .catalog import list_runs as list_runs
from .compare import compare_runs as compare_runs
from .machine import environment as environment
from .manifest import FORMAT as FORMAT
from .run import Run as Run
from .tensors import Tensors as Tensors
from .writer import RunWriter as RunWriter
