"""Drift: what seeds do passes, what somebody changed does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gradscope.differences import Course
from gradscope.gradients import GradientSource
from gradscope.health.baselines import Baseline
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limits, LimitValue, Verdict
from gradscope.health.rules.drift import DRIFT
from gradscope.health.run_courses import RunCourses
from tests.in_memory_source import InMemorySource, NormSource, RecordedSource

LAYERS = 6
Factor = Callable[[int, int], float]


def training(seed: int, factor: Factor = lambda step, layer: 1.0, steps: int = 200, layers: int = LAYERS) -> list[Any]:
    """Gradients that fall a hundredfold, with correlated noise, and layers that differ by a tenth between seeds."""
    generator = np.random.default_rng(seed)
    apart = np.exp(0.08 * generator.standard_normal(layers))
    noise = np.zeros(layers)
    found = []
    for step in range(steps):
        noise = 0.8 * noise + 0.15 * generator.standard_normal(layers)
        size = apart * np.exp(noise - 4.6 * step / steps)
        found.append(
            {
                f"l{k}.weight": size[k] * factor(step, k) * generator.standard_normal(64).astype(np.float32)
                for k in range(layers)
            }
        )
    return found


def run(source: GradientSource) -> RunCourses:
    found = RunCourses.of(Evidence.gather(source))
    assert found is not None
    return found


def against(usual: list[GradientSource], source: GradientSource, **limits: LimitValue) -> Verdict:
    baseline = Baseline("b.json", tuple(run(other) for other in usual))
    return DRIFT.judge(replace(Evidence.gather(source), baseline=baseline), Limits({**DRIFT.defaults(), **limits}))


def memory(seed: int, *options: Any, **more: Any) -> InMemorySource:
    return InMemorySource(training(seed, *options, **more))


HEALTHY: list[GradientSource] = [memory(seed) for seed in range(8)]


@pytest.mark.parametrize("runs", [1, 3])
def test_other_seeds_pass(runs: int) -> None:
    for first in range(8):
        usual = [HEALTHY[(first + i) % 8] for i in range(1, runs + 1)]
        verdict = against(usual, HEALTHY[first])
        assert verdict.violations == ()
        assert verdict.skipped is None
        assert verdict.nearest is not None
        assert verdict.nearest.value is not None
        assert verdict.nearest.limit is not None
        assert 1.0 <= verdict.nearest.value < verdict.nearest.limit


CHANGED: dict[str, Factor] = {
    "one layer": lambda step, layer: 10.0 if layer == 2 else 1.0,
    "one layer less": lambda step, layer: 0.1 if layer == 2 else 1.0,
    "the second half": lambda step, layer: 40.0 if layer == 2 and step >= 100 else 1.0,
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("runs", [1, 3])
def test_a_layer_that_changed_is_named(name: str, runs: int) -> None:
    verdict = against(HEALTHY[:runs], memory(20, CHANGED[name]))
    assert [reading.where for reading in verdict.violations] == ["l2"]
    (reading,) = verdict.violations
    assert reading.value is not None
    assert reading.limit is not None
    assert reading.value > reading.limit > 1.5
    assert reading.steps == (0, 199)
    assert "gradient norm" in reading.message


def test_all_layers_together_are_seen_before_any_of_them() -> None:
    verdict = against(HEALTHY[:1], memory(20, lambda step, layer: 4.0))
    assert verdict.violations[0].where == "most layers"
    assert against(HEALTHY[:1], memory(20, lambda step, layer: 4.0), ratio=20.0).violations == ()


def test_more_runs_see_smaller_changes() -> None:
    changed = memory(21, lambda step, layer: 2.55 if layer == 2 else 1.0)
    assert against(HEALTHY[:1], changed).violations == ()
    assert [reading.where for reading in against(HEALTHY[:8], changed).violations] == ["l2"]


def test_seeds_that_differ_widely_widen_the_limits() -> None:
    wide: list[GradientSource] = [memory(seed, lambda step, layer, s=seed: [0.2, 1.0, 5.0][s % 3]) for seed in range(6)]
    assert against(wide, memory(20, lambda step, layer: 5.0)).violations == ()
    assert against(HEALTHY[:6], memory(20, lambda step, layer: 5.0)).violations != ()


def test_layers_that_are_gone_new_or_of_another_size_are_named() -> None:
    fewer = against(HEALTHY[:1], memory(20, layers=4))
    assert [(r.where, r.message) for r in fewer.violations[:1]] == [("l4", "l4 is gone: the baseline has it.")]
    more = against(HEALTHY[:1], memory(20, layers=7))
    assert [(r.where, r.message) for r in more.violations] == [("l6", "l6 is new: the baseline does not have it.")]
    resized = [{**step, "l0.bias": np.ones(3) * 1e-3} for step in training(20)]
    (reading,) = against(HEALTHY[:1], InMemorySource(resized)).violations[:1]
    assert reading.message == "l0 has 67 parameters; in the baseline 64."


def test_another_model_altogether_is_said_once() -> None:
    other = [{f"other.{name}": array for name, array in step.items()} for step in training(1)]
    (reading,) = against(HEALTHY[:1], InMemorySource(other)).violations
    assert "another model" in reading.message


def test_another_model_is_no_run_of_another_length() -> None:
    other = InMemorySource([{f"other{name}": array for name, array in step.items()} for step in training(1, steps=40)])
    (reading,) = against(HEALTHY[:1], other).violations
    assert "another model" in reading.message


def test_a_layer_that_is_called_by_a_number_is_said_to_be_a_layer() -> None:
    steps = [{f"{name[1:]}": array for name, array in step.items()} for step in training(1)]
    fewer = [{name: array for name, array in step.items() if not name.startswith("3.")} for step in steps]
    (reading,) = against([InMemorySource(steps)], InMemorySource(fewer)).violations
    assert reading.message == "layer 3 is gone: the baseline has it."


def test_a_layer_that_fell_silent_or_is_nan_is_named() -> None:
    silent = against(HEALTHY[:1], memory(20, lambda step, layer: float(layer != 3)))
    assert silent.violations[0].message == ("the gradient of l3 is zero in 100 % of the steps; in the baseline in 0 %.")
    nan = against(HEALTHY[:1], memory(20, lambda step, layer: np.nan if layer == 3 else 1.0))
    assert nan.violations[0].where == "l3"
    assert "no finite gradient" in nan.violations[0].message


def recorded(seed: int, update: float = 0.01, **options: Any) -> RecordedSource:
    names = [f"l{k}.weight" for k in range(LAYERS)]
    return RecordedSource(training(seed), updates=dict.fromkeys(names, (1.0, update)), **options)


def test_a_learning_rate_shows_in_the_updates() -> None:
    verdict = against([recorded(0)], recorded(1, 0.03))
    assert verdict.violations[0].where == "most layers"
    assert "update" in verdict.violations[0].message


def test_another_max_norm_and_another_clip_rate_are_said() -> None:
    verdict = against([recorded(0, limits=0.5)], recorded(1, limits=50.0))
    assert verdict.violations[0].message == ("max_norm is 50; in the baseline it is 0.5.")
    assert "clips" in verdict.violations[1].message
    assert against([recorded(0, limits=0.5)], recorded(1, limits=0.5)).violations == ()


def norms(seed: int, factor: float = 1.0) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    return factor * np.exp(0.2 * generator.standard_normal((100, 1)))


def test_a_log_of_norms_is_compared_by_its_series() -> None:
    def log(seed: int, factor: float = 1.0) -> NormSource:
        source = NormSource(norms(seed, factor))
        source.info = replace(source.info, kind="norm-log")
        return source

    assert against([log(0)], log(1)).violations == ()
    assert [reading.where for reading in against([log(0)], log(1, 10.0)).violations] == ["t0.w"]
    assert against(HEALTHY[:1], log(1)).skipped == "a log of norms and a source with layers have no series in common"


def test_what_cannot_be_compared_is_skipped_with_a_reason() -> None:
    alone = DRIFT.judge(Evidence.gather(HEALTHY[0]), Limits(DRIFT.defaults()))
    assert alone.skipped == "there is no baseline to compare with (--baseline FILE)"
    assert "runs of about as many steps are needed: this run has 90, the baseline 200" in str(
        against(HEALTHY[:1], memory(1, steps=90)).skipped
    )
    assert "at least 16 steps are needed" in str(against([memory(0, steps=8)], memory(1, steps=8)).skipped)
    checkpoint = replace(Evidence.gather(HEALTHY[0]), table=None, baseline=Baseline("b", (run(HEALTHY[0]),)))
    assert "one moment" in str(DRIFT.judge(checkpoint, Limits(DRIFT.defaults())).skipped)


@pytest.mark.parametrize("logarithm", [9e3, -9e3])
def test_a_baseline_of_numbers_that_no_run_has_is_judged_all_the_same(logarithm: float) -> None:
    made_up = run(memory(1))
    courses = {"norm": Course((logarithm,) * 64, 64.0)}
    layers = {name: replace(layer, courses=courses) for name, layer in made_up.layers.items()}
    evidence = replace(Evidence.gather(memory(0)), baseline=Baseline("b.json", (replace(made_up, layers=layers),)))
    verdict = DRIFT.judge(evidence, Limits(DRIFT.defaults()))
    assert len(verdict.violations) == LAYERS + 1
    assert all(reading.value is not None and reading.value > 1e100 for reading in verdict.violations)
