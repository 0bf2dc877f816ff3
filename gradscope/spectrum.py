"""The magnitude spectrum: one pass over a tensor, and what can be read off it for ever after.

A spectrum counts the elements of a tensor in narrow magnitude bins and keeps the exact sum of every bin and exact
totals beside them.  Spectra add up, in any order, and answer what clip-by-value does at any threshold.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.clipped_count import Bin, ClippedCount, exactly
from gradscope.errors import GradscopeError
from gradscope.value_clip import POINT_ROUNDING, Straddle, ValueClip, exact_sum

try:
    from gradscope._kernels import Scanner, clip_sums, scatter_doubt
except ModuleNotFoundError as missing:
    raise GradscopeError(
        "gradscope",
        "this source tree was not built: its compiled core is missing",
        "pip install -e . builds it in place",
    ) from missing

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
}
"""Every dtype that can be scanned, and the numpy dtype whose bytes stand for it."""

# ``dtype.name`` takes longer than scanning a bias.
_NATIVE = {np.dtype(name): name for name in ("float64", "float32", "float16")}
# How far the total of a scan may be off, relative to it: the kernel's block sums round in float64.
_SCAN_ROUNDING = 2.0**-46
_STORED_ROUNDING = 2.0**-40
# Of how many parts a merged spectrum stays aware; ranks, not steps.
_MOST_PARTS = 64
# What a square or product that underflows float64 can lose.
_UNDERFLOW = 2.0**-1070
_EMPTY = np.empty(0)
_EMPTY_COUNT = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class MagnitudeSpectrum:
    """How many elements of a tensor fall in each narrow magnitude bin, with exact totals beside it.

    One entry per non-empty bin, ascending and disjoint: ``lower`` and ``upper`` are the smallest and largest
    magnitude that the bin can hold (both inclusive, non-zero, finite; equal where every value is known), ``count`` its
    elements, ``sum_abs`` their Σ|g| and ``bin_sum_squares``, where known, their Σg².  ``sum_squares`` (inf where a
    square overflows float64) and ``max_abs`` are over the finite elements; ``zeros``, ``nan`` and ``inf`` count
    elements outside the bins.

    ``rounding`` says how far the sums of a bin may be off where they were stored with fewer digits: ``sum_abs`` by this
    share of Σ(|g| - lower), and the scatter Σ(|g| - mean)² as far as such shifts can change it.
    ``parts`` are what a merged spectrum was made of, where bins of different width made wide ones: an octave that is
    wide because it held little of one part may hold most of another.
    """

    lower: FloatArray = field(default_factory=lambda: _EMPTY, repr=False)
    upper: FloatArray = field(default_factory=lambda: _EMPTY, repr=False)
    count: IntArray = field(default_factory=lambda: _EMPTY_COUNT, repr=False)
    sum_abs: FloatArray = field(default_factory=lambda: _EMPTY, repr=False)
    sum_squares: float = 0.0
    max_abs: float = 0.0
    zeros: int = 0
    nan: int = 0
    inf: int = 0
    bin_sum_squares: FloatArray | None = field(default=None, repr=False)
    rounding: float = 0.0
    parts: tuple[MagnitudeSpectrum, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, elements: Any, dtype: str | None = None) -> MagnitudeSpectrum:
        """The spectrum of a numpy array of any shape, strides and byte order, or of a contiguous buffer.

        ``dtype`` names the elements of a buffer, and of the ``uint16`` or ``uint8`` arrays that stand for
        ``"bfloat16"`` and the float8 types.  Raises GradscopeError where the elements are not floating-point numbers.
        """
        if hasattr(elements, "__array_interface__"):
            array = np.asarray(elements)
            dtype = dtype or _NATIVE.get(array.dtype) or array.dtype.name
            if dtype not in FLOAT_DTYPES or FLOAT_DTYPES[dtype].itemsize != array.itemsize:
                raise GradscopeError("array", f"dtype {array.dtype.name} does not hold floating-point numbers")
        else:
            array = np.frombuffer(elements, np.uint8)
            if dtype is None or dtype not in FLOAT_DTYPES:
                raise GradscopeError("buffer", f"dtype {dtype} is not one of {', '.join(FLOAT_DTYPES)}")
            if array.size % FLOAT_DTYPES[dtype].itemsize:
                raise GradscopeError("buffer", f"{array.size} bytes are no whole number of {dtype} elements")
        scanner = scanner_for(dtype)
        if array.flags.c_contiguous and array.dtype.isnative:
            scanner.feed(array)
        else:
            for chunk in contiguous_chunks(array):
                scanner.feed(chunk)
        return cls.from_scan(scanner)

    @classmethod
    def from_scan(cls, scanner: Scanner) -> MagnitudeSpectrum:
        """Empties a scanner of what it was fed."""
        bins, sum_squares, max_abs, zeros, nan, inf, _ = scanner.take()
        lower, upper, sum_abs, count = np.frombuffer(bins).reshape(4, -1)
        return cls(lower, upper, count.view(np.int64), sum_abs, sum_squares, max_abs, zeros, nan, inf)

    @classmethod
    def from_bins(
        cls,
        lower: FloatArray,
        upper: FloatArray,
        count: IntArray,
        sum_abs: FloatArray,
        bin_sum_squares: FloatArray | None,
        sum_squares: float,
        max_abs: float,
        zeros: int = 0,
        nan: int = 0,
        inf: int = 0,
        rounding: float = 0.0,
    ) -> MagnitudeSpectrum:
        """The spectrum of bins in any order; those that overlap become one."""
        lower, upper, count, sum_abs, squares = _join_bins(lower, upper, count, sum_abs, bin_sum_squares)
        return cls(lower, upper, count, sum_abs, sum_squares, max_abs, zeros, nan, inf, squares, rounding)

    @classmethod
    def merge(cls, spectra: Iterable[MagnitudeSpectrum]) -> MagnitudeSpectrum:
        """The spectrum of all their elements together; bins that overlap become one.  Their order does not matter."""
        parts = list(spectra)
        if len(parts) == 1:
            return parts[0]
        filled = [part for part in parts if part.lower.size]
        leaves = [leaf for part in parts for leaf in part.parts or (part,)]
        rounding = max((part.rounding for part in parts), default=0.0)
        lower, upper, count, sum_abs, squares = _merge_bins(filled)
        return cls(
            lower,
            upper,
            count,
            sum_abs,
            exact_sum([part.sum_squares for part in parts]),
            max((part.max_abs for part in parts), default=0.0),
            sum(part.zeros for part in parts),
            sum(part.nan for part in parts),
            sum(part.inf for part in parts),
            squares,
            rounding,
            tuple(leaves) if rounding and len(leaves) <= _MOST_PARTS and _widened(filled, lower.size) else (),
        )

    def repeated(self, times: int) -> MagnitudeSpectrum:
        """The spectrum of every element standing ``times`` times."""
        squares = None if self.bin_sum_squares is None else self.bin_sum_squares * times
        return MagnitudeSpectrum(
            self.lower,
            self.upper,
            self.count * times,
            self.sum_abs * times,
            self.sum_squares * times,
            self.max_abs,
            self.zeros * times,
            self.nan * times,
            self.inf * times,
            squares,
            self.rounding,
            tuple(part.repeated(times) for part in self.parts),
        )

    def __add__(self, other: MagnitudeSpectrum) -> MagnitudeSpectrum:
        return MagnitudeSpectrum.merge([self, other])

    @property
    def nonfinite(self) -> int:
        """The number of NaN and infinite elements."""
        return self.nan + self.inf

    @property
    def finite(self) -> int:
        """The number of finite elements, zeros included."""
        return self.zeros + int(self.count.sum())

    @property
    def numel(self) -> int:
        """The number of all elements."""
        return self.finite + self.nonfinite

    @property
    def norm(self) -> float:
        """The L2 norm of the finite elements."""
        return math.sqrt(self.sum_squares)

    @property
    def rms(self) -> float:
        """The root mean square of the finite elements; 0 where there are none."""
        finite = self.finite
        return math.sqrt(self.sum_squares / finite) if finite else 0.0

    @property
    def sum_abs_total(self) -> float:
        """Σ|g| of the finite elements."""
        return exact_sum(self.sum_abs.tolist())

    def quantile(self, p: float) -> float:
        """The smallest magnitude that a share ``p`` of the finite elements does not exceed, zeros included.

        Exact where every value is known, else interpolated within the bin that holds it (0.8 % wide).  NaN where
        there is no finite element; ValueError where p is outside [0, 1].
        """
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must lie in [0, 1], got {p}")
        ranks = np.cumsum(self.count)
        finite = self.zeros + (int(ranks[-1]) if ranks.size else 0)
        if finite == 0:
            return math.nan
        rank = max(math.ceil(p * finite), 1) - self.zeros
        if rank <= 0:
            return 0.0
        k = int(np.searchsorted(ranks, rank))
        lower, upper = float(self.lower[k]), min(float(self.upper[k]), self.max_abs)
        if rank == ranks[-1]:
            return self.max_abs
        inside = rank - (int(ranks[k]) - int(self.count[k])) - 0.5
        return lower + (upper - lower) * inside / int(self.count[k])

    def share_below(self, x: float) -> tuple[float, float]:
        """Bounds on the share of the finite elements with |g| < x, zeros included; (0, 0) where there are none."""
        finite = self.finite
        if finite == 0 or not x > 0:
            return 0.0, 0.0
        if x > self.max_abs:
            return 1.0, 1.0
        surely = self.zeros + int(self.count[: np.searchsorted(self.upper, x, side="left")].sum())
        at_most = self.zeros + int(self.count[: np.searchsorted(self.lower, x, side="left")].sum())
        return surely / finite, at_most / finite

    def value_clip(self, v: float) -> ValueClip:
        """What clipping every element into [-v, v] does.  ValueError where v is not positive."""
        if not v > 0:
            raise ValueError(f"v must be positive, got {v}")
        energy = self.sum_squares
        if self.parts and v < self.max_abs:
            return ValueClip.total(part.value_clip(v) for part in self.parts)
        if v >= self.max_abs:
            points = np.array_equal(self.lower, self.upper)
            return ValueClip.none(v, energy, self._total_rounding(points))
        if not energy < math.inf:
            clipped = self._clipped(v, math.inf)
            return ValueClip(v, energy, 0.0, math.inf, 0.0, math.inf, 0.0, math.inf, clipped, 1.0)
        straddling, n, s, square, above, below = clip_sums(
            self.lower, self.upper, self.count, self.sum_abs, self.bin_sum_squares, v, self.rounding
        )
        inside = Straddle.none() if straddling < 0 else self._straddle(straddling, v)
        points = above[2] == below[2] == inside.scatter_most == 0.0
        rounding = self._total_rounding(points)
        underflow = self.finite * _UNDERFLOW
        slack = rounding * energy + underflow
        scatter = energy - above[0] - below[0] - inside.energy
        # A mean that is off by a share r puts the energy of the means off by 2r.
        astray = slack + 3.0 * self.rounding * energy
        least, most = max(scatter - astray, 0.0), max(scatter + astray, 0.0)
        above_most = min(above[2], max(most - below[1] - inside.scatter_least, above[1]))
        above_least = min(max(above[1], least - below[2] - inside.scatter_most), above_most)
        below_most = min(below[2], max(most - above[1] - inside.scatter_least, below[1]))
        below_least = min(max(below[1], least - above[2] - inside.scatter_most), below_most)
        scatter_inside = max(most - above[1] - below[1], 0.0)
        split = inside.split(v, max(inside.scatter_least, least - above[2] - below[2]), scatter_inside)
        # The scatter above v and in its bin are two parts of one known whole, which sharpens the sum of both.
        square_lo = max(above_least + split.square_lo, least - below_most + split.around - split.missed_hi)
        square_hi = min(above_most + split.square_hi, most - below_least + split.around - split.missed_lo)
        s_off = (2.0**-49 + self.rounding) * (s + n * v + inside.sum_abs)
        square_off = (2.0**-49 + 3.0 * self.rounding) * (above[0] + inside.energy) + underflow
        kept = below[0] + n * v * v
        kept_off = 3.0 * self.rounding * (below[0] + inside.energy)
        return ValueClip(
            v,
            energy,
            max(s + split.s_lo - s_off, 0.0),
            s + split.s_hi + s_off,
            max(square + square_lo - square_off, 0.0),
            square + max(square_hi, square_lo) + square_off,
            max((kept + below_least + split.kept_lo) * (1 - 2.0**-49) - kept_off, n * v * v * (1 - 2.0**-49)),
            (kept + below_most + split.kept_hi) * (1 + 2.0**-49) + kept_off,
            self._clipped(v, min(inside.scatter_most, scatter_inside)),
            slack / energy if energy else 1.0,
        )

    def _total_rounding(self, points: bool) -> float:
        """How far ``sum_squares`` may be off, relative to it; ``points`` says that every value is known."""
        if self.rounding:
            return _STORED_ROUNDING
        return POINT_ROUNDING if points else _SCAN_ROUNDING

    def _clipped(self, v: float, scatter_most: float) -> ClippedCount:
        """The elements above ``v``; ``scatter_most`` bounds the scatter in the bin that holds it inside."""
        k = int(np.searchsorted(self.upper, v, side="right"))
        if k == self.lower.size or self.lower[k] > v:
            return exactly(int(self.count[k:].sum()))
        lower, upper = float(self.lower[k]), float(self.upper[k])
        count, sum_abs = int(self.count[k]), float(self.sum_abs[k])
        doubt = self.rounding * (sum_abs - count * lower) + 4 * self.rounding * math.ulp(sum_abs)
        held = Bin(lower, upper, min(upper, self.max_abs), count, sum_abs, doubt)
        inside = held.above_its_edge() if held.lower == v else held.above(v, scatter_most)
        return exactly(int(self.count[k + 1 :].sum())) + inside

    def _straddle(self, k: int, v: float) -> Straddle:
        c, a = float(self.count[k]), float(self.sum_abs[k])
        lower, upper = float(self.lower[k]), min(float(self.upper[k]), self.max_abs)
        mean = min(max(a / c, lower), upper)
        energy = a * mean
        astray = self.rounding * max(a - c * lower, 0.0)
        most = (mean - lower) * (upper - mean) * c + 9e-16 * energy + astray * (upper - lower)
        least = 0.0
        if self.bin_sum_squares is not None:
            known = float(self.bin_sum_squares[k]) - energy
            off = 1e-14 * energy
            if self.rounding:
                off += scatter_doubt(self.rounding, c, mean - lower, known)
            least = min(max(known - off, 0.0), most)
            most = max(min(known + off, most), least)
        # As if the elements were shifted to the mean that is known.
        shift = astray / c
        return Straddle(c, a, mean, max(lower - shift, 0.0), upper + shift, energy, least, most)


class _Scanners(threading.local):
    """One scanner per thread and dtype: making one costs more than scanning a small tensor."""

    def __init__(self) -> None:
        self.of: dict[str, Scanner] = {}


_scanners = _Scanners()


def scanner_for(dtype: str) -> Scanner:
    """This thread's scanner for ``dtype``, empty unless somebody left it full."""
    scanner = _scanners.of.get(dtype)
    if scanner is None:
        scanner = _scanners.of[dtype] = Scanner(dtype)
    return scanner


