"""Columns of numbers, gathered a piece at a time: what CSV, JSON and Parquet readers have in common."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.sources.norm_logs.series import Column, FloatArray, IntArray, NormLog, is_step, log_of_table
from gradscope.sources.norm_logs.tags import Tags

MAX_NAMES = 20_000
MAX_NESTING = 8
NONFINITE = frozenset({"nan", "inf", "-inf", "+inf", "infinity", "-infinity", "+infinity"})


class GrowingColumn:
    """A column while it is being read."""

    def __init__(self) -> None:
        self._rows = array("q")
        self._values = array("d")

    def add(self, row: int, value: float) -> None:
        """Append the value in ``row``."""
        self._rows.append(row)
        self._values.append(value)

    def extend(self, rows: IntArray, values: FloatArray) -> None:
        """Append a piece of a column."""
        self._rows.frombytes(np.ascontiguousarray(rows, dtype=np.int64).tobytes())
        self._values.frombytes(np.ascontiguousarray(values, dtype=np.float64).tobytes())

    def whole(self) -> Column:
        """The column as read so far."""
        return Column(np.frombuffer(self._rows, dtype=np.int64), np.frombuffer(self._values, dtype=np.float64))


class Records:
    """The wanted numbers of records (mappings of names to values), one at a time."""

    def __init__(self, what: str, tags: Tags) -> None:
        self._what = what
        self._tags = tags
        self._columns: dict[str, GrowingColumn | None] = {}
        self._others: list[str] = []
        self._rows = 0

    def add(self, record: object, where: str | int) -> None:
        """Take in the next record; ``where`` (a line's number, or words) names it in errors.

        Raises:
            GradscopeError: it is no mapping, or a wanted value in it is no number.
        """
        if not isinstance(record, dict):
            raise GradscopeError(self._what, f"{_place(where)} is no record of names and values")
        row, columns = self._rows, self._columns
        for name, value in _flattened(record).items():
            if name not in columns:
                self._meet(name, value, where)
            column = columns.get(name)
            if column is None:
                continue
            number = value if type(value) is float else self._number(name, value, where)
            if number is not None:
                column.add(row, number)
        self._rows += 1

    def log(self, format_: str, *notes: str) -> NormLog:
        """The log in the records so far."""
        columns = {name: column.whole() for name, column in self._columns.items() if column is not None}
        return log_of_table(format_, columns, tuple(self._others), *notes)

    def _meet(self, name: str, value: Any, where: str | int) -> None:
        """Decide what becomes of a name that has had no column so far."""
        if value is None:
            return
        if len(self._columns) == MAX_NAMES:
            raise GradscopeError(self._what, f"{_place(where)}: there are more than {MAX_NAMES:,} names")
        wanted = is_step(name) or self._tags.wants(name)
        self._columns[name] = GrowingColumn() if wanted else None
        if not wanted and self._number(name, value, where) is not None:
            self._others.append(name)

    def _number(self, name: str, value: Any, where: str | int) -> float | None:
        """``value`` as a number; None where it is none and need not be one."""
        if type(value) is float:
            return value
        if type(value) is int:
            try:
                return float(value)
            except OverflowError:
                return math.inf
        if isinstance(value, str) and value.strip().lower() in NONFINITE:
            return float(value)
        if value is not None and not is_step(name) and self._tags.wants(name):
            raise GradscopeError(self._what, f"{_place(where)}: {name} is {str(value)[:40]!r}, not a number")
        return None


def _flattened(record: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with slashes in the names; what is nested too deep is left out."""
    return dict(_flat(record, "", 0)) if dict in map(type, record.values()) else record


def _place(where: str | int) -> str:
    return f"line {where}" if isinstance(where, int) else where


def _flat(record: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Values by name; what is nested gets slashes."""
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            if depth < MAX_NESTING:
                yield from _flat(value, f"{name}/", depth + 1)
        else:
            yield name, value
