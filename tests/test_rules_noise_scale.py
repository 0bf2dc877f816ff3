"""``noise-scale`` on minibatches of known covariance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from judged import judged

from gradscope.gradients import GradientStep, Progress
from tests.in_memory_source import InMemorySource


class Minibatches(InMemorySource):
    """Means of ``size`` samples whose gradient is (``signal``, …) with unit variance in 100 elements."""

    def __init__(self, count: int, size: int, signal: float, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        super().__init__([{"a.weight": signal + rng.standard_normal(100) / np.sqrt(size)} for _ in range(count)])
        self._size = size

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        for step in super().read_steps(steps, progress):
            yield replace(step, samples=self._size)


def test_minibatches_far_below_the_noise_scale_warn() -> None:
    # tr Σ/‖G‖² = 100/(100·0.02²) = 2500 samples.
    verdict = judged("noise-scale", Minibatches(400, 2, 0.02), max=100.0)
    (found,) = verdict.violations
    assert found.value is not None
    assert 100.0 < found.value < 1250.0
    assert "almost all noise" in found.message
    assert verdict.status == "warn"


def test_the_lower_end_is_compared() -> None:
    for seed in range(5):
        assert judged("noise-scale", Minibatches(64, 2, 0.02, seed), max=1250.0).status == "pass"
    nearest = judged("noise-scale", Minibatches(64, 8, 1.0))
    assert nearest.status == "pass"
    assert nearest.value == pytest.approx(1 / 8, rel=0.3)
    assert nearest.value < 1 / 8


def test_too_few_minibatches_or_none_cannot_tell() -> None:
    assert "too few" in judged("noise-scale", Minibatches(3, 2, 0.1)).message
    assert judged("noise-scale", InMemorySource([{"a.weight": np.ones(4)}])).status == "skipped"
