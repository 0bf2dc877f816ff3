"""The interval of a clip rate from correlated steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from gradscope.intervals import clip_rate_interval, effective_sample_size, wilson_interval


def autoregressive(seed: int, steps: int, phi: float) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    series = np.empty(steps)
    series[0] = rng.normal() / math.sqrt(1 - phi * phi)
    for t in range(1, steps):
        series[t] = phi * series[t - 1] + rng.normal()
    return series


def test_wilson_by_hand() -> None:
    # 3 of 10 at z = 2: centre (0.3 + 0.2)/1.4, half-width 2/1.4·√(0.021 + 0.01).
    low, high = wilson_interval(0.3, 10, z=2.0)
    assert low == pytest.approx(0.5 / 1.4 - 2 / 1.4 * math.sqrt(0.031), rel=1e-14)
    assert high == pytest.approx(0.5 / 1.4 + 2 / 1.4 * math.sqrt(0.031), rel=1e-14)


def test_wilson_at_the_ends() -> None:
    low, high = wilson_interval(0.0, 20)
    assert low == 0.0
    assert high == pytest.approx(1.959963984540054**2 / (20 + 1.959963984540054**2), rel=1e-12)
    assert wilson_interval(1.0, 20) == (pytest.approx(1 - high, rel=1e-12), 1.0)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_the_effective_size_of_an_autoregression(phi: float) -> None:
    sizes = [effective_sample_size(autoregressive(seed, 4000, phi)) for seed in range(8)]
    assert np.mean(sizes) == pytest.approx(4000 * (1 - phi) / (1 + phi), rel=0.15)
    assert max(sizes) <= 4000


def test_alternation_counts_no_more_than_its_steps() -> None:
    assert effective_sample_size(np.tile([0.0, 1.0], 50)) == 100


def test_a_series_that_never_changes_is_one_value() -> None:
    assert effective_sample_size(np.full(500, 0.1)) == 1.0
    assert effective_sample_size([3.0]) == 1.0
    assert effective_sample_size([]) == 0.0


def test_the_interval_holds_the_true_rate_of_correlated_steps() -> None:
    # The indicator of a stationary series; its true clip rate is 20 %.
    held = 0
    for seed in range(100):
        series = autoregressive(seed, 2000, 0.8)
        threshold = 0.8416212335729143 / math.sqrt(1 - 0.64)
        interval, _ = clip_rate_interval(series > threshold, np.exp(series))
        assert interval is not None
        held += interval[0] <= 0.2 <= interval[1]
    assert held >= 88


def test_an_indicator_that_never_changes_takes_its_size_from_the_norms() -> None:
    norms = np.exp(autoregressive(1, 2000, 0.9))
    always = np.ones(2000, dtype=bool)
    interval, size = clip_rate_interval(always, norms)
    assert size == pytest.approx(effective_sample_size(np.log(norms)))
    assert size < 400
    assert interval == wilson_interval(1.0, size)


def test_too_few_independent_steps_give_no_interval() -> None:
    ramp = np.linspace(0.1, 1.0, 500)
    interval, size = clip_rate_interval(ramp > 0.5, ramp)
    assert interval is None
    assert size < 10
    assert clip_rate_interval(np.array([True]), np.array([1.0])) == (None, 1.0)
    assert clip_rate_interval(np.array([], dtype=bool), np.array([])) == (None, 0.0)


def test_zero_norms_have_a_logarithm_here() -> None:
    norms = np.abs(np.random.default_rng(0).normal(size=200))
    norms[::50] = 0.0
    interval, size = clip_rate_interval(np.zeros(200, dtype=bool), norms)
    assert interval is not None
    assert math.isfinite(size)
