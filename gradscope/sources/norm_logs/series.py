"""What a log of norms holds, whatever its format: series of numbers by tag, each at the steps it was logged at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# The last part of a column's name, lower case; the first that every value of a series has gives its steps.
STEP_NAMES = ("global_step", "step", "_step", "iteration", "training_iteration", "iter", "num_updates", "update")
LARGEST_STEP = float(1 << 53)


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One tag: ``values`` (float64 [n]) in the order in which they were logged, at ``steps`` (int64 [n])."""

    steps: IntArray
    values: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class NormLog:
    """A log as read.  ``format`` is for people; ``series`` holds the wanted tags, ``others`` names the rest.

    ``counted`` where the log has no steps and rows were counted instead.  ``max_norm`` is the threshold that the log
    names.  ``notes`` are sentences about what was read, and ``meaning`` those about what its norms are.
    """

    format: str
    series: Mapping[str, Series]
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    meaning: tuple[str, ...] | None = None
    max_norm: float | None = None
    counted: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """A table's column: ``values`` (float64 [n]) and the numbers of the ``rows`` (int64 [n], rising) they are in."""

    rows: IntArray
    values: FloatArray


def is_step(name: str) -> bool:
    """Whether a column of this name may hold the steps."""
    return _leaf(name) in STEP_NAMES


def log_of_table(format_: str, columns: Mapping[str, Column], others: tuple[str, ...], *notes: str) -> NormLog:
    """The log in a table, whose ``columns`` hold the wanted tags and whatever may hold the steps."""
    ranked = sorted((name for name in columns if is_step(name)), key=_rank)
    wanted = {name: column for name, column in columns.items() if not is_step(name)}
    steps = {name: _steps(column, [columns[candidate] for candidate in ranked]) for name, column in wanted.items()}
    counted = any(found is None for found in steps.values())
    series = {}
    for name, column in wanted.items():
        found = steps[name]
        series[name] = Series(column.rows if counted or found is None else found, column.values)
    return NormLog(format_, series, others, notes, counted=counted)


def _rank(name: str) -> tuple[int, int]:
    return STEP_NAMES.index(_leaf(name)), len(name)


def _leaf(name: str) -> str:
    """``global_step`` of ``train/global_step`` and of W&B's ``RUN - train/global_step``."""
    return name.rsplit(" - ", 1)[-1].rsplit("/", 1)[-1].strip().lower()


def _steps(column: Column, candidates: list[Column]) -> IntArray | None:
    """The steps of a column's values: those of the first candidate that has a whole number in each of its rows."""
    for candidate in candidates:
        places = np.searchsorted(candidate.rows, column.rows)
        if not len(candidate.rows) or places.max(initial=0) >= len(candidate.rows):
            continue
        values = candidate.values[places]
        if (candidate.rows[places] == column.rows).all() and _whole(values):
            return values.astype(np.int64)
    return None


def _whole(values: FloatArray) -> bool:
    return bool(np.isfinite(values).all() and (np.abs(values) < LARGEST_STEP).all() and (values % 1 == 0).all())
