"""The bins of a trace: what their codes mean, and what they decode to.

A fine bin is the 14 bits below the sign of a float64, exponent and 3 bits of mantissa: 8 equal bins an octave, from the
subnormals on.  A bin of a coarser level is 2, 4 or all 8 of an octave's, and one more level holds everything below an
octave.  So bins of any levels either hold one another or are disjoint, and a code has 15 bits:

    code             number within the level                                               bins an octave
        0 … 16383    bits >> 49                                                            8
    16384 … 24575    bits >> 50                                                            4
    24576 … 28671    bits >> 51                                                            2
    28672 … 30719    bits >> 52                                                            1
    30720 … 32767    exponent field e of an octave: all non-zero magnitudes below it       —
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gradscope.spectrum import MagnitudeSpectrum
from gradscope.trace.measurement import Bins

FloatArray = NDArray[np.float64]

LEVEL_STARTS = (0, 16384, 24576, 28672)
BELOW = 30720
CODES = 32768
# How far the sum of a bin may be off, relative to what its elements exceed the lower edge by: the mean is a float32.
ROUNDING = 2.0**-23

_SMALLEST = 2.0**-1074
_LARGEST = float(np.finfo(np.float64).max)


def edges(codes: NDArray[np.integer]) -> tuple[FloatArray, FloatArray]:
    """The smallest and largest magnitude (float64, both inclusive, non-zero, finite) of each bin.

    ValueError where a code means no finite magnitude.
    """
    if np.any((codes < 0) | (codes >= CODES)):
        raise ValueError(f"bin codes lie in [0, {CODES}), got {int(codes.max())} and {int(codes.min())}")
    lower, upper = _LOWER[codes], _UPPER[codes]
    if not np.all(upper > 0.0):
        raise ValueError("a bin code stands for no finite magnitude")
    return lower, upper


def decode(
    bins: Bins,
    sum_squares: float,
    max_abs: float,
    zeros: int = 0,
    nan: int = 0,
    inf: int = 0,
    grad_scale: float = 1.0,
) -> MagnitudeSpectrum:
    """The spectrum that ``bins`` were made of, divided by ``grad_scale`` (positive), like the totals beside them.

    Bins may come in any order, and one code may stand several times.  ValueError where a code or moment is impossible.
    """
    lower, upper = edges(bins.code)
    mean, spread = bins.mean.astype(np.float64), bins.spread.astype(np.float64)
    if not (0.0 < grad_scale < math.inf):
        raise ValueError(f"grad_scale must be positive and finite, got {grad_scale}")
    if not (np.all((mean >= 0.0) & (mean <= 1.0) & (spread >= 0.0) & (spread <= 1.0)) and np.all(bins.count > 0)):
        raise ValueError("the moments of a bin lie outside of it")
    if grad_scale != 1.0:
        lower, upper = _scaled(lower, upper, grad_scale)
    width = upper - lower
    count = bins.count.astype(np.int64)
    value = lower + width * mean
    with np.errstate(over="ignore", under="ignore"):
        squares = count * (value * value + spread * width * width)
        energy = sum_squares / grad_scale / grad_scale
    return MagnitudeSpectrum.from_bins(
        lower, upper, count, count * value, squares, energy, max_abs / grad_scale, zeros, nan, inf, ROUNDING
    )


def _scaled(lower: FloatArray, upper: FloatArray, scale: float) -> tuple[FloatArray, FloatArray]:
    """Edges divided by ``scale``; where that rounds, bins that were disjoint stay so."""
    with np.errstate(over="ignore", under="ignore"):
        low = np.clip(lower / scale, _SMALLEST, _LARGEST)
        high = np.minimum(np.nextafter(upper, np.inf) / scale, _LARGEST)
    return low, np.maximum(np.nextafter(high, 0.0), low)


def _all_edges() -> tuple[FloatArray, FloatArray]:
    lower, upper = np.zeros(CODES), np.zeros(CODES)
    infinite = 0x7FF0000000000000
    ends = (*LEVEL_STARTS[1:], BELOW)
    for level, (start, end) in enumerate(zip(LEVEL_STARTS, ends, strict=True)):
        first = np.arange(end - start, dtype=np.uint64) << np.uint64(49 + level)
        finite = first < infinite
        last = first + np.uint64((1 << (49 + level)) - 1)
        lower[start:end][finite] = first[finite].view(np.float64)
        upper[start:end][finite] = last[finite].view(np.float64)
    octaves = np.arange(1, 2047, dtype=np.uint64) << np.uint64(52)
    upper[BELOW + 1 : BELOW + 2047] = (octaves - np.uint64(1)).view(np.float64)
    lower[upper > 0.0] = np.maximum(lower[upper > 0.0], _SMALLEST)
    return lower, upper


_LOWER, _UPPER = _all_edges()
