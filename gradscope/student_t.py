"""Student's t: how likely a deviation is where its standard error is itself an estimate."""

from __future__ import annotations

import math
from statistics import NormalDist

# Above so many degrees of freedom it is the normal distribution, to the precision that is asked of it.
NORMAL_FROM = 1e7


def student_probability(t: float, freedom: float) -> float:
    """P(|T| ≥ t) for Student's t with ``freedom`` > 0 degrees of freedom (inf: the normal distribution), t ≥ 0.

    The regularised incomplete beta function I_x(ν/2, 1/2) at x = ν/(ν + t²), by its continued fraction (NIST DLMF
    8.17.22, 8.17.4).
    """
    if math.isinf(t) or freedom > NORMAL_FROM:
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
    """The t below which Student's t with ``freedom`` ≥ 1 falls with probability ``p``, 0.5 ≤ p < 1.

    By Newton's method for log P(|T| ≥ t) as a function of log t, which is concave.
    """
    tail = 2.0 * (1.0 - p)
    if tail >= 1.0:
        return 0.0
    # The normal distribution has less beyond.
    t = NormalDist().inv_cdf(p)
    for _ in range(100):
        beyond = student_probability(t, freedom)
        step = math.log(beyond / tail) * beyond / (2.0 * t * _density(t, freedom))
        t *= math.exp(step)
        if abs(step) < 1e-14:
            break
    return t


def _density(t: float, freedom: float) -> float:
    if freedom > NORMAL_FROM:
        return math.exp(-t * t / 2.0) / math.sqrt(2.0 * math.pi)
    front = math.lgamma((freedom + 1.0) / 2.0) - math.lgamma(freedom / 2.0) - 0.5 * math.log(freedom * math.pi)
    return math.exp(front - (freedom + 1.0) / 2.0 * math.log1p(t * t / freedom))


def _beta_fraction(a: float, b: float, x: float, rest: float) -> float:
    """I_x(a, b) for x < (a + 1)/(a + b + 2), by Lentz's evaluation of the continued fraction; ``rest`` is 1 - x."""
    if x <= 0.0:
        return 0.0
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
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
    return math.exp(front) / a * value
