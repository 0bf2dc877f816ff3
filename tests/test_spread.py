"""The six numbers, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradscope.spread import Spread


@given(st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=300))
def test_a_spread_is_what_numpy_says(values: list[float]) -> None:
    spread = Spread.of(values)
    expected = np.percentile(values, [0, 50, 95, 99, 100])
    scale = max(map(abs, values)) * 1e-12
    assert [spread.min, spread.p50, spread.p95, spread.p99, spread.max] == pytest.approx(expected, rel=1e-12, abs=scale)
    assert spread.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-12, abs=scale)
    assert spread.min <= spread.p50 <= spread.p95 <= spread.p99 <= spread.max


def test_one_value_is_its_own_spread() -> None:
    assert Spread.of([0.1]) == Spread(0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    assert Spread.of([math.inf, math.inf]) == Spread.constant(math.inf)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.nan, 2.0]])
def test_what_cannot_be_told_is_nan(values: list[float]) -> None:
    assert all(math.isnan(number) for number in (Spread.of(values).min, Spread.of(values).p50, Spread.of(values).max))
