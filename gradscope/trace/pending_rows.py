"""Rows that wait to be written: taken in within microseconds, made into one record batch later."""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, Union

import numpy as np

from gradscope._meter import ArrowRows
from gradscope.trace.columns import element_type
from gradscope.trace.measurement import PackedMeasurement, Row
from gradscope.trace.schema import COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa

    from gradscope._meter import Memory

# What every row has one of, as it is packed: ``present`` has a bit for every value that is not null, and one that says
# whether the optimizer stepped; then the length of each list.
_HEAD = Struct("<qidddddd7i")
_HEAD_DTYPE = np.dtype(
    [
        ("step", "<i8"),
        ("group", "<i4"),
        *((name, "<f8") for name in ("time", "max_norm", "clip_value", "norm_type", "returned_norm", "grad_scale")),
        *((name, "<i4") for name in ("present", "tensors", "group_bins", "counts", "tensor_bins", "weight", "update")),
    ]
)
_PRESENT = {"max_norm": 1, "clip_value": 2, "norm_type": 4, "returned_norm": 8, "stepped": 16}
_STEPPED = 32
# Which length each list column has.
_LENGTH_OF = {
    **dict.fromkeys(("sum_squares", "max_abs", "zeros", "nan", "inf"), "tensors"),
    **dict.fromkeys(("group_code", "group_count", "group_mean", "group_spread"), "group_bins"),
    **dict.fromkeys(("tensor_code", "tensor_count", "tensor_mean", "tensor_spread"), "tensor_bins"),
    "tensor_bin_counts": "counts",
    "weight_norm": "weight",
    "update_norm": "update",
}


_OFFSETS = {name: field[1] for name, field in (_HEAD_DTYPE.fields or {}).items()}


def _layout(name: str, kind: str) -> tuple[str, int, int, int]:
    """A column as ``ArrowRows`` takes it, but for its values."""
    element = element_type(kind)
    if element is not None:
        return name, np.dtype(element).itemsize, _OFFSETS[_LENGTH_OF[name]], 0
    if kind == "bool":
        return name, 0, _STEPPED.bit_length() - 1, _PRESENT[name]
    return name, np.dtype(kind).itemsize, _OFFSETS[name], _PRESENT.get(name, 0)


_LAYOUT = [_layout(name, kind) for name, kind in COLUMNS.items()]
# Anything that bytes can be read from.
Piece = Union["bytes", "bytearray", "Memory"]
# The list columns as ``PackedRows`` holds them.
PACKED_COLUMNS = (
    *("sum_squares", "max_abs", "zeros", "nan", "inf", "tensor_bin_counts"),
    *("group_count", "group_mean", "group_spread", "group_code"),
    *("tensor_count", "tensor_mean", "tensor_spread", "tensor_code"),
    *("weight_norm", "update_norm"),
)


