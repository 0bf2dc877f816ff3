"""What ``inspect`` reports about gradients: norms, shares, steps, faults; and the sentences on top."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_memory_source import Arrays, InMemorySource

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientStep, Progress
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
    assert inspection.findings[0] == (
        "1 of 5 steps holds NaN or Inf: step 3, in critic.0.weight; the last finite tensor before it is "
        "actor.0.bias. It is left out of every rate and quantile."
    )


def test_the_sentence_on_nan_speaks_of_what_was_looked_at() -> None:
    steps = network(1, 40)
    for broken in (7, 12, 30):
        steps[broken]["actor.0.weight"][0, 0] = np.inf
    source = InMemorySource(steps)
    assert inspect(source).findings[0].startswith("3 of 40 steps hold NaN or Inf, first step 7, in actor.0.")
    assert inspect(source, steps="10:20").findings[0].startswith("1 of 10 steps holds NaN or Inf: step 12,")
    assert inspect(source, at=12).findings[0] == "Step 12 holds NaN or Inf, in actor.0.weight."
    assert "NaN" not in "".join(inspect(source, at=13).findings)
    assert inspect(source, steps="12:13").findings[0] == "The step holds NaN or Inf, in actor.0.weight."


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


def test_tensors_that_overflow_the_float32_norm_only_together_are_said() -> None:
    steps = [{"a.w": np.full(2, 1e19, np.float32), "b.w": np.full(2, 1e19, np.float32)}]
    findings = inspect(InMemorySource(steps)).findings
    assert "The squares of the clip group all together overflow float32 although" in findings[0]
    assert not inspect(InMemorySource([{name: a.astype(np.float64) for name, a in steps[0].items()}])).findings


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


def test_at_is_the_number_of_a_step_whatever_is_selected() -> None:
    source = InMemorySource(network(3, 40))
    for at, steps in ((12, "10:35"), (34, "10:35"), (10, "10:35"), (-1, "10:13")):
        gradients = inspect(source, at=at, steps=steps).gradients
        assert gradients is not None and gradients.at is not None
        assert gradients.at[-1].step == at if at > 0 else 12
        assert gradients.at[0].step >= 10


@pytest.mark.parametrize(
    ("at", "steps", "message"),
    [
        (40, None, "steps run from 0 to 39"),
        (-41, None, "steps run from 0 to 39"),
        (9, "10:35", "steps run from 10 to 34"),
        (35, "10:35", "steps run from 10 to 34"),
    ],
)
def test_a_step_that_does_not_exist_is_refused(at: int, steps: str | None, message: str) -> None:
    with pytest.raises(GradscopeError, match=message):
        inspect(InMemorySource(network(3, 40)), at=at, steps=steps)


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


def test_a_slip_in_groups_is_told_before_a_long_read() -> None:
    class Unread(InMemorySource):
        def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
            raise AssertionError("read before the options were checked")

    with pytest.raises(GradscopeError, match="matches no tensor"):
        inspect(Unread(network(6, 2)), groups={"actor": "pi.*"})
