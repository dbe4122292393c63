"""Tables as Parquet: plain columns only (numbers, text, booleans, times), the same in every part.

A table is written in parts, one a step, and the parts are joined at the end, one in memory at a time. What
pandas would have to pickle, or would quietly turn into something else, is refused when it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from workbench.errors import RequestError, RunCorrupt

_PLAIN = (
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_timestamp,
    pa.types.is_null,
)


def to_arrow(frame: pd.DataFrame, name: str) -> pa.Table:
    """The frame's columns without its index; categories become text."""
    if frame.index.nlevels > 1 or frame.index.name is not None:
        raise RequestError(f"table {name}: the index {list(frame.index.names)} would be lost; call reset_index() first")
    columns = list(frame.columns)
    if not columns or not all(isinstance(c, str) for c in columns) or len(set(columns)) < len(columns):
        raise RequestError(f"table {name}: columns need names, each a different text; got {columns}")
    bare = frame.copy(deep=False)
    # pyarrow would try to write these as JSON, and warn where they are none.
    bare.attrs = {}
    try:
        table = pa.Table.from_pandas(bare, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise RequestError(f"table {name} has a column of mixed or unknown type: {error}") from error
    # pandas' own metadata would make a table look different according to how its frame came about.
    table = table.replace_schema_metadata(None)
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    for field in table.schema:
        if not any(is_plain(field.type) for is_plain in _PLAIN):
            raise RequestError(
                f"table {name}: column {field.name!r} holds {field.type}; "
                "a table holds numbers, text, booleans and times"
            )
    return table


def write_part(table: pa.Table, file: Path, name: str, earlier: Sequence[Path]) -> None:
    """Write one part, after checking that it can be joined to those already there."""
    schemas = [pq.read_schema(part) for part in earlier]
    for schema in schemas[:1]:
        if set(schema.names) != set(table.column_names):
            extra = sorted(set(table.column_names) - set(schema.names))
            missing = sorted(set(schema.names) - set(table.column_names))
            raise RequestError(
                f"table {name}: a part has other columns than the first (missing: {missing}, new: {extra})"
            )
        table = table.select(schema.names)
    try:
        pa.unify_schemas([*schemas, table.schema], promote_options="permissive")
    except pa.ArrowException as error:
        raise RequestError(f"table {name}: a part has a column of another type than before: {error}") from error
    pq.write_table(table, file)


def join_parts(parts: Sequence[Path], file: Path, name: str) -> int:
    """Write the parts, in their order, as one table; the number of its rows."""
    schema = pa.unify_schemas([pq.read_schema(part) for part in parts], promote_options="permissive")
    rows = 0
    with pq.ParquetWriter(file, schema) as writer:
        for part in parts:
            try:
                table = _read(part).cast(schema)
            except pa.ArrowException as error:
                raise RequestError(f"table {name}: the parts cannot be joined: {error}") from error
            writer.write_table(table)
            rows += table.num_rows
    return rows


def read_table(file: Path) -> pd.DataFrame:
    """A table of a run."""
    try:
        return _read(file).to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise RunCorrupt(f"{file} cannot be read ({error}); take the run from a copy, or make it again") from error


def _read(file: Path) -> pa.Table:
    # `pq.read_table` would also look for columns in the names of the folders above.
    with pq.ParquetFile(file) as parquet:
        return parquet.read()