def contiguous_chunks(array: NDArray[Any]) -> Iterable[NDArray[Any]]:
    """The elements of an array of any strides and byte order, in native, contiguous pieces of bounded size."""
    chunks = np.nditer(
        array,
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_dtypes=[array.dtype.newbyteorder("=")],
        buffersize=1 << 16,
        order="K",
    )
    return (np.ascontiguousarray(chunk) for chunk in chunks)


def _merge_bins(
    parts: list[MagnitudeSpectrum],
) -> tuple[FloatArray, FloatArray, IntArray, FloatArray, FloatArray | None]:
    if not parts:
        return _EMPTY, _EMPTY, _EMPTY_COUNT, _EMPTY, None
    first = parts[0]
    squares = [part.bin_sum_squares for part in parts if part.bin_sum_squares is not None]
    all_squares = len(squares) == len(parts)
    if all(part.lower.size == first.lower.size and np.array_equal(part.lower, first.lower) for part in parts) and all(
        np.array_equal(part.upper, first.upper) for part in parts
    ):
        # Sorted, so that the sum does not depend on the order of the parts.
        return (
            first.lower,
            first.upper,
            np.sum([part.count for part in parts], axis=0),
            np.sort(np.stack([part.sum_abs for part in parts]), axis=0).sum(axis=0),
            np.sort(np.stack(squares), axis=0).sum(axis=0) if all_squares else None,
        )
    return _join_bins(
        np.concatenate([part.lower for part in parts]),
        np.concatenate([part.upper for part in parts]),
        np.concatenate([part.count for part in parts]),
        np.concatenate([part.sum_abs for part in parts]),
        np.concatenate(squares) if all_squares else None,
    )


