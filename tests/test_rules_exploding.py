"""``exploding``: enormous or growing gradients, and not those that are only noisy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_memory_source import InMemorySource, NormSource
from judged import SAMPLES, judged
from noisy_norms import heavy_tailed
from numpy.typing import NDArray

from gradscope.health.running_median import medians_before, running_medians


def of(norms: NDArray[np.float64]) -> NormSource:
    return NormSource(norms[:, None])


def test_growth_is_the_worst_running_median_over_the_median_before_it() -> None:
    rng = np.random.default_rng(0)
    norms = np.exp(rng.standard_normal(320))
    norms[200:] *= 1e4
    outcome = judged("exploding", of(norms))
    windows = [(a, np.median(norms[a : a + 20]) / np.median(norms[:a])) for a in range(20, 301, 5)]
    start, worst = max(windows, key=lambda pair: pair[1])
    assert outcome.status == "fail"
    assert outcome.value == pytest.approx(worst)
    assert outcome.steps == (start, start + 19)
    assert "the run diverges" in outcome.message


def test_growth_among_small_norms_does_not_count() -> None:
    norms = np.concatenate([np.full(100, 1e-6), np.full(100, 1.0)])
    assert judged("exploding", of(norms)).status == "pass"
    assert judged("exploding", of(norms), min_norm=0.5).status == "fail"


def test_one_enormous_step_is_no_explosion_but_several_are() -> None:
    norms = np.ones(200)
    norms[120] = 1e9
    assert judged("exploding", of(norms)).status == "pass"
    norms[120:140] = 1e9
    assert judged("exploding", of(norms)).status == "fail"


def test_a_single_step_is_judged_by_itself() -> None:
    assert judged("exploding", of(np.array([2e6]))).status == "fail"
    passing = judged("exploding", of(np.array([2.0])))
    assert (passing.status, passing.value, passing.limit) == ("pass", 2.0, 1e6)
    assert passing.message == "Gradient norm: 2.00."


def test_a_norm_whose_square_overflows_is_an_explosion() -> None:
    with np.errstate(over="ignore"):
        outcome = judged("exploding", of(np.concatenate([np.ones(50), np.full(50, 1e200)])))
    assert outcome.status == "fail"


def test_zeros_and_nan_do_no_harm() -> None:
    assert judged("exploding", of(np.zeros(100))).status == "pass"
    assert judged("exploding", of(np.full(100, np.nan))).status == "skipped"
    mixed = np.ones(100)
    mixed[::3] = np.nan
    assert judged("exploding", of(mixed)).status == "pass"


def test_minibatches_of_one_batch_do_not_grow() -> None:
    class Unordered(InMemorySource):
        in_time = False

    steps = [{"w": np.array([1.0])}] * 50 + [{"w": np.array([1e5])}] * 50
    assert judged("exploding", InMemorySource(steps)).status == "fail"
    assert judged("exploding", Unordered(steps)).status == "pass"


def test_a_checkpoint_is_judged_by_what_its_optimizer_remembers() -> None:
    outcome = judged("exploding", SAMPLES / "ppo_cartpole.zip")
    assert outcome.status == "pass"
    assert outcome.value == pytest.approx(0.5, rel=1e-3)
    assert judged("exploding", SAMPLES / "ppo_cartpole.zip", max=0.1).status == "fail"


@pytest.mark.parametrize("name", ["ppo_cartpole.gradscope", "rsl_rl_run.gradscope", "ppo_cartpole_gradients"])
def test_the_samples_pass(name: str) -> None:
    assert judged("exploding", SAMPLES / name).status == "pass"


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=60), st.data())
def test_running_medians_are_medians(values: list[float], data: st.DataObject) -> None:
    norms = np.array(values)
    window = data.draw(st.integers(1, len(norms)))
    starts, medians = running_medians(norms, window)
    assert starts[-1] == len(norms) - window
    assert starts[0] < max(1, window // 4)
    assert [np.median(norms[a : a + window]) for a in starts] == list(medians)
    later = starts[starts > 0]
    assert [np.median(norms[:a]) for a in later] == list(medians_before(norms, later))


def test_noise_does_not_explode() -> None:
    runs = [judged("exploding", of(heavy_tailed(seed, 100.0))).status for seed in range(60)]
    assert runs.count("pass") == 60
