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


@dataclass(slots=True, eq=False)
class Row:
    """One clip group at one step, ready to be written; the fields are the columns of ``trace.schema``.

    ``weight_norm`` and ``update_norm`` (float64 [tensors]) are None where they were not measured.
    """

    step: int
    group: int
    time: float
    measurement: Measurement
    max_norm: float | None = None
    clip_value: float | None = None
    norm_type: float | None = None
    returned_norm: float | None = None
    grad_scale: float = 1.0
    stepped: bool | None = None
    weight_norm: NDArray[np.float64] | None = None
    update_norm: NDArray[np.float64] | None = None
