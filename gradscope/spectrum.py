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

from gradscope._kernels import Scanner, clip_sums
from gradscope.errors import GradscopeError

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
# How far a total may be off, relative to it: the kernel's block sums over 64 lanes' worth of float64 roundings, and,
# for spectra that know every value, a few roundings.
_SCAN_ROUNDING = 2.0**-46
_POINT_ROUNDING = 2.0**-50
# What a square or product that underflows float64 can lose.
_UNDERFLOW = 2.0**-1070
_EMPTY = np.empty(0)
_EMPTY_COUNT = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class ValueClip:
    """What clip-by-value at ``v`` does to a gradient g, as rigorous bounds; parts of a gradient add up with ``+``.

    With c = clip(g): ``energy`` is ‖g‖²; ``excess`` bounds s = Σ(|g|-v)₊; ``excess_sq`` bounds S = Σ((|g|-v)₊)²;
    ``clipped_energy`` bounds ‖c‖² = ‖g‖² - 2vs - S; ``clipped`` bounds the number of elements with |g| > v.
    ``rounding`` is how far ``energy`` may be off, relative to it.
    """

    v: float
    energy: float
    excess_lo: float
    excess_hi: float
    excess_sq_lo: float
    excess_sq_hi: float
    clipped_energy_lo: float
    clipped_energy_hi: float
    clipped_lo: int
    clipped_hi: int
    rounding: float

    @classmethod
    def none(cls, v: float, energy: float = 0.0, rounding: float = 0.0) -> ValueClip:
        """The clip of a gradient that holds nothing above ``v``."""
        return cls(v, energy, 0.0, 0.0, 0.0, 0.0, energy * (1 - rounding), energy * (1 + rounding), 0, 0, rounding)

    def __add__(self, other: ValueClip) -> ValueClip:
        if self.v != other.v:
            raise ValueError(f"clips at different values do not add up: {self.v} and {other.v}")
        return ValueClip(
            self.v,
            self.energy + other.energy,
            self.excess_lo + other.excess_lo,
            self.excess_hi + other.excess_hi,
            self.excess_sq_lo + other.excess_sq_lo,
            self.excess_sq_hi + other.excess_sq_hi,
            self.clipped_energy_lo + other.clipped_energy_lo,
            self.clipped_energy_hi + other.clipped_energy_hi,
            self.clipped_lo + other.clipped_lo,
            self.clipped_hi + other.clipped_hi,
            max(self.rounding, other.rounding) + 2.0**-53,
        )

    @classmethod
    def total(cls, clips: Iterable[ValueClip]) -> ValueClip:
        """The clip of all the parts together, at least one, added with a single rounding; they share one ``v``."""
        parts = list(clips)
        if len({part.v for part in parts}) != 1:
            raise ValueError(f"clips at different values do not add up: {sorted({part.v for part in parts})}")
        return cls(
            parts[0].v,
            energy=_exact_sum([part.energy for part in parts]),
            excess_lo=_exact_sum([part.excess_lo for part in parts]),
            excess_hi=_exact_sum([part.excess_hi for part in parts]),
            excess_sq_lo=_exact_sum([part.excess_sq_lo for part in parts]),
            excess_sq_hi=_exact_sum([part.excess_sq_hi for part in parts]),
            clipped_energy_lo=_exact_sum([part.clipped_energy_lo for part in parts]),
            clipped_energy_hi=_exact_sum([part.clipped_energy_hi for part in parts]),
            clipped_lo=sum(part.clipped_lo for part in parts),
            clipped_hi=sum(part.clipped_hi for part in parts),
            rounding=max(part.rounding for part in parts) + 2.0**-53,
        )

    def direction_change_deg(self) -> tuple[float, float]:
        """The angle between g and c in degrees, and the half-width of the interval that surely holds it.

        cos θ = (‖c‖² + vs)/(‖g‖‖c‖) and sin² θ = (S‖c‖² - v²s²)/(‖g‖²‖c‖²).  At fixed ‖g‖² and S the angle falls as
        s grows; at fixed s it is largest where ‖c‖² = vs.  So its extremes over a box of bounds are at corners or
        there.  The boxes (s, S) and (s, ‖c‖²) both hold the truth: the first is sharp for small angles, the second
        where nearly all is clipped.  (45, 45) where the squares leave float64 and nothing is known.
        """
        if self.excess_hi == 0.0 and self.excess_sq_hi == 0.0:
            return 0.0, 0.0
        if not (0.0 < self.energy < math.inf) or not self.rounding < 1.0:
            return 45.0, 45.0
        lo, hi = self._angles_by_excess()
        also_lo, also_hi = self._angles_by_clipped_energy()
        lo, hi = max(lo, also_lo), min(hi, also_hi)
        return math.degrees((lo + hi) / 2), math.degrees(abs(hi - lo) / 2)

    def _angles_by_excess(self) -> tuple[float, float]:
        slope = self.v / self.energy
        s_lo, s_hi = self.excess_lo * slope, self.excess_hi * slope
        sq_lo, sq_hi = self.excess_sq_lo / self.energy, self.excess_sq_hi / self.energy
        kept_lo = self.clipped_energy_lo / self.energy
        # ‖c‖²/‖g‖² is a difference of numbers near 1 here, and loses digits where it is small.
        noise = 8 * max(self.rounding, _POINT_ROUNDING) * (1 + 1 / kept_lo) if kept_lo > 0 else math.inf
        if noise > 1e-6:
            return 0.0, math.pi / 2

        def angle(s: float, sq: float, sign: int) -> float:
            kept = 1 - 2 * s - sq
            sine_sq = sq - s * s / kept + sign * noise
            return math.atan2(math.sqrt(max(sine_sq, 0.0)), (kept + s) / math.sqrt(kept))

        most = angle(s_lo, min(max(1 - 3 * s_lo, sq_lo), sq_hi, 1 - 2 * s_lo - kept_lo), +1)
        # A corner outside of what Cauchy-Schwarz allows bounds nothing.
        least = 0.0
        if 1 - 2 * s_hi - sq_hi > 0:
            least = min(angle(s_hi, sq_lo, -1), angle(s_hi, sq_hi, -1))
        return least, most

    def _angles_by_clipped_energy(self) -> tuple[float, float]:
        slope = self.v / self.energy
        s_lo, s_hi = self.excess_lo * slope, self.excess_hi * slope
        kept_lo, kept_hi = self.clipped_energy_lo / self.energy, self.clipped_energy_hi / self.energy
        if kept_lo <= 0.0:
            return 0.0, math.pi / 2
        noise = 8 * max(self.rounding, _POINT_ROUNDING)

        def angle(s: float, kept: float, sign: int) -> float:
            cosine = (kept + s) / math.sqrt(kept)
            return math.atan2(math.sqrt(max(1 - cosine * cosine + sign * noise, 0.0)), cosine)

        most = angle(s_lo, min(max(s_lo, kept_lo), kept_hi), +1)
        least = min(angle(s_hi, kept_lo, -1), angle(s_hi, kept_hi, -1))
        return least, most

    def norm_ratio(self) -> float:
        """‖c‖/‖g‖, from the middle of its bounds; 1 for a zero gradient."""
        if self.excess_hi == 0.0 or self.energy == 0.0:
            return 1.0
        return math.sqrt((self.clipped_energy_lo + self.clipped_energy_hi) / 2 / self.energy)

    def scale(self) -> float:
        """(g·c)/‖g‖², from the middle of its bounds; 1 for a zero gradient."""
        if self.excess_hi == 0.0 or self.energy == 0.0:
            return 1.0
        kept = (self.clipped_energy_lo + self.clipped_energy_hi) / 2
        return (kept + self.v * (self.excess_lo + self.excess_hi) / 2) / self.energy


