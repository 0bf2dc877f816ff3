"""Rows of a trace as they are read back: columns of numpy arrays, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.trace.bins import edges
from gradscope.trace.columns import element_type
from gradscope.trace.measurement import Bins
from gradscope.trace.schema import COLUMNS, NULLABLE

if TYPE_CHECKING:
    import pyarrow as pa

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

PER_TENSOR = ("sum_squares", "max_abs", "zeros", "nan", "inf")
_SAME_LENGTHS = (
    PER_TENSOR,
    ("group_code", "group_count", "group_mean", "group_spread"),
    ("tensor_code", "tensor_count", "tensor_mean", "tensor_spread"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """A list column: row r holds ``values[offsets[r]:offsets[r + 1]]``."""

    offsets: IntArray
    values: NDArray[Any]

    def of(self, row: int) -> NDArray[Any]:
        """The list of one row."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> IntArray:
        """The length of each row's list."""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Consecutive rows of one rank.

    ``single`` holds the columns that are no lists, [rows]: NaN and False where a value is null, which ``present``
    (bool [rows], for each column that may be null) tells.  ``lists`` holds the others.
    """

    single: dict[str, NDArray[Any]]
    present: dict[str, NDArray[np.bool_]]
    lists: dict[str, Lists]

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch) -> Rows:
        """The rows of a valid record batch, which share its memory.

        Raises ValueError where a value is null that must not be.
        """
        single, present, lists = {}, {}, {}
        for name, kind in COLUMNS.items():
            column = batch.column(batch.schema.get_field_index(name))
            if name in NULLABLE:
                present[name] = _bits(column, 0)
            elif column.null_count:
                raise ValueError(f"{name} is null")
            if kind == "bool":
                single[name] = _bits(column, 1) & present[name]
            elif element_type(kind) is None:
                single[name] = column.to_numpy(zero_copy_only=False)
            elif column.values.null_count:
                raise ValueError(f"{name} holds null")
            else:
                offsets = column.offsets.to_numpy().astype(np.int64)
                lists[name] = Lists(offsets, column.values.to_numpy())
        return cls(single, present, lists)

    @classmethod
    def concatenate(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of ``parts``, at least one, in order."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return cls(
            {name: np.concatenate([part.single[name] for part in parts]) for name in first.single},
            {name: np.concatenate([part.present[name] for part in parts]) for name in first.present},
            {name: _joined([part.lists[name] for part in parts]) for name in first.lists},
        )

    def __len__(self) -> int:
        return len(self.single["step"])

    def __getitem__(self, part: slice) -> Rows:
        """Some of the rows, which share these rows' memory; ``part`` has a start and a stop."""
        offsets = slice(part.start, part.stop + 1)
        return Rows(
            {name: column[part] for name, column in self.single.items()},
            {name: column[part] for name, column in self.present.items()},
            {name: Lists(column.offsets[offsets], column.values) for name, column in self.lists.items()},
        )

    def group_bins(self, row: int) -> Bins | None:
        """The bins of the row's whole group; None where none were taken."""
        codes = self.lists["group_code"].of(row)
        if not len(codes) and not self._has_bins_for_nothing(row):
            return None
        return Bins(codes, *(self.lists[f"group_{name}"].of(row) for name in ("count", "mean", "spread")))

    def tensor_bins(self, row: int, position: int) -> Bins | None:
        """The bins of the tensor at this position in the row's group; None where none were taken."""
        counts = self.lists["tensor_bin_counts"].of(row)
        if not len(counts):
            return None
        start = int(self.lists["tensor_code"].offsets[row]) + int(counts[:position].sum())
        part = slice(start, start + int(counts[position]))
        return Bins(*(self.lists[f"tensor_{name}"].values[part] for name in ("code", "count", "mean", "spread")))

    def _has_bins_for_nothing(self, row: int) -> bool:
        """Whether the row would have no bins even if they were taken: no element is finite and not zero."""
        return not self.lists["max_abs"].of(row).any()

    def check(self, group_sizes: IntArray) -> None:
        """Raise ValueError unless the rows agree with themselves and with groups of these sizes."""
        single = self.single
        group = single["group"]
        if len(group) and not (group.min() >= 0 and group.max() < len(group_sizes)):
            raise ValueError("a row is of a group that trace.json does not name")
        if (np.diff(single["step"]) < 0).any() or (len(self) and single["step"][0] < 0):
            raise ValueError("steps go backwards")
        if not (np.abs(single["time"]) < 1e11).all():
            raise ValueError("a time is impossible")
        self._check_lengths(group_sizes[group])
        self._check_values()

    def _check_lengths(self, sizes: IntArray) -> None:
        lists = self.lists
        for names in _SAME_LENGTHS:
            if any(not np.array_equal(lists[names[0]].lengths, lists[name].lengths) for name in names[1:]):
                raise ValueError(f"{', '.join(names)} differ in length")
        tensors = lists["sum_squares"].lengths
        if (tensors > sizes).any():
            raise ValueError("a row has more tensors than its group")
        for name in ("tensor_bin_counts", "weight_norm", "update_norm"):
            if (lists[name].lengths * (lists[name].lengths - tensors)).any():
                raise ValueError(f"{name} does not fit the tensors")
        counts = lists["tensor_bin_counts"]
        ends = np.concatenate([[0], np.cumsum(self._part("tensor_bin_counts"), dtype=np.int64)])
        per_row = np.diff(ends[counts.offsets - counts.offsets[0]])
        if not np.array_equal(per_row, lists["tensor_code"].lengths):
            raise ValueError("tensor_bin_counts do not fit tensor_code")

    def _check_values(self) -> None:
        for name in ("zeros", "nan", "inf", "tensor_bin_counts", "sum_squares", "max_abs"):
            if (self._part(name) < 0).any():
                raise ValueError(f"{name} is negative")
        for name in ("group_mean", "group_spread", "tensor_mean", "tensor_spread"):
            values = self._part(name)
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError(f"{name} lies outside [0, 1]")
        for name in ("group", "tensor"):
            edges(self._part(f"{name}_code"))
            if not self._part(f"{name}_count").all():
                raise ValueError(f"{name}_count is zero")
        if not (self._part("max_abs") < np.inf).all():
            raise ValueError("max_abs is not finite")

    def _part(self, name: str) -> NDArray[Any]:
        """All values of a list column that these rows hold."""
        column = self.lists[name]
        return column.values[column.offsets[0] : column.offsets[-1]]


def _bits(column: pa.Array, number: int) -> NDArray[np.bool_]:
    """A buffer of bits of a column: which values are not null (0), or its Boolean values (1).

    pyarrow's own functions for it lie in a module that takes longer to load than a trace to read.
    """
    buffer = column.buffers()[number]
    if buffer is None:
        return np.ones(len(column), dtype=np.bool_)
    bits = np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(np.bool_)


def _joined(parts: Sequence[Lists]) -> Lists:
    values = [part.values[part.offsets[0] : part.offsets[-1]] for part in parts]
    lengths = np.concatenate([part.lengths for part in parts])
    return Lists(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(values))
