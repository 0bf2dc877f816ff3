"""Spectra add up: of any dtypes, in any order, split anywhere."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrum_oracle import bfloat16_bits, check_against

from gradscope.spectrum import MagnitudeSpectrum

GRIDS = ["float32", "float64", "float16", "bfloat16"]


def spectrum_as(values: list[float], dtype: str) -> MagnitudeSpectrum:
    if dtype == "bfloat16":
        return MagnitudeSpectrum.of(bfloat16_bits(np.array(values)), dtype)
    return MagnitudeSpectrum.of(np.array(values, dtype))


def same_bins(one: MagnitudeSpectrum, other: MagnitudeSpectrum) -> bool:
    return (
        np.array_equal(one.lower, other.lower)
        and np.array_equal(one.upper, other.upper)
        and np.array_equal(one.count, other.count)
        and (one.zeros, one.nan, one.inf, one.max_abs) == (other.zeros, other.nan, other.inf, other.max_abs)
    )


values = st.lists(st.floats(-100, 100, width=16) | st.sampled_from([math.nan, math.inf, 0.0]), max_size=12)
parts = st.lists(st.tuples(values, st.sampled_from(GRIDS)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(parts, st.randoms(use_true_random=False))
def test_merging_is_commutative_to_the_last_bit(cases: list[tuple[list[float], str]], random: object) -> None:
    spectra = [spectrum_as(*case) for case in cases]
    shuffled = list(spectra)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = MagnitudeSpectrum.merge(spectra), MagnitudeSpectrum.merge(shuffled)
    assert same_bins(one, other)
    assert np.array_equal(one.sum_abs, other.sum_abs)
    assert one.sum_squares == other.sum_squares


@settings(max_examples=150, deadline=None)
@given(parts, st.integers(0, 6))
def test_merging_is_associative(cases: list[tuple[list[float], str]], cut: int) -> None:
    spectra = [spectrum_as(*case) for case in cases]
    at_once = MagnitudeSpectrum.merge(spectra)
    in_two = MagnitudeSpectrum.merge(spectra[:cut]) + MagnitudeSpectrum.merge(spectra[cut:])
    assert same_bins(at_once, in_two)
    assert in_two.sum_abs == pytest.approx(at_once.sum_abs, rel=1e-15)
    assert in_two.sum_squares == pytest.approx(at_once.sum_squares, rel=1e-15)


@settings(max_examples=100, deadline=None)
@given(parts)
def test_nothing_is_lost_and_bins_stay_disjoint(cases: list[tuple[list[float], str]]) -> None:
    merged = MagnitudeSpectrum.merge([spectrum_as(*case) for case in cases])
    assert merged.numel == sum(len(case[0]) for case in cases)
    assert np.all(merged.lower[1:] > merged.upper[:-1])
    assert np.all(merged.lower <= merged.upper)
    finite = [x for case, dtype in cases for x in map(float, as_stored(case, dtype)) if math.isfinite(x)]
    assert merged.sum_abs_total == pytest.approx(float(sum(abs(Fraction(x)) for x in finite)), rel=1e-14)
    mean = merged.sum_abs / np.maximum(merged.count, 1)
    assert np.all((merged.lower * (1 - 1e-15) <= mean) & (mean <= merged.upper * (1 + 1e-15)))


def as_stored(case: list[float], dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (bfloat16_bits(np.array(case)).astype(np.uint32) << 16).view(np.float32)
    return np.array(case, dtype)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), max_size=60), st.integers(0, 60))
def test_a_split_tensor_adds_up_to_the_whole(elements: list[float], cut: int) -> None:
    array = np.array(elements, np.float32)
    check_against(MagnitudeSpectrum.of(array[:cut]) + MagnitudeSpectrum.of(array[cut:]), array, "float32", 2**-46)


def test_a_short_value_joins_the_wide_bin_it_falls_in() -> None:
    wide = MagnitudeSpectrum.of(np.array([1.001, 2.0], np.float32))
    short = MagnitudeSpectrum.of(np.array([1.002, 1.5], np.float16))
    merged = wide + short
    assert merged.count.tolist() == [2, 1, 1]
    assert merged.lower.tolist() == [1.0, 1.5, 2.0]
    assert merged.upper[1] == 1.5


def test_merging_none_and_merging_empties() -> None:
    empty = MagnitudeSpectrum.merge([])
    assert (empty.numel, empty.norm, empty.rms, empty.sum_abs_total) == (0, 0.0, 0.0, 0.0)
    assert (empty + MagnitudeSpectrum()).numel == 0
    one = MagnitudeSpectrum.of(np.array([1.0, 0.0], np.float32))
    assert same_bins(one + empty, one)


def test_bin_sums_of_squares_survive_only_where_all_parts_have_them() -> None:
    edges = np.array([1.0, 2.0]), np.array([1.5, 2.5])
    one = MagnitudeSpectrum(
        *edges, np.array([1, 1]), np.array([1.25, 2.0]), 5.5625, 2.0, bin_sum_squares=np.array([1.5625, 4])
    )
    other = MagnitudeSpectrum(
        np.array([1.25]), np.array([2.25]), np.array([1]), np.array([1.5]), 2.25, 1.5, bin_sum_squares=np.array([2.25])
    )
    assert (one + one).bin_sum_squares.tolist() == [3.125, 8.0]
    assert (one + other).bin_sum_squares.tolist() == [7.8125]
    assert (one + MagnitudeSpectrum.of(np.ones(2))).bin_sum_squares is None
    assert one.repeated(3).bin_sum_squares.tolist() == [4.6875, 12.0]


def test_sums_that_overflow_are_inf() -> None:
    huge = MagnitudeSpectrum.of(np.array([1.3e154]))
    assert MagnitudeSpectrum.merge([huge] * 4).sum_squares == math.inf
