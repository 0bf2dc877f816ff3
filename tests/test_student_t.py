"""Student's t against tables and against its own definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.student_t import student_probability, student_quantile

# One-sided 97.5 % and 99.95 %.
TABLE = [
    (1, 12.70620, 636.6192),
    (2, 4.302653, 31.59905),
    (5, 2.570582, 6.868827),
    (7, 2.364624, 5.407883),
    (30, 2.042272, 3.645959),
    (120, 1.979930, 3.373455),
    (math.inf, 1.959964, 3.290527),
]


@pytest.mark.parametrize(("freedom", "usual", "rare"), TABLE)
def test_quantiles_are_those_of_the_tables(freedom: float, usual: float, rare: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(usual, rel=1e-6)
    assert student_quantile(0.9995, freedom) == pytest.approx(rare, rel=1e-6)
    assert student_probability(usual, freedom) == pytest.approx(0.05, rel=1e-5)
    assert student_quantile(0.5, freedom) == 0.0
    assert student_probability(0.0, freedom) == 1.0
    assert student_probability(math.inf, freedom) == 0.0


@given(st.floats(1.0, 1e6), st.floats(-9.0, math.log10(0.49)))
def test_the_quantile_undoes_the_probability(freedom: float, exponent: float) -> None:
    tail = 10.0**exponent
    t = student_quantile(1.0 - tail, freedom)
    assert student_probability(t, freedom) == pytest.approx(2.0 * tail, rel=1e-6)


def test_the_probability_is_the_integral_of_the_density() -> None:
    freedom, t = 3.5, 1.7
    # dx/(1 + x²/ν)^((ν+1)/2), x = √ν tan φ: cos^(ν−1) φ dφ.
    phi = np.linspace(0.0, math.pi / 2.0, 200_001)
    density = np.cos(phi) ** (freedom - 1.0)
    beyond = phi >= math.atan(t / math.sqrt(freedom))
    assert student_probability(t, freedom) == pytest.approx(density[beyond].sum() / density.sum(), rel=1e-4)
