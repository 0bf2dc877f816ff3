"""``spike``: one step far above its neighbours, and not the tail of a healthy run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from in_memory_source import InMemorySource, NormSource
from judged import SAMPLES, judged
from noisy_norms import heavy_tailed
from numpy.typing import NDArray

from gradscope.health.rules import spike

# In place of the 16,384 steps that are looked at together.
SHORT_PART = 100


def of(norms: NDArray[np.float64]) -> NormSource:
    return NormSource(norms[:, None])


def noisy(steps: int, sigma: float = 0.3, seed: int = 0) -> NDArray[np.float64]:
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(steps))


def test_a_spike_is_found_with_its_size() -> None:
    norms = noisy(200)
    norms[120] = 500.0
    outcome = judged("spike", of(norms))
    logs = np.log(norms)
    before, after = logs[88:120], logs[121:153]
    above = logs[120] - max(np.median(before), np.median(after))
    deviations = np.concatenate([before - np.median(before), after - np.median(after)])
    z = above / (1.4826 * np.median(np.abs(deviations)))
    assert outcome.status == "fail"
    assert outcome.steps == (120, 120)
    # The one of the two numbers that is nearer to its limit is told.
    assert (outcome.value, outcome.limit) == (
        (pytest.approx(z), 10.0) if z / 10.0 < math.exp(above) / 30.0 else (pytest.approx(math.exp(above)), 30.0)
    )
    assert len(outcome.violations) == 1


def test_it_takes_both_a_factor_and_deviations() -> None:
    steady, wild = noisy(200, 0.01), noisy(200, 2.0)
    steady[120] = 20.0
    wild[120] = np.median(wild) * 50.0
    assert judged("spike", of(steady)).status == "pass"
    assert judged("spike", of(steady), ratio=10.0).status == "fail"
    assert judged("spike", of(wild)).status == "pass"


def test_spikes_are_told_worst_first() -> None:
    norms = noisy(400)
    norms[[100, 200, 300]] = 1e3, 1e6, 1e4
    violations = judged("spike", of(norms)).violations
    assert [reading.steps for reading in violations] == [(200, 200), (300, 300), (100, 100)]


def test_the_last_step_may_spike_but_not_the_first_ones() -> None:
    last, first = noisy(100), noisy(100)
    last[-1] = first[0] = 1e5
    assert judged("spike", of(last)).steps == (99, 99)
    assert judged("spike", of(first)).status == "pass"


def test_a_change_of_level_is_no_spike() -> None:
    norms = noisy(200)
    norms[100:] *= 1e4
    assert judged("spike", of(norms)).status == "pass"


def test_bursts_that_come_again_and_again_are_what_the_run_is_like() -> None:
    norms = noisy(400)
    norms[np.random.default_rng(1).choice(400, 20, replace=False)] *= 1e4
    assert judged("spike", of(norms)).status == "pass"


def test_too_few_steps_and_steps_not_in_time_are_skipped() -> None:
    class Unordered(InMemorySource):
        in_time = False

    assert judged("spike", of(noisy(16))).status == "skipped"
    assert judged("spike", of(noisy(17))).status == "pass"
    assert judged("spike", Unordered([{"w": np.array([x])} for x in noisy(50)])).status == "skipped"
    assert judged("spike", SAMPLES / "ppo_cartpole.zip").status == "skipped"


def test_zeros_and_nan_are_no_neighbours() -> None:
    norms = noisy(300)
    norms[::2] = 0.0
    norms[1::8] = np.nan
    assert judged("spike", of(norms)).status == "pass"
    norms[151] = 1e5
    assert judged("spike", of(norms)).steps == (151, 151)
    assert judged("spike", of(np.zeros(100))).status == "skipped"
    assert judged("spike", of(np.full(100, np.nan))).status == "skipped"


def test_long_runs_are_seen_in_parts_that_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = judged("spike", of(noisy(SHORT_PART + 500)))
    monkeypatch.setattr(spike, "PART", SHORT_PART)
    norms = noisy(SHORT_PART + 500)
    assert judged("spike", of(norms)) == whole
    for at in (SHORT_PART - 1, SHORT_PART, SHORT_PART + 1, SHORT_PART + 499):
        spiked = norms.copy()
        spiked[at] = 1e4
        assert judged("spike", of(spiked)).steps == (at, at)


def test_noise_does_not_spike() -> None:
    outcomes = [judged("spike", of(heavy_tailed(seed, 1.0))).status for seed in range(60)]
    assert outcomes.count("pass") == 60


@pytest.mark.parametrize("name", ["ppo_cartpole.gradscope", "rsl_rl_run.gradscope", "ppo_cartpole_gradients"])
def test_the_samples_pass(name: str) -> None:
    assert judged("spike", SAMPLES / name).status == "pass"