class PackedRows(NamedTuple):
    """Many rows as the kernel hands them over: ``heads`` laid out as ``_HEAD``, the lists of each column in one piece.

    ``columns`` are in the order of ``PACKED_COLUMNS``.
    """

    heads: Piece
    columns: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all."""
        return len(self.heads) + sum(map(len, self.columns))


class PendingRows:
    """Rows, column by column, in bytes that grow.

    ``bytearray.extend`` takes 0.15 µs for an array of any length up to a few KiB: half of what a slice of a numpy
    buffer takes, and the buffer need not be grown by hand.
    """

    __slots__ = ("_first", "heads", "lists")

    def __init__(self) -> None:
        # Rows that came as one, and so far alone: they are written from where they are.
        self._first: PackedRows | None = None
        self.heads = bytearray()
        self.lists: dict[str, bytearray] = {name: bytearray() for name in _LENGTH_OF}

    def __len__(self) -> int:
        return len(self.heads if self._first is None else self._first.heads) // _HEAD.size

    @property
    def nbytes(self) -> int:
        """The bytes that wait."""
        if self._first is not None:
            return self._first.nbytes
        return len(self.heads) + sum(map(len, self.lists.values()))

    def append(self, row: Row) -> None:
        """Copy ``row``; its arrays may be reused at once."""
        if self._first is not None:
            self._take_over_first()
        if isinstance(row.measurement, PackedMeasurement):
            self._append_packed(row, row.measurement)
            return
        m, lists, weight_norm, update_norm = row.measurement, self.lists, row.weight_norm, row.update_norm
        group_bins, tensor_bins, counts = m.group_bins, m.tensor_bins, m.tensor_bin_counts
        # First what can fail, so that a row is taken in whole or not at all.
        head = _head(
            row,
            len(m.sum_squares),
            0 if group_bins is None else len(group_bins.code),
            0 if counts is None else len(counts),
            0 if tensor_bins is None else len(tensor_bins.code),
            0 if weight_norm is None else len(weight_norm),
            0 if update_norm is None else len(update_norm),
        )
        lists["sum_squares"].extend(m.sum_squares)
        lists["max_abs"].extend(m.max_abs)
        lists["zeros"].extend(m.zeros)
        lists["nan"].extend(m.nan)
        lists["inf"].extend(m.inf)
        if group_bins is not None:
            lists["group_code"].extend(group_bins.code)
            lists["group_count"].extend(group_bins.count)
            lists["group_mean"].extend(group_bins.mean)
            lists["group_spread"].extend(group_bins.spread)
        if counts is not None:
            lists["tensor_bin_counts"].extend(counts)
        if tensor_bins is not None:
            lists["tensor_code"].extend(tensor_bins.code)
            lists["tensor_count"].extend(tensor_bins.count)
            lists["tensor_mean"].extend(tensor_bins.mean)
            lists["tensor_spread"].extend(tensor_bins.spread)
        if weight_norm is not None:
            lists["weight_norm"].extend(weight_norm)
        if update_norm is not None:
            lists["update_norm"].extend(update_norm)
        self.heads += head

    def extend(self, rows: PackedRows) -> None:
        """Take in many rows at once, whose memory must stay as it is."""
        if self._first is None and not self.heads:
            self._first = rows
            return
        if self._first is not None:
            self._take_over_first()
        self._copy(rows)

    def _take_over_first(self) -> None:
        first, self._first = self._first, None
        if first is not None:
            self._copy(first)

    def _copy(self, rows: PackedRows) -> None:
        for name, column in zip(PACKED_COLUMNS, rows.columns, strict=True):
            self.lists[name] += column
        self.heads += rows.heads

    def _append_packed(self, row: Row, packed: PackedMeasurement) -> None:
        lists, weight_norm, update_norm = self.lists, row.weight_norm, row.update_norm
        n, of_group, of_tensors = packed.tensors, packed.group_bins_held, packed.tensor_bins_held
        counts = n if packed.spectra == 2 else 0
        head = _head(
            row,
            n,
            of_group,
            counts,
            of_tensors,
            0 if weight_norm is None else len(weight_norm),
            0 if update_norm is None else len(update_norm),
        )
        data = memoryview(packed.data)
        eight, four, two = 8 * n, 4 * of_group, 2 * of_group
        lists["sum_squares"] += data[:eight]
        lists["max_abs"] += data[eight : 2 * eight]
        lists["zeros"] += data[2 * eight : 3 * eight]
        lists["nan"] += data[3 * eight : 4 * eight]
        lists["inf"] += data[4 * eight : 5 * eight]
        at = 5 * eight
        lists["group_count"] += data[at : at + four]
        lists["group_mean"] += data[at + four : at + 2 * four]
        lists["group_spread"] += data[at + 2 * four : at + 3 * four]
        at += 3 * four
        if counts:
            four = 4 * of_tensors
            lists["tensor_count"] += data[at : at + four]
            lists["tensor_mean"] += data[at + four : at + 2 * four]
            lists["tensor_spread"] += data[at + 2 * four : at + 3 * four]
            at += 3 * four
            lists["tensor_bin_counts"] += data[at : at + 4 * n]
            at += 4 * n
            lists["tensor_code"] += data[at + two :]
        lists["group_code"] += data[at : at + two]
        if weight_norm is not None:
            lists["weight_norm"].extend(weight_norm)
        if update_norm is not None:
            lists["update_norm"].extend(update_norm)
        self.heads += head

    def serialized(self, schema: pa.Schema) -> pa.Buffer:
        """The rows as one message of an Arrow stream of ``schema``, that of ``trace.columns``: append no more.

        Raises ValueError where an array had not the length or dtype that ``trace.measurement`` states.
        """
        import pyarrow as pa

        lists: Mapping[str, Piece] = self.lists
        heads: Piece = self.heads
        if self._first is not None:
            heads, lists = self._first.heads, dict(zip(PACKED_COLUMNS, self._first.columns, strict=True))
        columns = [(name, size, offset, present, lists.get(name)) for name, size, offset, present in _LAYOUT]
        # One call for all columns, where an array for each takes twenty times as long on a busy machine.
        rows = ArrowRows(heads, _HEAD.size, _OFFSETS["present"], columns)
        batch = pa.RecordBatch._import_from_c(rows.address, schema)
        message = batch.serialize()
        # It shares the memory of ``rows``.
        del batch
        return message


def _head(row: Row, *lengths: int) -> bytes:
    present = 0
    max_norm, clip_value, norm_type, returned_norm = row.max_norm, row.clip_value, row.norm_type, row.returned_norm
    if max_norm is None:
        max_norm = 0.0
    else:
        present = 1
    if clip_value is None:
        clip_value = 0.0
    else:
        present |= 2
    if norm_type is None:
        norm_type = 0.0
    else:
        present |= 4
    if returned_norm is None:
        returned_norm = 0.0
    else:
        present |= 8
    if row.stepped is not None:
        present |= 16 + _STEPPED * row.stepped
    return _HEAD.pack(
        row.step, row.group, row.time, max_norm, clip_value, norm_type, returned_norm, row.grad_scale, present, *lengths
    )