def _widened(parts: list[MagnitudeSpectrum], bins: int) -> bool:
    """Whether merging ``parts`` into this many bins made some of a part's own bins one."""
    lower = np.concatenate([part.lower for part in parts]) if parts else _EMPTY
    upper = np.concatenate([part.upper for part in parts]) if parts else _EMPTY
    return len(set(zip(lower.tolist(), upper.tolist(), strict=True))) > bins


def _join_bins(
    lower: FloatArray, upper: FloatArray, count: IntArray, sum_abs: FloatArray, squares: FloatArray | None
) -> tuple[FloatArray, FloatArray, IntArray, FloatArray, FloatArray | None]:
    """Sorts bins and makes one of those that overlap; the order they come in does not matter."""
    if lower.size == 0:
        return lower, upper, count, sum_abs, squares
    order = np.lexsort((sum_abs, lower))
    unsorted = lower
    lower, reach = lower[order], np.maximum.accumulate(upper[order])
    starts = np.flatnonzero(np.concatenate(([True], lower[1:] > reach[:-1])))
    merged_squares = None
    if squares is not None:
        merged_squares = np.add.reduceat(squares[np.lexsort((squares, unsorted))], starts)
    return (
        lower[starts],
        np.maximum.reduceat(upper[order], starts),
        np.add.reduceat(count[order], starts),
        np.add.reduceat(sum_abs[order], starts),
        merged_squares,
    )
