"""A run replayed: which steps count, how it is divided, and what would clip how much."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory_source import InMemorySource, NormSource, flatten

import gradscope.simulation
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource, SourceInfo
from gradscope.results import Simulation
from gradscope.simulation import simulate


def run_of(norms: list[float] | np.ndarray) -> NormSource:
    return NormSource(np.asarray(norms, dtype=np.float64)[:, None])


def falling_run(seed: int = 0, steps: int = 2000) -> np.ndarray:
    size = np.where(np.arange(steps) < steps * 6 // 10, 20.0, 1.0)
    return size * np.exp(0.5 * np.random.default_rng(seed).normal(size=steps))


def test_rates_are_shares_of_the_finite_steps() -> None:
    result = simulate(run_of([1, 2, math.nan, 3, 4]), ["norm:2"])
    assert (result.steps, result.nonfinite_steps) == (5, 1)
    assert result.results[0].clipped_steps == 2
    assert result.results[0].clip_rate == 0.5
    assert result.results[0].scale.min == 0.5
    assert (result.norm.min, result.norm.max) == (1.0, 4.0)


def test_faulty_tensors_are_named_with_the_last_finite_ones_before_them() -> None:
    clean = {name: np.array([1.0]) for name in ("a.w", "b.w", "c.w", "d.w")}
    broken = {**clean, "b.w": np.array([np.nan]), "d.w": np.array([-np.inf])}
    result = simulate(InMemorySource([clean, broken, clean]), ["norm:1", "value:0.5"])
    assert len(result.nonfinite) == 1
    fault = result.nonfinite[0]
    assert (fault.step, fault.label) == (1, "step 1")
    assert fault.tensors == ("b.w", "d.w")
    assert fault.last_finite_before == ("a.w", "c.w")
    assert [policy.clip_rate for policy in result.results] == [1.0, 1.0]


def test_a_run_without_a_finite_step_is_still_a_result() -> None:
    result = simulate(run_of([math.nan, math.nan]), ["norm:1", "zclip:2", "autoclip:5", "skip:1"], sweep=True)
    assert result.nonfinite_steps == 2
    assert math.isnan(result.norm.p50)
    assert math.isnan(float(result.suggested_max_norm["0.10"]))  # type: ignore[arg-type]
    for policy in result.results:
        assert math.isnan(policy.clip_rate)
        assert (policy.clipped_steps, policy.clip_rate_ci95, policy.phases) == (0, None, ())
        assert math.isnan(policy.layers[0].scale)


def test_squares_beyond_float64_are_left_out_and_named() -> None:
    steps = [{"a": np.array([1.0]), "b": np.array([size])} for size in (1.0, 1e200)]
    result = simulate(InMemorySource(steps), ["norm:1"])
    assert [fault.tensors for fault in result.nonfinite] == [("b",)]
    assert result.norm.max == pytest.approx(math.sqrt(2))


def test_a_single_step() -> None:
    result = simulate(run_of([13.0]), ["norm:6.5"], sweep=True)
    policy = result.results[0]
    assert policy.scale.min == policy.scale.p50 == policy.scale.max == 0.5
    assert (policy.clip_rate, policy.clip_rate_ci95, policy.effective_steps) == (1.0, None, 1.0)
    assert [phase.steps for phase in policy.phases] == [(0, 0)]
    assert policy.recent.steps == (0, 0)
    assert result.suggested_max_norm == {"steps": (0, 0), "0.50": 13.0, "0.10": 13.0, "0.05": 13.0, "0.01": 13.0}


def test_steps_are_chosen_by_slice_and_keep_their_index() -> None:
    result = simulate(run_of([1.0, 2.0, 3.0, 4.0, 5.0]), ["norm:3.5"], steps="-3:")
    assert result.steps == 3
    assert (result.norm.min, result.norm.max) == (3.0, 5.0)
    assert result.results[0].clip_rate == pytest.approx(2 / 3)
    assert result.results[0].recent.steps == (2, 4)
    assert result.suggested_max_norm_overall["steps"] == (2, 4)


def test_groups_can_be_redefined() -> None:
    norms = np.array([[3.0, 4.0, 12.0], [3.0, 4.0, 5.0]])
    source = NormSource(norms)
    one = simulate(source, ["norm:6"]).results[0]
    assert one.clip_rate == 1.0
    several = simulate(source, ["norm:6"], groups={"critic": "t2.*"})
    assert [group.name for group in several.results[0].groups] == ["rest", "critic"]
    assert [group.clip_rate for group in several.results[0].groups] == [0.0, 0.5]
    assert several.results[0].clip_rate == 0.5
    assert several.norm.max == 13.0
    # The largest clip group decides what max_norm clips.
    assert several.suggested_max_norm["0.50"] == 5.0
    with pytest.raises(GradscopeError, match="matches no tensor"):
        simulate(source, ["norm:6"], groups={"actor": "pi.*"})


def test_a_drop_divides_the_run_into_phases() -> None:
    result = simulate(run_of(falling_run()), ["norm:2"]).results[0]
    assert len(result.phases) == 2
    first, second = result.phases
    assert abs(second.steps[0] - 1200) <= 40
    assert first.steps == (0, second.steps[0] - 1)
    assert second.steps[1] == 1999
    assert first.clip_rate == 1.0
    assert second.clip_rate < 0.2
    assert first.norm.p50 == pytest.approx(20, rel=0.1)


def test_phases_count_steps_that_are_not_finite() -> None:
    norms = falling_run()
    norms[[0, 5, 1199, 1200, 1999]] = np.nan
    phases = simulate(run_of(norms), ["norm:2"]).results[0].phases
    assert phases[0].steps[0] == 0
    assert phases[-1].steps[1] == 1999
    assert phases[0].steps[1] + 1 == phases[1].steps[0]


@pytest.mark.parametrize(
    ("steps", "recent"), [(5, 5), (19, 19), (20, 20), (30, 20), (400, 200), (2000, 1000), (3000, 1000)]
)
def test_the_recent_part(steps: int, recent: int) -> None:
    norms = falling_run(steps=steps)
    result = simulate(run_of(norms), ["norm:1"])
    assert result.results[0].recent.steps == (steps - recent, steps - 1)
    assert result.results[0].recent.clip_rate == pytest.approx((norms[-recent:] > 1).mean())
    assert result.suggested_max_norm["steps"] == (steps - recent, steps - 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 100) | st.sampled_from([1.0, 2.0]), min_size=1, max_size=120),
    st.sampled_from([("0.50", 50), ("0.10", 10), ("0.05", 5), ("0.01", 1)]),
)
def test_a_suggestion_clips_no_more_than_it_says_and_nothing_smaller_does(
    norms: list[float], wanted: tuple[str, int]
) -> None:
    key, percent = wanted
    series = np.array(norms)
    result = simulate(run_of(series), [])
    suggested = result.suggested_max_norm_overall[key]
    assert suggested in series
    assert (series > suggested).sum() * 100 <= percent * len(series)
    smaller = series[series < suggested]
    assert all((series > lower).sum() * 100 > percent * len(series) for lower in smaller)


def test_the_interval_allows_for_correlation() -> None:
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.normal(size=100), 20)
    result = simulate(run_of(np.exp(shared)), ["norm:1"]).results[0]
    assert 30 < result.effective_steps < 300
    assert result.clip_rate_ci95 is not None
    low, high = result.clip_rate_ci95
    assert low < result.clip_rate < high
    assert high - low > 0.1


def test_the_sweep_holds_what_was_given_and_falls() -> None:
    norms = falling_run()
    rows = simulate(run_of(norms), ["norm:0.77", "joint-norm:123"], sweep=True).sweep
    thresholds = [row.max_norm for row in rows]
    assert thresholds == sorted(set(thresholds))
    assert 0.77 in thresholds
    assert 123 not in thresholds
    assert 10 <= len(rows) <= 15
    for row in rows:
        assert row.clip_rate == pytest.approx((norms > row.max_norm).mean(), abs=1e-12)
        assert row.recent_clip_rate == pytest.approx((norms[-1000:] > row.max_norm).mean(), abs=1e-12)
        assert row.scale == pytest.approx(np.minimum(1, row.max_norm / norms).mean())
    assert simulate(run_of(norms), ["norm:1"]).sweep == ()


def test_layer_figures_are_means_over_the_steps() -> None:
    rng = np.random.default_rng(1)
    steps = [{"a.w": rng.normal(size=(3, 2)), "b.w": rng.normal(size=4)} for _ in range(30)]
    result = simulate(InMemorySource(steps), ["value:0.8", "per-layer-norm:1.5"])
    value, norm = result.results
    for name, by_value, by_norm in zip(("a.w", "b.w"), value.layers, norm.layers, strict=True):
        over = [np.abs(step[name]) > 0.8 for step in steps]
        sizes = np.array([np.linalg.norm(step[name]) for step in steps])
        assert by_value.clip_rate == pytest.approx(np.mean([mask.any() for mask in over]))
        assert by_value.clipped_elements == pytest.approx(sum(mask.sum() for mask in over), abs=15)
        assert by_norm.clip_rate == pytest.approx((sizes > 1.5).mean())
        assert by_norm.scale == pytest.approx(np.minimum(1, 1.5 / sizes).mean())
    assert value.clipped_elements == sum(layer.clipped_elements for layer in value.layers)
    assert [layer.name for layer in value.layers] == ["a", "b"]


def test_long_runs_are_taken_in_stretches_with_the_same_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = np.exp(np.random.default_rng(3).normal(size=(50, 3)))
    policies = ["norm:1.5", "per-tensor-norm:1", "autoclip:20"]
    whole = simulate(NormSource(norms), policies)
    monkeypatch.setattr("gradscope.clipping.policy.STRETCH_ELEMENTS", 20)
    parts = simulate(NormSource(norms), policies)
    for one, other in zip(whole.results, parts.results, strict=True):
        assert one.scale == other.scale
        assert one.direction_change_deg == other.direction_change_deg
        for layer, same in zip(one.layers, other.layers, strict=True):
            assert layer.scale == pytest.approx(same.scale, rel=1e-13)


def test_each_step_is_read_once_and_whatever_the_policies() -> None:
    class Counting(InMemorySource):
        reads = 0

        def read_steps(self, steps: range, progress: object = None):  # type: ignore[no-untyped-def]
            Counting.reads += 1
            return super().read_steps(steps, None)

    source = Counting([{"w": np.array([1.0, 2.0])}] * 3, weights={"w": np.array([1.0, 2.0])})
    simulate(source, ["norm:1", "value:1", "agc:0.1", "value:1", "autoclip:5"], sweep=True)
    assert Counting.reads == 1


def test_a_bare_checkpoint_is_refused_with_the_way_out() -> None:
    class Checkpoint(GradientSource):
        def read_steps(self, steps: range, progress: object = None):  # type: ignore[no-untyped-def]
            raise AssertionError("nothing to read")

    with pytest.raises(GradscopeError) as refused:
        simulate(Checkpoint(SourceInfo("ppo.zip", "checkpoint", "SB3 PPO", 0)), ["norm:1"])
    assert refused.value.what == "ppo.zip"
    assert "holds no gradients" in refused.value.why
    assert refused.value.hint is not None
    assert "--batch" in refused.value.hint
    assert "gradscope record" in refused.value.hint


def test_clipping_by_value_needs_more_than_norms() -> None:
    with pytest.raises(GradscopeError, match="holds norms only"):
        simulate(run_of([1.0, 2.0]), ["value:0.1"])


def test_a_log_of_norms_has_no_layers_to_clip() -> None:
    source = run_of([1.0, 2.0])
    source.info = SourceInfo("norms.csv", "norm-log", "CSV", 2)
    for policy in ("per-layer-norm:1", "block-rms:1", "value:1", "agc:0.1"):
        with pytest.raises(GradscopeError, match="log of norms"):
            simulate(source, [policy])
    assert simulate(source, ["norm:1", "autoclip:50"]).results[0].clip_rate == 0.5


@pytest.mark.parametrize(
    ("options", "what"),
    [({"convention": "keras"}, "--convention keras"), ({"steps": "7:"}, "--steps 7:"), ({"steps": "x"}, "--steps x")],
)
def test_unusable_options_are_refused(options: dict[str, str], what: str) -> None:
    with pytest.raises(GradscopeError) as refused:
        simulate(run_of([1.0, 2.0]), ["norm:1"], **options)  # type: ignore[arg-type]
    assert refused.value.what == what


def test_the_histogram_counts_every_finite_step_once() -> None:
    norms = falling_run()
    norms[:3] = [np.nan, 0.0, 0.0]
    histogram = simulate(run_of(norms), []).norm_histogram
    assert sum(histogram.counts) == len(norms) - 1
    assert len(histogram.edges) == len(histogram.counts) + 1 <= 25
    assert histogram.counts[0] >= 2


def test_policies_may_be_objects_and_repeat() -> None:
    from gradscope.clipping import parse_policy

    result: Simulation = simulate(run_of([1.0, 4.0]), [parse_policy("norm:2"), "norm:2"])
    assert result.results[0] == result.results[1]
    assert result.schema == gradscope.simulation.SCHEMA


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_joint_norm_is_that_of_all_elements(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = [
        {f"l{i}.w": (rng.normal(size=5) * 10.0 ** rng.uniform(-6, 6)).astype(np.float32) for i in range(4)}
        for _ in range(3)
    ]
    result = simulate(InMemorySource(steps, groups={"a": ["l0.w", "l2.w"], "b": ["l1.w", "l3.w"]}), [])
    norms = [np.linalg.norm(flatten(list(step.values()))) for step in steps]
    assert result.norm.max == pytest.approx(max(norms), rel=1e-12)
    assert result.norm.min == pytest.approx(min(norms), rel=1e-12)
