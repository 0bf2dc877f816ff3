"""How far two series of the same quantity are apart, beyond what noise explains.

Training is not stationary: a norm that falls tenfold in a run says nothing of how far two runs are apart.  So equal
fractions of two runs are compared, and what is common to both courses is no noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.intervals import effective_sample_size

FloatArray = NDArray[np.float64]

MOST_SEGMENTS = 8
# Fewer values in a segment say little of how they scatter in it.
VALUES_PER_SEGMENT = 8
FEWEST_VALUES = 4
# Of as many independent values a segment's mean is told from its noise.
INDEPENDENT_PER_SEGMENT = 4


@dataclass(frozen=True, slots=True)
class Course:
    """The course of a quantity over a run: its means in 1, 2, 4 or 8 segments of equal length.

    ``means`` (NaN where nothing is known) and ``counts`` are of the values known in each segment.  ``variance`` is the
    long-run variance σ²τ of one value about the mean of its segment, τ being the autocorrelation time, so that a
    segment of n values has a mean of variance σ²τ/n; inf where there are too few values to tell.  ``freedom`` are its
    degrees of freedom (inf for a series that never changes), ``effective`` is n/τ over the whole run.
    """

    means: tuple[float, ...]
    counts: tuple[int, ...]
    variance: float
    freedom: float
    effective: float

    @classmethod
    def of(cls, series: FloatArray) -> Course:
        """The course of ``series``, float64 [steps], finite, or NaN where it is not known."""
        values = np.asarray(series, dtype=np.float64)
        here = ~np.isnan(values)
        known = int(np.count_nonzero(here))
        segments = MOST_SEGMENTS
        while segments > 1 and known < VALUES_PER_SEGMENT * segments:
            segments //= 2
        course = cls._divided(values, here, segments)
        while segments > 1 and course.effective < INDEPENDENT_PER_SEGMENT * segments:
            segments //= 2
            course = cls._divided(values, here, segments)
        return course

    @classmethod
    def _divided(cls, values: FloatArray, here: NDArray[np.bool_], segments: int) -> Course:
        # Where a value lies in its run, known or not, so that runs of any length divide alike.
        place = ((np.arange(len(values)) * segments) // max(1, len(values)))[here]
        values = values[here]
        counts = np.bincount(place, minlength=segments)
        means = np.full(segments, math.nan)
        np.divide(np.bincount(place, weights=values, minlength=segments), counts, out=means, where=counts > 0)
        variance, freedom, effective = _noise(values - means[place], int(np.count_nonzero(counts)))
        return cls(tuple(means.tolist()), tuple(counts.tolist()), variance, freedom, effective)

    @property
    def mean(self) -> float:
        """The mean of the segments that are known, each counting alike; NaN where none is."""
        known = [mean for mean in self.means if not math.isnan(mean)]
        return math.fsum(known) / len(known) if known else math.nan

    def coarser(self, segments: int) -> Course:
        """The same in this many segments, a power of two not above their number."""
        share = len(self.means) // segments
        counts = [sum(self.counts[i : i + share]) for i in range(0, len(self.counts), share)]
        sums = [mean * count if count else 0.0 for mean, count in zip(self.means, self.counts, strict=True)]
        means = [
            math.fsum(sums[i * share : (i + 1) * share]) / count if count else math.nan
            for i, count in enumerate(counts)
        ]
        return Course(tuple(means), tuple(counts), self.variance, self.freedom, self.effective)


@dataclass(frozen=True, slots=True)
class Difference:
    """``change`` is the mean of b minus that of a, ``error`` its standard error; inf where too little is known.

    ``effective`` is the number of independent values behind each of the two means, ``freedom`` the degrees of freedom
    of ``error``.  ``segments`` are the changes in equal fractions of the two runs, whose mean ``change`` is; NaN for
    a fraction of which one run knows nothing, and throughout where no fraction is known of both.
    """

    change: float
    error: float
    effective: tuple[float, float]
    freedom: float = math.inf
    segments: tuple[float, ...] = ()

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

    Both runs are divided into up to 8 equal fractions, at least 8 values in each; the change is the mean of the
    differences of their means.  Noise is what scatters about these means, its variance multiplied by the
    autocorrelation time (Geyer 1992) of what is left.
    """
    return between(Course.of(a), Course.of(b))


