"""How many elements clip-by-value reaches, told from bins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spectrum_oracle import bfloat16_bits

from gradscope.clipped_count import ClippedCount, exactly
from gradscope.spectrum import MagnitudeSpectrum


def count_of(elements: Any, v: float, dtype: str | None = None) -> ClippedCount:
    return MagnitudeSpectrum.of(np.asarray(elements), dtype).value_clip(v).clipped


def truth(elements: Any, v: float) -> int:
    return int((np.abs(np.asarray(elements, np.float64)) > v).sum())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_values_beside_the_threshold_are_told_from_those_above_it(dtype: type) -> None:
    at_threshold = np.array([0.7] * 1000 + [1e6], dtype)
    assert count_of(at_threshold, 0.7).likely == 1
    for value, v in ((0.7, 0.701), (0.7, 0.6999), (0.7, 0.7000001)):
        elements = np.array([value] * 1000 + [1e6], np.float32)
        assert count_of(elements, v).likely == truth(elements, v)


def test_elements_on_a_bin_edge_are_not_above_it() -> None:
    assert count_of(np.array([0.5] * 100_000 + [1.0] * 3, np.float32), 0.5) == exactly(3)
    clip = count_of(np.array([0.5] * 100_000 + [1.0] * 3), 0.5)
    assert clip.likely == 3
    assert clip.error > 0  # a float64 sum of so many has no room for the last digit of one


def test_a_few_elements_just_above_an_edge_that_holds_many() -> None:
    rng = np.random.default_rng(3)
    elements = np.concatenate([np.full(100_000, 0.5), rng.uniform(0.5, 0.5039, 400)]).astype(np.float32)
    clip = count_of(elements, 0.5)
    assert clip.likely == pytest.approx(truth(elements, 0.5), rel=0.1)
    assert clip.lo <= truth(elements, 0.5) <= clip.hi


@pytest.mark.parametrize("v", [1.0, 0.5, 2.0, 3.0, 4.0, 0.7, 1.003, 0.0117])
@pytest.mark.parametrize("shape", ["normal", "heavy"])
def test_smooth_densities_are_counted_to_a_thousandth(v: float, shape: str) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(500_000) if shape == "normal" else rng.standard_t(2, 500_000)
    elements = drawn.astype(np.float32)
    clip, true = count_of(elements, v), truth(elements, v)
    assert clip.likely == pytest.approx(true, abs=3 + 1e-3 * true)
    assert abs(clip.likely - true) <= clip.error


def test_single_elements_are_known() -> None:
    for value in np.random.default_rng(1).uniform(0.5, 1, 50).astype(np.float32):
        elements = np.array([value, 1e3], np.float32)
        for v in (np.nextafter(float(value), 0), float(value), np.nextafter(float(value), 1)):
            assert count_of(elements, v) == exactly(truth(elements, v))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**16 - 1), st.integers(1, 40)),
        min_size=1,
        max_size=8,
    ),
    st.integers(-2, 2**16 + 1),
    st.floats(0, 1),
    st.sampled_from(["float32", "float64"]),
    st.booleans(),
)
def test_the_bounds_hold_inside_one_bin(
    places: list[tuple[int, int]], at: int, between: float, dtype: str, huge: bool
) -> None:
    spacing = 2.0**-24 if dtype == "float32" else 2.0**-53
    elements = np.repeat([0.5 + place * spacing for place, _ in places], [times for _, times in places])
    elements = np.append(elements, 1e6 if huge else 0.75).astype(dtype)
    v = 0.5 + (at + between) * spacing
    clip = count_of(elements, v)
    assert clip.lo <= truth(elements, v) <= clip.hi
    assert clip.lo <= clip.likely <= clip.hi


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=40), st.floats(1e-6, 1e5))
def test_short_dtypes_are_counted_exactly(values: list[float], v: float) -> None:
    half = np.array(values, np.float16)
    assert count_of(half, v) == exactly(truth(half, v))
    bits = bfloat16_bits(np.array(values))
    assert count_of(bits, v, "bfloat16") == exactly(truth((bits.astype(np.uint32) << 16).view(np.float32), v))


def test_squares_beyond_float64_do_not_matter() -> None:
    assert count_of(np.array([1e200, 3e200, 1.0]), 2.0) == exactly(2)
