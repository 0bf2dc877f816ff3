"""Parquet: W&B's history artifacts, and whatever else writes tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.sources.norm_logs.series import FloatArray, NormLog, is_step, log_of_table
from gradscope.sources.norm_logs.tables import MAX_NAMES, GrowingColumn
from gradscope.sources.norm_logs.tags import Tags

BATCH_ROWS = 1 << 16


def read_parquet_log(path: str, tags: Tags) -> NormLog:
    """The log in a Parquet file; a batch of the wanted columns is in memory at a time.

    Raises:
        GradscopeError: it is truncated or damaged.
    """
    import pyarrow
    from pyarrow import parquet

    with Path(path).open("rb") as stream:
        stream.seek(-4, 2)
        if stream.read() != b"PAR1":
            raise GradscopeError(path, "is a truncated Parquet file, of which nothing can be read without its end")
    try:
        with parquet.ParquetFile(path) as file:
            return _read(file, path, tags)
    except (pyarrow.ArrowException, OSError) as error:
        raise GradscopeError(path, f"is a damaged Parquet file ({str(error).splitlines()[0][:100]})") from None


def _read(file: Any, path: str, tags: Tags) -> NormLog:
    schema = file.schema_arrow
    if len(schema.names) > MAX_NAMES:
        raise GradscopeError(path, f"there are more than {MAX_NAMES:,} columns")
    numeric = [field.name for field in schema if _is_number(field.type)]
    wanted = [name for name in numeric if is_step(name) or tags.wants(name)]
    if len(set(wanted)) < len(wanted):
        raise GradscopeError(path, "has several columns of one name")
    columns = {name: GrowingColumn() for name in wanted}
    start = 0
    for batch in file.iter_batches(BATCH_ROWS, columns=wanted) if wanted else ():
        for name, values in zip(batch.schema.names, batch.columns, strict=True):
            held = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
            columns[name].extend(held + start, _floats(values.drop_null()))
        start += batch.num_rows
    others = tuple(name for name in numeric if name not in columns)
    format_ = "W&B history" if {"_step", "_runtime"} & set(numeric) else "Parquet log"
    return log_of_table(format_, {name: column.whole() for name, column in columns.items()}, others)


def _is_number(type_: Any) -> bool:
    from pyarrow import types

    return bool(types.is_floating(type_) or types.is_integer(type_) or types.is_decimal(type_))


def _floats(values: Any) -> FloatArray:
    from pyarrow import compute, float64

    floats: FloatArray = compute.cast(values, float64(), safe=False).to_numpy(zero_copy_only=False)
    return floats
