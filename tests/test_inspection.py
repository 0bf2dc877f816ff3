"""What ``inspect`` reports about gradients: norms, shares, steps, faults; and the sentences on top."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_memory_source import Arrays, InMemorySource

from gradscope.errors import GradscopeError
from gradscope.inspection import inspect
from gradscope.spread import Spread


def network(seed: int, steps: int, dtype: type[np.floating] = np.float32) -> list[Arrays]:
    random = np.random.default_rng(seed)
    shapes = {"actor.0.weight": (8, 4), "actor.0.bias": (8,), "critic.0.weight": (6, 4), "critic.0.bias": (6,)}
    return [
        {
            name: (random.normal(size=shape) * 10.0 ** random.integers(-3, 2)).astype(dtype)
            for name, shape in shapes.items()
        }
        for _ in range(steps)
    ]


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from([np.float16, np.float32, np.float64]))
def test_norms_and_shares_are_those_of_float64(seed: int, count: int, dtype: type[np.floating]) -> None:
    steps = network(seed, count, dtype)
    gradients = inspect(InMemorySource(steps)).gradients
    assert gradients is not None
    energies = {name: np.array([np.sum(s[name].astype(np.float64) ** 2) for s in steps]) for name in steps[0]}
    total = sum(energies.values())
    assert math.isclose(gradients.global_.l2_norm.p50, float(np.median(np.sqrt(total))), rel_tol=1e-6)
    assert math.isclose(gradients.global_.l2_norm.max, float(np.sqrt(total.max())), rel_tol=1e-6)
    for tensor in gradients.tensors:
        expected = energies[tensor.name]
        assert math.isclose(tensor.l2_norm.mean, float(np.sqrt(expected).mean()), rel_tol=1e-6)
        assert math.isclose(tensor.share, float(expected.sum() / total.sum()), rel_tol=1e-6)
        assert math.isclose(tensor.rms, float(np.sqrt(expected.mean() / tensor.numel)), rel_tol=1e-6)
    assert [layer.name for layer in gradients.layers] == ["actor.0", "critic.0"]
    assert math.isclose(sum(layer.share for layer in gradients.layers), 1.0, rel_tol=1e-9)


def test_a_step_with_nan_is_named_and_left_out() -> None:
    steps = network(1, 5)
    steps[3]["critic.0.weight"][2, 1] = np.nan
    inspection = inspect(InMemorySource(steps))
    gradients = inspection.gradients
    assert gradients is not None
    assert (gradients.global_.nonfinite, gradients.global_.nonfinite_steps) == (1, 1)
    assert gradients.nonfinite[0].step == 3
    assert gradients.nonfinite[0].tensors == ("critic.0.weight",)
    assert gradients.nonfinite[0].last_finite_before == ("actor.0.bias",)
    finite = [np.sqrt(sum(np.sum(a.astype(np.float64) ** 2) for a in steps[i].values())) for i in (0, 1, 2, 4)]
    assert math.isclose(gradients.global_.l2_norm.mean, float(np.mean(finite)), rel_tol=1e-6)
    assert "1 of 5 steps hold NaN or Inf, first in step 3" in inspection.findings[0]


def test_where_no_step_is_finite_the_finite_tensors_still_have_norms() -> None:
    steps = network(2, 1)
    steps[0]["actor.0.bias"][0] = -np.inf
    gradients = inspect(InMemorySource(steps)).gradients
    assert gradients is not None
    by_name = {tensor.name: tensor for tensor in gradients.tensors}
    assert by_name["actor.0.bias"].l2_norm == Spread.constant(math.inf)
    assert math.isinf(gradients.global_.l2_norm.max)
    expected = np.linalg.norm(steps[0]["critic.0.weight"].astype(np.float64))
    assert math.isclose(by_name["critic.0.weight"].l2_norm.max, float(expected), rel_tol=1e-6)
    assert math.isnan(by_name["critic.0.weight"].share)


def test_a_finite_gradient_that_overflows_the_float32_norm_is_said() -> None:
    inspection = inspect(InMemorySource([{"a.w": np.array([2e19], np.float32), "b.w": np.array([1e19], np.float32)}]))
    assert any("a.w overflow float32" in sentence for sentence in inspection.findings)
    gradients = inspection.gradients
    assert gradients is not None
    assert math.isclose(gradients.global_.l2_norm.max, math.hypot(np.float32(2e19), np.float32(1e19)), rel_tol=1e-12)


def test_dominance_and_dead_tensors_are_said() -> None:
    steps = [
        {
            "actor.0.weight": np.full(3, 0.01, np.float32),
            "critic.0.weight": np.full(3, 1.0, np.float32),
            "critic.0.bias": np.zeros(3, np.float32),
        }
    ]
    findings = inspect(InMemorySource(steps)).findings
    assert "The critic dominates: 99.99 % of the squared norm; the actor has 0.01 %." in findings
    assert "critic.0.bias is zero in every step." in findings


def test_at_shows_one_step_and_the_twenty_before_it() -> None:
    steps = network(3, 40)
    gradients = inspect(InMemorySource(steps), at=30).gradients
    assert gradients is not None and gradients.at is not None
    assert [row.step for row in gradients.at] == list(range(10, 31))
    expected = np.sqrt(sum(np.sum(a.astype(np.float64) ** 2) for a in steps[30].values()))
    assert math.isclose(gradients.global_.l2_norm.min, float(expected), rel_tol=1e-6)
    assert gradients.global_.l2_norm.min == gradients.global_.l2_norm.max
    last = inspect(InMemorySource(steps), at=-1).gradients
    assert last is not None and last.at is not None
    assert last.at[-1].step == 39


@pytest.mark.parametrize("at", [40, -41])
def test_a_step_that_does_not_exist_is_refused(at: int) -> None:
    with pytest.raises(GradscopeError, match="there are only 40 steps"):
        inspect(InMemorySource(network(3, 40)), at=at)


def test_groups_are_redefined_by_glob() -> None:
    steps = network(4, 3)
    gradients = inspect(InMemorySource(steps), groups={"actor": "actor.*"}).gradients
    assert gradients is not None
    assert [(group.name, group.numel) for group in gradients.groups] == [("actor", 40), ("rest", 30)]
    assert {tensor.name: tensor.group for tensor in gradients.tensors}["critic.0.bias"] == "rest"


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_max_norm_is_refused(max_norm: float) -> None:
    with pytest.raises(GradscopeError, match="positive, finite"):
        inspect(InMemorySource(network(5, 1)), max_norm=max_norm)
