"""How many elements clip-by-value reaches, where the elements themselves are gone: bounds, and the likely number.

Only the bin that holds the threshold v leaves a doubt.  Of it are known its edges, the number c of its elements and
their sum; and that they lie on a grid, the numbers of their dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# How narrow the bins of float32 and float64 scans are, and how many digits the dtypes have.
BINS_PER_OCTAVE = 128
DIGITS = (24, 53)
# From this many elements on, a mean that is itself a number of the dtype is no coincidence if it is also lopsided.
FEWEST_ALIKE = 16
# How far, in standard deviations of a uniform density, a mean is called lopsided.
LOPSIDED = 4.0
# Neighbouring bins differ in density by less than this, but for repeated values.
SLOPE = 0.1


@dataclass(frozen=True, slots=True)
class ClippedCount:
    """Bounds on a number of elements, and the most likely number between them."""

    lo: int
    likely: int
    hi: int

    @classmethod
    def between(cls, lo: int, likely: float, hi: int) -> ClippedCount:
        """``likely`` as a whole number, moved to the nearest bound where it lies outside."""
        return cls(lo, max(lo, min(round(likely), hi)), hi)

    @property
    def error(self) -> int:
        """How far from the truth ``likely`` is at most."""
        return max(self.likely - self.lo, self.hi - self.likely)

    def __add__(self, other: ClippedCount) -> ClippedCount:
        return ClippedCount(self.lo + other.lo, self.likely + other.likely, self.hi + other.hi)


def exactly(n: int) -> ClippedCount:
    """A number that is known."""
    return ClippedCount(n, n, n)


@dataclass(frozen=True, slots=True)
class Bin:
    """``count`` elements that add up to ``sum_abs`` (float64, correctly rounded), in [lower, largest].

    ``upper`` is the largest magnitude that the bin can hold; ``largest`` is less where no element reaches it.
    ``doubt`` is how far ``sum_abs`` may be off besides its rounding.
    """

    lower: float
    upper: float
    largest: float
    count: int
    sum_abs: float
    doubt: float = 0.0

    @property
    def spacing(self) -> float:
        """The distance of the elements' possible values: a dtype's where the edges tell it, else float64's."""
        exponent = math.frexp(self.lower)[1]
        left = math.ldexp(1.0, exponent - 1) / BINS_PER_OCTAVE - (self.upper - self.lower)
        told = (math.ldexp(1.0, exponent - digits) for digits in DIGITS)
        return next((spacing for spacing in told if spacing == left), math.ulp(self.lower))

    def above_its_edge(self) -> ClippedCount:
        """The elements above ``lower``, where v is that: the others equal it and add nothing to the excess Σ(x - v).

        No element adds less than the spacing, none more than the width.  A continuous density puts hardly one on the
        edge itself, so all are above unless the excess is too small for that.
        """
        excess, doubt = self._excess_over_edge()
        width = self.largest - self.lower
        lo = max(math.ceil((excess - doubt) / width * (1 - 1e-12)), 0)
        hi = min(_rounded_up((excess + doubt) / self.spacing), self.count)
        evenly = 2.0 * excess / width
        enough = (1.0 - SLOPE) * self.count - LOPSIDED * math.sqrt(self.count / 3.0)
        return ClippedCount.between(lo, self.count if evenly >= enough and excess > doubt else evenly, hi)

    def _excess_over_edge(self) -> tuple[float, float]:
        """Σ(x - lower), and how far the rounding of the sum may put it off."""
        if self.doubt:
            return self.sum_abs - self.count * self.lower, self.doubt + 4 * math.ulp(self.sum_abs)
        if not self._sum_rounds:
            # On the grid products and differences are exact too.
            return self.sum_abs - self.count * self.lower, 0.0
        from fractions import Fraction

        excess = Fraction(self.sum_abs) - self.count * Fraction(self.lower)
        return float(excess), math.ulp(self.sum_abs) / 2

    def above(self, v: float, scatter_most: float) -> ClippedCount:
        """The elements above ``v``, which lies inside the bin; ``scatter_most`` bounds their Σ(x - mean)².

        Bounds: Markov's inequality from either end, Cantelli's for the scatter.  Between them the elements are taken
        to lie evenly, or all in one place where the mean says so.
        """
        c, mean = self.count, self.sum_abs / self.count
        if c == 1 and abs(self.sum_abs - v) >= self.doubt:
            return exactly(int(self.sum_abs > v))
        astray = self.doubt / c
        below, over = v - self.lower, self.largest - v
        # The mean may be off by two roundings.
        off = max(abs(mean - v) - 4e-16 * mean - astray, 0.0)
        spread = (mean - self.lower) * (self.largest - mean) * c + self.doubt * (self.largest - self.lower)
        scatter = min(scatter_most, max(spread, 0.0) + 9e-16 * c * mean * mean)
        beyond = min(_rounded_up(c * scatter / (scatter + c * off * off)), c - 1) if off else c
        hi = min(_rounded_up(c * (mean + astray - self.lower) / below), c if mean > v else beyond)
        not_above = min(_rounded_up(c * (self.largest - mean + astray) / over), beyond if mean > v else c)
        return ClippedCount.between(min(max(c - not_above, 0), hi), self._likely_above(v, mean), hi)

    def _likely_above(self, v: float, mean: float) -> float:
        width = self.largest - self.lower
        lopsided = abs(mean - (self.lower + width / 2)) > LOPSIDED * width / math.sqrt(12.0 * self.count)
        if lopsided and self.count >= FEWEST_ALIKE:
            if abs(self.sum_abs - self.count * v) <= math.ulp(self.sum_abs):
                return 0.0
            if not self._sum_rounds and (mean / self.spacing).is_integer() and mean * self.count == self.sum_abs:
                return float(self.count) if mean > v else 0.0
        return self.count * (self.largest - v) / width

    @property
    def _sum_rounds(self) -> bool:
        """Whether float64 may be too short for the sum: up to its 53 digits, sums on the grid are exact."""
        return self.sum_abs / self.spacing >= 2.0**53


def _rounded_up(bound: float) -> int:
    """The whole numbers that a bound allows, whatever its last digits."""
    return math.floor(bound * (1 + 1e-12) + 1e-9)
