"""What is read off one spectrum: norms, quantiles, shares; and which inputs make one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrum_oracle import bfloat16_bits, check_against

from gradscope.errors import GradscopeError
from gradscope.spectrum import MagnitudeSpectrum


def test_norm_rms_and_totals() -> None:
    spectrum = MagnitudeSpectrum.of(np.array([[3.0, -4.0], [0.0, math.nan]], np.float32))
    assert (spectrum.norm, spectrum.sum_abs_total, spectrum.numel, spectrum.finite) == (5.0, 7.0, 4, 3)
    assert spectrum.rms == pytest.approx(5 / math.sqrt(3))
    assert (spectrum.nonfinite, spectrum.zeros, spectrum.max_abs) == (1, 1, 4.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles(elements: list[float], p: float) -> None:
    magnitudes = np.sort(np.abs(elements))
    exact = float(magnitudes[max(math.ceil(p * len(elements)), 1) - 1])
    assert MagnitudeSpectrum.of(np.array(elements, np.float16)).quantile(p) == exact
    for dtype in (np.float32, np.float64):
        assert MagnitudeSpectrum.of(np.array(elements, dtype)).quantile(p) == pytest.approx(exact, rel=1 / 127)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=50), st.floats(0, 11))
def test_share_below(elements: list[float], x: float) -> None:
    exact = float(np.mean(np.abs(np.array(elements)) < x))
    lo, hi = MagnitudeSpectrum.of(np.array(elements, np.float32)).share_below(x)
    assert lo <= exact <= hi
    lo, hi = MagnitudeSpectrum.of(np.array(elements, np.float16)).share_below(x)
    assert lo == hi


def test_quantiles_of_nothing_and_outside_of_the_range() -> None:
    assert math.isnan(MagnitudeSpectrum().quantile(0.5))
    assert MagnitudeSpectrum().share_below(1.0) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        MagnitudeSpectrum().quantile(1.5)


def test_strides_byte_orders_and_zero_dimensions() -> None:
    base = np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32)
    for view in (base.T, base[::3, ::-2], base[:, 5], np.broadcast_to(base[0], (4, 60)), base.astype(">f4")):
        check_against(MagnitudeSpectrum.of(view), np.asarray(view, float).ravel(), "float32", 2**-46)
    check_against(MagnitudeSpectrum.of(np.float32(-2.5)), [-2.5], "float32", 0)
    check_against(MagnitudeSpectrum.of(np.array(2.5, ">f8")), [2.5], "float64", 0)
    check_against(MagnitudeSpectrum.of(np.empty((0, 3), np.float32)), [], "float32", 0)


def test_stand_in_integers_need_their_dtype() -> None:
    bits = bfloat16_bits(np.array([1.5, -2.0]))
    check_against(MagnitudeSpectrum.of(bits, "bfloat16"), [1.5, -2.0], "bfloat16", 0)
    check_against(MagnitudeSpectrum.of(bits[::-1], "bfloat16"), [-2.0, 1.5], "bfloat16", 0)
    check_against(MagnitudeSpectrum.of(bits.tobytes(), "bfloat16"), [1.5, -2.0], "bfloat16", 0)
    for wrong in (bits, np.arange(3), np.ones(2, np.complex64), np.ones(2, np.longdouble)):
        with pytest.raises(GradscopeError, match="does not hold floating-point"):
            MagnitudeSpectrum.of(wrong)
    with pytest.raises(GradscopeError, match="does not hold floating-point"):
        MagnitudeSpectrum.of(np.ones(2, np.float32), "bfloat16")
    with pytest.raises(GradscopeError, match="is not one of"):
        MagnitudeSpectrum.of(b"1234")
    with pytest.raises(GradscopeError, match="whole number"):
        MagnitudeSpectrum.of(b"123", "float16")
