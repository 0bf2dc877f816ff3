"""Change points of the norm: found where they are, and not where they are not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gradscope.phases import find_phases


def log_noise(seed: int, steps: int, phi: float, heavy: bool = False) -> NDArray[np.float64]:
    """A stationary first-order autoregression of unit variance (far tails where ``heavy``)."""
    rng = np.random.default_rng(seed)
    shocks = rng.standard_t(2.5, steps) if heavy else rng.normal(size=steps)
    series = np.empty(steps)
    series[0] = shocks[0]
    for t in range(1, steps):
        series[t] = phi * series[t - 1] + np.sqrt(1 - phi * phi) * shocks[t]
    return series


@pytest.mark.parametrize("steps", [40, 300, 2000])
@pytest.mark.parametrize("heavy", [False, True])
def test_a_stationary_run_is_one_phase(steps: int, heavy: bool) -> None:
    false_alarms = sum(
        len(find_phases(np.exp(log_noise(seed, steps, phi, heavy)))) > 1 for seed in range(20) for phi in (0.0, 0.5)
    )
    assert false_alarms <= 1


def test_strong_correlation_is_not_a_change() -> None:
    false_alarms = sum(len(find_phases(np.exp(log_noise(seed, 1000, 0.9)))) > 1 for seed in range(40))
    assert false_alarms <= 2


@pytest.mark.parametrize("steps", [100, 1000, 8000])
@pytest.mark.parametrize("place", [0.15, 0.6, 0.9])
def test_a_twentyfold_drop_is_found_in_its_place(steps: int, place: float) -> None:
    drop = int(steps * place)
    norms = np.exp(0.5 * log_noise(7, steps, 0.5)) * np.where(np.arange(steps) < drop, 20.0, 1.0)
    phases = find_phases(norms)
    assert len(phases) == 2
    assert abs(phases[1].start - drop) <= 0.02 * steps


def test_several_levels_are_several_phases() -> None:
    level = np.repeat([20.0, 1.0, 8.0, 0.5], 500)
    phases = find_phases(level * np.exp(0.5 * log_noise(2, 2000, 0.3)))
    starts = [phase.start for phase in phases]
    assert len(phases) == 4
    assert np.abs(np.array(starts) - [0, 500, 1000, 1500]).max() <= 20


def test_spikes_make_no_phase() -> None:
    norms = np.exp(0.3 * log_noise(4, 1000, 0.0))
    norms[[100, 101, 500, 900]] *= 1e8
    assert len(find_phases(norms)) == 1


def test_a_small_but_certain_change_is_no_phase() -> None:
    norms = np.where(np.arange(2000) < 1000, 1.0, 1.1) * np.exp(0.01 * log_noise(4, 2000, 0.0))
    assert len(find_phases(norms)) == 1


def test_a_noiseless_step_is_found() -> None:
    phases = find_phases(np.repeat([4.0, 1.0], [60, 40]))
    assert phases == [range(0, 60), range(60, 100)]


@pytest.mark.parametrize("steps", [1, 15, 16, 64, 700])
def test_phases_are_few_long_enough_and_cover_the_run(steps: int) -> None:
    norms = 10.0 ** np.linspace(3, -3, steps)
    phases = find_phases(norms)
    assert [step for phase in phases for step in phase] == list(range(steps))
    assert len(phases) <= 8
    assert len(phases) == 1 or min(len(phase) for phase in phases) >= max(8, steps / 32)


def test_zero_and_missing_norms() -> None:
    assert find_phases(np.array([])) == []
    assert find_phases(np.zeros(100)) == [range(100)]
    assert find_phases(np.repeat([0.0, 5.0], 50)) == [range(50), range(50, 100)]
