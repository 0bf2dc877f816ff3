"""The difference of two series: equal fractions, and noise that is correlated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradscope.differences import Course, difference


def autoregression(generator: np.random.Generator, n: int, phi: float) -> NDArray[np.float64]:
    values = generator.standard_normal(n + 200)
    for i in range(1, n + 200):
        values[i] += phi * values[i - 1]
    return values[200:]


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_intervals_cover_the_truth_for_correlated_noise_on_a_trend(phi: float) -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        a, b = (autoregression(generator, n, phi) + 5.0 * np.linspace(0, 1, n) ** 2 for n in (640, 400))
        low, high = difference(a, b + 0.7).interval(0.95)
        covered += low <= 0.7 <= high
    assert covered >= 180


def test_a_course_that_both_runs_took_is_no_noise() -> None:
    generator = np.random.default_rng(0)
    trend = 8.0 * np.exp(-np.arange(640) / 50)
    a, b = (trend + 0.1 * generator.standard_normal(640) for _ in range(2))
    found = difference(a, b + 0.3)
    assert found.change == pytest.approx(0.3, abs=0.03)
    assert found.error < 0.02


def test_runs_of_other_lengths_are_compared_at_equal_fractions() -> None:
    found = difference(np.linspace(0, 10, 64 * 3), np.linspace(0, 10, 64 * 7) + 1.0)
    assert np.allclose(found.changes, 1.0, atol=0.06)


def test_unknown_values_are_left_out_where_they_lie() -> None:
    a = np.arange(128, dtype=np.float64)
    b = a + 2.0
    b[::2] = np.nan
    a[64:96] = np.nan
    found = difference(a, b)
    known = np.array(found.changes)
    assert np.isnan(known[32:48]).all()
    assert np.allclose(known[~np.isnan(known)], 2.5)
    assert found.change == pytest.approx(2.5)


def test_nothing_in_common_and_too_few_values_say_so() -> None:
    nothing = np.full(100, np.nan)
    assert math.isnan(difference(nothing, np.ones(100)).change)
    assert difference(nothing, np.ones(100)).interval() == (-math.inf, math.inf)
    few = difference(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    assert few.change == 1.5
    assert few.interval() == (-math.inf, math.inf)


def test_series_that_never_change_differ_exactly() -> None:
    assert difference(np.full(50, 2.0), np.full(70, 2.5)).interval() == (0.5, 0.5)


@given(st.integers(1, 300), st.floats(-5, 5), st.integers(0, 2**32 - 1))
def test_a_difference_changes_sign_with_its_sides_and_shifts_with_them(n: int, shift: float, seed: int) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, n))
    assert difference(a, b).change == pytest.approx(-difference(b, a).change)
    assert difference(a, b + shift).change == pytest.approx(difference(a, b).change + shift)


def test_a_course_has_as_many_fractions_as_there_are_values_for() -> None:
    assert [len(Course.of(np.arange(n, dtype=np.float64)).means) for n in (0, 1, 3, 63, 64, 1000)] == [
        1,
        1,
        2,
        32,
        64,
        64,
    ]
    assert Course.of(np.arange(4.0)).coarser(2).tolist() == [0.5, 2.5]
