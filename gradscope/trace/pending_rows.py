"""Rows that wait to be written: taken in within microseconds, made into one record batch later."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradscope.trace.columns import element_type
from gradscope.trace.measurement import PackedMeasurement, Row
from gradscope.trace.schema import COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa

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

    heads: bytes
    columns: tuple[bytes, ...]


class PendingRows:
    """Rows, column by column, in bytes that grow.

    ``bytearray.extend`` takes 0.15 µs for an array of any length up to a few KiB: half of what a slice of a numpy
    buffer takes, and the buffer need not be grown by hand.
    """

    __slots__ = ("heads", "lists")

    def __init__(self) -> None:
        self.heads = bytearray()
        self.lists: dict[str, bytearray] = {name: bytearray() for name in _LENGTH_OF}

    def __len__(self) -> int:
        return len(self.heads) // _HEAD.size

    @property
    def nbytes(self) -> int:
        """The bytes that wait."""
        return len(self.heads) + sum(map(len, self.lists.values()))

    def append(self, row: Row) -> None:
        """Copy ``row``; its arrays may be reused at once."""
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
        """Take in many rows at once."""
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

    def to_batch(self, schema: pa.Schema) -> pa.RecordBatch:
        """The rows as one record batch that shares their memory: append no more.

        Raises ValueError where an array had not the length or dtype that ``trace.measurement`` states.
        """
        import pyarrow as pa

        heads = np.frombuffer(self.heads, _HEAD_DTYPE)
        offsets = {name: _offsets(heads[name]) for name in dict.fromkeys(_LENGTH_OF.values())}
        arrays = []
        for name, kind in COLUMNS.items():
            element = element_type(kind)
            if element is None:
                arrays.append(_column(name, heads))
                continue
            values = np.frombuffer(self.lists[name], element)
            if len(values) != offsets[_LENGTH_OF[name]][-1]:
                raise ValueError(f"{name} holds {len(values)} values of {offsets[_LENGTH_OF[name]][-1]}")
            starts = pa.array(offsets[_LENGTH_OF[name]])
            arrays.append(pa.ListArray.from_arrays(starts, pa.array(values), type=schema.field(name).type))
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


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


def _column(name: str, heads: NDArray[Any]) -> pa.Array:
    import pyarrow as pa

    mask = (heads["present"] & _PRESENT[name]) == 0 if name in _PRESENT else None
    values = (heads["present"] & _STEPPED) != 0 if name == "stepped" else np.ascontiguousarray(heads[name])
    return pa.array(values, mask=mask)


def _offsets(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
