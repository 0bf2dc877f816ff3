"""How far two series of the same quantity are apart, beyond what noise explains.

Training is not stationary: a norm that falls tenfold in a run says nothing of how far two runs are apart.  So equal
fractions of two runs are compared, and what both went through, a trend, the first steps of an optimizer, the beat of
rollouts, is no noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.intervals import effective_sample_size
from gradscope.student_t import student_quantile

FloatArray = NDArray[np.float64]

# A power of two, so that any two courses have fractions in common.
MOST_FRACTIONS = 64
# The difference of two courses is told from noise about straight lines through stretches of so many fractions: the
# shortest that hold enough independent values for each of the two numbers of a line.
STRETCHES = (16, 32, 64)
VALUES_PER_NUMBER = 4
FEWEST_FRACTIONS = 4


@dataclass(frozen=True, slots=True)
class Course:
    """The course of a quantity over a run: its means over equal fractions of it, 1, 2, 4 … or 64 of them.

    ``means`` are NaN where nothing is known.  ``effective`` is how many independent values tell as much as those that
    are known, their trend apart.
    """

    means: tuple[float, ...]
    effective: float

    @classmethod
    def of(cls, series: FloatArray) -> Course:
        """The course of ``series``, float64 [steps], finite, or NaN where it is not known.

        It has as many fractions as there are values for.
        """
        values = np.asarray(series, dtype=np.float64)
        here = ~np.isnan(values)
        known = int(np.count_nonzero(here))
        fractions = MOST_FRACTIONS
        while fractions > max(1, known):
            fractions //= 2
        # Where a value lies in its run, known or not, so that runs of any length divide alike.
        place = ((np.arange(len(values)) * fractions) // max(1, len(values)))[here]
        counts = np.bincount(place, minlength=fractions)
        means = np.full(fractions, math.nan)
        np.divide(np.bincount(place, weights=values[here], minlength=fractions), counts, out=means, where=counts > 0)
        eighth = (np.arange(len(values)) * 8 // max(1, len(values)))[here]
        residuals = _about_lines(values[here], np.flatnonzero(here).astype(np.float64), eighth)
        return cls(tuple(means.tolist()), effective_sample_size(residuals))

    @property
    def mean(self) -> float:
        """The mean of the fractions that are known, each counting alike; NaN where none is."""
        known = [mean for mean in self.means if not math.isnan(mean)]
        return math.fsum(known) / len(known) if known else math.nan

    def coarser(self, fractions: int) -> FloatArray:
        """The means over this many fractions, a power of two not above their number; float64, NaN: not known."""
        means = np.array(self.means).reshape(fractions, -1)
        known = ~np.isnan(means)
        counts = known.sum(axis=1)
        total = np.where(known, means, 0.0).sum(axis=1)
        return np.asarray(np.where(counts > 0, total / np.maximum(1, counts), math.nan))


@dataclass(frozen=True, slots=True)
class Difference:
    """``change`` is the mean of b minus that of a, ``error`` its standard error; inf where too little is known.

    ``changes`` are the differences in equal fractions of the two runs, whose mean ``change`` is: NaN for a fraction of
    which one run knows nothing, and ``change`` is NaN where no fraction is known of both.  ``freedom`` are the degrees
    of freedom of ``error``, ``effective`` the number of independent values in each of the two runs.
    """

    change: float
    error: float
    effective: tuple[float, float]
    freedom: float
    changes: tuple[float, ...]

    @classmethod
    def of(cls, changes: FloatArray, effective: tuple[float, float]) -> Difference:
        """The difference whose values in equal fractions of two runs are ``changes``, NaN where one is not known."""
        at = np.flatnonzero(~np.isnan(changes))
        known = changes[at]
        if not len(known):
            return cls(math.nan, math.inf, effective, 0.0, tuple(changes.tolist()))
        variance, freedom = _noise(known, at)
        error = math.sqrt(variance / len(known))
        return cls(math.fsum(known) / len(known), error, effective, freedom, tuple(changes.tolist()))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The interval that covers the change with this ``confidence``, by Student's t; infinite where none does.

        It allows for the noise within the two runs.  Two runs that differ in their seed alone may differ by more.
        """
        if not math.isfinite(self.error):
            return -math.inf, math.inf
        if self.error == 0.0:
            return self.change, self.change
        reach = student_quantile(0.5 + confidence / 2.0, self.freedom) * self.error
        return self.change - reach, self.change + reach


def difference(a: FloatArray, b: FloatArray) -> Difference:
    """How far ``b`` lies above ``a``: float64 [steps] each, of any two lengths, NaN where a value is not known.

    Both runs are divided into up to 64 equal fractions, and the change is the mean of the differences of their means.
    Noise is what of these scatters about straight lines through every 16 of them, its variance multiplied by their
    autocorrelation time (Geyer 1992, "Practical Markov chain Monte Carlo"; Kendall 1954 for the bias).
    """
    return between(Course.of(a), Course.of(b))


def between(a: Course, b: Course) -> Difference:
    """As ``difference``, of two courses."""
    fractions = min(len(a.means), len(b.means))
    changes = b.coarser(fractions) - a.coarser(fractions)
    return Difference.of(changes, (a.effective, b.effective))


def _noise(known: FloatArray, at: NDArray[np.int64]) -> tuple[float, float]:
    """The long-run variance of ``known`` differences, and its degrees of freedom.

    ``at`` says which fractions of the runs they are.
    """
    n = len(known)
    if n < FEWEST_FRACTIONS:
        return math.inf, 0.0
    residuals, fitted, time = known, n, math.inf
    for length in STRETCHES:
        stretch = at // length
        fitted = 2 * len(np.unique(stretch))
        if n < fitted + 2 and length < STRETCHES[-1]:
            continue
        residuals = _about_lines(known, at.astype(np.float64), stretch)
        # A line through equal values misses them by a rounding error.
        if np.abs(residuals).max() <= 1e-12 * max(1.0, float(np.abs(known).max())):
            return 0.0, math.inf
        time = max(n / effective_sample_size(residuals), _autoregressive_time(residuals, fitted))
        if n >= VALUES_PER_NUMBER * fitted * time:
            break
    # A line takes the variance of 2τ values with it.
    spare = max(n - fitted * time, n / 4)
    return float(np.square(residuals).sum()) / spare * time, max(1.0, spare / time)


def _about_lines(values: FloatArray, at: FloatArray, stretch: NDArray[np.int64]) -> FloatArray:
    """``values`` at the places ``at``, less the straight line that fits those of their ``stretch`` best."""
    count = np.maximum(1, np.bincount(stretch))
    off = at - (np.bincount(stretch, weights=at) / count)[stretch]
    values = values - (np.bincount(stretch, weights=values) / count)[stretch]
    squares = np.bincount(stretch, weights=off * off)
    slopes = np.bincount(stretch, weights=off * values) / np.where(squares > 0.0, squares, 1.0)
    return np.asarray(values - slopes[stretch] * off)


def _autoregressive_time(residuals: FloatArray, fitted: int) -> float:
    """(1+φ)/(1−φ) of a first-order autoregression, φ corrected for the ``fitted`` numbers.

    Removing a mean of m values lowers φ by about (1+4φ)/m (Kendall 1954), a line by twice that: without this, short
    stretches hide the longest correlations from any estimate.
    """
    n = len(residuals)
    phi = float(residuals[1:] @ residuals[:-1]) / float(residuals @ residuals)
    phi += (1.0 + 4.0 * phi) * fitted / n
    phi = min(max(0.0, phi), 1.0 - fitted / n)
    return (1.0 + phi) / (1.0 - phi)
