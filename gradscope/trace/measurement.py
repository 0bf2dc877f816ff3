"""What is measured of one clip group at one step: a row of a trace before it is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True, eq=False)
class Bins:
    """Magnitude bins as ``trace.schema`` defines them; all four arrays are [bins]."""

    code: NDArray[np.uint16]
    count: NDArray[np.uint32]
    mean: NDArray[np.float32]
    spread: NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Measurement:
    """The gradient of one clip group; arrays are [tensors of the group].

    ``sum_squares`` and ``max_abs`` (float64) are over the finite elements, ``sum_squares`` NaN where there was no
    gradient; ``zeros``, ``nan`` and ``inf`` (int64) count elements.  ``tensor_bins`` holds the tensors' bins one after
    the other, ``tensor_bin_counts`` (int32) of each.
    """

    sum_squares: NDArray[np.float64]
    max_abs: NDArray[np.float64]
    zeros: NDArray[np.int64]
    nan: NDArray[np.int64]
    inf: NDArray[np.int64]
    group_bins: Bins | None = None
    tensor_bins: Bins | None = None
    tensor_bin_counts: NDArray[np.int32] | None = None


class PackedMeasurement:
    """A measurement as the kernel hands it over: one piece of memory, which most rows are written from unread.

    ``data`` holds, one after the other: sum_squares, max_abs, zeros, nan, inf (8 bytes each, [tensors]); count, mean
    and spread of the group's bins; those of the tensors' (4 bytes each); with ``spectra`` 2 the tensors' bin counts (4
    bytes, [tensors]); the codes of the group's bins and those of the tensors' (2 bytes each).  ``spectra`` is 0: no
    bins, 1: the group's, 2: the tensors' too.
    """

    __slots__ = ("data", "group_bins_held", "spectra", "tensor_bins_held", "tensors")

    def __init__(self, data: bytes, tensors: int, spectra: int, group_bins: int, tensor_bins: int) -> None:
        self.data = data
        self.tensors = tensors
        self.spectra = spectra
        self.group_bins_held = group_bins
        self.tensor_bins_held = tensor_bins

    def unpacked(self) -> Measurement:
        """The same as arrays, read-only, that share its memory."""
        data, n = self.data, self.tensors
        measured = Measurement(
            np.frombuffer(data, np.float64, n),
            np.frombuffer(data, np.float64, n, 8 * n),
            np.frombuffer(data, np.int64, n, 16 * n),
            np.frombuffer(data, np.int64, n, 24 * n),
            np.frombuffer(data, np.int64, n, 32 * n),
        )
        of_group, of_tensors = self.group_bins_held, self.tensor_bins_held
        at, codes = 40 * n, 40 * n + 12 * (of_group + of_tensors)
        if self.spectra == 2:
            measured.tensor_bin_counts = np.frombuffer(data, np.int32, n, codes)
            codes += 4 * n
            measured.tensor_bins = _bins(data, at + 12 * of_group, codes + 2 * of_group, of_tensors)
        if self.spectra:
            measured.group_bins = _bins(data, at, codes, of_group)
        return measured


def unpacked(measurement: Measurement | PackedMeasurement) -> Measurement:
    """``measurement`` as arrays."""
    return measurement.unpacked() if isinstance(measurement, PackedMeasurement) else measurement


def _bins(data: bytes, at: int, codes: int, n: int) -> Bins:
    return Bins(
        np.frombuffer(data, np.uint16, n, codes),
        np.frombuffer(data, np.uint32, n, at),
        np.frombuffer(data, np.float32, n, at + 4 * n),
        np.frombuffer(data, np.float32, n, at + 8 * n),
    )


@dataclass(slots=True, eq=False)
class Row:
    """One clip group at one step, ready to be written; the fields are the columns of ``trace.schema``.

    ``weight_norm`` and ``update_norm`` (float64 [tensors]) are None where they were not measured.
    """

    step: int
    group: int
    time: float
    measurement: Measurement | PackedMeasurement
    max_norm: float | None = None
    clip_value: float | None = None
    norm_type: float | None = None
    returned_norm: float | None = None
    grad_scale: float = 1.0
    stepped: bool | None = None
    weight_norm: NDArray[np.float64] | None = None
    update_norm: NDArray[np.float64] | None = None
