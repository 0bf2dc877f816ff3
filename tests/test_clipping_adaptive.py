"""AutoClip and ZClip against their papers' formulas, one step after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradscope.clipping import ScalePolicy, parse_policy
from gradscope.clipping.adaptive import RunningPercentile
from gradscope.clipping.policy import Factors

NUMEL = np.ones(2, dtype=np.int64)


def factors(label: str, norms: NDArray[np.float64], convention: str = "exact") -> Factors:
    policy = parse_policy(label)
    assert isinstance(policy, ScalePolicy)
    return policy.factors(norms, NUMEL, convention)  # type: ignore[arg-type]


def noisy_norms(seed: int, steps: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(-1.0, 0.3, size=(steps, 2))) * np.where(rng.random((steps, 2)) < 0.05, 30.0, 1.0)


def test_autoclip_by_hand() -> None:
    # The medians so far are 4, 3, 3 and 2.5.
    found = factors("autoclip:50", np.array([[4.0], [2.0], [3.0], [1.0]]))
    assert found.scale[:, 0].tolist() == [1.0, 1.0, 1.0, 1.0]
    # The 25th percentiles so far are 4, 2.5 and 3.
    found = factors("autoclip:25", np.array([[4.0], [2.0], [5.0]]))
    assert found.scale[:, 0].tolist() == [1.0, 1.0, 3.0 / 5.0]
    assert found.triggered[:, 0].tolist() == [False, False, True]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e6) | st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=60),
    st.floats(1e-3, 100.0) | st.sampled_from([10.0, 50.0, 90.0, 100.0]),
)
def test_the_running_percentile_is_numpys(series: list[float], percentile: float) -> None:
    found = np.array([*map(RunningPercentile(percentile).after, series)])
    expected = [np.percentile(series[: t + 1], percentile) for t in range(len(series))]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("percentile", [1.0, 10.0, 95.0])
def test_autoclip_follows_the_paper(percentile: float) -> None:
    norms = noisy_norms(3, 400)
    found = factors(f"autoclip:{percentile}", norms, "torch")
    for group in range(2):
        history: list[float] = []
        for t, norm in enumerate(norms[:, group]):
            history.append(norm)
            limit = np.percentile(history, percentile)
            assert found.scale[t, group] == pytest.approx(min(1.0, limit / (norm + 1e-6)), rel=1e-12)
            assert found.triggered[t, group] == (norm > limit)


def zclip_by_the_paper(norms: list[float], z: float, alpha: float) -> list[float]:
    """The norm that each step is left with, by the exact convention: warm-up, z-score, adaptive threshold, update."""
    warmup, cap, eps = 25, 1.0, 1e-6
    left = [min(norm, cap) for norm in norms[:warmup]]
    mean = sum(norms[:warmup]) / warmup
    variance = sum((norm - mean) ** 2 for norm in norms[:warmup]) / warmup
    for norm in norms[warmup:]:
        std = math.sqrt(variance)
        score = (norm - mean) / (std + eps)
        spike = score > z
        seen = mean + (z * std) / (score / z) if spike else norm
        left.append(min(norm, seen, cap))
        mean = alpha * mean + (1 - alpha) * seen
        variance = alpha * variance + (1 - alpha) * (seen - mean) ** 2
    return left


@pytest.mark.parametrize(("label", "z", "alpha"), [("zclip:2.5", 2.5, 0.97), ("zclip:2,0.9", 2.0, 0.9)])
def test_zclip_follows_the_paper(label: str, z: float, alpha: float) -> None:
    norms = noisy_norms(5, 400)
    found = factors(label, norms)
    for group in range(2):
        series = norms[:, group].tolist()
        left = zclip_by_the_paper(series, z, alpha)
        np.testing.assert_allclose(found.scale[:, group] * norms[:, group], left, rtol=1e-12)
        clipped = [after < before * (1 - 1e-12) for before, after in zip(series, left, strict=True)]
        assert found.triggered[:, group].tolist() == clipped
        assert 0 < sum(clipped[25:]) < len(clipped) / 2


def test_zclip_only_caps_a_run_shorter_than_its_warm_up() -> None:
    found = factors("zclip:2.5", np.array([[0.5], [4.0], [0.25]]))
    assert found.scale[:, 0].tolist() == [1.0, 0.25, 1.0]


def test_skip_drops_a_step_in_all_groups() -> None:
    found = factors("skip:2", np.array([[1.0, 2.0], [1.0, 2.5], [0.0, 0.0]]))
    assert found.scale.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert found.triggered.tolist() == [[False, False], [False, True], [False, False]]


def test_a_run_without_steps_is_no_fault() -> None:
    for label in ("autoclip:10", "zclip:2.5", "skip:1"):
        assert factors(label, np.empty((0, 2))).scale.shape == (0, 2)
