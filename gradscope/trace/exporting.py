"""A recorded run as one table for other tools: Parquet, CSV or JSONL."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from gradscope.trace.merging import MergedSteps, merged_steps
from gradscope.trace.metadata_json import metadata_to_json
from gradscope.trace.ranks import RecordedRun

if TYPE_CHECKING:
    import pyarrow as pa

By = Literal["group", "tensor"]
# Of a Parquet file's own metadata: the run's, as trace.json holds it.
PARQUET_KEY = b"gradscope"
SUFFIXES = (".parquet", ".csv", ".jsonl")

_WHOLE, _REAL, _TEXT, _YES_OR_NO = "int64", "float64", "string", "bool"
COLUMNS: dict[By, dict[str, str]] = {
    "group": {
        "step": _WHOLE,
        "group": _TEXT,
        "time": _REAL,
        "max_norm": _REAL,
        "norm_type": _REAL,
        "returned_norm": _REAL,
        "l2_norm": _REAL,
        "max_abs": _REAL,
        "zeros": _WHOLE,
        "nonfinite": _WHOLE,
        "stepped": _YES_OR_NO,
        "clip_value": _REAL,
        "grad_scale": _REAL,
    },
    "tensor": {
        "step": _WHOLE,
        "group": _TEXT,
        "tensor": _TEXT,
        "l2_norm": _REAL,
        "max_abs": _REAL,
        "zeros": _WHOLE,
        "nonfinite": _WHOLE,
        "weight_norm": _REAL,
        "update_norm": _REAL,
    },
}
"""The columns of a table.  ``time`` is in seconds since the epoch; ``l2_norm`` and ``max_abs`` are over the finite
elements.  What a loss scale was still in is divided by ``grad_scale``: norms, and with them max_norm, clip_value and
returned_norm.  Null: there was none, it is not known, it was not measured, or the tensor had no gradient."""


def export(
    run: RecordedRun, places: range, by: By, suffix: str, out: BinaryIO, told: Callable[[int], None] | None = None
) -> int:
    """Write the steps at ``places`` to ``out`` in the format of ``suffix``; the number of rows written.

    One row per (step, clip group that has one at this step), or per (step, tensor of those groups).  A few MiB are in
    memory at a time; ``told`` is called with the number of steps done.

    Raises GradscopeError where a stream is no longer what it was, OSError where ``out`` cannot take it.
    """
    write = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}[suffix]
    written = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal written
        done = 0
        for merged in merged_steps(run, places):
            batch = _by_group(run, merged) if by == "group" else _by_tensor(run, merged)
            written += batch.num_rows
            yield batch
            done += len(merged.step)
            if told is not None:
                told(done)

    write(batches(), _schema(run, by), out)
    return written


def is_exported_parquet(path: Path) -> bool:
    """Whether the file at ``path`` is a Parquet file that ``export`` wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return PARQUET_KEY in (pq.read_metadata(path).metadata or {})
    except (OSError, ValueError, pa.ArrowException):
        return False


def _schema(run: RecordedRun, by: By) -> pa.Schema:
    import pyarrow as pa

    types = {_YES_OR_NO: pa.bool_(), _TEXT: pa.string()}
    fields = [(name, types.get(kind) or pa.type_for_alias(kind)) for name, kind in COLUMNS[by].items()]
    return pa.schema(fields, metadata={PARQUET_KEY: metadata_to_json(run.metadata)})


# --- rows ------------------------------------------------------------------------------------------------------------


def _by_group(run: RecordedRun, merged: MergedSteps) -> pa.RecordBatch:
    place, group = np.nonzero(merged.has_row)
    at = place, group
    given = {name: mask[at] for name, mask in merged.given.items()}
    stepped = merged.stepped[at]
    columns = {
        "step": _array(merged.step[place]),
        "group": _names([g.name for g in run.groups], group),
        "time": _array(merged.time[place]),
        **{name: _array(getattr(merged, name)[at], mask) for name, mask in given.items()},
        "l2_norm": _array(np.sqrt(merged.group_sum_squares[at])),
        "max_abs": _array(merged.group_max_abs[at]),
        "zeros": _array(merged.group_zeros[at]),
        "nonfinite": _array(merged.group_nonfinite[at]),
        "stepped": _array(stepped == 1, stepped >= 0),
        "grad_scale": _array(merged.grad_scale[at]),
    }
    return _batch(run, "group", columns)


def _by_tensor(run: RecordedRun, merged: MergedSteps) -> pa.RecordBatch:
    group_of = np.full(len(run.tensors), -1, dtype=np.int64)
    has_row = np.zeros(merged.sum_squares.shape, dtype=np.bool_)
    for number, recorded in reversed(list(enumerate(run.groups))):
        group_of[recorded.tensors] = number
        has_row[:, recorded.tensors] |= merged.has_row[:, number, None]
    at = place, tensor = np.nonzero(has_row)
    there = merged.has_gradient[at]
    columns = {
        "step": _array(merged.step[place]),
        "group": _names([g.name for g in run.groups], group_of[tensor]),
        "tensor": _names([t.name for t in run.tensors], tensor),
        "l2_norm": _array(np.sqrt(merged.sum_squares[at]), there),
        "max_abs": _array(merged.max_abs[at], there),
        "zeros": _array(merged.zeros[at], there),
        "nonfinite": _array(merged.nan[at] + merged.inf[at], there),
        "weight_norm": _array(merged.weight_norm[at], ~np.isnan(merged.weight_norm[at])),
        "update_norm": _array(merged.update_norm[at], ~np.isnan(merged.update_norm[at])),
    }
    return _batch(run, "tensor", columns)


def _array(values: Any, present: Any = None) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, mask=None if present is None else ~present)


def _names(names: list[str], which: Any) -> pa.Array:
    import pyarrow as pa

    return pa.array(names, pa.string()).take(pa.array(which))


def _batch(run: RecordedRun, by: By, columns: dict[str, pa.Array]) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([columns[name] for name in COLUMNS[by]], schema=_schema(run, by))


# --- formats ---------------------------------------------------------------------------------------------------------


def _write_parquet(batches: Iterable[pa.RecordBatch], schema: pa.Schema, out: BinaryIO) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(out, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _write_csv(batches: Iterable[pa.RecordBatch], schema: pa.Schema, out: BinaryIO) -> None:
    """Null is empty; NaN and infinities are ``nan``, ``inf`` and ``-inf``; names are quoted where they must be."""
    import csv
    import io

    text = io.TextIOWrapper(out, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(schema.names)
    for batch in batches:
        rows.writerows(zip(*(_csv_cells(column) for column in batch.columns), strict=True))
    text.flush()
    text.detach()


def _csv_cells(column: pa.Array) -> list[Any]:
    values = column.to_pylist()
    if str(column.type) == "bool":
        return ["" if value is None else str(value).lower() for value in values]
    return ["" if value is None else value for value in values]


def _write_jsonl(batches: Iterable[pa.RecordBatch], schema: pa.Schema, out: BinaryIO) -> None:
    """One object a line; NaN and infinities are the strings ``"nan"``, ``"inf"`` and ``"-inf"``."""
    encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode
    for batch in batches:
        cells = [[_json_value(value) for value in column.to_pylist()] for column in batch.columns]
        lines = [encode(dict(zip(schema.names, row, strict=True))) for row in zip(*cells, strict=True)]
        out.write("".join(f"{line}\n" for line in lines).encode())


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