def between(a: Course, b: Course) -> Difference:
    """As ``difference``, of two courses."""
    segments = min(len(a.means), len(b.means))
    a, b = a.coarser(segments), b.coarser(segments)
    changes = tuple(after - before for before, after in zip(a.means, b.means, strict=True))
    known = [k for k, change in enumerate(changes) if not math.isnan(change)]
    effective = (a.effective, b.effective)
    if not known:
        return Difference(math.nan, math.inf, effective, 0.0, changes)
    change = math.fsum(changes[k] for k in known) / len(known)
    variances = [_variance_of_mean(course, known) for course in (a, b)]
    total = math.fsum(variances)
    freedom = _pooled_freedom(variances, (a.freedom, b.freedom))
    return Difference(change, math.sqrt(total), effective, freedom, changes)


def student_probability(t: float, freedom: float) -> float:
    """P(|T| ≥ t) for Student's t with ``freedom`` > 0 degrees of freedom (inf: the normal distribution), t ≥ 0.

    The regularised incomplete beta function I_x(ν/2, 1/2) at x = ν/(ν + t²), by its continued fraction (NIST DLMF
    8.17.22, 8.17.4).
    """
    if math.isinf(t) or freedom > 1e7:
        return math.erfc(t / math.sqrt(2.0))
    x = freedom / (freedom + t * t)
    a, b = freedom / 2.0, 0.5
    # 1 - x by itself, for what is subtracted from 1 may lose all its digits.
    rest = t * t / (freedom + t * t)
    if rest == 0.0:
        return 1.0
    if x < (a + 1.0) / (a + b + 2.0):
        return _beta_fraction(a, b, x, rest)
    return 1.0 - _beta_fraction(b, a, rest, x)


def student_quantile(p: float, freedom: float) -> float:
    """The t below which Student's t falls with probability ``p``, 0.5 ≤ p < 1."""
    tail = 2.0 * (1.0 - p)
    if tail >= 1.0:
        return 0.0
    low, high = 0.0, 1.0
    while student_probability(high, freedom) > tail:
        low, high = high, high * 2.0
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (middle, high) if student_probability(middle, freedom) > tail else (low, middle)
    return (low + high) / 2.0


def _noise(residuals: FloatArray, segments: int) -> tuple[float, float, float]:
    """The long-run variance of ``residuals`` about ``segments`` means, its degrees of freedom, the effective size."""
    n = len(residuals)
    if n < max(FEWEST_VALUES, segments + 2):
        return math.inf, 0.0, float(n)
    # Means of equal values differ from them by a rounding error.
    if np.abs(residuals).max() <= 1e-12:
        return 0.0, math.inf, 1.0
    time = max(n / effective_sample_size(residuals), _autoregressive_time(residuals, segments))
    # A mean takes the variance of τ values with it.
    spare = max(n - segments * time, 1.0)
    return float(np.square(residuals).sum()) / spare * time, max(1.0, spare / time), n / time


def _autoregressive_time(residuals: FloatArray, segments: int) -> float:
    """(1+φ)/(1−φ) of a first-order autoregression, φ corrected for the means removed.

    Removing a mean of m values lowers φ by about (1+4φ)/m (Kendall 1954): without this, short segments hide the
    longest correlations from any estimate.
    """
    n = len(residuals)
    phi = float(residuals[1:] @ residuals[:-1]) / float(residuals @ residuals)
    phi += (1.0 + 4.0 * phi) * segments / n
    phi = min(max(0.0, phi), 1.0 - segments / n)
    return (1.0 + phi) / (1.0 - phi)


def _variance_of_mean(course: Course, known: Sequence[int]) -> float:
    return course.variance * math.fsum(1.0 / course.counts[k] for k in known) / len(known) ** 2


def _pooled_freedom(variances: Sequence[float], freedoms: Sequence[float]) -> float:
    """The degrees of freedom of a sum of estimated variances (Satterthwaite 1946, Welch 1947)."""
    total = math.fsum(variances)
    if not 0.0 < total < math.inf:
        return math.inf if total == 0.0 else 0.0
    doubt = math.fsum((v / total) ** 2 / freedom for v, freedom in zip(variances, freedoms, strict=True) if v > 0.0)
    return 1.0 / doubt if doubt > 0.0 else math.inf


def _beta_fraction(a: float, b: float, x: float, rest: float) -> float:
    """I_x(a, b) for x < (a + 1)/(a + b + 2), by Lentz's evaluation of the continued fraction; ``rest`` is 1 - x."""
    front = (
        math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)) / a
        if x > 0.0
        else 0.0
    )
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0) or tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / (1.0 + term * d or tiny)
            c = 1.0 + term / c or tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * value
