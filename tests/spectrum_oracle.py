"""A slow, plain account of what a magnitude spectrum must say, in exact rational arithmetic."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np

from gradscope.spectrum import MagnitudeSpectrum

SPACING = {"float32": (24, -149), "float64": (53, -1074)}


def bin_of(magnitude: float, dtype: str) -> tuple[float, float]:
    """The bin of a float32 or float64 magnitude: 128 to the octave, bounds as numbers of the dtype."""
    digits, least = SPACING[dtype]
    _, exponent = math.frexp(magnitude)
    octave = 2.0 ** (exponent - 1)
    width = Fraction(octave) / 128
    step = math.floor((Fraction(magnitude) - Fraction(octave)) / width)
    lower = Fraction(octave) + step * width
    spacing = Fraction(2) ** max(exponent - digits, least)
    upper = lower + width - spacing if width > spacing else lower
    return float(lower), float(upper)


def check_against(spectrum: MagnitudeSpectrum, elements: Iterable[float], dtype: str, tolerance: float) -> None:
    """Asserts every field of ``spectrum`` against ``elements``; sums to ``tolerance``, everything else exactly."""
    values = [float(x) for x in elements]
    finite = [abs(x) for x in values if math.isfinite(x)]
    bins: dict[tuple[float, float], list[Fraction]] = defaultdict(list)
    for x in finite:
        if x:
            bins[bin_of(x, dtype) if dtype in SPACING else (x, x)].append(Fraction(x))
    expected = sorted(bins)
    assert spectrum.numel == len(values)
    assert spectrum.nan == sum(math.isnan(x) for x in values)
    assert spectrum.inf == sum(math.isinf(x) for x in values)
    assert spectrum.zeros == sum(x == 0 for x in values)
    assert spectrum.max_abs == max(finite, default=0.0)
    assert list(zip(spectrum.lower.tolist(), spectrum.upper.tolist(), strict=True)) == expected
    assert spectrum.count.tolist() == [len(bins[edges]) for edges in expected]
    for got, edges in zip(spectrum.sum_abs.tolist(), expected, strict=True):
        assert got == float(sum(bins[edges]))
    squares = sum(Fraction(x) ** 2 for x in finite)
    assert abs(Fraction(spectrum.sum_squares) - squares) <= Fraction(tolerance) * squares


def exact_angle_deg(elements: Iterable[float], v: float) -> float:
    """The angle between g and clip(g, -v, v) in degrees, correctly rounded but for the last digits."""
    magnitudes = [abs(Fraction(float(x))) for x in elements]
    bound = Fraction(v)
    clipped = [min(x, bound) for x in magnitudes]
    energy = sum(x * x for x in magnitudes)
    kept = sum(c * c for c in clipped)
    dot = sum(x * c for x, c in zip(magnitudes, clipped, strict=True))
    if energy == 0:
        return 0.0
    sine_sq = 1 - dot * dot / (energy * kept)
    cosine_sq = dot * dot / (energy * kept)
    return math.degrees(math.atan2(_root(sine_sq), _root(cosine_sq)))


def _root(x: Fraction) -> float:
    with localcontext() as context:
        context.prec = 60
        return float((Decimal(x.numerator) / Decimal(x.denominator)).sqrt())


def exact_clip(elements: Iterable[float], v: float) -> dict[str, Fraction]:
    """What ``ValueClip`` bounds, exactly."""
    magnitudes = [abs(Fraction(float(x))) for x in elements]
    bound = Fraction(v)
    return {
        "energy": sum((x * x for x in magnitudes), Fraction(0)),
        "excess": sum((x - bound for x in magnitudes if x > bound), Fraction(0)),
        "excess_sq": sum(((x - bound) ** 2 for x in magnitudes if x > bound), Fraction(0)),
        "clipped_energy": sum((min(x, bound) ** 2 for x in magnitudes), Fraction(0)),
        "clipped": Fraction(sum(x > bound for x in magnitudes)),
    }


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 values cut to bfloat16, as the uint16 that stand for them."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