@dataclass(frozen=True, slots=True, eq=False)
class MagnitudeSpectrum:
    """How many elements of a tensor fall in each narrow magnitude bin, with exact totals beside it.

    One entry per non-empty bin, ascending and disjoint: ``lower`` and ``upper`` are the smallest and largest
    magnitude that the bin can hold (both inclusive, non-zero, finite; equal where every value is known), ``count`` its
    elements, ``sum_abs`` their Σ|g| and ``bin_sum_squares``, where known, their Σg².  ``sum_squares`` (inf where a
    square overflows float64) and ``max_abs`` are over the finite elements; ``zeros``, ``nan`` and ``inf`` count
    elements outside the bins.
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
    def merge(cls, spectra: Iterable[MagnitudeSpectrum]) -> MagnitudeSpectrum:
        """The spectrum of all their elements together; bins that overlap become one.  Their order does not matter."""
        parts = list(spectra)
        if len(parts) == 1:
            return parts[0]
        filled = [part for part in parts if part.lower.size]
        lower, upper, count, sum_abs, squares = _merge_bins(filled)
        return cls(
            lower,
            upper,
            count,
            sum_abs,
            _exact_sum([part.sum_squares for part in parts]),
            max((part.max_abs for part in parts), default=0.0),
            sum(part.zeros for part in parts),
            sum(part.nan for part in parts),
            sum(part.inf for part in parts),
            squares,
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
        return _exact_sum(self.sum_abs.tolist())

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
        if v >= self.max_abs:
            points = np.array_equal(self.lower, self.upper)
            return ValueClip.none(v, energy, _POINT_ROUNDING if points else _SCAN_ROUNDING)
        if not energy < math.inf:
            return ValueClip(v, energy, 0.0, math.inf, 0.0, math.inf, 0.0, math.inf, 0, self.numel, 1.0)
        straddling, n, s, square, above, below = clip_sums(
            self.lower, self.upper, self.count, self.sum_abs, self.bin_sum_squares, v
        )
        inside = _Straddle.none() if straddling < 0 else self._straddle(straddling, v)
        points = above[2] == below[2] == inside.scatter_most == 0.0
        rounding = _POINT_ROUNDING if points else _SCAN_ROUNDING
        underflow = self.finite * _UNDERFLOW
        slack = rounding * energy + underflow
        scatter = energy - above[0] - below[0] - inside.energy
        least, most = max(scatter - slack, 0.0), max(scatter + slack, 0.0)
        above_most = min(above[2], max(most - below[1] - inside.scatter_least, above[1]))
        above_least = min(max(above[1], least - below[2] - inside.scatter_most), above_most)
        below_most = min(below[2], max(most - above[1] - inside.scatter_least, below[1]))
        below_least = min(max(below[1], least - above[2] - inside.scatter_most), below_most)
        split = inside.split(
            v, max(inside.scatter_least, least - above[2] - below[2]), max(most - above[1] - below[1], 0.0)
        )
        # The scatter above v and in its bin are two parts of one known whole, which sharpens the sum of both.
        square_lo = max(above_least + split.square_lo, least - below_most + split.around - split.missed_hi)
        square_hi = min(above_most + split.square_hi, most - below_least + split.around - split.missed_lo)
        s_off = 2.0**-49 * (s + n * v + inside.sum_abs)
        square_off = 2.0**-49 * (above[0] + inside.energy) + underflow
        kept = below[0] + n * v * v
        return ValueClip(
            v,
            energy,
            max(s + split.s_lo - s_off, 0.0),
            s + split.s_hi + s_off,
            max(square + square_lo - square_off, 0.0),
            square + max(square_hi, square_lo) + square_off,
            (kept + below_least + split.kept_lo) * (1 - 2.0**-49),
            (kept + below_most + split.kept_hi) * (1 + 2.0**-49),
            int(n) + split.n_lo - self._perhaps_at(v),
            int(n) + split.n_hi,
            slack / energy if energy else 1.0,
        )

    def _perhaps_at(self, v: float) -> int:
        """How many elements of the bin that begins at ``v`` may equal it: the others make up its excess over v."""
        k = int(np.searchsorted(self.lower, v))
        if k == self.lower.size or self.lower[k] != v or self.upper[k] == v:
            return 0
        count, width = int(self.count[k]), min(float(self.upper[k]), self.max_abs) - v
        excess = max(float(self.sum_abs[k]) - count * v, 0.0) * (1 - 1e-12)
        return count - min(math.ceil(excess / width - 1e-9), count)

    def _straddle(self, k: int, v: float) -> _Straddle:
        c, a = float(self.count[k]), float(self.sum_abs[k])
        lower, upper = float(self.lower[k]), min(float(self.upper[k]), self.max_abs)
        mean = min(max(a / c, lower), upper)
        energy = a * mean
        most = (mean - lower) * (upper - mean) * c + 9e-16 * energy
        least = 0.0
        if self.bin_sum_squares is not None:
            known = float(self.bin_sum_squares[k]) - energy
            least = min(max(known - 1e-14 * energy, 0.0), most)
            most = max(min(known + 1e-14 * energy, most), least)
        return _Straddle(c, a, mean, lower, upper, energy, least, most)


@dataclass(frozen=True, slots=True)
class _Split:
    """Bounds on what the elements of the bin that holds v contribute."""

    s_lo: float
    s_hi: float
    square_lo: float
    square_hi: float
    around: float
    missed_lo: float
    missed_hi: float
    kept_lo: float
    kept_hi: float
    n_lo: int
    n_hi: int


@dataclass(frozen=True, slots=True)
class _Straddle:
    """The bin that holds v inside: elements x in [lower, upper] and bounds on their scatter Σ(x-mean)²."""

    count: float
    sum_abs: float
    mean: float
    lower: float
    upper: float
    energy: float
    scatter_least: float
    scatter_most: float

    @classmethod
    def none(cls) -> _Straddle:
        return cls(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

    def split(self, v: float, scatter_least: float, scatter_most: float) -> _Split:
        """Bounds on s = Σ(x-v)₊, S = Σ((x-v)₊)², Σmin(x,v)² and the elements above v.

        With t = Σ(v-x)₊ and R = Σ((v-x)₊)², s - t = a - cv and S + R = M, the scatter around v.  Below and above v lie
        at most v - lower and upper - v away, so R <= (v - lower)t and S <= (upper - v)s; Cauchy-Schwarz gives
        S >= s²/c and R >= t²/c.  s is at most the chord (mass at the ends) and Scarf's ½(√(cM) + a - cv).
        """
        c, a = self.count, self.sum_abs
        if c == 0.0:
            return _Split(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0)
        lower, upper = self.lower, self.upper
        below, over = v - lower, upper - v
        d = c * (self.mean - v)
        most = min(self.scatter_most, scatter_most)
        around_least = min(scatter_least, most) + d * d / c
        around_most = most + d * d / c
        s_lo = max(0.0, d, (around_least + below * d) / (upper - lower))
        s_hi = max(min(c * (self.mean - lower) * over / (upper - lower), (math.sqrt(c * around_most) + d) / 2), s_lo)
        t_lo, t_hi = max(s_lo - d, 0.0), max(s_hi - d, 0.0)
        n_hi = min(c, math.floor(c * (self.mean - lower) / below * (1 + 1e-12) + 1e-9))
        n_lo = max(0.0, c - math.floor(c * (upper - self.mean) / over * (1 + 1e-12) + 1e-9), float(d > 1e-12 * a))
        square_lo = max(s_lo * s_lo / c, around_least - below * t_hi, 0.0)
        square_hi = max(min(over * s_hi, around_most - t_lo * t_lo / c), square_lo)
        kept_lo = c * (v - t_hi / c) ** 2
        kept_hi = max(c * v * v - (v + lower) * t_lo, kept_lo)
        missed_lo, missed_hi = t_lo * t_lo / c, below * t_hi
        return _Split(
            s_lo,
            s_hi,
            square_lo,
            square_hi,
            d * d / c,
            missed_lo,
            missed_hi,
            kept_lo,
            kept_hi,
            int(min(n_lo, n_hi)),
            int(n_hi),
        )


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


def _exact_sum(values: list[float]) -> float:
    """The correctly rounded sum, whatever the order; inf where it overflows."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


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
    lower = np.concatenate([part.lower for part in parts])
    upper = np.concatenate([part.upper for part in parts])
    count = np.concatenate([part.count for part in parts])
    sum_abs = np.concatenate([part.sum_abs for part in parts])
    order = np.lexsort((sum_abs, lower))
    lower, reach = lower[order], np.maximum.accumulate(upper[order])
    starts = np.flatnonzero(np.concatenate(([True], lower[1:] > reach[:-1])))
    merged_squares = None
    if all_squares:
        joined = np.concatenate(squares)
        merged_squares = np.add.reduceat(joined[np.lexsort((joined, np.concatenate([p.lower for p in parts])))], starts)
    return (
        lower[starts],
        np.maximum.reduceat(upper[order], starts),
        np.add.reduceat(count[order], starts),
        np.add.reduceat(sum_abs[order], starts),
        merged_squares,
    )
